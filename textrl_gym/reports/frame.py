"""What the hand-written pages have in common: their frame, tables, prompts and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from textrl_gym.reports.run_page import PAGE_SECURITY_POLICY, STYLE

PAGE = "report.html"
"""The file of a page in the folder of what it is about."""

Rows = list[list[str]]
"""Of a table, the first cell of each its heading."""


def page_html(title: str, body: Markup) -> str:
    """A page of its own: title, style and policy around a body."""
    head = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{}</title>'
        '<meta http-equiv="Content-Security-Policy" content="{}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><style>'
    ).format(title, PAGE_SECURITY_POLICY)
    return str(head) + STYLE + str(Markup("</style></head><body><main>{}</main></body></html>\n").format(body))


def table_html(head: Sequence[str], rows: Sequence[Sequence[object]], kind: str, label: str) -> Markup:
    """A table; cells are text, whatever they hold, or Markup.

    Args:
        kind: its class in the style.
        label: what a screen reader calls the part of the page that scrolls with it.
    """
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    lines = []
    for first, *rest in rows:
        cells = Markup("").join(Markup("<td>{}</td>").format(cell) for cell in rest)
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(first, cells))
    table = '<table class="{}"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>'
    region = '<div class="wide" role="region" tabindex="0" aria-label="{}">' + table + "</div>"
    return Markup(region).format(label, kind, top, Markup("").join(lines))


def prompt_html(prompt: str) -> Markup:
    """A prompt in a table of samples."""
    return Markup('<div class="text prompt">{}</div>').format(prompt.strip())


def completion_html(sample: Mapping[str, Any]) -> Markup:
    """A completion with its scores, of a line of episodes."""
    gold = f"gold {sample['gold']:.2f}, " if "gold" in sample else ""
    marks = Markup('<div class="marks">{}score {}</div>').format(gold, f"{sample['score']:.2f}")
    return Markup('<div class="text">{}</div>{}').format(str(sample["completion"]).strip(), marks)
