"""Saving and loading: what every agent writes into a checkpoint, and how it is made again from one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from safetensors.torch import load_file, save_file
from torch import Tensor

from textrl_gym import files, registry
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.models import loading, lora
from textrl_gym.training import checkpoint
from textrl_gym.training.config import Clock


class Saved:
    """The half of Agent that is about checkpoints; see textrl_gym.training.checkpoint for the files."""

    env: TextVectorEnv
    policy: Any
    optimizer: torch.optim.Optimizer
    config: Any
    kl: Any
    seed: int
    device: torch.device
    model_spec: str | None
    """The name that the model was loaded by; None: the task's own, or one that was given."""
    reference_spec: str | None
    rebuilds_model: bool
    """Whether the start can be loaded again by name, so that a checkpoint need not hold it."""
    rebuilds_reference: bool
    generator: torch.Generator
    shuffler: np.random.Generator

    def memory(self) -> dict[str, Any]:
        """What a subclass keeps from update to update beside the policy, as JSON can hold it; saved and restored."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""

    def save(self, path: str | Path) -> None:
        """Write a checkpoint folder (safetensors and JSON) that `load` goes on from as if never stopped."""
        files.write_folder(path, self._fill)

    def _fill(self, folder: Path) -> None:
        with loading.no_bars():
            lora.save(self.policy.model, folder / "model", base=not self.rebuilds_model)
            self.env.tokenizer.save_pretrained(folder / "model")
            if self.policy.value_model is not None:
                lora.save(self.policy.value_model, folder / "value_model", base=False)
            reference = self.policy.reference
            if reference is not None and reference.model is not self.policy.model and not self.rebuilds_reference:
                lora.save(reference.model, folder / "reference", base=False)
        if self.policy.value_head is not None:
            save_file(self.policy.value_head.state_dict(), folder / "value_head.safetensors")
        extra = {"generator": self.streams()[1]}
        checkpoint.save_optimizer(folder / "training.safetensors", self.optimizer, extra)
        files.write_state(folder, self._state())

    def _state(self) -> dict[str, Any]:
        mdp = self.env
        settings = {k: v for k, v in mdp.settings.items() if k not in ("task", "autoreset_mode", "device")}
        task_path = next((t for t in registry.env_ids().values() if t == type(mdp.task).__module__), None)
        return {
            "agent": registry.path_of(type(self), "agents"),
            "task": task_path or f"{type(mdp.task).__module__}:{type(mdp.task).__qualname__}",
            "env": {k: v for k, v in settings.items() if files.jsonable(v)},
            "env_not_saved": sorted(k for k, v in settings.items() if not files.jsonable(v) and k != "tokenizer"),
            "num_envs": mdp.num_envs,
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "model": self.model_spec,
            "reference": self.reference_spec,
            "total_timesteps": self._total_timesteps,
            "num_updates": self.num_updates,
            "kl_coef": self.kl.coef,
            "seconds": self.seconds,
            "memory": self.memory(),
            "streams": self.streams()[0],
        }

    def streams(self) -> tuple[dict[str, Any], Tensor]:
        """Where prompts, shuffling and sampling stand, and the timesteps done: JSON, and the generator's state."""
        numbers = {
            "num_timesteps": self.num_timesteps,
            "shuffler": self.shuffler.bit_generator.state,
            "env": self.env.streams(),
        }
        return numbers, self.generator.get_state()

    def restore_streams(self, numbers: dict[str, Any], generator: Tensor, env: bool = True) -> None:
        """Go back to where `streams()` was taken (with env=False, not the environment's prompts)."""
        self.num_timesteps = numbers["num_timesteps"]
        self.shuffler.bit_generator.state = numbers["shuffler"]
        self.generator.set_state(generator)
        if env:
            self.env.restore_streams(numbers["env"])

    @classmethod
    def load(
        cls, path: str | Path, env: Any = None, *, device: str = "auto", out: str | Path | None = None, **settings: Any
    ) -> Self:
        """The agent that `save` wrote, ready to predict or to go on learning.

        Args:
            env: another environment; None makes the saved one again.
            settings: config fields to change.

        Raises:
            ValueError: the folder holds no agent, or another class's; or the environment had settings that cannot be
                written down (a callable reward, say), and no env was given.
        """
        folder, state = Path(path), files.read_state(path)
        if registry.load_agent_class(state["agent"]) is not cls:
            raise ValueError(f"{str(path)!r} holds the agent {state['agent']!r}, not {cls.__name__}")
        if env is None and state["env_not_saved"]:
            raise ValueError(
                f"{str(path)!r} was trained with {state['env_not_saved']}, which cannot be saved: give env="
            )
        config = state["config"] | settings
        given = env is not None
        if isinstance(getattr(env, "unwrapped", None), TextVectorEnv):  # its own number of rows counts
            config = {k: v for k, v in config.items() if k in settings or k not in ("rollout_episodes", "group_size")}
        if not given:
            kept = state["env"] | {"tokenizer": str(folder / "model"), "array": "torch"}
            chosen = loading.resolve_device(device)
            env = TextVectorEnv(
                state["num_envs"],
                task=state["task"],
                autoreset_mode=AutoresetMode.DISABLED,
                device=str(chosen),
                **kept,
            )
        task = vector_env(env).task
        model: Any = str(folder / "model")
        saved_reference, saved_base = folder / "reference", folder / lora.BASE
        reference = str(saved_reference) if saved_reference.is_dir() else state["reference"]
        if lora.is_saved_lora(folder / "model"):  # its reference is the model that it stands on
            base = task.load_model(str(saved_base) if saved_base.is_dir() else state["model"])
            model = lora.load(base, folder / "model")
        elif reference is None:
            reference = task.load_model(state["model"])
        make: Any = cls
        agent = make(
            env,
            model,
            reference,
            seed=state["seed"],
            device=device,
            out=out,
            **config,
        )
        agent.model_spec, agent.reference_spec = state["model"], state["reference"]
        agent.rebuilds_reference, agent.rebuilds_model = not saved_reference.is_dir(), not saved_base.is_dir()
        agent._restore(folder, state, streams=not given)
        return agent

    def _restore(self, folder: Path, state: dict[str, Any], streams: bool) -> None:
        if self.policy.value_head is not None:
            self.policy.value_head.load_state_dict(load_file(folder / "value_head.safetensors", str(self.device)))
        if self.policy.value_model is not None:
            saved = folder / "value_model"
            lora.restore_(self.policy.value_model, saved, lambda: loading.load_model(str(saved)))
        extra = checkpoint.load_optimizer(folder / "training.safetensors", self.optimizer)
        self.restore_streams(state["streams"], extra["generator"], env=streams)
        self._total_timesteps = state["total_timesteps"]
        self.remember(state.get("memory", {}))
        self.num_updates, self.kl.coef, self.seconds = state["num_updates"], state["kl_coef"], state["seconds"]
        if self._total_timesteps > 0:
            self.clock = Clock(self.num_updates + 1, self.num_timesteps / self._total_timesteps)
