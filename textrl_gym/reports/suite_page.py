"""The page of a comparison over tasks: one scale, intervals over tasks and seeds, and a row for each task."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from textrl_gym import files
from textrl_gym.experiments.suite import SuiteResult, read_suite
from textrl_gym.reports.frame import PAGE, page_html, table_html
from textrl_gym.stats import suites
from textrl_gym.stats.estimates import Estimate, performance_profile, probability_of_improvement

MARKDOWN = "tables.md"
"""The tables of the page in Markdown, in its folder."""
THRESHOLDS = (0.25, 0.5, 0.75, 0.9)
"""Normalised scores of the performance profile."""
WIDTH, ROW, LEFT, RIGHT = 760, 34, 190, 30


def words_of(estimate: Estimate) -> str:
    """A number with its interval; without one where runs do not differ."""
    if estimate.low == estimate.high:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def interval_plot(title: str, rows: Mapping[str, Estimate], low: float, high: float) -> Markup:
    """A dot and its interval for each name, as SVG."""
    low = min(low, *(one.low for one in rows.values()))
    high = max(high, *(one.high for one in rows.values()))

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = []
    marks = np.linspace(low, high, 5)
    bottom = ROW * len(rows) + 10
    for mark in marks:
        grid = '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="6" y2="{1}"/>'
        grid += '<text x="{0:.1f}" y="{2}" text-anchor="middle">{3:.2f}</text>'
        parts.append(Markup(grid).format(x(mark), bottom, bottom + 18, mark))
    for number, (name, one) in enumerate(rows.items()):
        y, color = ROW * number + 24, number % 6
        line = (
            '<text x="{0}" y="{1}" text-anchor="end">{2}</text>'
            '<polyline class="s{3}" points="{4:.1f},{5} {6:.1f},{5}"/>'
            '<circle class="eval s{3}" cx="{7:.1f}" cy="{5}" r="5"><title>{2}: {8}</title></circle>'
        )
        parts.append(
            Markup(line).format(LEFT - 12, y + 4, name, color, x(one.low), y, x(one.high), x(one.value), words_of(one))
        )
    figure = (
        '<figure><figcaption>{}</figcaption><svg class="intervals" viewBox="0 0 {} {}" role="img" aria-label="{}">{}'
        "</svg></figure>"
    )
    return Markup(figure).format(title, WIDTH, bottom + 26, title, Markup("").join(parts))


Table = tuple[list[str], list[list[str]]]
"""The head and the rows of a table."""


def overall(result: SuiteResult) -> tuple[dict[str, Estimate], Table]:
    """Interquartile means, ranks and performance profiles of the agents that were run on every task."""
    tables = {agent: result.table(agent) for agent in result.complete}
    iqm = {agent: suites.iqm_of_tasks(table) for agent, table in tables.items()}
    ordered = dict(sorted(iqm.items(), key=lambda item: -item[1].value))
    ranks = suites.mean_ranks(tables)
    rows = []
    for agent in ordered:
        profile = performance_profile(tables[agent], THRESHOLDS) if min(map(len, tables[agent])) > 1 else None
        shares = [f"{one.value:.2f}" for one in profile] if profile else ["-"] * len(THRESHOLDS)
        rows.append([agent, words_of(ordered[agent]), words_of(ranks[agent]), *shares])
    head = ["agent", "interquartile mean", "mean rank", *(f"runs above {one:g}" for one in THRESHOLDS)]
    return ordered, (head, rows)


def pairs(result: SuiteResult) -> Table | None:
    """Each pair of agents: the difference over seeds and prompts, and the probability of improvement.

    The intervals of the differences hold for all pairs at once (Bonferroni). None: one run of each agent leaves none.
    """
    tables = {agent: result.table(agent) for agent in result.complete}
    of_prompts = {agent: result.table_of_prompts(agent) for agent in result.complete}
    everyone = list(of_prompts.values())
    if any(all(len(table[task]) == 1 for table in everyone) for task in range(len(result.comparisons))):
        return None
    rows = []
    couples = list(itertools.combinations(tables, 2))
    confidence = 1 - 0.05 / len(couples)
    for a, b in couples:
        if np.mean([np.mean(row) for row in tables[a]]) < np.mean([np.mean(row) for row in tables[b]]):
            a, b = b, a
        untrained = (a in result.untrained, b in result.untrained)
        gap = suites.pooled_difference(
            of_prompts[a], of_prompts[b], everyone, untrained=untrained, confidence=confidence
        )
        better = probability_of_improvement(tables[a], tables[b])
        verdict = f"{a} is better than {b}" if gap.low > 0 else f"{a} is ahead of {b}; too few runs to tell"
        rows.append((gap.low, [verdict, words_of(gap), words_of(better)]))
    head = ["pair", f"difference ({100 * confidence:.4g}%)", "probability of improvement (95%)"]
    # What can be told apart first.
    return head, [row for _, row in sorted(rows, key=lambda item: -item[0])]


def tasks(result: SuiteResult) -> Table:
    """A row for each task: its anchors, and each agent's mean score as it is."""
    rows = []
    runs = {len(group.runs) for one in result.comparisons.values() for group in one.groups if not group.untrained}
    uneven = len(runs) > 1  # how many runs a mean is of is said where it differs
    for env_id, comparison in result.comparisons.items():
        start, best = result.anchors[env_id]
        cells = [env_id, f"{start:.3f}", f"{best:.3f}"]
        for agent in result.scores:
            groups = [group for group in comparison.groups if group.label == agent]
            finals = groups[0].finals(comparison.gold) if groups else []
            number = f" ({len(finals)})" if uneven else ""
            cells.append(f"{np.mean(finals):.3f}{number}" if finals else "-")
        rows.append(cells)
    agents = [f"{agent} (runs)" if uneven else agent for agent in result.scores]
    return ["task", "initial policy", "best known", *agents], rows


