"""Bounds of settings: read from annotations, checked, and printed with the help."""

from __future__ import annotations

import dataclasses
import importlib
import math
import operator
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt

from textrl_gym import registry
from textrl_gym.agents import PPO
from textrl_gym.bounds import bounds_of, check_settings
from textrl_gym.cli import options, train
from textrl_gym.training.config import AgentConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Base:
    number: Annotated[int, Ge(1)] = 4
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    decay: Annotated[float, Ge(0), Lt(1)] = 0.5
    limit: Annotated[float | None, Gt(0)] = None
    most: Annotated[int, Le(9)] = 1
    kind: Literal["a", "b"] = "a"
    free: float = -1.0
    flag: bool = False
    name: str | None = None
    file: Path | None = None
    counts: Annotated[tuple[int, ...], Ge(1)] = ()

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Tighter(Base):
    number: Annotated[int, Ge(2)] = 8
    share: float = 1.0
    """Declared again for another default: the bounds stay."""


def test_bounds_in_words() -> None:
    words = {name: str(bounds) for name, bounds in bounds_of(Tighter).items()}
    assert words == {
        "number": "at least 2",
        "share": "in (0, 1]",
        "decay": "in [0, 1)",
        "limit": "> 0",
        "most": "at most 9",
        "kind": "one of a, b",
        "counts": "at least 1",
    }
    assert str(bounds_of(Base)["number"]) == "at least 1"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"number": 1}, "number must be at least 2, got 1"),
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"share": math.nan}, "share must be a finite number, got nan"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"limit": 0}, "limit must be > 0, got 0"),
        ({"free": math.inf}, "free must be a finite number, got inf"),
        ({"free": True}, "free must be a finite number, got True"),
        ({"free": "1"}, "free must be a finite number, got '1'"),
        ({"number": 2.5}, "number must be a whole number, got 2.5"),
        ({"number": None}, "number must be a whole number, got None"),
        ({"limit": "x"}, "limit must be a finite number or None, got 'x'"),
        ({"flag": 1}, "flag must be True or False, got 1"),
        ({"name": 3}, "name must be a string that is not empty or None, got 3"),
        ({"counts": 3}, "counts must be a list, each a whole number, got 3"),
        ({"counts": (1, 2.0)}, r"counts must be a list, each a whole number, got \(1, 2.0\)"),
        ({"counts": (1, 0)}, r"counts must be at least 1, got \(1, 0\)"),
        ({"most": 10}, "most must be at most 9, got 10"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
    ],
)
def test_a_value_out_of_bounds_is_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tighter(**bad)


def test_values_at_closed_bounds_and_none_are_allowed() -> None:
    given: dict[str, Any] = {"number": np.int64(2), "share": 1, "decay": 0.0, "limit": None, "most": 9}
    config: Any = Tighter(**given, file="x", counts=[1])  # type: ignore[arg-type]
    assert (config.number, config.share, config.decay, config.limit, config.most) == (2, 1.0, 0.0, None, 9)
    assert (config.file, config.counts) == ("x", [1])  # as a checkpoint's JSON gives them


def test_help_prints_the_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.train_command(["ppo", "CopyText-v0", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The policy's ratio is clipped to 1 +- this. (default: 0.2, > 0)" in text
    assert "Discount of a token step. (default: 1.0, in [0, 1])" in text
    parsed = options.parse_flags("train", None, [("agent", options.flat(PPO.Config))], ["--clip-range", "0.5"])
    assert parsed.agent == PPO.Config(clip_range=0.5), "of the same class, or they would not be equal"
    shown = options.with_bounds(PPO.Config)
    assert isinstance(shown(clip_range=0.5), PPO.Config)
    with pytest.raises(ValueError, match="clip_range must be > 0, got -1"):
        shown(clip_range=-1.0)


def configs() -> list[type[Any]]:
    """Every dataclass of settings: those that check themselves, and what a command line reads."""
    found: set[type[Any]] = {Base}
    for name in registry.names("agents"):
        found.add(registry.load_agent_class(name).Config)
    for path in (ROOT / "textrl_gym").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "check_settings(self)" in source and path.name != "bounds.py" and "agents" not in path.parts:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            found |= {
                cls
                for cls in vars(module).values()
                if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
            }
    return sorted((cls for cls in found if hasattr(cls, "__post_init__")), key=lambda cls: cls.__qualname__)


class Bomb:
    """Neither a number nor a text nor anything else."""


HOSTILE: list[Any] = [math.nan, math.inf, -math.inf, -1, 1.5, True, 1j, "", "nan", b"x", 10**400, 2**63, None]
HOSTILE += [Bomb(), [], {}, (math.nan,), [1, "x"], np.float64("nan"), np.array([1, 2]), "x" * 9_999]
REQUIRED: dict[str, Any] = {"agents": ("ppo",), "ppo": "folder", "out": "folder", "env": "CopyText-v0"}
REQUIRED |= {"evaluate": "folder"}


def allowed(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, written apart from the checker."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return allowed(value, options[0]) and all(
            value is None or all(_within(one, limit) for one in (value if isinstance(value, tuple | list) else [value]))
            for limit in options[1:]
        )
    if origin is Literal:
        return isinstance(value, str) and value in options
    if origin in (Union, types.UnionType):
        return any(allowed(value, option) for option in options) and not (isinstance(value, str) and not value)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(allowed(one, options[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, (str, Path) if hint is Path else hint)


def _within(value: Any, limit: Any) -> bool:
    ((name, bound),) = dataclasses.asdict(limit).items()
    compare = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    return bool(compare[name](value, bound))


@pytest.mark.parametrize("cls", configs(), ids=lambda cls: cls.__qualname__)
def test_no_setting_of_any_command_takes_what_it_should_not(cls: type[Any]) -> None:
    hints, of_all = (get_type_hints(one, include_extras=True) for one in (cls, AgentConfig))
    lacking = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    given = {name: REQUIRED[name] for name in {*lacking, *(["ppo"] if "ppo" in hints else [])}}
    for field in dataclasses.fields(cls):
        for value in HOSTILE:
            lists = ("dataset", "eval_dataset")  # of preferences: one name may stand for a list, and None for none
            if field.name == "annotators" and isinstance(value, dict):
                continue  # as a run's record has them
            if field.name in lists and cls.__name__ == "RewardModelConfig" and isinstance(value, str | None):
                continue
            if allowed(value, hints[field.name]):
                continue  # it may still be refused, for what it means
            with pytest.raises(ValueError) as error:
                cls(**{**given, field.name: value})
            assert field.name in str(error.value), value
            assert len(str(error.value)) < 1_500
            if cls is not AgentConfig and hints[field.name] == of_all.get(field.name):
                break  # an agent's setting that all agents have: tried whole on theirs
