"""Pages of the documentation that are programs: `python tests/run_page.py docs/lecture/04-bradley-terry.md` runs one.

A page's ```python blocks run in order as one script in an empty folder, in which a block with a title is a file. A
```text block right behind one holds what it printed, and a figure NAME.svg that the script saves is committed in
images/ beside the page. Running a page puts both into it anew, and the table of settings behind a line
`<!-- defaults: grpo dapo -->`. `--notebooks FOLDER` writes all such pages for Jupyter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FOLDERS = ("tutorials", "lecture", "algorithms")
"""Folders of docs/ whose pages with Python are programs."""
BLOCK = re.compile(
    r'^```python(?: title="(?P<title>[^"\n]+)")?\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?',
    re.M | re.S,
)
FIGURE = re.compile(r"^!\[[^\]]+\]\(images/([\w-]+\.svg)\)\n", re.M)
DEFAULTS = re.compile(r"^<!-- defaults: (?P<agents>[\w ]+) -->\n\n(?P<table>(?:\|[^\n]*\n)*)\n?", re.M)
END = "\x1eend of block"
"""Printed behind each block, to tell what each one printed."""


def pages(folder: str) -> list[Path]:
    """The programs in a folder of docs/, in their order."""
    return sorted(page for page in (DOCS / folder).glob("*.md") if BLOCK.search(page.read_text(encoding="utf-8")))


def programs() -> list[Path]:
    """All pages that are programs."""
    return [page for folder in FOLDERS for page in pages(folder)]


def files(page: Path) -> dict[str, str]:
    """Name -> text of the files that the page has the reader write."""
    return {
        match["title"]: match["code"] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match["title"]
    }


def blocks(page: Path) -> list[str]:
    """The Python blocks that run."""
    return [match["code"] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if not match["title"]]


def figures(page: Path) -> list[str]:
    """The names of the figures that the page shows."""
    return FIGURE.findall(page.read_text(encoding="utf-8"))


def run(page: Path, folder: Path, timeout: float | None = None) -> tuple[list[str], float]:
    """Run a page's blocks as a script of one thread and without a network.

    Returns:
        what each block printed, progress bars left out, and seconds of CPU.

    Raises:
        RuntimeError: the script failed, with the end of what it said.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    for name, text in files(page).items():
        (folder / name).write_text(text, encoding="utf-8")
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
    # A progress bar says how long it took here.
    quiet_lines = "".join(line for line in done.stdout.splitlines(keepends=True) if "━" not in line)
    return [part.strip("\n") for part in quiet_lines.split(END)[:-1]], seconds


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


# -- settings of agents -----------------------------------------------------------------------------------------------

OF_UPDATES = ("rollout_episodes", "group_size", "learning_rate", "epochs", "minibatches")
"""What an update is made of: in the tables of all agents that train."""


def defaults_table(agents: Sequence[str]) -> str:
    """The defaults of agents, as a table: what an update is made of, and all that is not as it is for every agent."""
    from textrl_gym import registry
    from textrl_gym.agents import AgentConfig

    classes = [registry.load_agent_class(name) for name in agents]
    common = {field.name: field.default for field in dataclasses.fields(AgentConfig)}
    own = [{field.name: field.default for field in dataclasses.fields(one.Config)} for one in classes]

    def shown(field: str) -> bool:
        of_update = field in OF_UPDATES and any(one.trains for one in classes)
        return of_update or any(field in has and has[field] != common.get(field, ...) for has in own)

    names = [name for name in dict.fromkeys([*common, *(name for has in own for name in has)]) if shown(name)]
    rows = [["setting", *(f"`{agent}`" for agent in agents)], ["---"] * (len(agents) + 1)]
    rows += [[f"`{name}`", *(_word(has[name]) if name in has else "" for has in own)] for name in names]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value}" if value != "" else '""'


# -- printing again, notebooks ----------------------------------------------------------------------------------------


