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
    figure = '<figure><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    return Markup(figure).format(title, WIDTH, bottom + 26, title, Markup("").join(parts))


def overall(result: SuiteResult) -> Markup:
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
    plot = interval_plot("Interquartile mean of the normalised scores, 95% over seeds", ordered, 0.0, 1.0)
    return plot + table_html(head, rows, "words")


def pairs(result: SuiteResult) -> Markup:
    """Each pair of agents: the difference over seeds and prompts, and the probability of improvement."""
    tables = {agent: result.table(agent) for agent in result.complete}
    of_prompts = {agent: result.table_of_prompts(agent) for agent in result.complete}
    everyone = list(of_prompts.values())
    if any(all(len(table[task]) == 1 for table in everyone) for task in range(len(result.comparisons))):
        return Markup("<p>One run of each agent leaves no interval between them.</p>")
    rows = []
    for a, b in itertools.combinations(tables, 2):
        if np.mean([np.mean(row) for row in tables[a]]) < np.mean([np.mean(row) for row in tables[b]]):
            a, b = b, a
        untrained = (a in result.untrained, b in result.untrained)
        gap = suites.pooled_difference(of_prompts[a], of_prompts[b], everyone, untrained=untrained)
        better = probability_of_improvement(tables[a], tables[b])
        verdict = f"{a} is better than {b}" if gap.low > 0 else f"{a} is ahead of {b}; too few runs to tell"
        rows.append([verdict, words_of(gap), words_of(better)])
    return table_html(["pair", "difference (95%)", "probability of improvement (95%)"], rows, "words")


def tasks(result: SuiteResult) -> Markup:
    """A row for each task: its anchors, and each agent's mean score as it is."""
    rows: list[Sequence[object]] = []
    for env_id, comparison in result.comparisons.items():
        start, best = result.anchors[env_id]
        cells: list[object] = [
            Markup('<a href="{0}/report.html">{0}</a>').format(env_id),
            f"{start:.3f}",
            f"{best:.3f}",
        ]
        for agent in result.scores:
            groups = [group for group in comparison.groups if group.label == agent]
            finals = groups[0].finals(comparison.gold) if groups else []
            cells.append(f"{np.mean(finals):.3f} ({len(finals)})" if finals else "-")
        rows.append(cells)
    head = ["task", "initial policy", "best known", *(f"{agent} (runs)" for agent in result.scores)]
    return table_html(head, rows, "words")


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
        "seeds differ is pooled over all agents of a task, since two seeds alone say little of their own.</p>{pairs}"
        "<h2>Tasks</h2>{rows}"
    ).format(
        tasks=len(result.comparisons),
        note=note,
        warning=warning if result.failed else "",
        overall=overall(result) if result.complete else Markup("<p>No agent has a finished run on every task.</p>"),
        pairs=pairs(result) if len(result.complete) > 1 else "",
        rows=tasks(result),
    )
    return page_html("Agents over tasks", body)


def suite_report(folder: Path) -> Path:
    """Write the page of a comparison over tasks into its folder."""
    page = folder / PAGE
    files.write_text(page, suite_html(read_suite(folder)))
    return page
