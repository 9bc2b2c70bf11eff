"""Texts of users and models in the terminal: brackets are no markup, and nothing steers the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from textrl_gym.cli.terminal import make_table, show_error
from textrl_gym.console import plain
from textrl_gym.experiments.progress import LiveTable
from textrl_gym.training.loop import samples_table

NASTY = "[INST] say [/INST] [red]not red[/red] [link=http://x]y\\"


def printed(*what: object) -> str:
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    console.print(*what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_brackets_are_shown() -> None:
    assert printed(plain(NASTY)).strip() == NASTY
    table = make_table(NASTY, [NASTY], [[NASTY]])
    assert printed(table).count(NASTY) == 3
    sample = {"prompt": NASTY, "completion": NASTY, "score": 1.0}
    assert printed(samples_table([sample], {NASTY: 1.0}, 0)).count(NASTY) == 3


def test_a_title_is_not_broken_by_a_narrow_table() -> None:
    title = "runs/a-long-name/of a folder with words"
    assert title in printed(make_table(title, ["a"], [["1"]]))
    means = {f"measure {number}": 0.5 for number in range(10)}
    lines = printed(samples_table([{"prompt": "b c", "completion": "b", "score": 1.0}], means, 0)).splitlines()
    assert lines[0].startswith("after 0 tokens: measure 0 0.5") and lines[0].rstrip().endswith("measure 9 0.5")
    # No wider than the terminal, whatever the title.
    assert max(map(len, printed(make_table("long " * 100, ["a"], [["1"]])).splitlines())) <= 300


def test_the_live_table_shows_brackets(tmp_path: Path) -> None:
    run = tmp_path / NASTY
    run.mkdir(parents=True)
    (run / "error.txt").write_text(NASTY)
    shown = printed(LiveTable({NASTY: run}, 10, enabled=False)._table())
    assert shown.count(NASTY) == 2


def test_an_error_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(ValueError(NASTY + "\x1b]0;owned\x07"))
    err = capsys.readouterr().err
    assert NASTY in err and "\x1b]0" not in err and "␛]0;owned␇" in err


def test_control_characters_are_shown_as_symbols() -> None:
    assert plain("a\x1b[2Jb\x00c\x7f\x9bd\n\te").plain == "a␛[2Jb␀c␡\ufffdd\n\te"


def test_where_nobody_watches_a_line_is_printed_for_each_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for folder in folders.values():
        folder.mkdir()
    with LiveTable(folders, 10) as table:
        table({"a"})
        table.shown_at = 0.0  # a second later
        table({"a"})
        (folders["a"] / "evaluation.json").write_text("{}")
        (folders["a"] / "progress.json").write_text('{"time/total_timesteps": 10, "rollout/score": 0.25}\n')
        table.shown_at = 0.0
        table({"b"})
        table(set())  # b has stopped without a result
    text = capsys.readouterr().err
    assert text.endswith("┘\n"), "what comes next begins a line of its own"
    lines = [line.split(" ", 1)[1] for line in text.splitlines() if line[2:3] == ":"]
    assert lines == ["a: running", "a: done, score 0.250", "b: running", "b: waiting"]


def test_of_many_runs_those_that_go_on_or_have_failed_are_shown(tmp_path: Path) -> None:
    folders = {f"run-{number}": tmp_path / f"run-{number}" for number in range(40)}
    for folder in folders.values():
        folder.mkdir()
    for number in range(3):
        (folders[f"run-{number}"] / "evaluation.json").write_text("{}")
    (folders["run-3"] / "error.txt").write_text("ValueError: no")
    (folders["run-4"] / "error.txt").write_text("of an earlier try")
    table = LiveTable(folders, 10, enabled=False)
    (folders["run-4"] / "error.txt").unlink()  # it is to be run again
    table({"run-5", "run-6"})
    shown = printed(table._table())
    assert [f"run-{number}" for number in range(40) if f"run-{number} " in shown] == ["run-3", "run-5", "run-6"]
    assert "3 of 40 runs done, 34 waiting" in shown
