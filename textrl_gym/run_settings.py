"""Settings of a training run from a TOML file and the command line, which wins. Loads no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The run as a whole."""

    total_timesteps: int | None = None
    """Generated tokens to train for; the last rollout is whole. Only agents that do not train go without."""
    seed: int = 0
    """Seeds prompts, sampling, shuffling and new weights."""
    out: Path | None = None
    """Folder for the checkpoint, the logs and the samples; None: runs/AGENT-ENV-seedS."""
    model: str | None = None
    """The causal LM to start from: a folder, a Hub id or smollm2-135m; None: the environment's own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    config: Path | None = None
    """A TOML file with the tables [agent], [train] and [env]; the command line wins over it."""

    def __post_init__(self) -> None:
        if self.total_timesteps is not None and self.total_timesteps < 1:
            raise ValueError(f"total_timesteps must be at least 1, got {self.total_timesteps}")


@dataclasses.dataclass(frozen=True)
class EnvSettings:
    """Keyword arguments of the environment; None: the task's own."""

    split: Literal["train", "validation", "test"] = "train"
    """The prompts to train on."""
    dataset: str | None = None
    """A Hub id, or a local file or folder; None: the embedded prompts."""
    tokenizer: str | None = None
    """A Hub id or a folder; None: the model's."""
    reward: str | None = None
    """A name, name:argument, package.module:name or a folder with a reward model; or a weighted sum of such, as
    rouge=1.0,length=-0.01 (in a TOML file a table)."""
    max_prompt_tokens: int | None = None
    """Longer prompts are cut at the end of their body."""
    max_new_tokens: int | None = None
    """The budget of a completion."""
    stop: tuple[str, ...] | None = None
    """Strings that end an episode."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of an episode whose budget ran out."""

    def keywords(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as the environment takes them."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {k: v for k, v in dataclasses.asdict(self).items() if v != defaults[k]}
        if self.reward is not None:
            given["reward"] = parse_reward(self.reward)
        if self.stop is not None:
            given["stop"] = list(self.stop)  # as a checkpoint's JSON gives it back
        return given


def parse_reward(text: str) -> str | dict[str, float]:
    """The reward that a flag names: "rouge" as it is, "rouge=1.0,length=-0.01" as a mapping of names to weights."""
    if Path(text).is_dir():
        return text  # a folder's name may hold "=" too
    parts = [part.rpartition("=") for part in text.split(",")]
    if not any(equals for _, equals, _ in parts):
        return text
    mixture: dict[str, float] = {}
    for name, _, weight in parts:
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or name in mixture or not math.isfinite(value):
            raise ValueError(f"reward {text!r} must be a name, or NAME=WEIGHT,NAME=WEIGHT,... with each name once")
        mixture[name] = value
    return mixture


def unknown(kind: str, name: str, allowed: Iterable[str], more: str = "") -> ValueError:
    """An error for a name that is none of the allowed ones, with the nearest of them."""
    names = sorted(allowed)
    lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; allowed: {', '.join(names)}{more}")


# -- TOML -------------------------------------------------------------------------------------------------------------


def read_toml(path: Path, schema: Mapping[str, tuple[type[Any], ...]]) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, each key checked against the fields of its dataclasses.

    Args:
        schema: table name -> the dataclasses whose fields it may set.

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
        if name not in schema or not isinstance(table, dict):
            raise ValueError(f"{path}: {unknown('table', name, schema)}")
    return {name: _checked(tables.get(name, {}), classes, f"{path}: [{name}]") for name, classes in schema.items()}


def _checked(table: dict[str, Any], classes: tuple[type[Any], ...], where: str) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for cls in classes:
        fields = {field.name for field in dataclasses.fields(cls)} - {"config"}
        hints |= {k: v for k, v in get_type_hints(cls).items() if k in fields}
    checked = {}
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"{where}: {unknown('key', key, hints)}")
        if key == "reward" and isinstance(value, dict):
            value = ",".join(f"{name}={weight}" for name, weight in value.items())
            parse_reward(value)
        if not matches(value, hints[key]):
            raise ValueError(f"{where}: {key} must be {describe(hints[key])}, got {value!r}")
        checked[key] = tuple(value) if isinstance(value, list) else value
    return checked


def matches(value: Any, hint: Any) -> bool:
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
    return type(value) is hint  # a bool is no int


def describe(hint: Any) -> str:
    """A field's type in words, without None, which TOML cannot say."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(hint) if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in get_args(hint))
    if origin is tuple:
        return f"a list, each item {describe(get_args(hint)[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a string"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def as_arguments(table: Mapping[str, Any]) -> list[str]:
    """A checked table as flags. They go before the user's own: of two equal flags the last one counts."""
    arguments = []
    for key, value in table.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments.append(f"--{flag}={value}")
    return arguments


# -- flags ------------------------------------------------------------------------------------------------------------


def parse(command: str, about: str | None, fields: Sequence[tuple[Any, ...]], args: Sequence[str]) -> Any:
    """Flags to an object with the given fields (name, type[, default]), by tyro."""
    cls = dataclasses.make_dataclass("Arguments", fields, kw_only=True)
    return tyro.cli(cls, prog=f"textrl-gym {command}", args=list(args), description=about)


def flat(cls: type[Any]) -> Any:
    """A dataclass whose fields are flags without a prefix."""
    return Annotated[cls, tyro.conf.OmitArgPrefixes]


def flag(kind: Any, about: str) -> Any:
    """A flag with its help."""
    return Annotated[kind, tyro.conf.arg(help=about)]


def place(kind: Any, about: str) -> Any:
    """A positional argument with its help."""
    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(help=about)]


# -- the environment --------------------------------------------------------------------------------------------------


def make_env(env_id: str, settings: EnvSettings, model: str | None, device: str, config: dict[str, Any]) -> Any:
    """The vector environment that an agent would make for itself, with the given settings."""
    import gymnasium
    from gymnasium.vector import AutoresetMode

    from textrl_gym import models

    tokenizer = {} if model is None else {"tokenizer": model}
    return gymnasium.make_vec(
        env_id,
        num_envs=config["rollout_episodes"],
        group_size=config["group_size"],
        array="torch",
        device=str(models.resolve_device(device)),
        autoreset_mode=AutoresetMode.DISABLED,
        **(tokenizer | settings.keywords()),
    )
