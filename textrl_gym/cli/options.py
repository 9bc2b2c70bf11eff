"""Settings of a command from a TOML file and the command line, which wins. Loads no torch."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import tomllib
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, Union, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Ge
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from textrl_gym import files
from textrl_gym.bounds import Bounds, Seed, bounds_of, check_settings, name_here
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
    command: str,
    about: str | None,
    parts: Sequence[Part],
    tables: Mapping[str, str],
    args: Sequence[str],
    titles: Mapping[str, str] | None = None,
    first: Sequence[str] = (),
) -> types.SimpleNamespace:
    """Read a command's flags, with the TOML file that `--config` names as their defaults.

    Args:
        parts: as of `parse_flags`; those of `tables` are dataclasses, or `flat` ones.
        tables: name of a part -> the table of the file that sets it.
        first: flags that the file and the user's own win over.

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
    return parse_flags(command, about, parts, [*positionals, *first, *before, *args[len(positionals) :]], titles)


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


def parse_flags(
    command: str,
    about: str | None,
    parts: Sequence[Part],
    args: Sequence[str],
    titles: Mapping[str, str] | None = None,
) -> types.SimpleNamespace:
    """Read a command's flags with tyro; returns an object with the parts' names as attributes.

    Args:
        titles: name of a part -> what the help calls its panel, beside PANELS.
    """
    cls: type[Any] = dataclasses.make_dataclass("Arguments", map(_bounded_default, parts), kw_only=True)
    example = EXAMPLES.get(" ".join(command.split()[:2]), EXAMPLES.get(command.split()[0]))
    if example is not None:
        about = f"{about}\n\nExample: textrl-gym {example}"
    with _titled_help({**PANELS, **(titles or {})}) if {"-h", "--help"} & set(args) else contextlib.nullcontext():
        parsed = tyro.cli(cls, prog=f"textrl-gym {command}", args=list(args), description=about, registry=_registry())
    return types.SimpleNamespace(**{name: _without_bounds(value) for name, value in vars(parsed).items()})


EXAMPLES = {
    "envs": "envs",
    "agents": "agents",
    "env-info": "env-info",
    "check": "check TLDRSummarize-v0",
    "train": "train grpo TLDRSummarize-v0 --total-timesteps 200_000 --out runs/grpo",
    "evaluate": "evaluate runs/grpo --episodes 512",
    "compare": "compare CopyText-v0 --agents ppo grpo --seeds 3 --total-timesteps 1e5 --out runs/two",
    "lesson": "lesson MathWords-v0",
    "sizes": "sizes CalibratedQA-v0 --out runs/sizes",
    "reproduce": "reproduce runs/two/runs/grpo-0",
    "report": "report runs/grpo",
    "judge": "judge runs/two --judge gold --against start",
    "watch": "watch runs/two",
    "sft": "sft TLDRSummarize-v0 --env.dataset posts.jsonl --model smollm2-135m --out runs/sft",
    "reward-model": "reward-model TLDRSummarize-v0 --dataset pairs.jsonl --out runs/reward-model",
    "preferences": "preferences TLDRSummarize-v0 --n 500 --out pairs.jsonl",
    "annotate": "annotate TLDRSummarize-v0 --n 100 --out labels.jsonl",
    "labels report": "labels report labels.jsonl",
    "labels export": "labels export labels.jsonl --format trl --out pairs.jsonl",
    "labels import": "labels import comparisons.jsonl --format openai --out labels.jsonl",
    "play": "play GuessNumber-v0",
    "collect": "collect GuessNumber-v0 --episodes 200 --out games.jsonl",
    "rlhf": "rlhf CalibratedQA-v0 --rounds 3 --labels 200 --out runs/rounds",
    "constitutional": "constitutional HelpfulHarmless-v0 --set kl_coef=0.1",
    "export": "export runs/grpo --to exported",
    "bench": "bench --agent ppo",
}
"""One for each command, which its help shows."""
PANELS = {
    "run": "Run",
    "options": "Training",
    "env": "Environment",
    "settings": "Settings",
    "output": "Output",
    "launch": "Launching",
    "judging": "Judge",
    "endpoint": "Endpoint",
    "labellers": "Labellers",
    "annotators": "Simulated annotators",
    "reward-model": "Reward model",
    "critic": "Critic",
    "errors": "Errors of the rule-based critic",
}
"""Name of a part -> what the help calls its panel."""
WIDEST = 100
"""Columns of the help."""


def hold_names(args: Sequence[str], allowed: Collection[str]) -> None:
    """Hold that no flag has the name that a setting has in another library.

    Raises:
        ValueError: with its name here.
    """
    for arg in args:
        flag_name = arg.partition("=")[0]
        name = flag_name.removeprefix("--").replace("-", "_")
        if flag_name.startswith("--") and name not in allowed and (here := name_here(name, allowed)) is not None:
            raise ValueError(f"unknown setting {flag_name}: here it is --{here.replace('_', '-')}")


class _Help(io.StringIO):
    """Takes what is printed, and says of itself what the terminal behind it says."""

    encoding = "utf-8"

    def __init__(self, behind: TextIO) -> None:
        super().__init__()
        self.isatty = behind.isatty  # type: ignore[method-assign]  # colours are for terminals


