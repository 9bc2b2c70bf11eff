"""What a step of a text vector environment is given: tokens, and the policy's log-probabilities that the KL needs.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from textrl_gym import kl
from textrl_gym.bounds import shown
from textrl_gym.mdp.spaces import MDPSettings, to_tensor
from textrl_gym.mdp.transition import BatchArray, State

Actions = Mapping[str, Any] | Tensor | np.ndarray | Sequence[int]
"""B tokens, or {"token": B tokens, "logprob": log pi of them} where the KL penalty asks for it."""

# torch's dtypes know no "kind" as numpy's do.
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def parse_actions(env: MDPSettings, actions: Actions) -> tuple[BatchArray, Tensor | None]:
    """Tokens [B], integers (numpy where the environment's state is), and the log-probabilities that came with them.

    Raises:
        ValueError: naming what is missing, of a wrong shape or out of range.
    """
    logprob = None
    token: ArrayLike | Tensor
    if isinstance(actions, Mapping):
        if "token" not in actions or (env.wants_logprob and "logprob" not in actions):
            raise ValueError(f"an action needs the keys 'token' and 'logprob', got {shown(list(actions))}")
        if env.wants_logprob:
            shape = (env.num_envs, env.vocab_size) if env.kl_estimator == "full" else (env.num_envs,)
            logprob = parse_logprob("logprob", actions["logprob"], shape, env.device)
        token = actions["token"]
    elif env.wants_logprob:
        raise ValueError(
            f"kl_coef={env.kl_coef} needs the policy's log-probability: send actions as "
            "{'token': a, 'logprob': log pi(a|s)}, or make the environment with policy_logprob=fn"
        )
    else:
        token = actions
    try:
        if env.device.type == "cpu":  # the state is numpy's there
            action_B: Any = token.numpy() if isinstance(token, Tensor) else np.asarray(token)
            integers = action_B.dtype.kind in "iu"
        else:
            action_B = to_tensor(token, env.device)
            integers = action_B.dtype in _INTEGERS
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # lists of several lengths, say
        raise ValueError(f"actions must be {env.num_envs} integers, got {shown(token)}") from error
    if action_B.shape != (env.num_envs,) or not integers:
        raise ValueError(f"actions must be {env.num_envs} integers, got {shown(token)}")
    if action_B.min() < 0 or action_B.max() >= env.vocab_size:
        raise ValueError(f"actions must lie in [0, {env.vocab_size}), got {shown(action_B.tolist())}")
    return action_B, logprob


ABOVE_0 = 1e-3
"""What rounding may add to a log-probability of 0, and 1 of a distribution's sum be off in bfloat16, as logarithms."""
SUM_OFF = 0.05


def parse_logprob(what: str, values: ArrayLike | Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Log-probabilities as float32, of single tokens ([B]) or of whole distributions ([B, V]).

    Raises:
        ValueError: they are of another shape or kind, not finite, or no logarithms of probabilities.
    """
    try:
        given = to_tensor(values, device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{what} must be numbers of shape {shape}, got {shown(values)}") from error
    # True and 1j would pass for 1.0: a tensor turns them into numbers with a warning at most.
    if given.dtype == torch.bool or given.is_complex():
        raise ValueError(f"{what} must be numbers of shape {shape}, got {given.dtype} in {shown(values)}")
    logprob = given.float()
    if tuple(logprob.shape) != shape or not bool(torch.isfinite(logprob).all()):
        raise ValueError(f"{what} must be finite numbers of shape {shape}, got {shown(values)}")
    if bool((logprob > ABOVE_0).any()):
        raise ValueError(f"{what} must be logarithms of probabilities, at most 0, got {float(logprob.max()):.6g}")
    if len(shape) == 2 and bool((logprob.logsumexp(-1).abs() > SUM_OFF).any()):
        totals_B = logprob.exp().sum(-1)
        worst = float(totals_B[(totals_B - 1).abs().argmax()])
        raise ValueError(f"{what} must be the logarithms of distributions, which add up to 1, got a sum of {worst:.6g}")
    return logprob


def penalty(
    env: MDPSettings,
    observe: Callable[[], dict[str, Any]],
    state: State,
    actions: Actions,
    action_B: BatchArray,
    logprob: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The KL estimate of each row's action and the reference's log-probability of it, both [B] on the device.

    Args:
        observe: gives the observation before the action, for env.policy_logprob.
        actions: as the step was given them.
        logprob: what came with the actions ([B]; for "full" [B, V]); None asks env.policy_logprob.

    Raises:
        ValueError: env.policy_logprob returns a wrong shape or numbers that are not finite.
    """
    assert env.reference is not None, "with a penalty an environment has a reference"
    ref_logp_BV = env.reference.next_logprobs(*(to_tensor(x, env.device) for x in (state.token_BL, state.mask_BL)))
    ref_logp_B = ref_logp_BV.gather(1, to_tensor(action_B, env.device).long()[:, None]).squeeze(1)
    ref = ref_logp_BV if env.kl_estimator == "full" else ref_logp_B
    if logprob is None:
        assert env.policy_logprob is not None
        # The tokens as they were given: a user's function may hold them in a type of its own.
        token = actions["token"] if isinstance(actions, Mapping) else actions
        given = env.policy_logprob(observe(), token)
        logprob = parse_logprob("what policy_logprob returns", given, tuple(ref.shape), env.device)
    # Detached: a reward is a number, and a graph kept here would keep every forward pass of the episode.
    return kl.estimate(env.kl_estimator, logprob.detach(), ref), ref_logp_B
