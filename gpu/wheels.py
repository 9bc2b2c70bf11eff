"""`make gpu-wheels`: what a machine with a GPU, Python 3.12 and torch lacks, as wheels that install without a network.

    python -m gpu.wheels --out .whl
    # there, into its own Python:
    python3 -m pip install --no-index --find-links .whl textrl-gym sb3-contrib plotly
    # or beside it, whatever else lies there:
    python3 -m pip install --no-index --no-deps --target site .whl/*.whl && PYTHONPATH=site make gpu

The machine is expected to have torch, transformers, accelerate, peft, pytest, hypothesis and tensorboard, with what
they need. The folder stays under a limit, since what travels to such a machine is limited: what is too large is left
out, and said.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_MIB = 60
DROPPED_FIRST = {
    "pyarrow": "TRL's side of the comparison is skipped on a machine that has none",
    "pandas": "the same",
    "plotly": "pages cannot be written there",
}
"""What is left out, in this order, where the folder would be too large; and what is lost."""
WANTED = (
    *("annotated-types", "gymnasium", "farama-notifications", "cloudpickle", "rich", "markdown-it-py", "mdurl"),
    *("stable-baselines3", "sb3-contrib", "tyro", "docstring-parser", "typeguard", "tomli-w"),
    *("nltk", "defusedxml", "click", "joblib", "absl-py", "six", "plotly", "narwhals"),
    *("trl==1.16.0", "datasets", "dill", "multiprocess", "xxhash", "pyarrow", "pandas", "python-dateutil"),
)
FROM_SOURCE = ("rouge-score",)
"""Pure Python whose newest version has no wheel."""
# pip takes a wheel only for a platform that is named, and not for older ones.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def pip(*arguments: str) -> None:
    """Run this Python's pip; its output goes to the terminal."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def collect(out: Path) -> None:
    """Download and build all wheels into a folder."""
    target = [word for name in PLATFORMS for word in ("--platform", name)]
    target += ["--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:"]
    # --no-deps, because torch would bring gigabytes; the constraints are what this project was tested with.
    pinned = ["--no-deps", "-c", str(ROOT / "constraints.txt"), "--quiet"]
    pip("download", *pinned, *target, "-d", str(out), *WANTED)
    pip("wheel", *pinned, "-w", str(out), *FROM_SOURCE)
    pip("wheel", "--no-deps", "--quiet", "-w", str(out), str(ROOT))


def mib(files: Sequence[Path]) -> float:
    """The size of files."""
    return sum(path.stat().st_size for path in files) / 2**20


def slim(out: Path, limit_mib: float = LIMIT_MIB) -> dict[str, str]:
    """Remove what is too large for the limit; returns what was left out and why that matters.

    Raises:
        ValueError: it is too large all the same.
    """
    left_out = {}
    for name, lost in DROPPED_FIRST.items():
        if mib([*out.glob("*.whl")]) < limit_mib:
            break
        for wheel in out.glob(f"{name}-*.whl"):
            left_out[f"{name} ({mib([wheel]):.0f} MiB)"] = lost
            wheel.unlink()
    if (size := mib([*out.glob("*.whl")])) >= limit_mib:
        raise ValueError(f"the wheels in {out} have {size:.0f} MiB, allowed are {limit_mib:.0f}")
    return left_out


def main(argv: Sequence[str] | None = None) -> None:
    """Collect the wheels, and say how large they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".whl"), help="folder; its wheels are replaced")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.whl"):  # two versions of one library would stop the whole installation
        old.unlink()
    collect(args.out)
    for name, lost in slim(args.out).items():
        print(f"left out: {name}: {lost}")
    found = [*args.out.glob("*.whl")]
    print(f"{args.out}: {len(found)} wheels, {mib(found):.1f} MiB")


if __name__ == "__main__":
    main()
