"""The folder is the registry: a file in envs/, agents/ or rewards/ is registered because it exists. Loads no torch."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import gymnasium

from textrl_gym import files

ENV_ENTRY = "textrl_gym.mdp.text_env:TextEnv"
VECTOR_ENTRY = "textrl_gym.mdp.text_env:TextVectorEnv"


def folder(kind: str) -> list[Path]:
    """The plug-in files of kind "envs", "agents" or "rewards", sorted by name."""
    # By the package's path and not by this file's: installed in editable mode the folders are links to elsewhere. Found
    # and not imported, which would load torch.
    package = importlib.util.find_spec(f"textrl_gym.{kind}")
    if package is None or not package.submodule_search_locations:
        raise ImportError(f"the package textrl_gym has no folder {kind!r}")
    root = Path(next(iter(package.submodule_search_locations)))
    return sorted(p for p in root.glob("*.py") if not p.name.startswith("_"))


def names(kind: str) -> list[str]:
    """The names of all plug-ins of a kind: their files' stems."""
    return [path.stem for path in folder(kind)]


def env_ids() -> dict[str, str]:
    """Environment id -> task path ("textrl_gym.envs.copy_text"), read from the line ID = "..." without importing."""
    tasks: dict[str, str] = {}
    for path in folder("envs"):
        # Read and not imported: `import textrl_gym` registers every environment and must not wait for their torch.
        match = re.search(r'^ID = "([^"]+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
        if match is None:
            raise ImportError(f'{path} must hold a line ID = "Name-v0": every file in envs/ is an environment')
        tasks[match[1]] = f"textrl_gym.envs.{path.stem}"
    return tasks


def register_envs() -> None:
    """Register every file in envs/ with Gymnasium."""
    for env_id, task in env_ids().items():
        register(env_id, task)


def register(env_id: str, task: str) -> None:
    """Register a task under a Gymnasium id.

    Args:
        env_id: such as "Mine-v0".
        task: "package.module:TaskClass", or a module that holds exactly one Task subclass.
    """
    gymnasium.register(id=env_id, entry_point=ENV_ENTRY, vector_entry_point=VECTOR_ENTRY, kwargs={"task": task})


def load_object(path: str) -> object:
    """The object at "package.module:name".

    Raises:
        ValueError: the path has no colon, the module cannot be found, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} is not of the form package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module was found; something that it imports was not
        raise ValueError(f"{path!r}: there is no module {module_name!r}") from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ValueError(f"{path!r}: module {module_name!r} has no {name!r}; it has {public}")
    return getattr(module, name)


def load_agent_class(name: str) -> type[Any]:
    """The agent class of a file in agents/ ("ppo") or at "package.module:Class".

    Raises:
        ValueError: naming the agents that exist.
    """
    if ":" in name:
        return cast(type[Any], load_object(name))
    if name not in names("agents"):
        raise unknown("agent", name, names("agents"), ", or module:Class")
    module = importlib.import_module(f"textrl_gym.agents.{name}")
    return class_in(module, "update")


def class_in(module: ModuleType, method: str) -> type:
    """The one class that a plug-in's module defines with this method."""
    # By __module__: a file also holds the classes that it imports, its own base class among them.
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    matching = [c for c in classes if hasattr(c, method)]
    if len(matching) != 1:
        raise ValueError(
            f"{module.__name__} must define one class with {method}(), found {[c.__name__ for c in matching]}"
        )
    return matching[0]


def path_of(cls: type, kind: str) -> str:
    """The name by which a plug-in class is found again: its file's stem, or "package.module:Class"."""
    prefix = f"textrl_gym.{kind}."
    if cls.__module__.startswith(prefix):
        return cls.__module__.removeprefix(prefix)
    return f"{cls.__module__}:{cls.__qualname__}"


def text_envs() -> dict[str, Any]:
    """Environment id -> the task that it was registered with."""
    return {env_id: spec.kwargs["task"] for env_id, spec in gymnasium.registry.items() if "task" in spec.kwargs}


def find_env(name: str) -> str:
    """A registered id; "module:ID" imports the module that registers it, as gymnasium.make does."""
    module, _, env_id = name.rpartition(":")
    if module:
        importlib.import_module(module)
    if env_id not in text_envs():
        raise unknown("environment", env_id, text_envs(), ", or module:ID, where module registers ID")
    return env_id


def load_agent(folder: str | Path, env: object = None, **settings: Any) -> Any:
    """The agent saved in a folder, whatever its class."""
    folder = files.whole_checkpoint(folder)
    state = files.read_state(folder)
    if not isinstance(state.get("agent"), str):
        raise ValueError(f"{str(folder / files.STATE_FILE)!r} is damaged: it names no agent")
    return load_agent_class(state["agent"]).load(folder, env, **settings)


def unknown(kind: str, name: str, allowed: Iterable[str], more: str = "") -> ValueError:
    """An error for a name that is none of the allowed ones, with the nearest of them."""
    names = sorted(allowed)
    lower = {n.lower(): n for n in names}
    # Lower case on both sides: most slips are "PPO" for "ppo" and "copytext-v0" for "CopyText-v0".
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(names)}{more}")
