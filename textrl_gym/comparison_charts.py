"""The charts of a comparison's page: plotly figures, each with words and with its numbers as a table.

Colours are the page's to choose (light or dark): a trace names the agent's number in `meta`, and the script paints it.
An agent also has a symbol and a dash of its own, so that nothing is told by colour alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from textrl_gym import comparison_numbers as numbers
from textrl_gym.comparison_data import Comparison, Group

LIGHT = ("#0072b2", "#c84e00", "#00805f", "#7208f0", "#541c03", "#142a41")
DARK = ("#56b4e9", "#ee7733", "#2bbf93", "#c942fd", "#e8e70a", "#dfe6ee")
"""Far apart for people who see two colours too, and at 3:1 or more to the page."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True)
class Chart:
    """A figure, and what it says for those who do not see it."""

    key: str
    title: str
    note: str
    """How to read it, in a sentence or two."""
    figure: Any
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def go() -> Any:
    """plotly.graph_objects.

    Raises:
        ImportError: it or scipy, which the statistics are made with, is missing; the message says how to install them.
    """
    try:
        import plotly.graph_objects
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page of a comparison needs {error.name}: pip install textrl-gym[report]") from error
    return plotly.graph_objects


def short(x: float, digits: int = 3) -> str:
    """A number to so many digits, without an exponent where that can be."""
    if not math.isfinite(x):
        return "-"
    if x and abs(x) < 1e-4:
        return f"{x:.{digits}g}"
    return f"{x:,.{max(digits - 1 - math.floor(math.log10(abs(x))), 0) if x else 0}f}"


def plain(text: str) -> str:
    """For plotly, which reads a little HTML in its texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def look(group: Group, **more: Any) -> dict[str, Any]:
    """What all traces of a group share: its name, and its colour by number."""
    meta = {"color": group.color % len(LIGHT)} | more.pop("meta", {})
    return {"name": plain(group.label), "legendgroup": group.label, "meta": meta} | more


def marker(group: Group, size: int = 8) -> dict[str, Any]:
    """A symbol that differs between an agent's coefficients too."""
    return {"symbol": SYMBOLS[(group.color + group.variant) % len(SYMBOLS)], "size": size}


def line(group: Group) -> dict[str, Any]:
    """A dash that differs between an agent's coefficients too."""
    return {"dash": DASHES[(group.color + group.variant) % len(DASHES)], "width": 2}


def figure(x: str, y: str, **layout: Any) -> Any:
    """An empty figure with its axes named."""
    made = go().Figure()
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    made.update_layout(template="none", **{"height": 380, **axes, **layout})
    return made


# -- the charts -------------------------------------------------------------------------------------------------------


def charts(comparison: Comparison) -> dict[str, Chart]:
    """All charts that the comparison has data for, by name."""
    tokens = learning_curves(comparison, "tokens", "timesteps", "generated tokens")
    seconds = learning_curves(comparison, "seconds", "train_seconds", "seconds of training")
    made = [tokens, seconds, frontier(comparison), matrix(comparison), profile(comparison)]
    made += [overoptimisation(comparison), lengths(comparison), cost(comparison)]
    return {chart.key: chart for chart in made if chart is not None}


