"""What commands print: errors, tables and numbers with intervals. rich is imported when something is printed."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from textrl_gym import processes
from textrl_gym.console import plain

if TYPE_CHECKING:
    from rich.table import Table

    from textrl_gym.stats.estimates import Estimate


def show_error(error: Exception) -> int:
    """Print an error as one red line; returns the exit code: 1 for a failed health check, else 2."""
    from rich.console import Console

    text = str(error) or type(error).__name__
    whose = f"process {processes.rank()} of {processes.size()}: " if processes.size() > 1 else ""
    Console(stderr=True, soft_wrap=True).print(plain(f"{whose}error: {text}", style="bold red"), highlight=False)
    # Looked up, not imported: health imports torch, and a mistyped word must not wait seconds for that.
    health = sys.modules.get("textrl_gym.evaluation.health")
    return 1 if health is not None and isinstance(error, health.HealthError) else 2


def make_table(
    title: str | None,
    headings: Iterable[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[str] = (),
    no_wrap: Collection[str] = (),
) -> Table:
    """A table of texts, which are shown as they are: brackets in them are no markup.

    Args:
        left: the headings of columns that hold words; the others hold numbers and are aligned on the right.
        no_wrap: the headings of columns that are never wrapped.
    """
    from rich.table import Table

    # A title has the width of its table: a path is not to be broken by short words below it.
    table = Table(title=None if title is None else plain(title), title_justify="left", min_width=len(title or ""))
    for heading in headings:
        table.add_column(
            plain(heading), justify="left" if heading in left else "right", no_wrap=heading in no_wrap, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def records_table(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """A table of records that all have the keys of the first: floats with three decimals, texts on the left."""
    left = [name for name, value in records[0].items() if isinstance(value, str)]
    rows = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in r.values()] for r in records]
    return make_table(title, records[0], rows, left=left)


def print_rows(title: str, rows: Mapping[str, str]) -> None:
    """Print a table of two columns: measure and value."""
    print_tables(make_table(title, ("measure", "value"), list(rows.items()), left=("measure",)))


def print_tables(*tables: Table) -> None:
    """Print tables."""
    from rich.console import Console

    Console().print(*tables)


def interval(estimate: Estimate | None) -> str:
    """A number with its 95% interval; a dash where there is none."""
    return "-" if estimate is None else f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
