"""Checkpoints: safetensors and JSON in a folder, nothing pickled.

checkpoint.json         the names of the files that belong to it; what else lies in the folder does not
agent.json              the version that wrote it, which agent, its config and environment, counters, random streams
model/                  the language model and tokenizer, as transformers saves them
value_head.safetensors, value_model/      the critic, where there is one
base/                   the model under a LoRA, only where it cannot be loaded again by name; model/ has the LoRA then
reference/              only where the reference cannot be loaded again by name
training.safetensors    the optimizer's moments and the sampler's generator
.previous/              the checkpoint before, in the folder of a run
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from textrl_gym import files, registry
from textrl_gym.data import sources
from textrl_gym.kl import KLPenalty
from textrl_gym.mdp.task import Task, load_env_task
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.models import adapters, fingerprint, loading, lora
from textrl_gym.persistence.optimizer_state import load_optimizer, optimizer_tensors, save_tensors
from textrl_gym.policy.policy import Policy
from textrl_gym.training import dependencies
from textrl_gym.training.config import AgentConfig, Clock
from textrl_gym.training.dependencies import Fingerprints

VERSION = "0.2"
"""Of the format. 0.1 wrote none."""


class Saved(Protocol):
    """What is saved of an agent, and restored."""

    env: TextVectorEnv
    policy: Policy
    optimizer: torch.optim.Optimizer
    kl: KLPenalty
    clock: Clock
    seed: int
    out: Path | None
    home: Path | None
    finished: bool
    device: torch.device
    model_spec: str | None
    reference_spec: str | None
    fingerprints: Fingerprints
    rebuilds_model: bool
    rebuilds_reference: bool
    num_timesteps: int
    num_updates: int
    total_timesteps: int
    seconds: dict[str, float]

    @property
    def config(self) -> AgentConfig: ...

    def extra_state(self) -> dict[str, Any]: ...
    def load_extra_state(self, state: dict[str, Any]) -> None: ...
    def save_extra(self, folder: Path) -> None: ...
    def load_extra(self, folder: Path) -> None: ...
    def rng_state(self) -> tuple[dict[str, Any], Tensor]: ...
    def load_rng_state(self, numbers: dict[str, Any], generator: Tensor, env: bool = True) -> None: ...


SavedT = TypeVar("SavedT", bound=Saved)

# -- save -------------------------------------------------------------------------------------------------------------


def save(agent: Saved, folder: str | Path) -> None:
    """Write a checkpoint folder that `load` goes on from as if training had never stopped.

    Raises:
        ValueError: the folder holds a model, or a run of another command.
    """
    files.check_free(folder, "train")
    # In the run's own folder the newest may be damaged by what stops the run, and the one before is kept.
    own = agent.out is not None and Path(folder).resolve() == agent.out.resolve()
    # Before the first process alone goes on to write: of moments that are sharded each process has a part.
    moments = optimizer_tensors(agent.optimizer)
    files.write_folder(folder, functools.partial(_fill, agent, moments), keep_previous=own)


def _fill(agent: Saved, moments: dict[str, Tensor], folder: Path) -> None:
    policy = agent.policy
    with loading.no_bars():
        lora.save(policy.model, folder / "model", base=not agent.rebuilds_model)
        agent.env.tokenizer.save_pretrained(folder / "model")
        if policy.value_model is not None:
            lora.save(policy.value_model, folder / "value_model", base=False)
        reference = policy.reference
        if reference is not None and reference.model is not policy.model and not agent.rebuilds_reference:
            lora.save(reference.model, folder / "reference", base=False)
    if policy.value_head is not None:
        save_file(policy.value_head.state_dict(), folder / "value_head.safetensors")
    numbers, generator = agent.rng_state()
    # Safetensors and not torch.save: a pickle could run code when a checkpoint of someone else is loaded.
    save_tensors(folder / "training.safetensors", moments, {"generator": generator})
    agent.save_extra(folder)
    files.write_state(folder, _state(agent) | {"rng_state": numbers})


def _state(agent: Saved) -> dict[str, Any]:
    mdp = agent.env
    # The device is that of the machine that loads, and the mode is every agent's own.
    settings = {k: v for k, v in mdp.settings.items() if k not in ("task", "autoreset_mode", "device")}
    task_path = next((t for t in registry.env_ids().values() if t == type(mdp.task).__module__), None)
    return {
        "version": VERSION,
        "agent": registry.path_of(type(agent), "agents"),
        "task": task_path or f"{type(mdp.task).__module__}:{type(mdp.task).__qualname__}",
        "env": {k: v for k, v in settings.items() if files.jsonable(v)},
        "env_not_saved": sorted(k for k, v in settings.items() if not files.jsonable(v) and k != "tokenizer"),
        "num_envs": mdp.num_envs,
        "config": dataclasses.asdict(agent.config),
        "seed": agent.seed,
        "model": agent.model_spec,
        "reference": agent.reference_spec,
        "fingerprints": agent.fingerprints,
        "total_timesteps": agent.total_timesteps,
        "num_updates": agent.num_updates,
        "finished": agent.finished,
        "kl_coef": agent.kl.coef,
        "seconds": agent.seconds,
        "extra_state": agent.extra_state(),
    }


# -- load -------------------------------------------------------------------------------------------------------------


def load(
    cls: type[SavedT],
    folder: str | Path,
    env: str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | None = None,
    *,
    device: str = "auto",
    out: str | Path | None = None,
    trust_code: bool = False,
    base_model: str | None = None,
    env_settings: Mapping[str, Any] | None = None,
    **settings: object,
) -> SavedT:
    """The agent that `save` wrote, ready to predict or to go on learning.

    Args:
        env: another environment; None makes the saved one again.
        trust_code: import the agent, task and reward that the folder names, though they are not part of textrl_gym and
            have not been imported; see textrl_gym.registry.named_by.
        base_model: where the model stands now that the run started from, the reference of which it is.
        env_settings: keywords of the saved environment to change, such as where its dataset or reward model is now.
        settings: config fields to change.

    Raises:
        ValueError: the folder holds no agent, another class's, or one of a version that is not read; or the environment
            had settings that cannot be written down (a callable reward, say), and no env was given; or another model
            stands where one stood that the run depends on.
    """
    if env is not None and env_settings:
        raise ValueError(f"env_settings={sorted(env_settings)} are of the saved environment: leave env out")
    if isinstance(env, str):
        registry.find_env(env)  # the caller's, so that its module is imported
    with registry.named_by(Path(folder) / files.STATE_FILE, trust_code):
        return _load(cls, folder, env, device, out, base_model, dict(env_settings or {}), settings)


def _load(
    cls: type[SavedT],
    folder: str | Path,
    env: str | gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | None,
    device: str,
    out: str | Path | None,
    base_model: str | None,
    env_settings: dict[str, Any],
    settings: dict[str, object],
) -> SavedT:
    folder = files.whole_checkpoint(folder)
    file, state = folder / files.STATE_FILE, read_state(folder)
    # PPO.load on GRPO's folder would go on with another loss on settings that happen to have the same names.
    if registry.load_agent_class(state["agent"]) is not cls:
        raise ValueError(f"{str(folder)!r} holds the agent {state['agent']!r}, not {cls.__name__}")
    expected = dependencies.known(state, file)
    config = state["config"] | settings
    if isinstance(config.get("pairs"), str) and "pairs" not in settings:  # a file as the dataset is one
        config["pairs"] = sources.located(config["pairs"], folder)
    # Guided decoding, for one, loads a PPO on an environment of one row.
    if isinstance(getattr(env, "unwrapped", None), TextVectorEnv):  # its own number of rows counts
        config = {k: v for k, v in config.items() if k in settings or k not in ("rollout_episodes", "group_size")}
    env_given = env is not None
    if env is None:
        env = _saved_env(folder, state, device, expected["reward"], env_settings)
    task = load_env_task(env) if isinstance(env, str) else vector_env(env).task
    initial = dependencies.initial_model(folder, task, state["model"], expected["model"], base_model)
    if state["reference"] is not None and expected["reference"] is not None:
        say = dependencies.FLAGS["reference"]
        state["reference"] = fingerprint.locate(state["reference"], folder, expected["reference"], say)
    model, reference = _models(folder, state["reference"], initial, task)
    make: Any = cls  # a protocol has no constructor
    agent: SavedT = make(env, model, reference, seed=state["seed"], device=device, out=out, **config)
    agent.model_spec = state["model"] if base_model is None else base_model
    agent.reference_spec = state["reference"]
    if expected["model"] is not None:  # its name may be right from another working folder only
        agent.fingerprints = {**agent.fingerprints, "model": expected["model"]}
    run = folder.parent if folder.name == files.PREVIOUS else folder
    if agent.out is not None and agent.out.resolve() == run.resolve():
        agent.home = run.resolve()
    agent.rebuilds_reference = not (folder / "reference").is_dir()
    agent.rebuilds_model = not (folder / lora.BASE).is_dir()
    try:
        _restore(agent, folder, state, env_streams=not env_given)
    except (SafetensorError, OSError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the checkpoint in {str(folder)!r} does not fit its agent.json: {reason}") from error
    return agent


FIELDS: files.Kinds = {
    "agent": (str,),
    "task": (str,),
    "env": (dict,),
    "env_not_saved": (list,),
    "num_envs": (int,),
    "config": (dict,),
    "seed": (int,),
    "model": (str, type(None)),
    "reference": (str, type(None)),
    "total_timesteps": (int,),
    "num_updates": (int,),
    "kl_coef": files.NUMBER,
    "seconds": (dict,),
    "extra_state": (dict,),
    "rng_state": (dict,),
}
"""What agent.json holds."""


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, as this version writes it.

    Raises:
        ValueError: there is none, it is damaged, or another version wrote it.
    """
    file = folder / files.STATE_FILE
    try:
        state = upgraded(files.read_state(folder), str(folder))
    except (KeyError, TypeError, AttributeError) as error:  # of 0.1's keys
        raise ValueError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error
    files.check_fields(state, file, FIELDS)
    return state


