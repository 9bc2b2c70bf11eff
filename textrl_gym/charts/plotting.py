"""What the charts of a comparison are drawn with: plotly, colours, symbols, and numbers in words.

Colours are the page's to choose (light or dark): a trace names the agent's number in `meta`, and the script paints it.
An agent also has a symbol and a dash of its own, so that nothing is told by colour alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from textrl_gym.evaluation.metrics import Scale
from textrl_gym.experiments.results import Group
from textrl_gym.extras import install
from textrl_gym.stats.estimates import Estimate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Six agents can be told apart by colour; from the seventh on colours come again, with another symbol and dash.
LIGHT = ("#0072b2", "#c84e00", "#00805f", "#7208f0", "#541c03", "#142a41")
DARK = ("#56b4e9", "#ee7733", "#2bbf93", "#c942fd", "#e8e70a", "#dfe6ee")
"""Far apart for people who see two colours too, and at 3:1 or more to the page."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True)
class Table:
    """Numbers beside a figure's own."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """A figure, and what it says for those who do not see it."""

    key: str
    title: str
    note: str
    """How to read it, in a sentence or two."""
    figure: Figure
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    more: Table | None = None
    """A second table."""


def go() -> ModuleType:
    """plotly.graph_objects.

    Raises:
        ImportError: it or scipy, which the statistics are made with, is missing; the message says how to install them.
    """
    try:
        import plotly.graph_objects
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page of a comparison needs {error.name}: {install('report')}") from error
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


def look(group: Group, **more: object) -> dict[str, Any]:
    """What all traces of a group share: its name, and its colour by number."""
    own = more.pop("meta", {})
    assert isinstance(own, dict)
    meta = {"color": group.color % len(LIGHT)} | own
    return {"name": plain(group.label), "legendgroup": group.label, "meta": meta} | more


def marker(group: Group, size: int = 8) -> dict[str, Any]:
    """A symbol that differs between an agent's coefficients too."""
    return {"symbol": SYMBOLS[(group.color + group.variant) % len(SYMBOLS)], "size": size}


def line(group: Group) -> dict[str, Any]:
    """A dash that differs between an agent's coefficients too."""
    return {"dash": DASHES[(group.color + group.variant) % len(DASHES)], "width": 2}


def extent(values: Sequence[float], scale: Scale | None, least: float = 0.0) -> list[float]:
    """The ends of an axis: around the values, not closer than noise is large, and little beyond their scale.

    Without it an axis would stretch three curves between 0.97 and 0.99 from its lower to its upper end.

    Args:
        scale: of the values; a fifth of it is shown at least, and without one a fifth of the largest value.
        least: show no less than this.
    """
    known = [x for x in values if math.isfinite(x)] or [0.0]
    low, high = min(known), max(known)
    whole = scale[1] - scale[0] if scale is not None else math.inf
    least = max(least, 0.2 * (whole if math.isfinite(whole) else max(abs(low), abs(high))))
    more = max(least - (high - low), 0.0) / 2 or 0.05 * (high - low) or 0.5
    low, high = low - more, high + more
    if scale is not None:
        # A little beyond, so that a curve along the end of the scale can be seen.
        beyond = 0.03 * (high - low)
        low, high = max(low, scale[0] - beyond), min(high, scale[1] + beyond)
    return [low, high]


def axes(x: str, y: str, **layout: object) -> Figure:
    """An empty figure with its axes named."""
    figure = go().Figure()
    titles = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    # Plotly's own template would put its colours above those that the page's script gives.
    figure.update_layout(template="none", **{"height": 380, **titles, **layout})
    return figure


def between(estimate: Estimate) -> str:
    """A number with its interval."""
    if math.isnan(estimate.low):  # one seed: a number without an interval
        return short(estimate.value)
    return f"{short(estimate.value)} ({short(estimate.low)} to {short(estimate.high)})"


def painted(chart: Chart) -> dict[str, Any]:
    """The figure as plain data for the script."""
    # By way of plotly's JSON, which knows numpy's arrays and dates; the figure's own dict holds them as they are.
    return _rounded(json.loads(chart.figure.to_json()))


def _rounded(data: Any) -> Any:
    """Numbers to five digits, a hundredth of a pixel: seventeen are half of a page's data."""
    if isinstance(data, float):
        return float(f"{data:.5g}")
    if isinstance(data, list):
        return [_rounded(item) for item in data]
    return {key: _rounded(item) for key, item in data.items()} if isinstance(data, dict) else data


def palettes() -> dict[str, Sequence[str]]:
    """The agents' colours on a light page and on a dark one."""
    return {"light": LIGHT, "dark": DARK}
