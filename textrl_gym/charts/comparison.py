"""The charts of a comparison's page: plotly figures, each with words and with its numbers as a table."""

from __future__ import annotations

import numpy as np

from textrl_gym.charts import analysis as numbers
from textrl_gym.charts.plotting import Chart, axes, between, extent, line, look, marker, plain, short
from textrl_gym.charts.training_curves import drifts, learning_curves, length_chart
from textrl_gym.experiments.results import Comparison


def charts(comparison: Comparison) -> dict[str, Chart]:
    """All charts that the comparison has data for, by name."""
    drawn = [*learning_curves(comparison), frontier(comparison), matrix(comparison), profile_chart(comparison)]
    drawn += [overoptimisation(comparison), length_chart(comparison), *drifts(comparison), cost(comparison)]
    return {chart.key: chart for chart in drawn if chart is not None}


def frontier(comparison: Comparison) -> Chart:
    """Every run a point; the mean of each coefficient joined to the agent's next."""
    gold = comparison.gold
    chart = axes("KL to the reference, nats per sequence", comparison.gold)
    rows = []
    for agent in dict.fromkeys(group.agent for group in comparison.groups):
        own = [group for group in comparison.groups if group.agent == agent]
        means = []
        for group in own:
            runs = [run for run in group.runs if "kl_sequence" in run.final and gold in run.final]
            if not runs:
                continue
            x, y = [run.final["kl_sequence"] for run in runs], [run.final[gold] for run in runs]
            hover = [f"{plain(run.name)}, KL coefficient {group.coefficient}" for run in runs]
            chart.add_scatter(x=x, y=y, mode="markers", marker=marker(group, 10), hovertext=hover, **look(group))
            means.append((float(np.mean(x)), float(np.mean(y))))
            rows += [
                (run.name, group.coefficient, short(kl), short(value))
                for run, kl, value in zip(runs, x, y, strict=True)
            ]
        if len(own) > 1:
            joined = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": {"width": 2}}
            chart.add_scatter(x=[m[0] for m in means], y=[m[1] for m in means], **look(own[0], **joined))
    if rows:
        y_range = extent([y for trace in chart.data for y in trace.y], comparison.scale(gold))
        x_range = extent([0.0, *(x for trace in chart.data for x in trace.x)], None, least=1.0)
        chart.update_layout(xaxis={"range": x_range}, yaxis={"range": y_range})
    note = (
        "Each point is a run's last evaluation; up and to the left is better. A line joins an agent's KL coefficients."
    )
    bounds = numbers.best_of_n_kls(comparison)
    for n, kl in bounds.items():
        chart.add_vline(x=kl, line={"width": 1, "dash": "dot"}, annotation={"text": f"best of {n}"})
    if bounds:
        values = ", ".join(f"{kl:.2f} for n = {n}" for n, kl in bounds.items())
        note += (
            f" Best-of-n stands at log n - (n - 1)/n nats ({values}): a bound that its KL to what it samples from does "
            "not exceed, and lies under where scores tie."
        )
    return Chart("frontier", "What the KL buys", note, chart, ("run", "KL coefficient", "KL", comparison.gold), rows)