def learning_curves(comparison: Comparison, key: str, x_key: str, x_name: str) -> Chart | None:
    """Mean over seeds, and the band from the lowest to the highest."""
    gold = comparison.gold
    made = figure(x_name, comparison.gold_name)
    curves = {group.label: numbers.learning_curve(group, x_key, gold) for group in comparison.groups}
    ends = [curve.x[-1] for curve in curves.values() if curve is not None]
    if not ends:
        return None
    faint = 0.18 if len(comparison.groups) <= 6 else 0.07
    rows = []
    for group in comparison.groups:
        curve = curves[group.label]
        if curve is None:  # nothing was trained: a level
            level = float(np.mean(group.finals(gold)))
            made.add_scatter(x=[0, max(ends)], y=[level, level], mode="lines", line=line(group), **look(group))
            rows.append((group.label, str(len(group.runs)), short(level), short(level), "-"))
            continue
        band = {"fill": "toself", "hoverinfo": "skip", "showlegend": False, "mode": "none"}
        if len(group.runs) > 1:
            x, y = curve.x + curve.x[::-1], curve.high + curve.low[::-1]
            made.add_scatter(x=x, y=y, **look(group, meta={"fill": faint}, **band))
        made.add_scatter(x=curve.x, y=curve.mean, mode="lines", line=line(group), **look(group))
        spread = f"{short(curve.low[-1])} to {short(curve.high[-1])}" if len(group.runs) > 1 else "-"
        rows.append((group.label, str(len(group.runs)), short(curve.mean[0]), short(curve.mean[-1]), spread))
    note = (
        f"Mean {comparison.gold_name} over seeds at the evaluations of training, with fewer held-out prompts than "
        "the summary's, as far as all seeds go. The band runs from the lowest seed to the highest. A level line is an "
        "agent that was not trained in this comparison."
    )
    if key == "seconds":
        note += " Evaluating is not counted; runs that shared a machine slowed each other down."
    head = ("agent", "seeds", "first", "last", "lowest and highest seed at the end")
    return Chart(f"curve-{key}", f"{comparison.gold_name.capitalize()} over {x_name}", note, made, head, rows)


def frontier(comparison: Comparison) -> Chart:
    """Every run a point; the mean of each coefficient joined to the agent's next."""
    gold = comparison.gold
    made = figure("KL to the reference, nats per sequence", comparison.gold_name)
    rows = []
    for agent in dict.fromkeys(group.agent for group in comparison.groups):
        own = [group for group in comparison.groups if group.agent == agent]
        means = []
        for group in own:
            x, y = group.finals("kl_sequence"), group.finals(gold)
            hover = [f"{plain(run.name)}, KL coefficient {group.coefficient}" for run in group.runs]
            made.add_scatter(x=x, y=y, mode="markers", marker=marker(group, 10), hovertext=hover, **look(group))
            means.append((float(np.mean(x)), float(np.mean(y))))
            rows += [
                (run.name, group.coefficient, short(kl), short(value))
                for run, kl, value in zip(group.runs, x, y, strict=True)
            ]
        if len(own) > 1:
            joined = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": {"width": 2}}
            made.add_scatter(x=[m[0] for m in means], y=[m[1] for m in means], **look(own[0], **joined))
    note = (
        "Each point is a run's last evaluation; up and to the left is better. A line joins an agent's KL coefficients."
    )
    bounds = numbers.best_of_n_kls(comparison)
    for n, kl in bounds.items():
        made.add_vline(x=kl, line={"width": 1, "dash": "dot"}, annotation={"text": f"best of {n}"})
    if bounds:
        values = ", ".join(f"{kl:.2f} for n = {n}" for n, kl in bounds.items())
        note += (
            f" Best-of-n stands at log n - (n - 1)/n nats ({values}): a bound that its KL to what it samples from does "
            "not exceed, and lies under where scores tie."
        )
    return Chart(
        "frontier", "What the KL buys", note, made, ("run", "KL coefficient", "KL", comparison.gold_name), rows
    )


def matrix(comparison: Comparison) -> Chart | None:
    """Win rates of rows against columns on common prompts."""
    groups, _ = numbers.same_prompts(comparison)
    if len(groups) < 2:
        return None
    rated = numbers.ratings(comparison, groups)
    order = [rating.group for rating in rated] or groups
    rate = {}
    rows = []
    for pair in numbers.pairs(comparison, order):
        won = pair.win_rate
        rate[pair.first.label, pair.second.label] = won.value
        rate[pair.second.label, pair.first.label] = 1 - won.value
        row = [pair.first.label, pair.second.label, between(won), "-", between(pair.improvement)]
        if pair.difference is not None:
            row[3] = between(pair.difference)
        rows.append(tuple(row))
    z = [[rate.get((row.label, column.label)) for column in order] for row in order]
    names = [plain(group.label) for group in order]
    made = figure("against", "", hovermode="closest")
    made.add_heatmap(
        z=z, x=names, y=names, zmin=0, zmax=1, texttemplate="%{z:.2f}", xgap=2, ygap=2, meta={"heat": True},
        hovertemplate="%{y} wins %{z:.1%} against %{x}<extra></extra>", showscale=False,
    )  # fmt: skip
    grid = {"showgrid": False}
    made.update_layout(xaxis=grid, yaxis={"autorange": "reversed", **grid}, height=160 + 46 * len(order))
    judge = "by the judge" if comparison.gold == "judge" else "by the training reward, as there is no judge"
    note = (
        f"How often the row's answer is better than the column's {judge}, on the same prompts with the same random "
        "numbers; a tie is half a win. Mean over all pairs of seeds; the intervals of win rates are over prompts, and "
        "those of the difference and of the chance that a run is better also over seeds."
    )
    head = ("agent", "against", "win rate", f"mean difference in {comparison.gold_name}", "chance that a run is better")
    return Chart("matrix", "Who beats whom", note, made, head, rows)


