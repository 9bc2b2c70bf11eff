"""Charts of what goes on through training, and of length: score, drift of the texts, score by length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from textrl_gym.charts import analysis as numbers
from textrl_gym.charts.plotting import Chart, Table, axes, between, extent, line, look, marker, short
from textrl_gym.evaluation.metrics import METRICS, metric, metric_names
from textrl_gym.experiments.results import Comparison, Group
from textrl_gym.training.config import TrainOptions

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NOTE = (
    "Points are evaluations of training, of all seeds, {training} completions each (the summary's prompts: {summary}); "
    "the line is their mean, as far as all seeds go, and the band runs from the lowest seed to the highest. A thin "
    "line is the mean of each update's rollout, which the policy before the update played. A level line is an agent "
    "that was not trained in this comparison."
)
OF_SECONDS = "Evaluating is not counted; runs that shared a machine slowed each other down."
SILENT = {"hoverinfo": "skip", "showlegend": False}
"""Of a trace that stands beside another of its agent."""
LEAST = {"kl_sequence": 1.0}
"""What an axis shows at least: a KL of hundredths of a nat is the noise of its estimate."""

# -- through training -------------------------------------------------------------------------------------------------


def learning_curves(comparison: Comparison) -> list[Chart]:
    """The score by which agents are compared, over tokens and seconds, and the score that is trained on."""
    gold, tokens = comparison.gold, ("timesteps", "generated tokens")
    # The runs leave the number of prompts of their evaluations as it is.
    summary = " or ".join(map(str, comparison.prompt_counts))
    note = NOTE.format(training=TrainOptions.eval_episodes, summary=summary)
    charts = [
        over_training(comparison, "curve-tokens", gold, (*tokens, gold), f"{gold.capitalize()} over tokens", note)
    ]
    if gold != "score":
        words = (*tokens, "score that is trained on")
        charts.append(over_training(comparison, "curve-score", "score", words, "Training score over tokens", note))
    words, title = ("train_seconds", "seconds of training", gold), f"{gold.capitalize()} over seconds"
    charts.append(over_training(comparison, "curve-seconds", gold, words, title, f"{note} {OF_SECONDS}"))
    return [chart for chart in charts if chart is not None]


def drifts(comparison: Comparison) -> list[Chart]:
    """How the texts change through training, of each number that was measured."""
    charts = []
    for key, entry in METRICS.items():
        if entry.drift is None:
            continue
        words = ("timesteps", "generated tokens", entry.heading)
        chart = over_training(comparison, f"drift-{key}", key, words, entry.drift.title, entry.drift.note)
        charts += [chart] if chart is not None else []
    return charts


def over_training(
    comparison: Comparison, key: str, y_key: str, words: tuple[str, str, str], title: str, note: str
) -> Chart | None:
    """A number of the evaluations: points of all seeds, their mean and the band from the lowest to the highest.

    Where the rollouts of training have the number too, each update's is a thin line.

    Args:
        key: of the chart.
        y_key: of the number.
        words: the key of what it is over, its name, and the number's.
    """
    x_key, x_name, y_name = words
    groups = [group for group in comparison.groups if group.finals(y_key)]
    curves = {group.label: numbers.learning_curve(group, x_key, y_key) for group in groups}
    ends = [curve.x[-1] for curve in curves.values() if curve is not None]
    if not ends:
        return None
    chart = axes(x_name, y_name)
    # Many bands over each other would hide the lines.
    faint = 0.18 if len(groups) <= 6 else 0.07
    rows = []
    for group in groups:
        curve = curves[group.label]
        if curve is None:  # nothing was trained: a level
            level = level_of(group, y_key)
            if level is not None:
                chart.add_scatter(x=[0, max(ends)], y=[level, level], mode="lines", line=line(group), **look(group))
                rows.append((group.label, str(len(group.runs)), short(level), short(level), "-"))
            continue
        if len(group.runs) > 1:
            # One closed outline: two lines with a fill between them would be two entries for the mouse to find.
            x, y = curve.x + curve.x[::-1], curve.high + curve.low[::-1]
            chart.add_scatter(x=x, y=y, mode="none", fill="toself", **look(group, meta={"fill": faint}, **SILENT))
        add_rollouts(chart, group, x_key, y_key)
        add_evaluations(chart, group, x_key, y_key)
        chart.add_scatter(x=curve.x, y=curve.mean, mode="lines", line=line(group), **look(group))
        spread = f"{short(curve.low[-1])} to {short(curve.high[-1])}" if len(group.runs) > 1 else "-"
        rows.append((group.label, str(len(group.runs)), short(curve.mean[0]), short(curve.mean[-1]), spread))
    drawn = [y for trace in chart.data for y in trace.y]
    chart.update_layout(yaxis={"range": extent(drawn, comparison.scale(y_key), LEAST.get(y_key, 0.0))})
    head = ("agent", "seeds", "first", "last", "lowest and highest seed at the end")
    return Chart(key, title, note, chart, head, rows)


def add_rollouts(chart: Figure, group: Group, x_key: str, y_key: str) -> None:
    """A thin line of each update's number, where x is tokens and rollouts have it."""
    curve = numbers.rollout_curve(group, f"rollout/{y_key}") if x_key == "timesteps" else None
    if curve is not None:
        thin = {"mode": "lines", "line": {"width": 1}, "opacity": 0.6, **SILENT}
        chart.add_scatter(x=curve.x, y=curve.mean, **look(group, **thin))


