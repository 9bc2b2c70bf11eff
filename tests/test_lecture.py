"""The lecture's pages: every topic has one, with its equation and its parts. tests/test_run_page.py runs them."""

import re
from pathlib import Path

import pytest
import run_page

LECTURE = run_page.DOCS / "lecture"
PAGES = run_page.pages("lecture")
SECONDS = 180
"""What a page may take of one core, on a quiet machine."""
TOPICS = (
    "instruction tuning",
    "objective",
    "ratings",
    "Bradley",
    "reward model",
    "policy",
    "REINFORCE",
    "KL",
    "advantage",
    "trust region",
    "clipped",
    "value model",
    "entropy",
    "PPO",
    "GRPO",
    "PPO against GRPO",
    "win rates",
    "fine-tuning",
    "offline",
    "hacking",
    "certainty",
    "RLAIF",
    "constitutional",
)
"""A word or two of the title of each topic's page, in the lecture's order."""


def nav(root: Path) -> list[str]:
    """The files under the tab of the lecture, in order."""
    lines = (root / "mkdocs.yml").read_text(encoding="utf-8").splitlines()
    first = lines.index("  - Lecture:") + 1
    return [line.split("lecture/")[1] for line in lines[first:] if line.startswith("      - ") and "lecture/" in line]


def test_every_topic_has_a_page() -> None:
    titles = [page.read_text(encoding="utf-8").splitlines()[0] for page in PAGES]
    assert len(titles) == len(TOPICS)
    for number, (title, topic) in enumerate(zip(titles, TOPICS, strict=True), 1):
        assert title.startswith("# ") and topic.lower() in title.lower(), f"page {number}: {title}"


def test_pages_are_numbered_and_listed(root: Path) -> None:
    names = [page.name for page in PAGES]
    assert [name[:2] for name in names] == [f"{number:02}" for number in range(1, len(names) + 1)]
    assert nav(root) == ["index.md", *names]
    index = (LECTURE / "index.md").read_text(encoding="utf-8")
    # Each once, in the table: topic, page, what it shows, seconds.
    assert re.findall(r"\]\((\d\d-[\w-]+\.md)\) \|", index) == names
    seconds = re.findall(r"^\|.*\]\(\d\d-[\w-]+\.md\) \|.*\| (\d+) \|$", index, re.M)
    assert len(seconds) == len(names) and max(map(int, seconds)) <= SECONDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_all_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "$$" in text and text.count("$$") % 2 == 0
    for heading in ("## What to look at", "## Exercises", "**Library:**", "**Papers:**"):
        assert text.count(heading) == 1, heading


def test_equations_need_no_network(root: Path) -> None:
    config = (root / "mkdocs.yml").read_text(encoding="utf-8")
    assets = re.findall(r"(assets/katex/[\w.-]+)", config)
    assert len(assets) == 4
    for name in assets:
        text = (root / "docs" / name).read_text(encoding="utf-8")
        # Names of namespaces (www.w3.org) are no addresses.
        assert not re.findall(r"(?:src|href|url\()[=\"'( ]*https?:", text), name
    css = (root / "docs/assets/katex/katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\((fonts/[\w-]+\.woff2)\)", css))
    assert fonts == {f"fonts/{path.name}" for path in (root / "docs/assets/katex/fonts").iterdir()}
    assert "MIT" in (root / "docs/assets/katex/LICENSE").read_text(encoding="utf-8")