def upgraded(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """The JSON part of a checkpoint of any version that is read, as this version writes it.

    Raises:
        ValueError: another version wrote it.
    """
    version = state.get("version", "0.1")
    if version == VERSION:
        return state
    if version != "0.1":
        raise ValueError(
            f"{folder!r} was written by version {version!r} of checkpoints; this textrl-gym reads 0.1 and {VERSION}"
        )
    state = dict(state)
    state["version"] = VERSION
    state["extra_state"], state["rng_state"] = state.pop("memory", {}), state.pop("streams")
    # 0.1's agent overruled the settings of a given environment, and its config did not know how many rows that had.
    env, config = dict(state["env"]), dict(state["config"])
    env.pop("kl_coef", None)
    env.pop("kl_estimator", None)
    if config.get("missing_eos_penalty") is not None:
        env.pop("missing_eos_penalty", None)
    config |= {"rollout_episodes": state["num_envs"], "group_size": env.get("group_size", 1)}
    return state | {"env": env, "config": config}


def _saved_env(
    folder: Path, state: dict[str, Any], device: str, expected: dict[str, str], changes: dict[str, Any]
) -> TextVectorEnv:
    """The environment that a checkpoint was trained in, with some settings changed.

    Args:
        expected: the hashes of the reward's folders.
    """
    if left := sorted(set(state["env_not_saved"]) - set(changes)):
        raise ValueError(f"{str(folder)!r} was trained with {left}, which cannot be saved: give env=")
    settings = state["env"] | changes
    if "reward" not in changes:
        settings["reward"] = dependencies.located_reward(folder, settings.get("reward"), expected)
    elif dependencies.of_rewards(changes["reward"]):
        other = dependencies.other_reward(folder, changes["reward"], expected)
        if other is not None:
            warnings.warn(other, stacklevel=2)
    dataset = settings.get("dataset")
    if isinstance(dataset, str) and "dataset" not in changes:
        settings["dataset"] = sources.located(dataset, folder)
    try:
        return TextVectorEnv(
            state["num_envs"],
            task=state["task"],
            autoreset_mode=AutoresetMode.DISABLED,
            device=str(loading.resolve_device(device)),
            **(settings | {"tokenizer": str(folder / "model"), "array": "torch"}),
        )
    except ValueError as error:
        if "dataset" in changes or repr(dataset) not in str(error):
            raise
        raise ValueError(f"{error}; {dependencies.FLAGS['dataset']}") from error


def _models(folder: Path, reference: str | None, initial: str | None, task: Task) -> tuple[Any, Any]:
    """Model and reference, as an agent's constructor takes them.

    Args:
        reference: what the checkpoint names as the reference.
        initial: what the run started from; None: the task's own.
    """
    saved_model, saved_reference, saved_base = folder / "model", folder / "reference", folder / lora.BASE
    if saved_reference.is_dir():
        reference = str(saved_reference)
    if adapters.is_adapter(saved_model):
        base = task.load_model(str(saved_base) if saved_base.is_dir() else initial)
        # As it was before training: without a reference of its own it is told by that to be one with the adapter off.
        model = lora.load(base, saved_model, trained=False)
        if adapters.is_adapter(saved_reference):  # it stands on the same base
            return model, lora.load_weights_(lora.frozen_copy(model), saved_reference)
        return model, reference
    return str(saved_model), task.load_model(initial) if reference is None else reference


def _restore(agent: Saved, folder: Path, state: dict[str, Any], env_streams: bool) -> None:
    policy = agent.policy
    if lora.is_lora(policy.model):
        lora.load_weights_(policy.model, folder / "model")
    if policy.value_head is not None:
        file = folder / "value_head.safetensors"
        policy.value_head.load_state_dict(load_file(file, str(agent.device)))
        loading.check_finite(policy.value_head, file)
    if policy.value_model is not None:
        saved = folder / "value_model"
        lora.restore_(policy.value_model, saved, lambda: loading.load_model(str(saved)))
    tensors = load_optimizer(folder / "training.safetensors", agent.optimizer)
    # After the weights: making the agent has drawn from its generators.
    agent.load_rng_state(state["rng_state"], tensors["generator"], env=env_streams)
    agent.total_timesteps = state["total_timesteps"]
    agent.num_updates, agent.kl.coef, agent.seconds = state["num_updates"], state["kl_coef"], state["seconds"]
    if agent.total_timesteps > 0:
        agent.clock = Clock(agent.num_updates + 1, agent.num_timesteps / agent.total_timesteps)
    # Versions that did not say it saved at the end, or when the run was stopped before it.
    agent.finished = bool(state.get("finished", agent.num_timesteps >= agent.total_timesteps))
    agent.load_extra_state(state["extra_state"])
    agent.load_extra(folder)
