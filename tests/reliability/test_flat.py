"""A training needs no more memory, file handles or threads after 2,000 updates than it did before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("flat.py")


def measure(work: str, updates: int, folder: Path) -> dict[str, list[int]]:
    command = [sys.executable, str(SCRIPT), work, "--updates", str(updates), "--folder", str(folder / work)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    seen: dict[str, list[int]] = json.loads(process.stdout.splitlines()[-1])
    return seen


def growth(values: list[int]) -> float:
    """By what share of their mean the straight line through the last half of the values rises."""
    half = np.array(values[len(values) // 2 :], dtype=float)
    slope, _ = np.polyfit(np.arange(len(half)), half, 1)
    return float(slope * (len(half) - 1) / half.mean())


def test_growth_by_hand() -> None:
    # the last half of 0, 0, 99, 100, 101: 99, 100, 101 rises by 2 of 100
    assert growth([0, 0, 99, 100, 101]) == pytest.approx(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["grpo", "ppo", "dpo", "sb3_ppo", "sft"])
def test_2000_updates_are_flat(work: str, tmp_path: Path) -> None:
    seen = measure(work, 2_000, tmp_path)
    assert len(seen["bytes"]) >= 99
    assert abs(growth(seen["bytes"])) < 0.01, seen["bytes"]
    for name in ("handles", "threads"):
        half = seen[name][len(seen[name]) // 2 :]
        assert max(half) == min(half), (name, seen[name])
