"""The page of policies by size: win rate against the reference texts over parameters, a line for each stage."""

from __future__ import annotations

import math
from pathlib import Path

from markupsafe import Markup

from textrl_gym import files
from textrl_gym.experiments.sizes import STAGES, Point, SizesResult
from textrl_gym.reports.frame import PAGE, Rows, page_html, table_html
from textrl_gym.reports.suite_page import words_of

WORDS = {"pretrained": "Pretrained", "sft": "Supervised (SFT)", "rlhf": "RLHF"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 60, 150, 16, 56
LINE = 18
"""Between two names of lines."""


def parameters_of(point: Point) -> str:
    """0.25M."""
    return f"{point.parameters / 1e6:.2g}M"


def points_table(result: SizesResult) -> tuple[list[str], Rows]:
    """Headings and rows: a model in each."""
    rows = [
        [WORDS[point.stage], parameters_of(point), f"{point.gold:.3f}", words_of(point.win_rate)]
        for stage in STAGES
        for point in result.points
        if point.stage == stage
    ]
    return ["model", "parameters", "gold", "win rate against the reference texts (95%)"], rows


def figure(result: SizesResult) -> Markup:
    """Win rate over parameters on a logarithmic scale, as SVG; a bar is an interval."""
    sizes = sorted({point.parameters for point in result.points})
    most = max(0.6, *(point.win_rate.high for point in result.points))
    least, widest = math.log(sizes[0]), math.log(sizes[-1]) - math.log(sizes[0])

    def x(parameters: int) -> float:
        share = (math.log(parameters) - least) / widest if widest else 0.5
        return LEFT + 30 + share * (WIDTH - LEFT - RIGHT - 60)

    def y(rate: float) -> float:
        return TOP + (1 - rate / most) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for mark in range(math.floor(most * 10) + 1):
        line = '<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/><text x="{3}" y="{4:.1f}" '
        line += 'text-anchor="end">{5:.1f}</text>'
        height = y(mark / 10)
        parts.append(Markup(line).format(LEFT, WIDTH - RIGHT, height, LEFT - 8, height + 4, mark / 10))
    for parameters in sizes:
        words = next(parameters_of(point) for point in result.points if point.parameters == parameters)
        tick = '<text x="{0:.1f}" y="{1}" text-anchor="middle">{2}</text>'
        parts.append(Markup(tick).format(x(parameters), HEIGHT - BOTTOM + 20, words))
    parts.append(
        Markup('<text x="{0:.1f}" y="{1}" text-anchor="middle">parameters</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10
        )
    )
    names = {"reference texts": y(0.5)}
    for color, stage in enumerate(STAGES):
        points = sorted((point for point in result.points if point.stage == stage), key=lambda one: one.parameters)
        line = " ".join(f"{x(point.parameters):.1f},{y(point.win_rate.value):.1f}" for point in points)
        parts.append(Markup('<polyline class="s{0}" points="{1}"/>').format(color, line))
        for point in points:
            centre, rate = x(point.parameters), point.win_rate
            dot = (
                '<polyline class="s{0}" points="{1:.1f},{2:.1f} {1:.1f},{3:.1f}"/>'
                '<circle class="eval s{0}" cx="{1:.1f}" cy="{4:.1f}" r="5"><title>{5}, {6}: {7}</title></circle>'
            )
            tip = WORDS[stage], parameters_of(point), words_of(rate)
            parts.append(Markup(dot).format(color, centre, y(rate.low), y(rate.high), y(rate.value), *tip))
        names[WORDS[stage]] = y(points[-1].win_rate.value)
    below = -math.inf
    for name, height in sorted(names.items(), key=lambda item: item[1]):
        below = max(height, below + LINE)
        parts.append(Markup('<text x="{0}" y="{1:.1f}">{2}</text>').format(WIDTH - RIGHT + 8, below + 4, name))
    frame = (
        '<figure><figcaption>{0}</figcaption><svg viewBox="0 0 {1} {2}" role="img" aria-label="{0}">{3}</svg></figure>'
    )
    caption = "Share of held-out prompts on which a sample is better than the reference text, by the gold score"
    return Markup(frame).format(caption, WIDTH, HEIGHT, Markup("").join(parts))


def sizes_html(result: SizesResult) -> str:
    """The whole page."""
    body = Markup(
        "<h1>{env}: policies by size</h1><p>The reference texts are the task's demonstrations, "
        "which supervised models learn from; their gold score is {gold:.3f}. A tie is half a win. Intervals are over "
        "prompts, and over seeds where RLHF has several.</p>{figure}{table}"
    ).format(
        env=result.env_id,
        gold=result.reference_gold,
        figure=figure(result),
        table=table_html(*points_table(result), "words", "Sizes"),
    )
    return page_html(f"{result.env_id}: policies by size", body)


def sizes_report(result: SizesResult) -> Path:
    """Write the page into the folder of the result."""
    page = result.folder / PAGE
    files.write_text(page, sizes_html(result))
    return page