def matrix(comparison: Comparison) -> Chart | None:
    """Win rates of rows against columns on common prompts."""
    groups, _ = comparison.same_prompts()
    if len(groups) < 2:
        return None
    rated = numbers.ratings(comparison, groups)
    order = [rating.group for rating in rated] or groups
    rate = {}
    rows = []
    for pair in numbers.pairs(comparison, order):
        won = pair.win_rate
        rate[pair.first.label, pair.second.label] = won.value
        # A tie is half a win to each, so that the two add up to 1.
        rate[pair.second.label, pair.first.label] = 1 - won.value
        row = [pair.first.label, pair.second.label, between(won), "-", between(pair.improvement)]
        if pair.difference is not None:
            row[3] = between(pair.difference)
        rows.append(tuple(row))
    # None on the diagonal, which plotly leaves blank: an agent against itself is no result.
    z = [[rate.get((row.label, column.label)) for column in order] for row in order]
    names = [plain(group.label) for group in order]
    chart = axes("against", "", hovermode="closest")
    chart.add_heatmap(
        z=z, x=names, y=names, zmin=0, zmax=1, texttemplate="%{z:.2f}", xgap=2, ygap=2, meta={"heat": True},
        hovertemplate="%{y} wins %{z:.1%} against %{x}<extra></extra>", showscale=False,
    )  # fmt: skip
    grid = {"showgrid": False}
    chart.update_layout(xaxis=grid, yaxis={"autorange": "reversed", **grid}, height=160 + 46 * len(order))
    measure = "by the gold score" if comparison.gold == "gold" else "by the training reward, as there is no gold score"
    note = (
        f"How often the row's answer is better than the column's {measure}, on the same prompts with the same random "
        "numbers; a tie is half a win. Mean over all pairs of seeds; the intervals of win rates are over prompts, and "
        "those of the difference and of the chance that a run is better also over seeds."
    )
    head = ("agent", "against", "win rate", f"mean difference in {comparison.gold}", "chance that a run is better")
    return Chart("matrix", "Who beats whom", note, chart, head, rows)


