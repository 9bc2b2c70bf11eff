"""Rendering of episodes: plain text, or coloured in the terminal as they happen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textrl_gym.core import StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_MODES = ["ansi", "human"]

# KL in nats of one token, and the colour from there on: how much more the policy likes it than the reference does.
KL_COLOURS = ((2.0, "bold red"), (1.0, "red"), (0.3, "yellow"), (-0.3, "green"), (-float("inf"), "cyan"))


class Renderer:
    """Shows the prompt, the tokens (coloured by KL) and the score of one row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Here, not above: 0.2 s that an environment without a render mode need not wait for.
        from rich.console import Console
        from rich.text import Text

        self.tokenizer, self._text = tokenizer, Text
        self.console = Console(highlight=False, soft_wrap=True)
        self._ids: list[int] = []
        self._shown = ""

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def text(self, prompt: Sequence[int], completion: Sequence[int], stop: StopReason) -> str:
        """Prompt and completion as the policy sees them, with the reason of the end if there was one."""
        end = "" if stop is StopReason.RUNNING else f" [{stop.name}]"
        return self._decode([*prompt, *completion]) + end

    def begin(self, prompt: Sequence[int]) -> None:
        """Print the prompt of a new episode."""
        self._ids, self._shown = list(prompt), self._decode(prompt)
        self.console.print(self._text("\n" + self._shown, style="dim"), end="")

    def token(self, token: int, kl: float) -> None:
        """Print what one generated token adds to the text: nothing while it ends inside a character's bytes."""
        self._ids.append(token)
        text = self._decode(self._ids)  # of the whole: a token alone may lose the space before it
        if text.endswith("\ufffd"):
            return
        style = next(colour for least, colour in KL_COLOURS if kl >= least)
        self.console.print(self._text(text[len(self._shown) :], style=style), end="")
        self._shown = text

    def end(self, score: float, stop: StopReason) -> None:
        """Print how the episode ended."""
        self.console.print(self._text(f"\n[{stop.name}] score {score:.3f}", style="bold"))