@contextlib.contextmanager
def _titled_help(titles: Mapping[str, str]) -> Iterator[None]:
    """Inside, what tyro prints has the panels' titles, and is at most WIDEST columns wide.

    tyro names a panel after its field, with the word "options" behind it, and has no setting for either.
    """
    columns, printed = os.environ.get("COLUMNS"), _Help(sys.stdout)
    os.environ["COLUMNS"] = str(min(WIDEST, shutil.get_terminal_size().columns))
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
        text = re.sub(r"─ ([\w-]+) options ─+", functools.partial(_retitled, titles), printed.getvalue())
        # What is an empty list by default has nothing printed there.
        print(re.sub(r"\(default: (\)|, [^()]*\)) {4}", r"(default: none\1", text), end="")


def _retitled(titles: Mapping[str, str], line: re.Match[str]) -> str:
    title = titles.get(line[1], line[1].capitalize())
    return f"─ {title} ".ljust(len(line[0]), "─")


def _registry() -> ConstructorRegistry:
    """How values are read: whole numbers also as 1e5, and what may be None without saying so in the help."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kind, optional = _without_none(info.type)
        if optional and get_origin(kind) is tuple and get_args(kind)[0] in READERS:
            return _several(*READERS[get_args(kind)[0]])
        if kind not in READERS or (kind is not int and not optional):
            return None  # tyro's own rule
        read, metavar = READERS[kind]

        def from_words(words: list[str]) -> object:
            return None if optional and words[0] == "None" else read(words[0])

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=from_words,
            is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _several(read: Callable[[str], object], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Any number of values, or None."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{metavar} [{metavar} ...]]",
        instance_from_str=lambda words: None if words == ["None"] else tuple(map(read, words)),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None"] if value is None else list(map(str, value)),
    )


def _without_none(kind: Any) -> tuple[Any, bool]:
    """A type that may be None without that, and whether it may."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    others = [option for option in options if option is not type(None)]
    return (others[0], True) if len(others) == 1 and len(options) == 2 else (kind, False)


def whole(text: str) -> int:
    """A whole number: 100000, 100_000 or 1e5."""
    try:
        return int(text)
    except ValueError as error:
        with contextlib.suppress(ValueError, OverflowError):  # 1e5, but neither 1.5 nor inf
            if float(text) == int(float(text)):
                return int(float(text))
        raise ValueError(f"expected a whole number, such as 100000, 100_000 or 1e5, got {text!r}") from error


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"expected a number, got {text!r}") from error


READERS: dict[object, tuple[Callable[[str], object], str]] = {
    int: (whole, "INT"),
    float: (number, "FLOAT"),
    str: (str, "STR"),
    Path: (Path, "PATH"),
}
"""Type -> what reads a word of the command line, and what the help calls it."""


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
    return Annotated[kind, tyro.conf.arg(help_behavior_hint=_hint_of(bounds))]


def _hint_of(bounds: Bounds) -> Callable[[str], str]:
    return lambda default: f"(default: {default})" if bounds.choices else f"(default: {default}, {bounds})"


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


def own_flags(config: type[Any], base: type[Any]) -> tuple[type[Any], type[Any]]:
    """A config's own settings and those of its base, as two dataclasses of flags: the own ones are read first.

    What the config declares again, with a default or bounds of its own, is its own.
    """
    hints, bounds, docs = get_type_hints(config, include_extras=True), bounds_of(config), field_docs(config)
    own = {name for cls in config.__mro__ if cls not in base.__mro__ for name in vars(cls).get("__annotations__", ())}

    def some(fields: Sequence[dataclasses.Field[Any]], about: str | None) -> type[Any]:
        flags = []
        for field in fields:
            behaviour = _hint_of(bounds[field.name]) if field.name in bounds else None
            about_field = tyro.conf.arg(help=docs.get(field.name, ""), help_behavior_hint=behaviour)
            flags.append(
                (field.name, Annotated[hints[field.name], about_field], dataclasses.field(default=field.default))
            )
        return dataclasses.make_dataclass(config.__name__, flags, namespace={"__doc__": about}, frozen=True)

    fields = dataclasses.fields(config)
    first = some([field for field in fields if field.name in own], config.__doc__)
    return first, some([field for field in fields if field.name not in own], "Settings of every agent.")


def field_docs(config: type[Any]) -> dict[str, str]:
    """The sentence under each field of a dataclass and of its bases, as it stands in their source."""
    docs: dict[str, str] = {}
    for cls in reversed([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, below in itertools.pairwise(body.body):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(line.target, ast.Name):
                docs[line.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs


def find_agent(name: str) -> type[Agent]:
    """The agent class of a file in agents/, or at module:Class."""
    from textrl_gym import registry

    agent_class = registry.load_agent_class(name)  # first: a wrong name is said without waiting for torch
    from textrl_gym.training.agent import Agent

    if not (isinstance(agent_class, type) and issubclass(agent_class, Agent)):
        raise ValueError(f"{name!r} is {agent_class!r}, not a subclass of textrl_gym.agents.Agent")
    return agent_class
