"""Settings of a command from a TOML file and the command line, which wins. Loads no torch."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Ge

from textrl_gym import files
from textrl_gym.bounds import Bounds, Seed, bounds_of, check_settings
from textrl_gym.mdp.env_settings import EnvSettings, parse_reward
from textrl_gym.registry import unknown

if TYPE_CHECKING:
    from textrl_gym.training.agent import Agent


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The run as a whole."""

    total_timesteps: Annotated[int | None, Ge(1)] = None
    """Generated tokens to train for; the last rollout is whole. Only agents that do not train go without."""
    seed: Seed = 0
    """Seeds prompts, sampling, shuffling and new weights."""
    out: Path | None = None
    """Folder for the checkpoint, the logs and the samples; None: runs/AGENT-ENV-seedS."""
    model: str | None = None
    """The causal LM to start from: a folder, a Hub id or smollm2-135m; None: the environment's own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_settings(self)


# -- TOML -------------------------------------------------------------------------------------------------------------

CONFIG_FILE = "config.toml"
"""The settings that a command was run with, in the folder that it wrote."""
ENV_TABLE = "env"
TABLES = (
    ENV_TABLE,
    "sft",
    "preferences",
    "endpoint",
    "reward_model",
    "annotate",
    "agent",
    "train",
    "evaluate",
    "compare",
    "bench",
    "play",
    "collect",
    "rlhf",
    "constitutional",
)
"""Of a TOML file, which may hold a whole pipeline: each command reads its own, and [env] belongs to all."""


def read_toml(path: Path, schema: Mapping[str, tuple[type[Any], ...]]) -> dict[str, dict[str, Any]]:
    """A command's tables of a TOML file, each key checked against the fields of its dataclasses.

    Args:
        schema: table name -> the dataclasses whose fields it may set. The tables of other commands are not read.

    Raises:
        ValueError: no such file, no TOML, an unknown table or key, or a value of the wrong type; each names the file,
            the key and what is allowed.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read --config {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for name, table in tables.items():
        if name not in TABLES or not isinstance(table, dict):
            raise ValueError(f"{path}: {unknown('table', name, TABLES)}")
    return {name: _check_table(tables.get(name, {}), classes, f"{path}: [{name}]") for name, classes in schema.items()}


def _check_table(table: dict[str, Any], classes: tuple[type[Any], ...], where: str) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for cls in classes:
        hints |= _hints(cls)
    checked = {}
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"{where}: {unknown('key', key, hints)}")
        if key == "reward" and isinstance(value, dict):
            # As a flag would say it, so that a table of weights takes the same way as --env.reward.
            value = json.dumps(value, default=str)
            try:
                parse_reward(value)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if not matches(value, hints[key]):
            raise ValueError(f"{where}: {key} must be {describe(hints[key])}, got {value!r}")
        checked[key] = tuple(value) if isinstance(value, list) else value
    return checked


