"""Rendering of episodes: plain text, a picture of it, or coloured in the terminal as they happen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from textrl_gym.console import plain
from textrl_gym.core import Message, StopReason

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.mdp.turns import Answer

RENDER_MODES = ["ansi", "human", "rgb_array"]
RENDER_FPS = 4
"""Tokens a second of a video: what a person reads."""

WIDTH, HEIGHT, MARGIN = 640, 480, 16
FONT, LINE = 15, 20
"""Of a picture, in pixels."""
SPEAKERS = {"assistant": "agent", "user": "environment"}
Spoken = tuple[Sequence[Message], Sequence[int]]
"""Of a conversation: the turns that are over, and the tokens of the agent's turn that is not."""
PAPER, PROMPT, COMPLETION = (255, 255, 255), (90, 96, 104), (0, 70, 140)

# KL in nats of one token, and the colour from there on: how much more the policy likes it than the reference does.
KL_COLOURS = ((2.0, "bold red"), (1.0, "red"), (0.3, "yellow"), (-0.3, "green"), (-float("inf"), "cyan"))


class Renderer:
    """Shows the prompt, the tokens (coloured by KL) and the score of one row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # Here, not above: 0.2 s that an environment without a render mode need not wait for.
        from rich.console import Console

        self.tokenizer = tokenizer
        self.console = Console(highlight=False, soft_wrap=True)
        self._ids: list[int] = []
        self._shown = ""

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def text(
        self, prompt: Sequence[int], completion: Sequence[int], stop: StopReason, spoken: Spoken | None = None
    ) -> str:
        """Prompt and completion as the policy sees them, with the reason of the end if there was one.

        Args:
            spoken: of a conversation, which is written as who says what.
        """
        end = "" if stop is StopReason.RUNNING else f" [{stop.name}]"
        if spoken is None:
            return self._decode([*prompt, *completion]) + end
        turns, running = spoken
        lines = [f"\n[{SPEAKERS[turn['role']]}] {turn['content']}" for turn in turns]
        lines += [f"\n[{SPEAKERS['assistant']}] {self._decode(running)}"] if running else []
        return self._decode(prompt) + "".join(lines) + end

    def picture(
        self, prompt: Sequence[int], completion: Sequence[int], stop: StopReason, spoken: Spoken | None = None
    ) -> NDArray[np.uint8]:
        """The end of the prompt, and below it the completion, as a picture. uint8 [HEIGHT, WIDTH, 3]

        Raises:
            ImportError: Pillow is not installed.
        """
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise ImportError('render_mode "rgb_array" needs the package pillow: pip install pillow') from error
        font = ImageFont.load_default(FONT)
        whole, asked = self.text(prompt, completion, stop, spoken), self._decode(prompt)
        # A token may be written differently where others follow it, so that the prompt's text need be no prefix.
        begins = next((i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), len(asked))
        lines = [(line, PROMPT) for line in _wrapped(whole[:begins], font.getlength)]
        lines += [(line, COMPLETION) for line in _wrapped(whole[begins:].lstrip(" "), font.getlength)]
        image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        draw = ImageDraw.Draw(image)
        for number, (line, colour) in enumerate(lines[-((HEIGHT - 2 * MARGIN) // LINE) :]):
            draw.text((MARGIN, MARGIN + number * LINE), line, fill=colour, font=font)
        return np.asarray(image)

    def begin(self, prompt: Sequence[int]) -> None:
        """Print the prompt of a new episode."""
        self._ids, self._shown = list(prompt), self._decode(prompt)
        self.console.print(plain("\n" + self._shown, style="dim"), end="")

    def token(self, token: int, kl: float) -> None:
        """Print what one generated token adds to the text: nothing while it ends inside a character's bytes."""
        self._ids.append(token)
        text = self._decode(self._ids)  # of the whole: a token alone may lose the space before it
        if text.endswith("\ufffd"):
            return
        style = next(colour for least, colour in KL_COLOURS if kl >= least)
        self.console.print(plain(text[len(self._shown) :], style=style), end="")
        self._shown = text

    def reply(self, answer: Answer) -> None:
        """Print the environment's reply, and that the agent speaks again if it does."""
        self.console.print(plain(f"\n[{SPEAKERS['user']}] {answer.text}\n", style="dim"), end="")
        if answer.stop is StopReason.RUNNING:
            self.console.print(plain(f"[{SPEAKERS['assistant']}] ", style="dim"), end="")
        self._ids += answer.ids
        self._shown = self._decode(self._ids)

    def end(self, score: float, stop: StopReason) -> None:
        """Print how the episode ended."""
        self.console.print(plain(f"\n[{stop.name}] score {score:.3f}", style="bold"))


def _wrapped(text: str, length: Callable[[str], float]) -> Iterator[str]:
    """The lines of a text that fit into a picture, broken between words where that can be."""
    for paragraph in text.splitlines():
        line = ""
        # A word that is longer than a line is broken anywhere: texts of a model need have no spaces.
        for piece in re.findall(r"\S+\s*|\s+", paragraph):
            if line and length(line + piece.rstrip()) > WIDTH - 2 * MARGIN:
                yield line
                line = ""
            for character in piece:
                if length(line + character) > WIDTH - 2 * MARGIN and not character.isspace():
                    yield line
                    line = ""
                line += character
        yield line
