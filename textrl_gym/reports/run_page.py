"""report(): one self-contained HTML file from what training wrote; no script, no network, no dependency.

The curves are inline SVG made here: a plotting library's script would be 4 MB for four lines.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape

from textrl_gym import files
from textrl_gym.charts.plotting import extent
from textrl_gym.evaluation.metrics import Scale, metric, metric_names, number, scale_of
from textrl_gym.training.run_folder import Run, alarms, find_runs, read_run

SAMPLES_SHOWN = 6
COLORS = 6
"""Of runs, after which they come again."""
# The page has no script: texts of a model in it must be able to run, to load and to send nothing.
PAGE_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"


# -- curves -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40


@dataclasses.dataclass(frozen=True)
class Series:
    """One run's points in a chart."""

    label: str
    color: int
    points: list[tuple[float, float]]
    style: str = "eval"
    """"eval" (line and dots), "rollout" (faint line) or "greedy" (rings)."""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within [low, high], which must differ."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, series: Sequence[Series], zero: bool = False, scale: Scale | None = None) -> str:
    """An SVG chart over generated tokens; the empty string where there is nothing to draw.

    Args:
        zero: the vertical axis includes 0.
        scale: of what is drawn (see `charts.plotting.extent`).
    """
    finite = [dataclasses.replace(s, points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    drawn = [s for s in finite if s.points]
    if not drawn:
        return ""
    values = [y for s in drawn for _, y in s.points] + ([0.0] if zero else [])
    low, high = extent(values, scale)
    x_most = max(x for s in drawn for x, _ in s.points) or 1.0

    def at(x: float, y: float) -> tuple[str, str]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_most
        up = (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)
        return f"{across:.1f}", f"{HEIGHT - BOTTOM - up:.1f}"

    parts = []
    for y in ticks(low, high):
        _, v = at(0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v}" y2="{v}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{v}" dy="4" text-anchor="end">{y:g}</text>')
    for x in ticks(0, x_most):
        h, _ = at(x, low)
        parts.append(f'<text x="{h}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{_short(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">generated tokens</text>')
    for s in sorted(drawn, key=lambda s: ("rollout", "eval", "greedy").index(s.style)):
        parts += _draw(s, at)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _draw(series: Series, at: Callable[[float, float], tuple[str, str]]) -> list[str]:
    kind = f"s{series.color} {series.style}"
    places = [at(x, y) for x, y in series.points]
    parts = []
    if series.style != "greedy" and len(places) > 1:
        line = " ".join(",".join(place) for place in places)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
    if series.style != "rollout":
        for (h, v), (x, y) in zip(places, series.points, strict=True):
            title = f"{series.label}, {x:,.0f} tokens: {y:.4g}"
            parts.append(f'<circle class="{kind}" cx="{h}" cy="{v}" r="4"><title>{escape(title)}</title></circle>')
    return parts


def _short(number: float) -> str:
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:g}k" if number >= 1e3 else f"{number:g}"


def curves(runs: Sequence[Run], colors: Sequence[int] | None = None) -> str:
    """The four learning curves, every run in each.

    Args:
        colors: numbers of the runs' colours; None: one after the other.
    """
    color_of = [color % COLORS for color in colors or range(len(runs))]

    def held_out(key: str, style: str = "eval") -> list[Series]:
        suffix = " (greedy)" if style == "greedy" else ""
        return [
            Series(r.name + suffix, color_of[i], [(e["timesteps"], e[key]) for e in r.evaluations if key in e], style)
            for i, r in enumerate(runs)
        ]

    def rollouts(key: str) -> list[Series]:
        x = "time/total_timesteps"
        return [
            Series(
                r.name, color_of[i], [(row[x], row[key]) for row in r.rollouts if x in row and key in row], "rollout"
            )
            for i, r in enumerate(runs)
        ]

    charts = [
        chart("Gold score", held_out("gold") + held_out("gold_greedy", "greedy")),
        chart("Score (training reward)", held_out("score") + rollouts("rollout/score")),
        chart(
            "KL to the reference, nats per sequence",
            held_out("kl_sequence") + rollouts("rollout/kl_sequence"),
            zero=True,
        ),
        chart(
            "Completion length, tokens",
            held_out("completion_tokens") + rollouts("rollout/completion_tokens"),
            zero=True,
            scale=scale_of("completion_tokens"),
        ),
    ]
    names = "".join(
        f'<span><i class="swatch s{color}"></i>{escape(run.name)}</span>'
        for color, run in zip(color_of, runs, strict=True)
    )
    styles = ["dots: held-out prompts, sampled at the training temperature"]
    if any("gold_greedy" in e for r in runs for e in r.evaluations):
        styles.append("rings: greedy decoding")
    if any("time/total_timesteps" in row for r in runs for row in r.rollouts):
        styles.append("faint lines: training rollouts")
    legend = f'<p class="legend">{names}<span class="muted">{"; ".join(styles)}</span></p>'
    return f'{legend}<div class="charts">{"".join(charts)}</div>'


# -- tables and samples -----------------------------------------------------------------------------------------------


def overview(runs: Sequence[Run]) -> str:
    """One row for each run's start and one for its end."""
    keys = [key for key in metric_names([run.end for run in runs]) if key != "kl_token"]
    head = "".join(f"<th>{escape(metric(key).heading)}</th>" for key in keys)
    rows = []
    for i, run in enumerate(runs):
        for when, row in (("start", run.start), (f"{run.end['timesteps']:,} tokens", run.end)):
            cells = "".join(f"<td>{number(row, key)}</td>" for key in keys)
            name = f'<th scope="row"><i class="swatch s{i % COLORS}"></i>{escape(run.name)}</th>'
            kind, head_cell = ("first", name) if when == "start" else ("last", "<td></td>")
            rows.append(f'<tr class="{kind}">{head_cell}<td class=when>{when}</td>{cells}</tr>')
    return (
        '<div class="wide" role="region" tabindex="0" aria-label="Before and after">'
        f'<table class="numbers"><thead><tr><th>run</th><th>after</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _completion(sample: dict[str, Any] | None) -> str:
    if sample is None:
        return '<td class="muted">-</td>'
    marks = [f"score {sample['score']:.2f}"]
    if "gold" in sample:
        marks.insert(0, f"gold {sample['gold']:.2f}")
    if sample.get("stop_reason", "EOS") != "EOS":
        marks.append(str(sample["stop_reason"]).lower().replace("_", " "))
    text = escape(sample["completion"].strip()) or '<span class="muted">(empty)</span>'
    return f'<td><div class="text">{text}</div><div class="marks">{escape(" · ".join(marks))}</div></td>'


def sample_tables(run: Run) -> str:
    """Completions of the same prompts before and after, side by side."""
    # Completions of the same prompts at both ends stand side by side.
    before = {s["index"]: s for s in run.samples if s["timesteps"] == run.start["timesteps"]}
    after = {s["index"]: s for s in run.samples if s["timesteps"] == run.end["timesteps"]}
    rows = []
    for index in list(before)[:SAMPLES_SHOWN]:
        prompt, reference = re.sub(r"\n\s*\n", "\n", before[index]["prompt"].strip()), before[index].get("reference")
        reference_mark = f'<div class="marks">reference: {escape(reference.strip())}</div>' if reference else ""
        rows.append(
            f'<tr><td><div class="text prompt">{escape(prompt)}</div>{reference_mark}</td>'
            f"{_completion(before[index])}{_completion(after.get(index))}</tr>"
        )
    if not rows:
        return ""
    return (
        f"<h3>Samples</h3><p class=muted>The first {len(rows)} held-out prompts, not picked; one sample of each.</p>"
        f'<div class="wide" role="region" tabindex="0" aria-label="Samples of {escape(run.name)}">'
        f'<table class="samples"><thead><tr><th>prompt</th><th>initial policy</th>'
        f"<th>after {run.end['timesteps']:,} tokens</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def setting_tables(run: Run) -> str:
    """What the run was started with, folded away."""
    if not run.state:
        return ""
    settings = {k: run.state[k] for k in ("agent", "task", "model", "seed", "config", "env") if k in run.state}
    return f"<details><summary>Settings</summary><pre>{escape(json.dumps(settings, indent=1))}</pre></details>"


# -- the page ---------------------------------------------------------------------------------------------------------

CHART_STYLE = """
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: baseline; max-width: none; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 16px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.rollout { stroke-width: 1.5; opacity: 0.4; } circle.eval { stroke: var(--card); stroke-width: 1.5; }
circle.greedy { fill: var(--card); stroke-width: 2; }
@media (max-width: 600px) { svg { overflow: visible; } svg text { font-size: 18px; }
  svg.intervals text { font-size: 25px; } }
""" + "\n".join(
    f"polyline.s{i}, circle.s{i}.greedy {{ stroke: var(--c{i}); }} circle.s{i}.eval {{ fill: var(--c{i}); }} "
    f".swatch.s{i} {{ background: var(--c{i}); }}"
    for i in range(COLORS)
)
"""Of the curves, by the colours --c0 to --c5 of the page that they stand in."""
STYLE = (
    """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #16181d; --soft: #5b5f66; --line: #e3e3df;
  --accent: #0063a0; --warn: #fff3e0; --warn-ink: #8a3b00; --warn-line: #e07b1a;
  --c0: #2a6fd0; --c1: #d9541e; --c2: #16916a; --c3: #b07d00; --c4: #8a4fc7; --c5: #c73a75; }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #eceded; --soft: #a2a6ad;
  --line: #33363b; --accent: #7cc4f5; --warn: #35240f; --warn-ink: #ffc68a; --warn-line: #d27c2c;
  --c0: #5b9bf0; --c1: #f0803f; --c2: #35b98c; --c3: #d7a52a; --c4: #b48ae6; --c5: #ec6f9f; } }
* { box-sizing: border-box; } a { color: var(--accent); }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1180px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 24px 0 0; } p { margin: 0 0 12px; }
.muted, .marks, .when { color: var(--soft); } .marks { font-size: 13px; margin-top: 6px; }
.warning { background: var(--warn); color: var(--warn-ink); border-left: 4px solid var(--warn-line); padding: 12px 16px;
  border-radius: 4px; margin: 16px 0; }
figure { margin: 0; padding: 14px 16px 10px; } figcaption { font-weight: 600; margin-bottom: 6px; }
figure, .wide { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure + .wide { margin-top: 16px; }
.numbers tr > :first-child { position: sticky; left: 0; background: var(--card); z-index: 1; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 9px 14px; } thead th { font-size: 13px; font-weight: 600;
  color: var(--soft); vertical-align: bottom; border-bottom: 1px solid var(--line); }
.numbers td:nth-child(n+3), .numbers thead th:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
.numbers tbody th, .when { white-space: nowrap; } .numbers .first td { color: var(--soft); }
.numbers tr.first + tr td, .numbers tr.last td { font-weight: 600; } .numbers tr.last td.when { font-weight: 400; }
tr.first:not(:first-child) > *, .samples tr:not(:first-child) > * { border-top: 1px solid var(--line); }
.samples { table-layout: fixed; min-width: 720px; } .samples th:first-child { width: 42%; }
.critiques { table-layout: fixed; min-width: 900px; } .critiques th:nth-child(3) { width: 8em; }
.critiques tbody tr:not(:first-child) > * { border-top: 1px solid var(--line); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { max-height: 20em; overflow-y: auto; font-size: 13.5px; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; overflow-x: auto; }
"""
    + CHART_STYLE
)


def run_html(runs: Sequence[Run]) -> str:
    """The whole page; every text of a run is escaped."""
    title = "textrl-gym: " + ", ".join(run.name for run in runs)
    has_gold = any("gold" in evaluation for run in runs for evaluation in run.evaluations)
    gold = "; the gold score is not trained on, unless it was named as the reward" if has_gold else ""
    warnings = "".join(
        f'<div class="warning" role="alert"><b>{title} in {escape(run.name)}.</b> {escape(alarm.words)}</div>'
        for run in runs
        for alarm in alarms(run)
        for title in (alarm.title,)
    )
    sections = "".join(
        f"<section><h2>{escape(run.name)}</h2>{sample_tables(run)}{setting_tables(run)}</section>" for run in runs
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{PAGE_SECURITY_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f"<h1>Training report</h1><p class=muted>{escape(', '.join(run.name for run in runs))}. Held-out prompts"
        f"{gold}.</p>{warnings}"
        f"<h2>Before and after</h2>{overview(runs)}<h2>Learning curves</h2><div id=curves>{curves(runs)}</div>"
        f"{sections}</main></body></html>\n"
    )


def report(dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one HTML file about the runs in some folders.

    Args:
        dirs: folders that hold a run (what training wrote), or whose subfolders do.
        out: the file to write.

    Raises:
        ValueError: a folder holds no run.
    """
    out = Path(out)
    runs = [read_run(path) for folder in dirs for path in find_runs(Path(folder))]
    files.make_folder(out.parent)
    files.write_text(out, run_html(runs))
    return out