def profile_chart(comparison: Comparison) -> Chart:
    """Share of runs above each threshold."""
    thresholds, shares = numbers.score_profile(comparison)
    chart = axes(f"threshold of {comparison.gold}", "share of runs above it")
    chart.update_layout(yaxis={"range": [-0.03, 1.03], "tickformat": ".0%"})
    # More than six bands over each other would be one grey.
    faint = 0.12 if len(comparison.groups) <= 6 else 0.05
    for group in comparison.groups:
        own = shares[group.label]
        if len(group.runs) > 1:
            band = {"hoverinfo": "skip", "showlegend": False, "mode": "lines", "line": {"width": 0, "shape": "hv"}}
            chart.add_scatter(x=thresholds, y=[s.low for s in own], **look(group, **band))
            chart.add_scatter(
                x=thresholds, y=[s.high for s in own], fill="tonexty", **look(group, meta={"fill": faint}, **band)
            )
        # A share changes at a score and nowhere between: steps, and no slopes.
        steps = {**line(group), "shape": "hv"}
        chart.add_scatter(x=thresholds, y=[s.value for s in own], mode="lines", line=steps, **look(group))
    some = range(0, len(thresholds), max(len(thresholds) // 8, 1))
    head = ("agent", *(f"> {short(thresholds[i])}" for i in some))
    rows = [(group.label, *(short(shares[group.label][i].value) for i in some)) for group in comparison.groups]
    note = (
        "The share of an agent's runs whose last evaluation lies above each threshold: a line further right is better. "
        "The band is a 95% bootstrap over seeds at each threshold; one seed has none."
    )
    return Chart("profile", "How many runs get how far", note, chart, head, rows)


def overoptimisation(comparison: Comparison) -> Chart | None:
    """Gold and proxy over KL, through training."""
    if comparison.gold != "gold":
        return None
    ways = [way for group in comparison.groups if (way := numbers.training(group)) is not None]
    if not ways:
        return None
    x_name = "KL to the reference, nats per sequence"
    chart = axes("", "gold", height=560)
    chart.update_layout(
        xaxis={"anchor": "y", "showticklabels": False},
        # Gold above proxy on one axis of KL: two scales on one chart could be shifted to show anything.
        xaxis2={"title": {"text": x_name}, "anchor": "y2", "matches": "x"},
        yaxis={"domain": [0.54, 1]},
        yaxis2={"title": {"text": "proxy"}, "domain": [0, 0.46], "anchor": "x2"},
    )
    rows = []
    for way in ways:
        group, dots = way.group, marker(way.group, 6)
        chart.add_scatter(x=way.kl, y=way.gold, mode="markers", marker=dots, **look(group))
        lower = look(group, xaxis="x2", yaxis="y2", showlegend=False)
        chart.add_scatter(x=way.kl, y=way.proxy, mode="markers", marker=dots, **lower)
        row = [group.label, *(f"{short(gold)} at {short(kl)}" for kl, gold in (way.best, way.end))]
        if way.fit is not None:
            # Between the KLs that were seen, and no further.
            x = np.linspace(min(way.kl), max(way.kl), 60)
            curve = {"mode": "lines", "line": line(group), "showlegend": False, "hoverinfo": "skip"}
            chart.add_scatter(x=x.tolist(), y=(way.start + way.fit.gold(x)).tolist(), **look(group, **curve))
            at = way.fit.peak_kl
            peak = short(at) if at is not None and at <= max(way.kl) else "not among the KLs that were seen"
            row += [short(way.fit.alpha), short(way.fit.beta), short(way.fit.r2, 2), peak]
        else:
            row += ["-"] * 4
        rows.append(tuple(row))
    shown = [y for way in ways for y in way.gold]
    chart.update_layout(yaxis={"range": extent(shown, comparison.scale("gold"))})
    note = (
        "Above the gold score, which no agent was trained on; below the score that was. Where gold falls while the "
        "proxy rises, the policy exploits the proxy. Each point is an evaluation, all seeds together; the line is Gao "
        "et al.'s form for RL, gold = start + d (alpha - beta log d) with d the root of the KL, fitted to gold where "
        f"there are {numbers.FIT_POINTS} KLs above 0. R2 is the share of gold's variance that it explains."
    )
    head = ("agent", "highest mean gold, at KL", "at the end", "alpha", "beta", "R2", "KL at the fit's peak")
    return Chart("overoptimisation", "Proxy and gold", note, chart, head, rows)


def cost(comparison: Comparison) -> Chart | None:
    """Seconds by phase, mean over seeds."""
    phases = ("collect", "update", "evaluate")
    known = [
        group
        for group in comparison.groups
        if all(set(phases) <= run.state.get("seconds", {}).keys() for run in group.runs)
    ]
    if not known:
        return None
    chart = axes("seconds, mean over seeds", "", barmode="stack")
    seconds = {
        group.label: [numbers.mean_of_key([run.state["seconds"] for run in group.runs], phase) for phase in phases]
        for group in known
    }
    names = [plain(group.label) for group in known]
    for number, phase in enumerate(phases):
        values = [seconds[group.label][number] for group in known]
        chart.add_bar(x=values, y=names, orientation="h", name=phase, meta={"color": number, "pattern": number})
    chart.update_layout(yaxis={"autorange": "reversed", "showgrid": False}, height=130 + 40 * len(known))
    rows = []
    for group in known:
        tokens = float(np.mean(group.finals("timesteps")))
        # Without evaluation: how often one looks is no property of an algorithm.
        work = sum(seconds[group.label][:2])
        rate = short(tokens / work, 3) if tokens and work else "-"
        updates = short(float(np.mean(group.finals("updates"))), 4) if group.finals("updates") else "-"
        spent = [short(s) for s in seconds[group.label]]
        passes = group.finals("model_calls")
        decoding = short(float(np.mean(passes))) if passes else "-"
        texts, flop = numbers.mean_known(group, numbers.texts), numbers.mean_known(group, numbers.flop)
        scored = "-" if texts is None else f"{texts:,.0f}"
        work_done = "-" if flop is None else f"{flop:.2g}".replace("e+", "e")
        rows.append((group.label, f"{tokens:,.0f}", scored, work_done, updates, *spent, rate, decoding))
    note = (
        "Wall-clock seconds of a run, by what they went into. Means over seeds; evaluations are in no other number of "
        "the table. Tokens are all that were generated to learn from. Reward calls are completions scored to learn "
        "from: tokens by the mean length of each rollout (of DPO, those of the pairs that it learnt from). FLOP is an "
        "estimate: the matrix products of the first rollout and update, as PyTorch counts them, policy, reference, "
        "critic and reward model, forward and backward, times tokens by that rollout's tokens. By the usual rule it is "
        "2 for each parameter and token in a forward pass, and 6 with its backward pass."
    )
    per_second, decoding = "tokens per second, without evaluating", "model evaluations per token of an answer"
    work_done = "FLOP, estimated"
    head = ("agent", "tokens", "reward calls", work_done, "updates", *phases, per_second, decoding)
    return Chart("cost", "Where the time went", note, chart, head, rows)
