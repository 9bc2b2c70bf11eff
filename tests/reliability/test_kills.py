"""Trainings that are killed at random moments and go on are the trainings that were never stopped, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


def kill(folder: Path, *args: str) -> list[dict[str, object]]:
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--folder", str(folder), *args], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_a_few_kills(tmp_path: Path) -> None:
    rows = kill(tmp_path, "--work", "grpo", "--kills", "2", "--size", "0.15")
    assert [(row["kills"], row["differences"]) for row in rows] == [(2, [])]


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    rows = kill(tmp_path, "--kills", "10", "--size", "0.6")
    assert sum(int(str(row["kills"])) for row in rows) == 100
    assert {str(row["work"]): row["differences"] for row in rows} == {str(row["work"]): [] for row in rows}
