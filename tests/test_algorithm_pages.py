"""The pages of the algorithm families: every agent has one, with its equation, its source and a picture."""

import re
from pathlib import Path

import pytest
import run_page

from textrl_gym import registry

PAGES = run_page.pages("algorithms")
BASELINES = {"reference", "random"}
"""Agents without an objective."""


def agents_of(page: Path) -> list[str]:
    """Those whose defaults the page lists."""
    return [
        name
        for match in run_page.DEFAULTS.finditer(page.read_text(encoding="utf-8"))
        for name in match["agents"].split()
    ]


def test_every_agent_has_one_page() -> None:
    listed = [name for page in PAGES for name in agents_of(page)]
    assert sorted(listed) == sorted(set(registry.names("agents")) - BASELINES)


def test_the_index_has_the_families() -> None:
    index = (run_page.DOCS / "algorithms" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^\]]+\]\((\w[\w-]*\.md)\) \| ([^|]+) \|", index, re.M)
    assert {name: re.findall(r"`(\w+)`", agents) for name, agents in rows} == {p.name: agents_of(p) for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_an_agent_has_its_equation_and_its_source(page: Path, root: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "$$" in text and text.count("$$") % 2 == 0
    for name in agents_of(page):
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.M)
        assert f"[agents/{name}.py](../api/agents/{name}.md)" in row
        # The papers that the head of its file names.
        head = (root / "agents" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
        sources = re.findall(r"(?:arXiv:|doi:)([\w./-]*\w)", row)
        assert sources and set(sources) <= set(re.findall(r"(?:arXiv:|doi:)([\w./-]*\w)", head)), (name, sources)
    assert "**Measured:**" in text
