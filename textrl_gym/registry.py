"""The folder is the registry: a file in envs/, agents/ or rewards/ is registered because it exists. Loads no torch."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import gymnasium

from textrl_gym import files

ENV_ENTRY = "textrl_gym.mdp.text_env:TextEnv"
VECTOR_ENTRY = "textrl_gym.mdp.text_env:TextVectorEnv"
AGENT_BASE = "textrl_gym.training.agent"
TASK_BASE = "textrl_gym.mdp.task"


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


# -- code that is named by a user or by a file -------------------------------------------------------------------------


trust_all = False
"""Whether every file is trusted: `--trust-code` of the command line sets it."""
foreign_modules: set[str] = set()
"""The modules outside textrl_gym that were imported by name: a checkpoint of these runs names them."""
_reading: contextvars.ContextVar[tuple[str, bool] | None] = contextvars.ContextVar("reading", default=None)
"""The file whose names are being resolved, and whether it is trusted; None: the names are the user's."""


@contextlib.contextmanager
def named_by(file: str | Path, trust: bool) -> Iterator[None]:
    """Inside, modules are named by a file and not by the user: only those that the user has imported count.

    A checkpoint may come from somebody else, and may hold Python files beside it. What it names is imported if it is
    part of textrl_gym, if the user has imported it already, or with `trust` (or `--trust-code`).
    """
    outer = _reading.get()
    token = _reading.set((str(file), trust or trust_all or (outer is not None and outer[1])))
    try:
        yield
    finally:
        _reading.reset(token)


def import_named(module_name: str) -> ModuleType:
    """Import a module that a user or a file has named: package.module, or a path such as tasks/mine.py.

    Raises:
        ValueError: there is no such module or file, it is a folder without Python's __init__.py, or a file that is not
            trusted names it (see `named_by`).
    """
    file, trusted = _reading.get() or ("", True)
    top = module_name.partition(".")[0]
    ours = top == __name__.partition(".")[0]
    # Python's own modules are imported already, and hold functions such as os.system.
    if not trusted and not ours and (module_name not in sys.modules or top in sys.stdlib_module_names):
        raise ValueError(
            f"{file!r} names code of the module {module_name!r}, which is not part of textrl-gym. If you trust that "
            "code, give --trust-code (in Python trust_code=True, or import the module first)"
        )
    if module_name.endswith(".py"):
        module_name = _on_path(Path(module_name))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module was found; something that it imports was not
        raise ValueError(f"there is no module {module_name!r}") from error
    if getattr(module, "__file__", None) is None and module.__name__ not in sys.builtin_module_names:
        # Python takes any folder on its way for a package, such as one named data in the working directory.
        raise ValueError(f"{module_name!r} is a folder without Python code of its own (no __init__.py)")
    if not ours:
        foreign_modules.add(module_name)
    return module


def _on_path(file: Path) -> str:
    """Make a Python file importable by its stem, as Python itself does with a script's folder; returns the stem."""
    file = file.expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r}")
    if not file.stem.isidentifier():
        raise ValueError(f"{file.name!r} cannot be imported: the name of a module has letters, digits and _ only")
    # By the path and not by a loader of our own: worker processes and saved agents import it by the same name.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.find_spec(file.stem)
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != file:
        raise ValueError(f"{str(file)!r} cannot be imported: {file.stem!r} is another module already; rename the file")
    return file.stem


