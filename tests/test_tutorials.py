"""The tutorials: seven chapters in order, each with exercises and a way on. test_run_page.py runs them."""

import re
from pathlib import Path

import pytest
import run_page

PAGES = run_page.pages("tutorials")
SECONDS = 180
"""What a chapter may take of one core, on a quiet machine."""


def test_chapters_are_numbered_and_listed(root: Path) -> None:
    names = [page.name for page in PAGES]
    assert [name[:2] for name in names] == [f"{number:02}" for number in range(1, 8)]
    index = (run_page.DOCS / "tutorials" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([^\]]+)\]\((\d\d-[\w-]+\.md)\) \|.*\| (\d+) \|$", index, re.M)
    assert [name for _, name, _ in rows] == names
    assert all(0 < int(seconds) <= SECONDS for _, _, seconds in rows)
    titles = [page.read_text(encoding="utf-8").splitlines()[0] for page in PAGES]
    assert titles == [f"# {title}" for title, _, _ in rows]
    nav = re.findall(
        r"^      - ([^:\n]+): tutorials/(\d\d-[\w-]+\.md)$", (root / "mkdocs.yml").read_text(encoding="utf-8"), re.M
    )
    assert nav == [(title, name) for title, name, _ in rows]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_chapter_has_exercises_and_a_way_on(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("## Try it yourself") == 1 and "**Reference:**" in text
    following = PAGES[PAGES.index(page) + 1 :]
    way_on = f"]({following[0].name})" if following else "](index.md)"
    assert way_on in text.rpartition("## Try it yourself")[2]
