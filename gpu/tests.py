"""The step `tests`: pytest on the tests that compare devices, with what each of them gave."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu.numbers import Numbers

ROOT = Path(__file__).resolve().parents[1]
FILES = {"cuda": ["tests/test_devices.py", "tests/test_rewards.py"], "cpu": ["tests/test_devices.py"]}
"""On a GPU the files with tests that carry the mark (importing all others would take half a minute of the nine);
without one, the bodies that are written for both."""


class Listener:
    """A pytest plugin that writes each test's outcome as it ends."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        self.outcomes: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's call has ended, or its setup went wrong."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.outcomes[report.outcome].append(report.nodeid.removeprefix("tests/"))
        self.numbers.add(**self.outcomes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    mark = "gpu" if args.device == "cuda" else "not gpu and not slow"
    # Warnings stay warnings here: another version of a library may warn, and the run cannot be repeated at will.
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", mark]
    options += ["--continue-on-collection-errors"]  # a library that is not there must not stop the tests of others
    paths = [str(ROOT / path) for path in FILES[args.device]]
    return int(pytest.main([*options, *paths], plugins=[Listener(Numbers(args.out))]))


if __name__ == "__main__":
    sys.exit(main())
