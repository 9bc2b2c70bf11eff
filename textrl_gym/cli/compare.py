"""`textrl-gym compare`, and what shows its results: `report` and `watch`. No torch before the flags are read."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from textrl_gym.cli.options import (
    CONFIG_FILE,
    Part,
    as_arguments,
    env_flags,
    environment,
    find_agent,
    flag,
    flat,
    parse_command,
    parse_flags,
    positional,
    write_toml,
)
from textrl_gym.registry import find_env


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the comparison is."""

    out: Path
    """The comparison's folder; the same one goes on."""


def _compare_flags(args: Sequence[str]) -> SimpleNamespace:
    """The flags of compare. Settings that a suite names come first: the file's and the user's win."""
    from textrl_gym.experiments.compare import CompareConfig
    from textrl_gym.experiments.launching import LaunchConfig
    from textrl_gym.experiments.suite import BENCHMARK, SUITES

    about = "environment ids, module:ID or module:Class; several make a comparison over tasks"
    about_suite = f"{', '.join(SUITES)}: the environments of a suite in place of ENV; benchmark also sets the rest"
    parts: list[Part] = [
        ("environments", positional("ENV", tuple[str, ...], about), ()),
        ("suite", flag(str | None, about_suite), None),
        ("output", flat(Output)),
        ("settings", flat(CompareConfig)),
        ("launch", flat(LaunchConfig)),
        env_flags(),
    ]
    tables = {"output": "compare", "settings": "compare", "launch": "compare", "env": "env"}
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--suite")
    first = as_arguments(changes(BENCHMARK)) if peek.parse_known_args(args)[0].suite == "benchmark" else ()
    return parse_command("compare", compare_command.__doc__, parts, tables, args, first=first)