def load_object(path: str) -> object:
    """The object at "package.module:name", or "file.py:name".

    Raises:
        ValueError: the path has no colon, the module cannot be found or is not trusted, or it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not name or not module_name:
        raise ValueError(f"{path!r} is not of the form package.module:name")
    try:
        module = import_named(module_name)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
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
    """A registered id.

    "module:ID" imports the module that registers it, as gymnasium.make does. "module:Class" registers a Task of the
    module under its `id`, or under Class-v0. A module may be given as a file: tasks/mine.py:Class.

    Raises:
        ValueError: there is no such environment, module or file, naming what there is.
    """
    module_name, _, env_id = name.rpartition(":")
    module = import_named(module_name) if module_name else None
    if env_id not in text_envs() and isinstance(getattr(module, env_id, None), type):
        env_id = _register_class(getattr(module, env_id))
    if env_id not in text_envs():
        more = ", or module:ID, where module registers ID, or module:Class of a Task (module: a file.py too)"
        raise unknown("environment", env_id, text_envs(), more)
    return env_id


def _register_class(task: type[Any]) -> str:
    """Register a task that a user has named by its class; returns the environment's id."""
    if not any(base.__name__ == "Task" and base.__module__ == TASK_BASE for base in task.__mro__):
        raise ValueError(f"{task.__module__}:{task.__qualname__} is no subclass of textrl_gym.Task")
    env_id = task.id or f"{task.__name__}-v0"
    path = f"{task.__module__}:{task.__qualname__}"
    registered = text_envs().get(env_id)
    if registered is None:
        register(env_id, path)
    elif registered not in (path, task):
        raise ValueError(f"{path} has the id {env_id!r}, which is {registered}: give the class another id")
    return env_id


def registration(env_id: str) -> dict[str, Any] | None:
    """How an environment of the user was registered, for another process (see `register_again`); None for one of ours.

    Raises:
        ValueError: another process could not: its task is no class that can be imported, or a keyword is no JSON.
    """
    if env_id in env_ids():
        return None
    keywords = dict(gymnasium.registry[env_id].kwargs)
    task = keywords["task"]
    if isinstance(task, type):
        keywords["task"] = task = f"{task.__module__}:{task.__qualname__}"
    if not isinstance(task, str) or task.startswith("__main__:") or "<locals>" in task:
        raise ValueError(
            f"{env_id} is registered with the task {task!r}, which a process of its own cannot import: put the class "
            "into a module and register it as 'module:Class'"
        )
    bad = [name for name, value in keywords.items() if not files.jsonable(value)]
    if bad:
        raise ValueError(f"{env_id} is registered with {bad[0]}={keywords[bad[0]]!r}, which cannot be written down")
    return keywords


def register_again(env_id: str, keywords: dict[str, Any] | None) -> None:
    """Register an environment as another process has it, unless it is registered here."""
    if keywords is None or env_id in gymnasium.registry:
        return
    import_named(str(keywords["task"]).partition(":")[0])  # which may register it
    if env_id not in gymnasium.registry:
        gymnasium.register(id=env_id, entry_point=ENV_ENTRY, vector_entry_point=VECTOR_ENTRY, kwargs=keywords)


def load_agent(folder: str | Path, env: object = None, *, trust_code: bool = False, **settings: Any) -> Any:
    """The agent saved in a folder, whatever its class.

    Args:
        trust_code: import what the folder names, though it is not part of textrl_gym; see `named_by`.
    """
    folder = files.whole_checkpoint(folder)
    file = folder / files.STATE_FILE
    state = files.read_state(folder)
    if not isinstance(state.get("agent"), str):
        raise ValueError(f"{str(file)!r} is damaged: it names no agent")
    if isinstance(env, str):
        find_env(env)  # the caller's, so that its module is imported
    with named_by(file, trust_code):
        agent_class = load_agent_class(state["agent"])
        # By the name of the base, whose module loads torch: other classes have a method called load, too.
        if not any(base.__module__ == AGENT_BASE for base in getattr(agent_class, "__mro__", ())):
            raise ValueError(f"{str(file)!r} names {state['agent']!r}, which is no agent")
        return agent_class.load(folder, env, **settings)


def unknown(kind: str, name: str, allowed: Iterable[str], more: str = "") -> ValueError:
    """An error for a name that is none of the allowed ones, with the nearest of them."""
    names = sorted(allowed)
    lower = {n.lower(): n for n in names}
    # Lower case on both sides: most slips are "PPO" for "ppo" and "copytext-v0" for "CopyText-v0".
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(names)}{more}")
