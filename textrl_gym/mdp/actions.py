"""What a step of a text vector environment is given: tokens, and the policy's log-probabilities that the KL needs.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_gym import kl
from textrl_gym.mdp.transition import Array, State

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def to_tensor(values: Any, device: torch.device) -> Tensor:
    """The values on the device; arrays, which may be read-only, are copied."""
    if isinstance(values, Tensor):
        return values.to(device)
    return torch.tensor(np.asarray(values), device=device)


def parse(env: Any, actions: Any) -> tuple[Array, Tensor | None]:
    """Tokens [B], integers (numpy where the environment's state is), and the log-probabilities that came with them.

    Raises:
        ValueError: naming what is missing, of a wrong shape or out of range.
    """
    logprob = None
    if isinstance(actions, Mapping):
        if "token" not in actions or (env.wants_logprob and "logprob" not in actions):
            raise ValueError(f"an action needs the keys 'token' and 'logprob', got {sorted(actions)}")
        if env.wants_logprob:
            logprob = to_tensor(actions["logprob"], env.device).float()
            shape = (env.num_envs, env.vocab_size) if env.kl_estimator == "full" else (env.num_envs,)
            if tuple(logprob.shape) != shape or not bool(torch.isfinite(logprob).all()):
                raise ValueError(f"logprob must be finite numbers of shape {shape}, got {actions['logprob']!r}")
        actions = actions["token"]
    elif env.wants_logprob:
        raise ValueError(
            f"kl_coef={env.kl_coef} needs the policy's log-probability: send actions as "
            "{'token': a, 'logprob': log pi(a|s)}, or make the environment with policy_logprob=fn"
        )
    if env.device.type == "cpu":
        action_B: Any = actions.numpy() if isinstance(actions, Tensor) else np.asarray(actions)
        integers = action_B.dtype.kind in "iu"
    else:
        action_B = to_tensor(actions, env.device)
        integers = action_B.dtype in _INTEGERS
    if action_B.shape != (env.num_envs,) or not integers:
        raise ValueError(f"actions must be {env.num_envs} integers, got {actions!r}")
    if action_B.min() < 0 or action_B.max() >= env.vocab_size:
        raise ValueError(f"actions must lie in [0, {env.vocab_size}), got {action_B.tolist()}")
    return action_B, logprob


def penalty(
    env: Any, observe: Callable[[], Any], state: State, actions: Any, action_B: Array, logprob: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The KL estimate of each row's action and the reference's log-probability of it, both [B] on the device.

    Args:
        observe: gives the observation before the action, for env.policy_logprob.
        actions: as the step was given them.
        logprob: what came with the actions ([B]; for "full" [B, V]); None asks env.policy_logprob.

    Raises:
        ValueError: env.policy_logprob returns a wrong shape or numbers that are not finite.
    """
    ref_logp_BV = env.reference.next_logprobs(*(to_tensor(x, env.device) for x in (state.token_BL, state.mask_BL)))
    ref_logp_B = ref_logp_BV.gather(1, to_tensor(action_B, env.device).long()[:, None]).squeeze(1)
    ref = ref_logp_BV if env.kl_estimator == "full" else ref_logp_B
    if logprob is None:
        token = actions["token"] if isinstance(actions, Mapping) else actions
        logprob = torch.as_tensor(env.policy_logprob(observe(), token), device=env.device).float()
        if logprob.shape != ref.shape or not bool(torch.isfinite(logprob).all()):
            raise ValueError(
                f"policy_logprob must return finite numbers of shape {tuple(ref.shape)}, got {logprob} of shape "
                f"{tuple(logprob.shape)}"
            )
    return kl.estimate(env.kl_estimator, logprob.detach(), ref), ref_logp_B