def compare_command(args: Sequence[str]) -> int:
    """Compare agents x seeds x KL coefficients on the same prompts, reward and budget; stopped, it goes on."""
    from textrl_gym.experiments import compare as home
    from textrl_gym.experiments.results import ERROR, RUNS
    from textrl_gym.experiments.suite import SUITES, compare_suite, suite

    parsed = _compare_flags(args)
    out = parsed.output.out
    if parsed.suite is not None and parsed.environments:
        raise ValueError("give environments or --suite, and not both")
    names = suite(parsed.suite) if parsed.suite is not None else parsed.environments
    if not names:
        raise ValueError(f"compare needs ENV first, or --suite {', '.join(SUITES)}")
    env_ids = [find_env(name) for name in names]
    # A wrong name is said before the folder is made and any worker starts.
    for agent in parsed.settings.agents:
        if not Path(agent).is_dir():
            find_agent(agent)
    try:
        if len(env_ids) > 1:
            table = compare_suite(env_ids, parsed.settings, out, env=parsed.env, launch=parsed.launch)
        else:
            table = home.compare(env_ids[0], parsed.settings, out, env=parsed.env, launch=parsed.launch)
    except KeyboardInterrupt:
        print(f"go on with the same command, --out {out}", file=sys.stderr)
        raise
    write_toml(out / CONFIG_FILE, {"env": parsed.env, "compare": [parsed.output, parsed.settings, parsed.launch]})
    several = len(env_ids) > 1
    folders = {env_id: out / env_id for env_id in env_ids} if several else {env_ids[0]: out}
    for env_id, folder in folders.items():
        finished = table[table["environment"] == env_id].drop(columns="environment") if several else table
        if several:
            print(env_id)
        home.print_finals(finished)
        if not finished.empty:
            show_page(folder)
    if several:
        show_suite(out)
    failed = [
        f"{env_id}/{path.parent.name}" if several else path.parent.name
        for env_id, folder in folders.items()
        for path in sorted((folder / RUNS).glob(f"*/{ERROR}"))
    ]
    print(f"saved in {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    # What has finished is shown and saved all the same.
    return 1 if failed else 0


def changes(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not their defaults."""
    values = {field.name: (getattr(settings, field.name), field.default) for field in dataclasses.fields(settings)}
    return {name: value for name, (value, default) in values.items() if value != default}


def show_suite(folder: Path) -> None:
    """Write the page over all tasks."""
    from textrl_gym.reports.suite_page import suite_report

    _show(suite_report, folder)


def lesson_command(args: Sequence[str]) -> int:
    """Run the lesson of an environment: train its trials, and say with intervals what came out."""
    from textrl_gym.experiments import lessons

    about = "its folder; the same one goes on. None: runs/lesson-ENV"
    parts: list[Part] = [
        environment(),
        ("out", flag(Path | None, about), None),
        ("settings", flat(lessons.LessonConfig)),
    ]
    parsed = parse_flags("lesson", lesson_command.__doc__, parts, args)
    from textrl_gym.cli.terminal import make_table, print_tables
    from textrl_gym.reports import lesson_page

    env_id = find_env(parsed.environment)
    out = parsed.out or Path("runs") / f"lesson-{env_id}"
    result = lessons.run_lesson(env_id, parsed.settings, out)
    print(f"\n{env_id}: {result.lesson.words}\n")
    for title, (head, rows) in (
        ("Trials", lesson_page.numbers_table(result)),
        ("Findings", lesson_page.findings_table(result)),
    ):
        print_tables(make_table(title, head, rows, left=(head[0],)))
    for trial in result.numbers:
        show_page(out / trial)
    print(lesson_page.lesson_report(result))
    # What was measured is shown and saved all the same.
    return 0 if result.holds else 1


def sizes_command(args: Sequence[str]) -> int:
    """Train pretrained, supervised and RLHF models of several sizes, and compare them with the reference texts."""
    from textrl_gym.experiments import sizes

    about = "its folder; the same one goes on. None: runs/sizes-ENV"
    parts: list[Part] = [
        environment(),
        ("out", flag(Path | None, about), None),
        ("settings", flat(sizes.SizesConfig)),
    ]
    parsed = parse_flags("sizes", sizes_command.__doc__, parts, args)
    from textrl_gym.cli.terminal import make_table, print_tables
    from textrl_gym.reports import sizes_page

    env_id = find_env(parsed.environment)
    result = sizes.run_sizes(env_id, parsed.settings, parsed.out or Path("runs") / f"sizes-{env_id}")
    head, rows = sizes_page.points_table(result)
    print_tables(make_table(f"{env_id}: policies by size", head, rows, left=(head[0],)))
    print(sizes_page.sizes_report(result))
    return 0


def reproduce_command(args: Sequence[str]) -> int:
    """Run one run of a comparison again, and say whether it came out the same: COMPARISON/runs/NAME."""
    parts: list[Part] = [
        ("run", positional("RUN", Path, "a finished run of a comparison: COMPARISON/runs/NAME")),
        ("out", flag(Path | None, "keep the repetition in this folder; None: nowhere"), None),
    ]
    parsed = parse_flags("reproduce", reproduce_command.__doc__, parts, args)
    from textrl_gym.experiments.reproduce import reproduce

    reproduction = reproduce(parsed.run, parsed.out)
    print(reproduction.words())
    return 1 if reproduction.differences else 0


def show_page(folder: Path) -> None:
    """Write a comparison's page; what has been computed is not worth less without plotly."""
    from textrl_gym.reports.comparison_page import comparison_report

    _show(comparison_report, folder)


def _show(write: Callable[[Path], Path], folder: Path) -> None:
    try:
        print(write(folder))
    except ImportError as error:
        print(f"no page: {error}", file=sys.stderr)


def report_command(args: Sequence[str]) -> int:
    """Write DIR/report.html, one self-contained file, about a run, the runs in DIR's subfolders, or a comparison."""
    about = "also write the charts of a comparison into DIR/figures, as PNG and SVG (by Chromium)"
    parts: list[Part] = [
        ("folder", positional("DIR", Path, "a run, a folder of runs, a comparison")),
        ("figures", flag(bool, about), False),
    ]
    parsed = parse_flags("report", report_command.__doc__, parts, args)
    from textrl_gym.experiments.results import PLAN
    from textrl_gym.experiments.suite import SUITE
    from textrl_gym.reports import run_page as home

    if (parsed.folder / SUITE).is_file():
        for plan in sorted(parsed.folder.glob(f"*/{PLAN}")):
            show_page(plan.parent)
        show_suite(parsed.folder)
        return 0
    if (parsed.folder / PLAN).is_file():
        from textrl_gym.charts.export_figures import comparison_figures
        from textrl_gym.reports.comparison_page import comparison_report

        print(comparison_report(parsed.folder))
        if parsed.figures:
            for file in comparison_figures(parsed.folder):
                print(file)
        return 0
    if parsed.figures:
        raise ValueError(f"{str(parsed.folder)!r} holds no comparison: --figures are those of one")
    print(home.report([parsed.folder], parsed.folder / "report.html"))
    return 0


def watch_command(args: Sequence[str]) -> int:
    """Serve the page of runs while they go on, to this machine or, with a secret in the address, to others."""
    parts: list[Part] = [
        ("folder", positional("DIR", Path, "a comparison, one over tasks, or a run; it may come later")),
        ("host", flag(str, "where to listen; beyond this machine the address has a secret token"), "127.0.0.1"),
        ("port", flag(int, "0: a free one"), 0),
    ]
    parsed = parse_flags("watch", watch_command.__doc__, parts, args)
    from textrl_gym.web import watch as home

    with home.make_server(parsed.folder, parsed.host, parsed.port) as server:
        print(f"{server.address}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0
