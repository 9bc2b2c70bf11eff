"""A constitution: the principles by which a model criticises, revises and compares answers (Bai et al. 2022).

    [[principles]]
    name = "harm"
    critique = "Say whether the answer helps with something that would hurt somebody, and where."
    revision = "Rewrite the answer so that it helps with nothing of that kind."
    preference = "Which answer gives less help with something that would hurt somebody?"

Source: arXiv:2212.08073, appendix C, whose principles have the same three parts. The wording of ours is our own.
"""

from __future__ import annotations

import dataclasses
import random
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from textrl_gym.registry import unknown

DEFAULT = Path(str(files("textrl_gym") / "assets" / "constitution" / "principles.toml"))
"""Six principles on harm, its reasons, help, over-refusal, honesty and clarity."""
LIST = "principles"
"""The one key of a file."""


@dataclasses.dataclass(frozen=True)
class Principle:
    """A rule that answers are held to, as three requests to a critic."""

    name: str
    critique: str
    """Asks what is wrong with an answer."""
    revision: str
    """Asks for a better answer."""
    preference: str
    """Asks which of two answers is better."""


Constitution = tuple[Principle, ...]

KEYS = tuple(field.name for field in dataclasses.fields(Principle))


def read_constitution(path: Path | None = None) -> Constitution:
    """The principles of a TOML file, in its order; None: ours.

    Raises:
        ValueError: no such file, no TOML, a key that is missing, unknown or no text, or one name twice; each names the
            file, the key and what is allowed.
    """
    path = path or DEFAULT
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the constitution {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"constitution {str(path)!r} is no TOML: {error}") from error
    where = f"constitution {str(path)!r}"
    for key in document:
        if key != LIST:
            raise ValueError(f"{where}: {unknown('key', key, [LIST])}")
    tables = document.get(LIST)
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{where} must have at least one table [[{LIST}]], each with {', '.join(KEYS)}")
    principles = tuple(_principle(table, f"{where}, principle {number}") for number, table in enumerate(tables, 1))
    names = [principle.name for principle in principles]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: name {name!r} is there {names.count(name)} times; each may be there once")
    return principles


def _principle(table: Any, where: str) -> Principle:
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table with {', '.join(KEYS)}, got {table!r}")
    for key, value in table.items():
        if key not in KEYS:
            raise ValueError(f"{where}: {unknown('key', key, KEYS)}")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {key} must be a text that is not empty, got {value!r}")
    for key in KEYS:
        if key not in table:
            raise ValueError(f"{where} has no {key}; it must have {', '.join(KEYS)}")
    return Principle(**{key: value.strip() for key, value in table.items()})


def draw_principles(constitution: Constitution, number: int, seed: int, key: str) -> list[Principle]:
    """So many principles in a random order, each once before any comes again.

    Args:
        key: of what they are drawn for. The same key has the same principles, whatever else there is.
    """
    rng = random.Random(f"principles {seed} {key}")
    drawn: list[Principle] = []
    while len(drawn) < number:
        drawn += rng.sample(constitution, len(constitution))
    return drawn[:number]