def add_evaluations(chart: Figure, group: Group, x_key: str, y_key: str) -> None:
    """A point for each evaluation of each seed."""
    points = [(row[x_key], row[y_key]) for rows in numbers.trained(group, x_key, y_key) for row in rows]
    x, y = [x for x, _ in points], [y for _, y in points]
    chart.add_scatter(x=x, y=y, mode="markers", marker=marker(group, 5), **look(group, **SILENT))


def level_of(group: Group, key: str) -> float | None:
    """A number of an agent that was not trained, from the evaluation on as many prompts as the others' curves have.

    A saved agent has none but the last one, with more prompts: shares of different n-grams cannot be compared then.
    """
    during = [run.evaluations[-1][key] for run in group.runs if run.evaluations and key in run.evaluations[-1]]
    # Shares of different n-grams fall with the number of texts: a level of 256 texts beside curves of 64 seemed poorer.
    if not during and key.startswith("distinct"):
        return None
    return float(np.mean(during or group.finals(key)))


# -- length and quality -----------------------------------------------------------------------------------------------


def length_chart(comparison: Comparison) -> Chart | None:
    """Mean score of short and of long answers."""
    keys = ["score", *(["gold"] if comparison.gold == "gold" else [])]
    trends = [
        (group, key, trend)
        for group in comparison.groups
        for key in keys
        if (trend := numbers.length_trend(group, key)) is not None
    ]
    if not trends:
        return None
    chart = axes("completion, tokens", "score that was trained on")
    rows, buckets = [], []
    for group, key, trend in trends:
        name = "gold" if key == "gold" else "score"
        rows.append((group.label, name, between(trend.slope), short(trend.correlation, 2)))
        for b in trend.buckets:
            # Many completions of equal length make a bucket of one length.
            span = f"{b.shortest:g}" if b.shortest == b.longest else f"{b.shortest:g} to {b.longest:g}"
            buckets.append((group.label, name, span, str(b.texts), short(b.mean_score)))
        if key == "score":
            x = [(bucket.shortest + bucket.longest) / 2 for bucket in trend.buckets]
            y = [bucket.mean_score for bucket in trend.buckets]
            hover = [f"{b.shortest:g} to {b.longest:g} tokens, {b.texts} texts" for b in trend.buckets]
            drawn = {"mode": "lines+markers", "line": line(group), "marker": marker(group), "hovertext": hover}
            chart.add_scatter(x=x, y=y, **look(group, **drawn))
    note = (
        "Mean score of each tenth of an agent's answers, from the shortest to the longest. A slope is no proof "
        "that the reward likes length, for longer answers may be better. It is by least squares over all answers of "
        "all seeds; where there is a gold score, its slope stands beside that of the score."
    )
    head = ("agent", "of", "slope per token", "correlation")
    by_length = Table("Score by length", ("agent", "of", "tokens", "texts", "mean"), buckets)
    return Chart("lengths", "Length and score", note, chart, head, rows, by_length)


def quality(comparison: Comparison) -> Table | None:
    """The metrics of the last evaluations that no other table has, means over seeds; None where there are none."""
    names = metric_names([run.final for run in comparison.runs])
    keys = [key for key in names if metric(key).table == "quality"]
    if not keys:
        return None

    def mean(group: Group, key: str) -> str:
        values = group.finals(key)
        return f"{np.mean(values):.{metric(key).decimals}f}" if values else "-"

    rows = [(group.label, *(mean(group, key) for key in keys)) for group in comparison.groups]
    return Table("Text quality", ("agent", *(metric(key).heading for key in keys)), rows)
