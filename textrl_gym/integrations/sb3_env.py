"""TextVecEnv: a text vector environment as Stable-Baselines3's VecEnv, so that its n rows are one batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from textrl_gym.mdp.text_env import vector_env


class TextVecEnv(VecEnv):
    """The rows of a text vector environment as SB3 steps them.

    Rows that end begin anew at once; their infos hold `terminal_observation`, `TimeLimit.truncated`, `episode` (the
    return `r`, the length `l`, the time `t`) and all that the environment tells at the end. The reference of the KL
    penalty goes on from step to step by a StepCache.

    Args:
        envs: a text vector environment, `gymnasium.make_vec(...)`. One that resets by itself is made again without.

    Raises:
        ValueError: no text environment, or one that wants log-probabilities with its actions.
    """

    def __init__(self, envs: object) -> None:
        mdp = vector_env(envs)
        # SB3 wants the last observation in the infos and the first of the next episode in its place, in one step. So
        # rows are reset here, and not by the environment.
        if mdp.metadata["autoreset_mode"] is not AutoresetMode.DISABLED:
            mdp = mdp.remake(mdp.num_envs, autoreset_mode=AutoresetMode.DISABLED)
        if not isinstance(mdp.single_action_space, Discrete):
            raise ValueError(
                f"kl_coef={mdp.kl_coef} needs the policy's log-probability, which SB3 does not send with its actions: "
                "make the environment with policy_logprob=PolicyLogprob()"
            )
        self.mdp = mdp
        # Without it each step would compute the whole text under the reference: T passes over L places.
        if mdp.reference is not None and mdp.reference.steps is None:
            mdp.reference.steps = mdp.reference.trunk.steps()
        super().__init__(mdp.num_envs, mdp.single_observation_space, mdp.single_action_space)
        self._actions: np.ndarray | None = None
        self._return_B, self._length_B = np.zeros(mdp.num_envs), np.zeros(mdp.num_envs, np.int64)
        self._began = time.time()

    def reset(self) -> dict[str, np.ndarray]:
        """Begin an episode in every row, with the seeds and options that were set for it."""
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observation, infos = self.mdp.reset(seed=seeds, options=self._joined_options())
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _rows(infos, self.num_envs)
        self._return_B[:], self._length_B[:] = 0.0, 0
        return _numpy(observation)

    def _joined_options(self) -> dict[str, Any] | None:
        """Each row's {"prompt_indices": [i]}, as a single environment takes it, as one of all rows."""
        if not any(self._options):
            return None
        if not all(
            set(options) == {"prompt_indices"} and len(options["prompt_indices"]) == 1 for options in self._options
        ):
            raise ValueError(f"options must be {{'prompt_indices': [i]}} for every row, got {self._options}")
        return {"prompt_indices": [options["prompt_indices"][0] for options in self._options]}

    def restore(self, episodes: Sequence[Mapping[str, Any]], return_B: Sequence[float]) -> dict[str, np.ndarray]:
        """Go on with episodes that the environment told (`episodes()`), and their returns so far."""
        observation = self.mdp.restore_episodes(episodes)
        self._return_B[:] = return_B
        self._length_B[:] = [len(episode["tokens"]) for episode in episodes]
        return _numpy(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for step_wait."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, rewards, dones and a dict for each row."""
        assert self._actions is not None, "step_async comes first"
        observation, reward, terminated, truncated, infos = map(_numpy, self.mdp.step(self._actions))
        rows = _rows(infos, self.num_envs)
        done_B = terminated | truncated
        # Here and not by SB3's VecMonitor, which would hide the environment from SB3Agent.
        self._return_B += reward
        self._length_B += 1
        for b, info in enumerate(rows):
            # SB3 bootstraps from truncated rows by it; CausalLMPolicy answers with a V of 0 there.
            info["TimeLimit.truncated"] = bool(truncated[b])
        if done_B.any():
            for b in np.flatnonzero(done_B).tolist():
                # A copy: the row's places in `observation` are overwritten by its next episode.
                rows[b]["terminal_observation"] = {name: value[b].copy() for name, value in observation.items()}
                rows[b]["episode"] = {
                    "r": float(self._return_B[b]),
                    "l": int(self._length_B[b]),
                    "t": round(time.time() - self._began, 6),
                }
            self._return_B[done_B], self._length_B[done_B] = 0.0, 0
            observation, reset_infos = map(_numpy, self.mdp.reset(options={"reset_mask": done_B}))
            fresh = _rows(reset_infos, self.num_envs)
            for b in np.flatnonzero(done_B).tolist():
                self.reset_infos[b] = fresh[b]
        return observation, reward.astype(np.float32), done_B, rows

    def close(self) -> None:
        """Close the environment."""
        self.mdp.close()

    def render(self, mode: str | None = None) -> Any:
        """The text of every row, where the environment was made with render_mode="ansi"."""
        return self.mdp.render()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the environment, for each of the rows."""
        return [getattr(self.mdp, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: object, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the environment, which all rows share."""
        self._all(indices, "set_attr")
        setattr(self.mdp, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: object, indices: VecEnvIndices = None, **method_kwargs: object
    ) -> list[Any]:
        """Call a method of the environment once; all rows share it."""
        self._all(indices, "env_method")
        return [getattr(self.mdp, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """False for each of the rows."""
        return [False for _ in self._get_indices(indices)]

    def _all(self, indices: VecEnvIndices, what: str) -> None:
        if sorted(self._get_indices(indices)) != list(range(self.num_envs)):
            raise ValueError(f"{what}: the rows are one environment; indices must be None, got {indices!r}")


def _numpy(value: object) -> Any:
    """Arrays of tensors, also inside dicts."""
    if isinstance(value, dict):
        return {name: _numpy(item) for name, item in value.items()}
    return value.cpu().numpy() if hasattr(value, "cpu") else value


def _rows(infos: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A vector environment's infos as a dict for each row, as a single environment gives them."""
    rows: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in infos.items():
        if not name.startswith("_"):
            for b in np.flatnonzero(infos[f"_{name}"]).tolist():
                rows[b][name] = value[b].item() if hasattr(value[b], "item") else value[b]
    return rows