def between(estimate: Any) -> str:
    """A number with its interval."""
    if math.isnan(estimate.low):
        return short(estimate.value)
    return f"{short(estimate.value)} ({short(estimate.low)} to {short(estimate.high)})"


def profile(comparison: Comparison) -> Chart:
    """Share of runs above each threshold."""
    thresholds, shares = numbers.profile(comparison)
    made = figure(f"threshold of {comparison.gold_name}", "share of runs above it")
    made.update_layout(yaxis={"range": [-0.03, 1.03], "tickformat": ".0%"})
    faint = 0.12 if len(comparison.groups) <= 6 else 0.05
    for group in comparison.groups:
        own = shares[group.label]
        if len(group.runs) > 1:
            band = {"hoverinfo": "skip", "showlegend": False, "mode": "lines", "line": {"width": 0, "shape": "hv"}}
            made.add_scatter(x=thresholds, y=[s.low for s in own], **look(group, **band))
            made.add_scatter(
                x=thresholds, y=[s.high for s in own], fill="tonexty", **look(group, meta={"fill": faint}, **band)
            )
        steps = {**line(group), "shape": "hv"}
        made.add_scatter(x=thresholds, y=[s.value for s in own], mode="lines", line=steps, **look(group))
    some = range(0, len(thresholds), max(len(thresholds) // 8, 1))
    head = ("agent", *(f"> {short(thresholds[i])}" for i in some))
    rows = [(group.label, *(short(shares[group.label][i].value) for i in some)) for group in comparison.groups]
    note = (
        "The share of an agent's runs whose last evaluation lies above each threshold: a line further right is better. "
        "The band is a 95% bootstrap over seeds at each threshold; one seed has none."
    )
    return Chart("profile", "How many runs get how far", note, made, head, rows)


def overoptimisation(comparison: Comparison) -> Chart | None:
    """Gold and proxy over KL, through training."""
    if comparison.gold != "judge":
        return None
    ways = [way for group in comparison.groups if (way := numbers.training(group)) is not None]
    if not ways:
        return None
    x_name = "KL to the reference, nats per sequence"
    made = figure("", "gold", height=560)
    made.update_layout(
        xaxis={"anchor": "y", "showticklabels": False},
        xaxis2={"title": {"text": x_name}, "anchor": "y2", "matches": "x"},
        yaxis={"domain": [0.54, 1]},
        yaxis2={"title": {"text": "proxy"}, "domain": [0, 0.46], "anchor": "x2"},
    )
    rows = []
    for way in ways:
        group, dots = way.group, marker(way.group, 6)
        made.add_scatter(x=way.kl, y=way.gold, mode="markers", marker=dots, **look(group))
        lower = look(group, xaxis="x2", yaxis="y2", showlegend=False)
        made.add_scatter(x=way.kl, y=way.proxy, mode="markers", marker=dots, **lower)
        row = [group.label, *(f"{short(gold)} at {short(kl)}" for kl, gold in (way.best, way.end))]
        if way.fit is not None:
            x = np.linspace(0, max(way.kl), 60)
            curve = {"mode": "lines", "line": line(group), "showlegend": False, "hoverinfo": "skip"}
            made.add_scatter(x=x.tolist(), y=(way.start + way.fit.gold(x)).tolist(), **look(group, **curve))
            peak = "none within reach" if way.fit.peak_kl is None else short(way.fit.peak_kl)
            row += [short(way.fit.alpha), short(way.fit.beta), short(way.fit.r2, 2), peak]
        else:
            row += ["-"] * 4
        rows.append(tuple(row))
    note = (
        "Above the judge's score, which no agent was trained on; below the score that was. Where gold falls while the "
        "proxy rises, the policy exploits the proxy. Each point is an evaluation, all seeds together; the line is Gao "
        "et al.'s form for RL, gold = start + d (alpha - beta log d) with d the root of the KL, fitted to gold where "
        f"there are {numbers.FIT_POINTS} KLs above 0. R2 is the share of gold's variance that it explains."
    )
    head = ("agent", "highest mean gold, at KL", "at the end", "alpha", "beta", "R2", "KL at the fit's peak")
    return Chart("overoptimisation", "Proxy and gold", note, made, head, rows)


def lengths(comparison: Comparison) -> Chart | None:
    """Mean score of short and of long answers."""
    keys = ["score", *(["judge"] if comparison.gold == "judge" else [])]
    trends = [
        (group, key, trend)
        for group in comparison.groups
        for key in keys
        if (trend := numbers.length_trend(group, key)) is not None
    ]
    if not trends:
        return None
    made = figure("completion, tokens", "score that was trained on")
    rows = []
    for group, key, trend in trends:
        name = "gold" if key == "judge" else "score"
        rows.append((group.label, name, between(trend.slope), short(trend.correlation, 2)))
        if key == "score":
            x = [(bucket.shortest + bucket.longest) / 2 for bucket in trend.buckets]
            y = [bucket.mean_score for bucket in trend.buckets]
            hover = [f"{b.shortest:g} to {b.longest:g} tokens, {b.texts} texts" for b in trend.buckets]
            drawn = {"mode": "lines+markers", "line": line(group), "marker": marker(group), "hovertext": hover}
            made.add_scatter(x=x, y=y, **look(group, **drawn))
    note = (
        "Mean score of each tenth of an agent's answers, from the shortest to the longest. A slope is no proof "
        "that the reward likes length, for longer answers may be better. It is by least squares over all answers of "
        "all seeds; where there is a judge, its slope stands beside that of the score."
    )
    head = ("agent", "of", "slope per token", "correlation")
    return Chart("lengths", "Length and score", note, made, head, rows)


def cost(comparison: Comparison) -> Chart | None:
    """Seconds by phase, mean over seeds."""
    phases = ("collect", "update", "evaluate")
    known = [group for group in comparison.groups if all("seconds" in run.state for run in group.runs)]
    if not known:
        return None
    made = figure("seconds, mean over seeds", "", barmode="stack")
    seconds = {
        group.label: [numbers.mean_of([run.state["seconds"] for run in group.runs], phase) for phase in phases]
        for group in known
    }
    names = [plain(group.label) for group in known]
    for number, phase in enumerate(phases):
        values = [seconds[group.label][number] for group in known]
        made.add_bar(x=values, y=names, orientation="h", name=phase, meta={"color": number, "pattern": number})
    made.update_layout(yaxis={"autorange": "reversed", "showgrid": False}, height=130 + 40 * len(known))
    rows = []
    for group in known:
        tokens = float(np.mean(group.finals("timesteps")))
        work = sum(seconds[group.label][:2])
        rate = short(tokens / work, 3) if tokens and work else "-"
        updates = short(float(np.mean(group.finals("updates"))), 4) if group.finals("updates") else "-"
        spent = [short(s) for s in seconds[group.label]]
        passes = group.finals("forward_passes")
        decoding = short(float(np.mean(passes))) if passes else "-"
        rows.append((group.label, f"{tokens:,.0f}", updates, *spent, rate, decoding))
    note = (
        "Wall-clock seconds of a run, by what they went into. Tokens are all that were generated to learn from; the "
        "last evaluation, on all prompts, is not counted."
    )
    per_second, decoding = "tokens per second, without evaluating", "model evaluations per token of an answer"
    head = ("agent", "tokens", "updates", *phases, per_second, decoding)
    return Chart("cost", "Where the time went", note, made, head, rows)


def painted(chart: Chart) -> dict[str, Any]:
    """The figure as plain data for the script."""
    return json.loads(chart.figure.to_json())


def palettes() -> dict[str, Sequence[str]]:
    """The agents' colours on a light page and on a dark one."""
    return {"light": LIGHT, "dark": DARK}
