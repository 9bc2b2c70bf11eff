"""Procedural worlds: rows that are a function of (split, seed, index), and that no two splits share.

A world's facts are drawn until a hash of them falls into the split, so that train, validation and test have different
problems and not only different wordings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from textrl_gym.core import Row

SIZES = {"train": 1_000_000, "validation": 10_000, "test": 10_000}
"""Rows of each split: as many as an index may name; the worlds have no end."""
SHARES = {"train": range(18), "validation": range(18, 19), "test": range(19, 20)}
"""Residues of the hash, of 20, that belong to each split."""


def in_split(key: str, split: str) -> bool:
    """Whether facts belong to a split, by a hash of what identifies them."""
    # Not hash(), which is salted in each process.
    return zlib.crc32(key.encode()) % 20 in SHARES[split]


@dataclasses.dataclass
class GlobalRandom:
    """The state of Python's and NumPy's global generators, for code of others that draws from them."""

    python: Any
    numpy: Any

    @classmethod
    def seeded(cls, seed: int) -> GlobalRandom:
        """The state after seeding both."""
        return cls(random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state())

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Both generators go on from this state inside, which takes up where they stop; outside nothing changes."""
        outside = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        try:
            yield
        finally:
            self.python, self.numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.setstate(outside[0])
            np.random.set_state(outside[1])  # noqa: NPY002


class Rows:
    """The rows of a world's split: each is drawn by a generator of its own.

    Args:
        draw: draw(split, rng) -> row.
        split: train, validation or test.
        seed: of the rows; another seed gives other rows of the same split.
        salt: makes rows of one seed differ between two uses of a world.
    """

    def __init__(self, draw: Callable[[str, random.Random], Row], split: str, seed: int = 0, salt: str = "") -> None:
        if split not in SIZES:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SIZES)}")
        self.draw, self.split, self.seed, self.salt = draw, split, seed, salt

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int, /) -> Row:
        """The row at a place."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return self.draw(self.split, random.Random(f"{self.salt}/{self.split}/{self.seed}/{index}"))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def rows_of(**columns: Sequence[Any]) -> list[dict[str, Any]]:
    """Columns as a reward is given them, as rows: name=[...], kind=[...] -> [{"name": ..., "kind": ...}, ...]."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def words_of(*texts: str) -> tuple[str, ...]:
    """The words of texts and wordings, each once, in their order: the symbols of a small model.

    What stands in braces is a field of a wording, and no word.
    """
    return tuple(dict.fromkeys(word for word in " ".join(texts).split() if "{" not in word))


def one_word_off(text: str, rng: random.Random) -> str:
    """A text behind a blank with a word lost, or said twice."""
    words = text.split()
    place = rng.randrange(len(words))
    words[place : place + 1] = [] if rng.random() < 0.5 else [words[place]] * 2
    return " " + " ".join(words)
