"""Text for the terminal, shown as it is. Loads no torch, and rich only when something is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn
    from rich.text import Text

# Line ends and tabs stay. An escape character would let a completion colour, move or rename the terminal.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Control characters -> what is shown in their place."""


def plain(text: str, style: str = "") -> Text:
    """A text for rich: brackets in it are no markup, and control characters are shown as symbols."""
    # Here, not above: 0.2 s that an environment without a render mode need not wait for.
    from rich.text import Text

    return Text(text.translate(CONTROLS), style=style)


def time_columns(elapsed: bool = True) -> tuple[ProgressColumn, ...]:
    """The times of a progress bar, each behind its name: two bare times beside each other are a riddle."""
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    def word(text: str) -> TextColumn:
        return TextColumn(text, style="dim", table_column=Column(min_width=len(text)))

    # In a narrow terminal the note behind the times is cut, and not the times.
    left = (word("left"), TimeRemainingColumn(table_column=Column(min_width=7)))
    return (word("took"), TimeElapsedColumn(table_column=Column(min_width=7)), *left) if elapsed else left
