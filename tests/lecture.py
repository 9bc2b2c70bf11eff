"""The lecture's pages as programs: `python tests/lecture.py docs/lecture/04-bradley-terry.md` runs and prints again.

A page's ```python blocks run in order as one script in an empty folder. A ```text block right behind one holds what it
printed, and a figure NAME.svg that the script saves is committed as docs/lecture/images/NAME.svg.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LECTURE = ROOT / "docs" / "lecture"
IMAGES = LECTURE / "images"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.M | re.S)
END = "\x1eend of block"
"""Printed behind each block, to tell what each one printed."""


def pages() -> list[Path]:
    """The pages in their order."""
    return sorted(LECTURE.glob("[0-9][0-9]-*.md"))


def blocks(page: Path) -> list[str]:
    """Its Python blocks."""
    return [match[1] for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def run(page: Path, folder: Path, timeout: float | None = None) -> tuple[list[str], float]:
    """Run a page's blocks as a script of one thread and without a network.

    Returns:
        what each block printed, and seconds of CPU.

    Raises:
        RuntimeError: the script failed, with the end of what it said.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    script = folder / "page.py"
    script.write_text("".join(f"{block}\nprint({END!r})\n" for block in blocks(page)), encoding="utf-8")
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, script.name], cwd=folder, env=os.environ | quiet, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{page.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [part.strip("\n") for part in done.stdout.split(END)[:-1]], seconds


def compact(svg: str) -> str:
    """A figure without what nobody sees: six digits of a point, the style of each of many dots, long names, blanks."""
    svg = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", svg)
    for number, name in enumerate(dict.fromkeys(re.findall(r'id="(m[0-9a-f]{8,})"', svg))):
        svg = svg.replace(name, f"m{number}")
    # A group of dots has one style, which they inherit; dots in several colours keep theirs.
    dots = re.compile(r'(<g clip-path="[^"]*")>((?:\s*<use [^>]*style="([^"]*)"/>)(?:\s*<use [^>]*style="\3"/>)+)')
    svg = dots.sub(lambda match: f'{match[1]} style="{match[3]}">' + match[2].replace(f' style="{match[3]}"', ""), svg)
    svg = re.sub(r'(<use [^>]*?x="\d+\.\d)\d" y="(\d+\.\d)\d"', r'\1" y="\2"', svg)
    return "".join(line.strip() + "\n" for line in svg.splitlines())


def print_again(page: Path) -> float:
    """Run a page, and put what it printed and drew into the documentation; returns seconds of CPU."""
    with tempfile.TemporaryDirectory() as folder:
        printed, seconds = run(page, Path(folder))
        for figure in Path(folder).glob("*.svg"):
            (IMAGES / figure.name).write_text(compact(figure.read_text(encoding="utf-8")), encoding="utf-8")
    outputs = iter(printed)

    def with_output(match: re.Match[str]) -> str:
        text = next(outputs)
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    page.write_text(BLOCK.sub(with_output, page.read_text(encoding="utf-8")), encoding="utf-8")
    return seconds


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {print_again(Path(name)):.1f} seconds of CPU", flush=True)
