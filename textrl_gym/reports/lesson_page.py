"""The page of a lesson: what it says, whether it came out, and what each trial's policy writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from textrl_gym import files
from textrl_gym.evaluation.metrics import Scale, metric, scale_of
from textrl_gym.experiments.lessons import LessonResult, first_completions
from textrl_gym.experiments.results import finished_runs, gold_scale
from textrl_gym.reports.frame import PAGE, Rows, completion_html, page_html, prompt_html, table_html
from textrl_gym.reports.run_page import ticks
from textrl_gym.stats.estimates import difference_of_means
from textrl_gym.worlds.lesson import START

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 420, 70, 50
"""Of the drawing, in its own units."""
SHOWN = 6
"""Prompts whose completions are shown."""


def mean_and_interval(values: Sequence[float], decimals: int = 3, scale: Scale | None = None) -> str:
    """The mean over seeds; with its 95% interval, within the scale of the number, where seeds differ."""
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return f"{mean:z.{decimals}f}"
    estimate = difference_of_means(values, 0.0).within(scale)
    return f"{mean:z.{decimals}f} ({estimate.low:z.{decimals}f} to {estimate.high:z.{decimals}f})"


def numbers_table(result: LessonResult) -> tuple[list[str], Rows]:
    """Headings and rows: a metric of the lesson in each, and what every trial gave."""
    seeds = [seed for trial in result.numbers.values() for seed in trial]
    names = [name for name in result.lesson.metrics if all(name in seed for seed in seeds)]
    gold = gold_scale(result.env_id)
    rows = [
        [
            metric(name).heading,
            *(
                mean_and_interval([seed[name] for seed in of_trial], metric(name).decimals, scale_of(name, gold))
                for of_trial in result.numbers.values()
            ),
        ]
        for name in names
    ]
    return ["mean of seeds (95%)", *result.numbers], rows


def findings_table(result: LessonResult) -> tuple[list[str], Rows]:
    """Headings and rows: a finding in each."""
    rows = []
    for one in result.outcomes:
        estimate = one.estimate
        interval = f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
        rows.append([one.words, interval, f"{one.agreeing} of {len(one.effects)}", "yes" if one.holds else "no"])
    return ["finding", "effect (95% over seeds)", "seeds", "holds"], rows


def plane_svg(result: LessonResult) -> Markup:
    """Each trial as a point with its 95% intervals, where the lesson has two metrics to draw; else nothing."""
    if result.lesson.plane is None:
        return Markup("")
    gold = gold_scale(result.env_id)
    points = {
        name: [
            difference_of_means([seed[key] for seed in of_trial], 0.0).within(scale_of(key, gold))
            for key in result.lesson.plane
        ]
        for name, of_trial in result.numbers.items()
    }
    across, up = (metric(key).heading for key in result.lesson.plane)
    lows = [min(point[axis].low for point in points.values()) for axis in (0, 1)]
    spans = [max(point[axis].high for point in points.values()) - lows[axis] or 1.0 for axis in (0, 1)]

    def at(axis: int, value: float) -> float:
        share = (value - lows[axis]) / spans[axis]
        return round(LEFT + (WIDTH - 2 * LEFT) * share if axis == 0 else HEIGHT - BOTTOM - (HEIGHT - 80) * share, 1)

    marks = []
    for axis in (0, 1):
        for tick in ticks(lows[axis], lows[axis] + spans[axis]):
            x, y, anchor = (at(0, tick), HEIGHT - 30, "middle") if axis == 0 else (LEFT - 16, at(1, tick), "end")
            marks.append(Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, f"{tick:g}"))
    for name, (right, upward) in points.items():
        line = Markup('<line class="interval" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        marks.append(line.format(at(0, right.low), at(0, right.high), at(1, upward.value), at(1, upward.value)))
        marks.append(line.format(at(0, right.value), at(0, right.value), at(1, upward.low), at(1, upward.high)))
        dot = '<circle class="eval" cx="{0}" cy="{1}" r="5" fill="var(--c0)"/>'
        dot += '<text x="{0}" y="{1}" dx="9" dy="-9">{2}</text>'
        marks.append(Markup(dot).format(at(0, right.value), at(1, upward.value), name))
    figure = (
        '<figure><figcaption>Across: {across}. Up: {up}.</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        'aria-label="{up} against {across}"><style>.interval {{ stroke: var(--c0); stroke-width: 1.5; }}</style>'
        "{marks}</svg></figure>"
    )
    return Markup(figure).format(across=across, up=up, width=WIDTH, height=HEIGHT, marks=Markup("").join(marks))


def samples_html(result: LessonResult) -> Markup:
    """The first held-out prompts, not picked, with each trial's completion by its first seed."""
    episodes: dict[str, list[dict[str, Any]]] = {}
    for trial in result.numbers:
        run = finished_runs(result.folder / trial)[0]
        episodes[trial] = first_completions(run, SHOWN)
    rows = []
    for number, first in enumerate(episodes[START]):
        cells: list[object] = [prompt_html(first["prompt"])]
        for of_trial in episodes.values():
            cells.append(completion_html(of_trial[number]))
        rows.append(cells)
    return table_html(["prompt", *episodes], rows, "samples", "Samples")


def lesson_html(result: LessonResult) -> str:
    """The whole page."""
    lesson = result.lesson
    trials = Markup("").join(
        Markup('<li><a href="{0}/report.html">{0}</a>: {1}</li>').format(name, trial.words)
        for name, trial in lesson.trials.items()
    )
    body = Markup(
        "<h1>{env}: the lesson</h1><p>{words} <b>{verdict}</b></p><h2>Findings</h2>{findings}"
        "<h2>Trials</h2><ul>{trials}</ul>{numbers}{plane}<h2>Samples</h2><p class=muted>The first held-out prompts, "
        "not picked; one sample of each trial's first seed.</p>{samples}"
    ).format(
        env=result.env_id,
        words=lesson.words,
        verdict="It came out." if result.holds else "It did not come out in all findings.",
        findings=table_html(*findings_table(result), "words", "Findings"),
        trials=trials,
        numbers=table_html(*numbers_table(result), "words", "Numbers"),
        plane=plane_svg(result),
        samples=samples_html(result),
    )
    return page_html(f"{result.env_id}: the lesson", body)


def lesson_report(result: LessonResult) -> Path:
    """Write the lesson's page into its folder."""
    page = result.folder / PAGE
    files.write_text(page, lesson_html(result))
    return page
