"""Families of models: right beside their own plain forward, by whichever way; or refused in words, and at once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from model_families import WINDOW, compare, tiny_model

# Another order of the same sums moves these random models by up to 1e-5 nats; a fault moves them by 0.1 and more.
ATOL = 1e-3


def checked(family: str, window: int | None = None, **changes: Any) -> tuple[bool, bool, bool]:
    """Which ways were taken: shares, pads, caches; all of them right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = compare(tiny_model(family, window, **changes))
    assert found.worst < ATOL, found
    return found.ways.shares, found.ways.pads, found.ways.caches


@pytest.mark.parametrize(
    ("family", "window", "ways"),
    [
        ("llama", None, (True, True, True)),
        # Attention gets no window from these, and used to ignore it beyond its length.
        ("phimoe", WINDOW, (False, True, True)),
        ("qwen2_moe", WINDOW, (False, True, True)),
        ("doge", WINDOW, (False, True, True)),
        ("mistral", WINDOW, (True, True, True)),
        # Positions that padding on the left shifts.
        ("bart", None, (False, False, False)),
        ("roformer", None, (False, False, False)),
        ("xlm-roberta", None, (False, False, False)),
        # Raw errors before.
        ("deepseek_v3", None, (False, True, True)),
        ("minicpm3", None, (False, True, True)),
        ("afmoe", None, (False, True, True)),
        ("jetmoe", None, (False, True, True)),
        ("minimax", None, (False, True, True)),
        ("mamba", None, (False, True, False)),
    ],
)
def test_a_family_is_right_by_the_ways_that_are_left(
    family: str, window: int | None, ways: tuple[bool, bool, bool]
) -> None:
    assert checked(family, window) == ways
