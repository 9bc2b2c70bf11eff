"""The code blocks of the documentation, as tests read them."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^>]+?) -->\n\n?)?```(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)
"""A fenced block, with the comment above it that says why it is not run."""
TRAINING = (re.compile(r"(total_timesteps=)[\d_]+"), r"\g<1>300")
"""The budget of a training as it is printed, and as it is tried."""
SMALLER = (
    TRAINING,
    (re.compile(r"(\bepisodes=)[\d_]+"), r"\g<1>8"),
    (re.compile(r"(eval_episodes=)[\d_]+"), r"\g<1>8"),
    (re.compile(r"(num_envs=)[\d_]+"), r"\g<1>8"),
)
"""All budgets."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str
    """The file that the page says it is; empty: none."""
    why_not: str
    """Why it is not run; empty: it is."""
    code: str

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"

    @property
    def smaller(self) -> str:
        """The code with small budgets."""
        code = self.code
        for printed, tried in SMALLER:
            code = printed.sub(tried, code)
        return code


def blocks(root: Path, page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (root / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: match.start("info")].count("\n") + 1,
            match["info"].split()[0] if match["info"].strip() else "",
            (re.findall(r'title="([^"]+)"', match["info"]) or [""])[0],
            match["why"] or "",
            match["code"],
        )
        for match in BLOCK.finditer(text)
    ]


def pages(root: Path) -> list[str]:
    """README and the pages of docs/, without the log, which is of its day."""
    docs = sorted(str(path.relative_to(root)) for path in (root / "docs").rglob("*.md"))
    return ["README.md", *(page for page in docs if page != "docs/design-log.md")]


def commands(block: Block) -> list[list[str]]:
    """The words of each `textrl-gym` command of a block of shell lines."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if "textrl-gym " in line]
    # Behind a prompt, an assignment or torchrun's own words.
    return [line[line.index("textrl-gym") + 1 :] for line in words if "textrl-gym" in line]
