"""The settings of a text environment: what is allowed, and the spaces that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from textrl_gym import kl
from textrl_gym.mdp.render import RENDER_MODES

if TYPE_CHECKING:
    from textrl_gym.mdp.task import Task
    from textrl_gym.policy.policy import Policy

ARRAYS = ("numpy", "torch")


class MDPSettings(Protocol):
    """What the parts of TextVectorEnv read of it."""

    num_envs: int
    group_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    vocab_size: int
    kl_coef: float
    kl_estimator: str
    missing_eos_penalty: float
    policy_logprob: Callable[[Any, Any], Any] | None
    stop: tuple[str, ...]
    array: str
    render_mode: str | None
    device: torch.device
    task: Task

    @property
    def wants_logprob(self) -> bool:
        """Whether the policy's log-probability must come with the action."""
        ...

    @property
    def reference(self) -> Policy | None:
        """The frozen policy that the KL penalty is measured to."""
        ...


def check_settings(env: MDPSettings, autoreset_mode: AutoresetMode | str) -> AutoresetMode:
    """Raise ValueError naming a setting with a value that is not allowed; return the autoreset mode."""
    for name in ("num_envs", "group_size", "max_prompt_tokens", "max_new_tokens"):
        value = getattr(env, name)
        # bool is an int in Python: group_size=True would pass for 1.
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if env.num_envs % env.group_size:
        raise ValueError(f"num_envs={env.num_envs} is no multiple of group_size={env.group_size}")
    for name in ("kl_coef", "missing_eos_penalty"):
        value = getattr(env, name)
        if not isinstance(value, int | float | np.number) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    kl.check_estimator(env.kl_estimator)
    if env.array not in ARRAYS:
        raise ValueError(f"array must be one of {', '.join(ARRAYS)}, got {env.array!r}")
    if env.render_mode is not None and env.render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode must be None or one of {', '.join(RENDER_MODES)}, got {env.render_mode!r}")
    if any(not isinstance(s, str) or not s for s in env.stop):
        raise ValueError(f"stop must hold texts that are not empty, got {env.stop!r}")
    logprob: object = env.policy_logprob  # whatever the user gave
    if logprob is not None and not callable(logprob):
        raise ValueError(f"policy_logprob must be fn(observation, action) or None, got {logprob!r}")
    # By name, value or member: gymnasium.make_vec passes what its caller wrote, a text on the command line.
    modes = {name: mode for mode in AutoresetMode for name in (mode.name, mode.value, mode)}
    if autoreset_mode not in modes:
        allowed = ", ".join(mode.name for mode in AutoresetMode)
        raise ValueError(f"autoreset_mode must be one of {allowed}, got {autoreset_mode!r}")
    return modes[autoreset_mode]


def spaces(env: MDPSettings) -> tuple[gym.spaces.Dict, gym.Space]:
    """The observation and action spaces of one row."""
    places, vocab = env.max_prompt_tokens + env.max_new_tokens, env.vocab_size
    observation: Any = gym.spaces.Dict(
        {
            "input_ids": gym.spaces.Box(0, vocab - 1, (places,), np.int64),
            "attention_mask": gym.spaces.Box(0, 1, (places,), np.int8),
        }
    )
    # What a policy that is shown nothing but spaces (Stable-Baselines3's) starts from.
    observation.task, observation.prompt_places = env.task, env.max_prompt_tokens
    token = gym.spaces.Discrete(vocab)
    if not env.wants_logprob:
        return observation, token
    # 0 is the log-probability of a certain token; there is no least one.
    shape = (vocab,) if env.kl_estimator == "full" else ()
    return observation, gym.spaces.Dict({"token": token, "logprob": gym.spaces.Box(-np.inf, 0.0, shape, np.float32)})