def print_again(page: Path) -> float:
    """Run a page, and put what it printed and drew into the documentation; returns seconds of CPU."""
    with tempfile.TemporaryDirectory() as folder:
        printed, seconds = run(page, Path(folder))
        for figure in Path(folder).glob("*.svg"):
            (page.parent / "images" / figure.name).write_text(
                compact(figure.read_text(encoding="utf-8")), encoding="utf-8"
            )
    outputs = iter(printed)

    def with_output(match: re.Match[str]) -> str:
        if match["title"]:
            return match[0]
        text = next(outputs)
        return f"```python\n{match['code']}```\n" + (f"\n```text\n{text}\n```\n" if text else "")

    text = BLOCK.sub(with_output, page.read_text(encoding="utf-8"))
    text = DEFAULTS.sub(
        lambda match: f"<!-- defaults: {match['agents']} -->\n\n{defaults_table(match['agents'].split())}\n", text
    )
    page.write_text(text, encoding="utf-8")
    return seconds


INSTALL = """This notebook is a page of the documentation of textrl-gym, which must be installed: in a checkout,
`pip install -e '.[dev]' -c constraints.txt`. Nothing else is fetched."""


def notebook(page: Path) -> dict[str, Any]:
    """A page as a notebook (nbformat 4.5): its blocks as cells, with what they printed and drew."""
    import nbformat.v4 as nb

    text, at = page.read_text(encoding="utf-8"), 0
    cells = [nb.new_markdown_cell(INSTALL)]

    def prose(part: str) -> None:
        # A link leads into the documentation, which is not beside the notebook; a figure is what the cell above draws.
        part = re.sub(r"\[([^\]]+)\]\((?![a-z]+:)([^)]+)\)", lambda m: _named(page, m), FIGURE.sub("", part))
        if part.strip():
            cells.append(nb.new_markdown_cell(part.strip()))

    for match in BLOCK.finditer(text):
        prose(text[at : match.start()])
        at = match.end()
        code = (f"%%writefile {match['title']}\n" if match["title"] else "") + match["code"].rstrip("\n")
        outputs = [nb.new_output("stream", text=match["printed"])] if match["printed"] else []
        drawn = [name for name in re.findall(r'savefig\("([\w-]+\.svg)"', code) if name in figures(page)]
        outputs += [
            nb.new_output(
                "display_data", {"image/svg+xml": (page.parent / "images" / name).read_text(encoding="utf-8")}
            )
            for name in drawn
        ]
        cells.append(nb.new_code_cell(code, outputs=outputs))
    prose(text[at:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # not nbformat's random one: the same page is the same notebook
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return dict(nb.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}))


def _named(page: Path, link: re.Match[str]) -> str:
    target, _, _ = link[2].partition("#")
    if not target:
        return link[1]
    return f"{link[1]} ({os.path.relpath(page.parent / target, ROOT)})"


def write_notebooks(folder: Path) -> None:
    """Every program as a notebook, in folders as those of docs/."""
    for page in programs():
        path = folder / page.relative_to(DOCS).with_suffix(".ipynb")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(notebook(page), indent=1) + "\n", encoding="utf-8")


def execute(page: Path, folder: Path, timeout: float) -> list[Any]:
    """Run a page's notebook by a kernel of its own, in a folder, with short trainings; returns its cells.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        nbclient.exceptions.CellTimeoutError: a cell took longer than `timeout` seconds.
    """
    import nbformat
    from docs_blocks import TRAINING
    from nbclient import NotebookClient

    made = nbformat.from_dict(notebook(page))
    for cell in made.cells:
        if cell.cell_type == "code":
            # test_a_page_runs_as_it_is_printed has the whole budget.
            cell.source, cell.outputs = TRAINING[0].sub(TRAINING[1], cell.source), []
    client = NotebookClient(made, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    client.execute(env=os.environ | quiet)
    return list(made.cells)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--notebooks"]:
        write_notebooks(Path(sys.argv[2]))
    else:
        for name in sys.argv[1:]:
            print(f"{name}: {print_again(Path(name).resolve()):.1f} seconds of CPU", flush=True)