def _hints(cls: type[Any]) -> dict[str, Any]:
    """The type of each field; those of a nested dataclass stand among them, as their flags do."""
    hints: dict[str, Any] = {}
    # Without include_extras: a TOML value is checked against the bare type, and against its bounds when the config is
    # made.
    types_by_name = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = types_by_name[field.name]
        hints |= _hints(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {field.name: hint}
    return hints


def write_toml(path: Path, tables: Mapping[str, object]) -> None:
    """Write the settings that a command was run with, as `--config` reads them.

    Args:
        tables: table name -> a dataclass, or a list of several. What is None stays out, which TOML cannot say.
    """
    import tomli_w

    document = {name: _plain(settings) for name, settings in tables.items()}
    files.write_text(path, tomli_w.dumps(document))


def _plain(settings: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    if isinstance(settings, list):
        return {key: value for one in settings for key, value in _plain(one).items()}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            plain |= _plain(value)
        elif isinstance(value, tuple | list):
            plain[field.name] = list(value)
        elif value is not None:
            plain[field.name] = str(value) if isinstance(value, Path) else value
    return plain


def matches(value: object, hint: object) -> bool:
    """Whether a value of a TOML file fits a field's type: an integer fits float, a list a tuple, a string a path."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if origin is tuple:
        return isinstance(value, list) and all(matches(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str)
    return type(value) is hint  # not isinstance: a bool is no int here


def describe(hint: object) -> str:
    """A field's type in words, without None, which TOML cannot say."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(hint) if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if origin is tuple:
        return f"a list, each item {describe(get_args(hint)[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a string"}
    return words[hint] if isinstance(hint, type) and hint in words else getattr(hint, "__name__", str(hint))


def as_arguments(table: Mapping[str, Any]) -> list[str]:
    """A checked table as flags. They go before the user's own: of two equal flags the last one counts."""
    arguments = []
    for key, value in table.items():
        flag = key.replace("_", "-")
        # tyro's flags of booleans take no value.
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            # With "=": a value that begins with a dash would be read as a flag.
            arguments.append(f"--{flag}={value}")
    return arguments


# -- flags ------------------------------------------------------------------------------------------------------------


Part = tuple[str, object] | tuple[str, object, object]
"""A command's argument: its name, its type (by `flag`, `positional`, `flat`, or a dataclass) and its default."""


def parse_command(
    command: str, about: str | None, parts: Sequence[Part], tables: Mapping[str, str], args: Sequence[str]
) -> types.SimpleNamespace:
    """Read a command's flags, with the TOML file that `--config` names as their defaults.

    Args:
        parts: as of `parse_flags`; those of `tables` are dataclasses, or `flat` ones.
        tables: name of a part -> the table of the file that sets it.

    Returns:
        an object with the parts' names and `config`, the file or None, as attributes.

    Raises:
        ValueError: as of `read_toml`.
    """
    # The file has to be read before tyro runs, since its values are the defaults that --help shows.
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", type=Path)
    file = peek.parse_known_args(args)[0].config
    before: list[str] = []
    if file is not None:
        schema: dict[str, tuple[type[Any], ...]] = {}
        for name, kind, *_ in parts:
            if name in tables:
                schema[tables[name]] = (*schema.get(tables[name], ()), _class_of(kind))
        values = read_toml(file, schema)
        # Those with a default have flags with a prefix.
        prefixed = [part[0] for part in parts if len(part) == 3 and part[0] in tables]
        parts = [_with_file(part, values[tables[part[0]]]) if part[0] in prefixed else part for part in parts]
        # As flags before the user's own, of which the last counts: a config is checked when all its values are there.
        in_flags = values.keys() - {tables[name] for name in prefixed}
        before = [arg for table in values if table in in_flags for arg in as_arguments(values[table])]
    listed = ", ".join(f"[{table}]" for table in dict.fromkeys(tables.values()))
    about_file = f"a TOML file, of which this command reads {listed}; flags win over it"
    parts = [*parts, ("config", flag(Path | None, about_file), None)]
    positionals = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    return parse_flags(command, about, parts, [*positionals, *before, *args[len(positionals) :]])


def _class_of(kind: object) -> type[Any]:
    cls = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    assert isinstance(cls, type)
    return cls


def _with_file(part: Part, values: dict[str, Any]) -> Part:
    """A part whose default has the values of a file: its flags have a prefix, and a stop string may look like one."""
    name, kind, default = part  # type: ignore[misc]
    settings: Any = default
    hints = get_type_hints(type(settings))
    # TOML has no paths.
    paths = {key: Path(value) for key, value in values.items() if Path in (hints[key], *get_args(hints[key]))}
    return name, kind, dataclasses.replace(settings, **(values | paths))


def parse_flags(command: str, about: str | None, parts: Sequence[Part], args: Sequence[str]) -> types.SimpleNamespace:
    """Read a command's flags with tyro; returns an object with the parts' names as attributes."""
    cls: type[Any] = dataclasses.make_dataclass("Arguments", map(_bounded_default, parts), kw_only=True)
    parsed = tyro.cli(cls, prog=f"textrl-gym {command}", args=list(args), description=about)
    return types.SimpleNamespace(**{name: _without_bounds(value) for name, value in vars(parsed).items()})


def flat(cls: type[Any]) -> object:
    """A dataclass whose fields are flags without a prefix."""
    return Annotated[with_bounds(cls), tyro.conf.OmitArgPrefixes]


def with_bounds(cls: type[Any]) -> type[Any]:
    """The dataclass with the bounds of its fields in the help of their flags: "(default: 0.2, > 0)"."""
    hints, bounds = get_type_hints(cls, include_extras=True), bounds_of(cls)
    fields = [
        (field.name, _hinted(hints[field.name], bounds[field.name]), dataclasses.field(default=field.default))
        for field in dataclasses.fields(cls)
        if field.name in bounds and not bounds[field.name].choices  # tyro prints choices itself
    ]
    if not fields:
        return cls
    # tyro finds the help by the first two.
    namespace = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__bounded__": True}
    frozen = cls.__dataclass_params__.frozen
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace=namespace, frozen=frozen)


def _bounded_default(part: Part) -> Part:
    """An argument whose default is of the class that its type was made from, by `with_bounds`."""
    if len(part) == 2:
        return part
    name, kind, default = part
    cls = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if not isinstance(cls, type) or "__bounded__" not in vars(cls) or type(default) is not cls.__base__:
        return part
    values: Any = default
    return name, kind, cls(**{field.name: getattr(values, field.name) for field in dataclasses.fields(values)})


def _without_bounds(value: object) -> object:
    """What was parsed, as an instance of the class that with_bounds was given: only then does it equal another one."""
    if "__bounded__" not in vars(type(value)):
        return value
    bare: Any = type(value).__base__
    parsed: Any = value
    return bare(**{field.name: getattr(value, field.name) for field in dataclasses.fields(parsed)})


def _hinted(kind: object, bounds: Bounds) -> object:
    return Annotated[kind, tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default}, {bounds})")]


def flag(kind: object, about: str) -> object:
    """A flag with its help."""
    return Annotated[kind, tyro.conf.arg(help=about)]


def positional(metavar: str, kind: object, about: str) -> object:
    """A positional argument with its help; metavar: how the usage line shows it."""
    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(help=about, metavar=metavar)]


def environment() -> Part:
    """The argument ENV."""
    about = "an environment id, module:ID, or module:Class of a Task; a module may be a file: tasks/mine.py:Mine"
    return ("environment", positional("ENV", str, about))


def env_flags(default: EnvSettings | None = None) -> Part:
    """The settings of the environment, as flags under --env."""
    return (ENV_TABLE, with_bounds(EnvSettings), default or EnvSettings())


# -- agents ------------------------------------------------------------------------------------------------------------


def find_agent(name: str) -> type[Agent]:
    """The agent class of a file in agents/, or at module:Class."""
    from textrl_gym import registry

    agent_class = registry.load_agent_class(name)  # first: a wrong name is said without waiting for torch
    from textrl_gym.training.agent import Agent

    if not (isinstance(agent_class, type) and issubclass(agent_class, Agent)):
        raise ValueError(f"{name!r} is {agent_class!r}, not a subclass of textrl_gym.agents.Agent")
    return agent_class
