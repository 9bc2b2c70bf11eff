"""Claims: what a text says of facts that are known, and what it is worth by them.

Coverage and correctness of slots are as in PARENT (Dhingra et al. 2019, arXiv:1906.01081); the product is our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Claim(NamedTuple):
    """What a predicate or a sentence says."""

    slot: str | None
    """None: something that there is no fact about."""
    value: str


class Marks(NamedTuple):
    """What a text is worth, each in [0, 1]."""

    covered: float
    """Share of the facts that are said."""
    supported: float
    """Share of the claims that are facts and were not said before."""
    form: float
    """What its world asks of sentences."""
    invented: float
    """Share of the claims that are no facts."""

    @property
    def gold(self) -> float:
        """Coverage times correctness times form."""
        return self.covered * self.supported * self.form


def marks_of(claims: Sequence[Claim], facts: Mapping[str, str], form: float) -> Marks:
    """The marks of a text that makes these claims.

    Args:
        claims: in any order.
        facts: slot -> value.
        form: in [0, 1].
    """
    # A set, so that a fact that is said twice supports one slot and still counts twice among all claims.
    right = {claim.slot for claim in claims if claim.slot is not None and facts.get(claim.slot) == claim.value}
    wrong = sum(claim.slot is None or facts.get(claim.slot) != claim.value for claim in claims)
    count = max(len(claims), 1)
    return Marks(len(right) / len(facts), len(right) / count, form, wrong / count)


def listed(text: str) -> list[str]:
    """The parts of "a , b and c"."""
    head, joined, last = text.rpartition(" and ")
    return [*head.split(" , "), last] if joined else [last]
