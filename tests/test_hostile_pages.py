"""Every field of every file that a page is made from, with HTML in it: it is shown as text, or the file is refused.

The marker is looked for outside of what is escaped: a page that holds "<hostile" anywhere would run it.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_comparison_page import write_comparison

from textrl_gym.experiments.results import read_comparison
from textrl_gym.reports import comparison_page
from textrl_gym.reports.run_page import report
from textrl_gym.web import watched

MARK = """"'></script><hostile src=x onerror=alert(1)>"""
GONE = object()
"""In place of a value: the field is missing."""
GONE = object()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of some JSON, and to each key of an object with names of its own."""
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
        yield (*path, MARK)  # a key that nobody knows
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))
    if path:
        yield path


def changed(value: Any, path: tuple[Any, ...], new: object) -> Any:
    """A copy of some JSON with another value at a place, or without it."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if new is not GONE:
        inner[path[-1]] = new
    elif path[-1] in inner or isinstance(path[-1], int):
        del inner[path[-1]]
    return copy


def hostile(folder: Path) -> Iterator[tuple[Path, str, tuple[Any, ...]]]:
    """Each file with each of its fields replaced: the file, its new text, and the field."""
    for file in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        text = file.read_text()
        lines = text.splitlines() if file.suffix == ".jsonl" or file.name == "progress.json" else [text]
        if not lines:
            continue
        for path in places(json.loads(lines[0])):
            for new in (MARK, [MARK], {MARK: MARK}, 7, GONE):
                first = json.dumps(changed(json.loads(lines[0]), path, new))
                yield file, "\n".join([first, *lines[1:]]) + "\n", path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with everything that a page can show, as small as that can be."""
    folder = tmp_path_factory.mktemp("comparison")
    write_comparison(folder)
    runs = sorted((folder / "runs").iterdir())
    agents: set[str] = set()
    for run in runs:  # one run of each agent
        agent = run.name.rpartition("-")[0]
        if agent in agents:
            shutil.rmtree(run)
        agents.add(agent)
    return folder


def check(folder: Path, every: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Try each n-th change; returns how many pages were made, and how many folders refused."""
    real = comparison_page.asset
    # What takes the time of a page, and no file of a run is in it.
    monkeypatch.setattr(comparison_page, "asset", lambda name: "" if name == comparison_page.PLOTLY else real(name))
    shown = refused = 0
    for number, (file, text, path) in enumerate(hostile(folder)):
        if number % every:
            continue
        before = file.read_text()
        file.write_text(text)
        try:
            page = comparison_page.comparison_html(read_comparison(folder), "v")
            now = watched.look(folder)
            now.status()
            page += now.curves_html()
        except ValueError:
            refused += 1
        else:
            shown += 1
            assert "<hostile" not in page, (file, path)
        finally:
            file.write_text(before)
    return shown, refused


def test_fields_of_a_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, refused = check(folder, 29, monkeypatch)
    assert shown > 5 and refused > 5


@pytest.mark.slow
def test_every_field_of_a_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, refused = check(folder, 1, monkeypatch)
    assert shown > 100 and refused > 100


def test_every_field_of_a_run(folder: Path, tmp_path: Path) -> None:
    run = next(run for run in sorted((folder / "runs").iterdir()) if (run / "evaluations.jsonl").is_file())
    shown = refused = 0
    for file, text, path in hostile(run):
        before = file.read_text()
        file.write_text(text)
        try:
            page = report([run], tmp_path / "report.html").read_text()
        except ValueError:
            refused += 1
        else:
            shown += 1
            assert "<hostile" not in page, (file, path)
        finally:
            file.write_text(before)
    assert shown > 20 and refused > 20
