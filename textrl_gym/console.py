"""Text for the terminal, shown as it is. Loads no torch, and rich only when something is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
