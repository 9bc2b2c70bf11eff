"""The token MDP as a Gymnasium environment: TextVectorEnv with one row, without the batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, SupportsFloat

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Ge
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from textrl_gym.bounds import check, shown
from textrl_gym.mdp.render import RENDER_FPS, RENDER_MODES
from textrl_gym.mdp.vector_env import (
    TextVectorEnv as TextVectorEnv,  # "textrl_gym.mdp.text_env:TextVectorEnv" is its registered name
)

Action = int | np.integer | np.ndarray | Tensor | Mapping[str, Any]
"""A token, or {"token": a, "logprob": log pi of it} where the KL penalty asks for it."""

LEFT_EPISODES = 5
"""Episodes in a row that are left unfinished before it is told: checkers of environments leave some on purpose."""


class TextEnv(gym.Env[Any, Any]):
    """One token MDP: TextVectorEnv with one row, without the batch dimension. Takes the same keyword arguments.

    Raises:
        ValueError: num_envs, autoreset_mode or a group_size other than 1, which only a vector environment can have.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": RENDER_FPS}

    def __init__(self, **kwargs: Any) -> None:
        for name in ("num_envs", "autoreset_mode"):
            if name in kwargs:
                raise ValueError(f"{name} is a setting of vector environments: use gymnasium.make_vec")
        if kwargs.get("group_size", 1) != 1:
            raise ValueError(f"group_size={kwargs['group_size']} needs a vector environment: use gymnasium.make_vec")
        if callable(kwargs.get("policy_logprob")):
            kwargs["policy_logprob"] = _Rowwise(kwargs["policy_logprob"])
        self.vector = TextVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **kwargs)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.render_mode = self.vector.render_mode
        self._taken = 0  # tokens of the episode that goes on
        self._left_after: list[int] = []  # tokens of the episodes that were left before their end

    def __getattr__(self, name: str) -> Any:
        # tokenizer, task, reward_model, reference, ...: what the row's MDP carries. Not num_envs, by which TorchRL's
        # GymWrapper tells a vector environment; "vector" itself is asked for while unpickling.
        if name.startswith("_") or name in ("vector", "num_envs"):
            raise AttributeError(name)
        return getattr(self.vector, name)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode. options={"prompt_indices": [i]} fixes the prompt."""
        check("seed", seed, Annotated[int | None, Ge(0)])
        super().reset(seed=None if seed is None else int(seed))
        self._tell_left_episodes()
        # Gymnasium's own generator draws the prompts, so that seed() and np_random mean what they mean everywhere.
        self.vector.streams_of_prompts.rngs = [self.np_random]
        observation, infos = self.vector.reset(options=options)
        return _first(observation), _first_info(infos)

    def step(
        self, action: int | np.integer | np.ndarray | Tensor | Mapping[str, Any]
    ) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Append one token; action is an int, or {"token": a, "logprob": log pi} where the KL penalty asks for it."""
        if isinstance(action, Mapping):
            batched: Any = {name: _batched(name, value) for name, value in action.items()}
        else:
            batched = _batched("action", action)
        if self.vector.over_B.any():  # the vector environment would speak of rows
            raise ValueError("the episode has ended: call reset()")
        observation, reward, terminated, truncated, infos = self.vector.step(batched)
        self._taken = 0 if terminated[0] or truncated[0] else self._taken + 1
        return (
            _first(observation),
            float(reward[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            _first_info(infos),
        )

    def _tell_left_episodes(self) -> None:
        """Warn, once, of episodes that are all left after as many tokens: what a TimeLimit below the budget does."""
        if self._taken > 1:  # checkers of environments take a step and reset
            self._left_after.append(self._taken)
        else:
            self._left_after = []
        self._taken = 0
        if len(self._left_after) == LEFT_EPISODES and len(set(self._left_after)) == 1:
            gym.logger.warn(
                f"{LEFT_EPISODES} episodes in a row were left after {self._left_after[0]} tokens, before their end: "
                "none has a score. A TimeLimit below the token budget does that (max_episode_steps in gym.make); "
                f"give max_new_tokens={self._left_after[0]} instead, and the text is scored where it is cut"
            )

    def render(self) -> str | NDArray[np.uint8] | None:
        """The episode's text in mode "ansi", a picture of it in "rgb_array"; mode "human" prints as it goes."""
        frames = self.vector.render()
        return frames[0] if frames else None


def _batched(name: str, value: Tensor | ArrayLike) -> Tensor | np.ndarray:
    """A value of the one row as a batch of one."""
    try:
        return value[None] if isinstance(value, Tensor) else np.asarray(value)[None]
    except (TypeError, ValueError) as error:  # lists of several lengths
        raise ValueError(f"{name} of an action must be a number or an array, got {shown(value)}") from error


def vector_env(env: object, **settings: Any) -> TextVectorEnv:
    """The TextVectorEnv under wrappers that only watch; a TextEnv's own one-row one; of an id, one made by settings.

    Raises:
        ValueError: it is not a text environment, or a wrapper around it would be passed by.
    """
    if isinstance(env, str):
        env = _made(env, settings)
    bare = getattr(env, "unwrapped", None)  # by getattr: what is no environment at all gets the error below
    if not isinstance(bare, TextEnv | TextVectorEnv):
        raise ValueError(f"{shown(env)} is not a text environment (TextEnv or TextVectorEnv)")
    mdp = bare.vector if isinstance(bare, TextEnv) else bare
    _check_wrappers(env, mdp.max_new_tokens)
    return mdp


WATCH_ONLY = {
    "OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo", "RenderCollection",
    "HumanRendering", "Autoreset", "Monitor", "NumpyToTorch", "ArrayConversion", "JaxToTorch",
}  # fmt: skip
"""Wrappers of Gymnasium and Stable-Baselines3 that change no prompt, no action's effect and no reward."""


def _check_wrappers(env: Any, most_steps: int) -> None:
    """Hold that nothing which a user has wrapped around an environment is lost, where it is not stepped as one."""
    while isinstance(env, gym.Wrapper | gym.vector.VectorWrapper):
        name = type(env).__name__
        limit = getattr(env, "_max_episode_steps", None) if name == "TimeLimit" else None
        if limit is not None and limit < most_steps:
            raise ValueError(
                f"TimeLimit of {limit} steps is not applied here: make the environment with max_new_tokens"
            )
        if limit is None and name not in WATCH_ONLY:
            raise ValueError(
                f"the wrapper {name} would not be applied: agents, collect and evaluate play the environment under it. "
                "Give a reward of your own as reward=, a Task of your own as task=, or env.unwrapped"
            )
        env = env.env


def _made(env_id: str, settings: Mapping[str, Any]) -> VectorEnv[Any, Any, Any]:
    """The vector environment of an id."""
    try:
        return gym.make_vec(env_id, **settings)
    except (TypeError, gym.error.DependencyNotInstalled) as error:
        # One of the user's own may still be a text environment, with another entry point.
        if "task" in gym.spec(env_id).kwargs:
            raise
        raise ValueError(f"{env_id!r} is not a text environment (TextEnv or TextVectorEnv): {error}") from error


class _Rowwise:
    """A single environment's policy_logprob as a vector environment's: asked row by row."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function

    def __call__(self, observation: dict[str, Any], action: Tensor | np.ndarray) -> Tensor:
        rows = [
            torch.as_tensor(self.function({k: v[b] for k, v in observation.items()}, action[b]))
            for b in range(len(action))
        ]
        return torch.stack(rows)


def _first(observation: dict[str, Any]) -> dict[str, Any]:
    return {k: v[0] for k, v in observation.items()}


def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
    first = {}
    for key, value in infos.items():
        if not key.startswith("_") and infos["_" + key][0]:
            first[key] = value[0].item() if hasattr(value[0], "item") else value[0]
    return first
