"""The lecture's pages: every topic has one, they run as printed, and their figures are those that are shown."""

import re
from pathlib import Path

import pytest
from lecture import IMAGES, LECTURE, blocks, pages, run

SECONDS = 180
"""What a page may take, on a quiet machine with two cores; the clock here is the wall's, and machines are shared."""
BUSY = 5
"""Times as long a page may take where others use the machine too."""
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
FIGURE = re.compile(r"!\[[^\]]+\]\(images/([\w-]+\.svg)\)")


def nav(root: Path) -> list[str]:
    """The files under the tab of the lecture, in order."""
    lines = (root / "mkdocs.yml").read_text(encoding="utf-8").splitlines()
    first = lines.index("  - Lecture:") + 1
    return [line.split("lecture/")[1] for line in lines[first:] if line.startswith("      - ") and "lecture/" in line]


def test_every_topic_has_a_page() -> None:
    titles = [page.read_text(encoding="utf-8").splitlines()[0] for page in pages()]
    assert len(titles) == len(TOPICS)
    for number, (title, topic) in enumerate(zip(titles, TOPICS, strict=True), 1):
        assert title.startswith("# ") and topic.lower() in title.lower(), f"page {number}: {title}"


def test_pages_are_numbered_and_listed(root: Path) -> None:
    names = [page.name for page in pages()]
    assert [name[:2] for name in names] == [f"{number:02}" for number in range(1, len(names) + 1)]
    assert nav(root) == ["index.md", *names]
    index = (LECTURE / "index.md").read_text(encoding="utf-8")
    # Each once, in the table: topic, page, what it shows, seconds.
    assert re.findall(r"\]\((\d\d-[\w-]+\.md)\) \|", index) == names
    seconds = re.findall(r"^\|.*\]\(\d\d-[\w-]+\.md\) \|.*\| (\d+) \|$", index, re.M)
    assert len(seconds) == len(names) and max(map(int, seconds)) <= SECONDS


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_has_all_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n\n".join(blocks(page))
    compile(code, page.name, "exec")
    assert "from textrl_gym" in code or "import textrl_gym" in code
    assert "$$" in text and text.count("$$") % 2 == 0
    # What is printed stands behind the block, and the figure that is shown is the one that the code saves.
    assert "```text\n" in text
    (figure,) = FIGURE.findall(text)
    assert f'fig.savefig("{figure}"' in code
    assert (IMAGES / figure).is_file()
    for heading in ("## What to look at", "## Exercises", "**Library:**", "**Papers:**"):
        assert text.count(heading) == 1, heading
    assert "NUMBERS" not in text


def test_images_are_those_of_the_pages() -> None:
    shown = sorted(name for page in pages() for name in FIGURE.findall(page.read_text(encoding="utf-8")))
    assert shown == sorted(path.name for path in IMAGES.iterdir())
    for path in IMAGES.iterdir():
        assert path.stat().st_size < 40_000, f"{path.name}: {path.stat().st_size:,} bytes"


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


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_runs_as_it_is_printed(page: Path, tmp_path: Path) -> None:
    printed, seconds = run(page, tmp_path, timeout=SECONDS * BUSY)
    assert seconds < SECONDS
    assert len(printed) == len(blocks(page)) and any(printed)
    figure = FIGURE.findall(page.read_text(encoding="utf-8"))[0]
    assert [path.name for path in tmp_path.glob("*.svg")] == [figure]
    # The same axes and legends as in the figure that is committed; its curves may differ by another machine's digits.
    texts = [
        re.findall(r"<text[^>]*>([^<]*[A-Za-z][^<]*)</text>", (folder / figure).read_text())
        for folder in (tmp_path, IMAGES)
    ]
    assert texts[0] == texts[1] != []


def test_a_page_that_fails_says_why(tmp_path: Path) -> None:
    page = tmp_path / "99-broken.md"
    page.write_text("```python\nprint('begun')\nraise ValueError('why')\n```\n")
    with pytest.raises(RuntimeError, match=r"(?s)99-broken.md failed:.*begun.*ValueError: why"):
        run(page, tmp_path)