def suite_markdown(result: SuiteResult) -> str:
    """The tables of the page in Markdown, for a paper, an issue or the documentation."""
    tables = [overall(result)[1] if result.complete else None]
    tables += [pairs(result) if len(result.complete) > 1 else None, tasks(result)]
    return "\n".join(markdown_table(*table) for table in tables if table is not None)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _overall_html(result: SuiteResult) -> Markup:
    if not result.complete:
        return Markup("<p>No agent has a finished run on every task.</p>")
    ordered, table = overall(result)
    plot = interval_plot("Interquartile mean of the normalised scores, 95% over seeds", ordered, 0.0, 1.0)
    return plot + table_html(*table, "words", "Over all tasks")


def _pairs_html(result: SuiteResult) -> Markup:
    if len(result.complete) < 2:
        return Markup("")
    table = pairs(result)
    if table is None:
        return Markup("<p>One run of each agent leaves no interval between them.</p>")
    return table_html(*table, "words", "Pairs")


def _tasks_html(result: SuiteResult) -> Markup:
    head, rows = tasks(result)
    link = Markup('<a href="{0}/report.html">{0}</a>')
    return table_html(head, [[link.format(env_id), *cells] for env_id, *cells in rows], "words", "Tasks")


def suite_html(result: SuiteResult) -> str:
    """The whole page."""
    missing = Markup("").join(Markup("<li>{}: {}</li>").format(name, why) for name, why in result.failed.items())
    warning = Markup('<div class="warning" role="alert"><b>Not in the numbers:</b><ul>{}</ul></div>').format(missing)
    partial = [agent for agent in result.scores if agent not in result.complete]
    note = f" Not on every task, and so not compared over all: {', '.join(partial)}." if partial else ""
    body = Markup(
        "<h1>Agents over tasks</h1><p>{tasks} tasks. A score of 0 is a task's initial policy and "
        "1 the best that is known; gold is the measure where a task has it.{note}</p>{warning}<h2>Over all tasks</h2>"
        "{overall}<h2>Pairs</h2><p class=muted>Agents are compared prompt by prompt, over seeds and prompts. How much "
        "seeds differ is pooled over all agents of a task, since two seeds alone say little of their own. The "
        "intervals of the differences hold for all pairs at once.</p>{pairs}"
        "<h2>Tasks</h2>{rows}"
    ).format(
        tasks=len(result.comparisons),
        note=note,
        warning=warning if result.failed else "",
        overall=_overall_html(result),
        pairs=_pairs_html(result),
        rows=_tasks_html(result),
    )
    return page_html("Agents over tasks", body)


def suite_report(folder: Path) -> Path:
    """Write the page of a comparison over tasks into its folder, and its tables in Markdown."""
    page, result = folder / PAGE, read_suite(folder)
    files.write_text(page, suite_html(result))
    files.write_text(folder / MARKDOWN, suite_markdown(result))
    return page
