"""comparison_figures(): the charts of a comparison's page for papers, as PNG and SVG, by plotly's kaleido.

Kaleido draws with Chromium or Chrome, which it finds on the PATH or by the environment variable BROWSER_PATH. It is
kept from the network. The browser's sandbox is off for root alone, for whom Chromium has none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrl_gym.charts.comparison import charts
from textrl_gym.charts.plotting import LIGHT, Chart, go
from textrl_gym.experiments.results import read_comparison
from textrl_gym.extras import install

if TYPE_CHECKING:
    from plotly.basedatatypes import BaseTraceType
    from plotly.graph_objects import Figure

FOLDER = "figures"
WIDTH = 760
"""Of a figure, in pixels of an SVG; a PNG has twice as many."""
INK, GRID = "#16181d", "#d9d9d6"
PATTERNS = ("", "/", "x")


def comparison_figures(folder: str | Path) -> list[Path]:
    """Write DIR/figures/CHART.png and CHART.svg of each chart of the comparison in DIR.

    Raises:
        ValueError: the folder holds no comparison, or no finished run of one.
        ImportError: plotly or kaleido is not installed.
        OSError: there is no browser, or it could not be started.
    """
    folder = Path(folder)
    comparison = read_comparison(folder)
    go()  # so that a missing plotly is named before kaleido
    try:
        import kaleido
        from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError
    except ImportError as error:
        raise ImportError(f"figures need {error.name}: {install('figures')}") from error

    (folder / FOLDER).mkdir(exist_ok=True)
    figures = list(_wanted(charts(comparison), folder / FOLDER))
    # MathJax would be fetched from the network, and no chart has a formula.
    options = {"mathjax": False, "enable_sandbox": os.geteuid() != 0}
    try:
        kaleido.write_fig_from_object_sync(figures, cancel_on_error=True, kopts=options)
    except ChromeNotFoundError as error:
        raise OSError(
            "figures need Chromium or Chrome: install it, or name its program in the environment variable BROWSER_PATH"
        ) from error
    except (BrowserClosedError, BrowserFailedError) as error:
        raise OSError(
            f"the browser that draws the figures could not be started: {error.args[0]} For other users than root it "
            "runs in its sandbox, which some containers do not allow."
        ) from error
    return [one["path"] for one in figures]


def _wanted(drawn: dict[str, Chart], folder: Path) -> Iterator[dict[str, Any]]:
    for key, chart in drawn.items():
        figure = printed(chart)
        for kind, scale in (("png", 2), ("svg", 1)):
            options = {"format": kind, "width": WIDTH, "height": figure.layout.height, "scale": scale}
            yield {"fig": figure, "path": folder / f"{key}.{kind}", "opts": options}


def printed(chart: Chart) -> Figure:
    """The figure with the colours of a light page on white, the legend below, and its axes drawn."""
    figure = go().Figure(chart.figure)
    for trace in figure.data:
        trace.update(_paint(trace))
    shown = {trace.legendgroup for trace in figure.data if trace.showlegend is not False and trace.type != "heatmap"}
    figure.update_layout(
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": "Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        # Beside the page the legend stands right; on paper below, about five names in a line.
        height=figure.layout.height + 40 + 24 * (len(shown) // 5),
        margin={"l": 70, "r": 20, "t": 30, "b": 60},
        legend={"orientation": "h", "x": 0, "y": 0, "yanchor": "bottom", "yref": "container", "traceorder": "normal"},
        showlegend=bool(shown),
    )
    axis = {"gridcolor": GRID, "linecolor": INK, "zeroline": False, "automargin": True, "ticks": "outside"}
    figure.update_xaxes(showline=True, title_standoff=10, **axis)
    figure.update_yaxes(showline=True, title_standoff=10, **axis)
    figure.update_shapes(line_color=INK)
    return figure


def _paint(trace: BaseTraceType) -> dict[str, Any]:
    """What page.js does on a light page: colours by the agent's number in the trace's meta."""
    meta = trace.meta or {}
    if meta.get("heat"):
        return {"colorscale": [[0, LIGHT[1]], [0.5, "#f3f3f0"], [1, LIGHT[0]]]}
    if "color" not in meta:
        return {}
    color = LIGHT[meta["color"]]
    if "fill" in meta:
        return {"fillcolor": faint(color, meta["fill"])}
    if trace.type == "bar":
        # Bars of one agent differ by pattern, so that they can be told apart in print without colours.
        pattern = {"shape": PATTERNS[meta["pattern"]], "fillmode": "overlay", "fgcolor": "white", "size": 7}
        return {"marker": {"color": color, "pattern": pattern}}
    return {"marker": {"color": color, "line": {"color": "white", "width": 1}}, "line": {"color": color}}


def faint(color: str, alpha: float) -> str:
    """#rrggbb as a colour that lets through what is behind it."""
    red, green, blue = (int(part, 16) for part in re.findall("[0-9a-f]{2}", color))
    return f"rgba({red},{green},{blue},{alpha})"
