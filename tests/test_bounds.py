"""Bounds of settings: read from annotations, checked, and printed with the help."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Lt

from textrl_gym.agents import PPO
from textrl_gym.bounds import bounds_of, check_settings
from textrl_gym.cli import options, train


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
        ({"name": 3}, "name must be a string or None, got 3"),
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
