"""Turn markers: what stands between the agent's words and the environment's in a conversation, as tokens.

A chat template writes whole conversations. Of it only the pieces between turns are taken, once, as the difference of
made-up conversations that it has written; from then on tokens are appended, and nothing that was generated is decoded
and encoded again. That is right where the template writes a longer conversation as a continuation of the shorter one,
which is tried on random conversations. A template that rewrites what came before, such as one that drops the reasoning
of earlier turns, is refused, or used in raw form by choice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

from textrl_gym.data.encoding import codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TurnTemplate = Literal["exact", "raw"]
USER, AGENT = "Q7zqx", "W4kvj"
"""Words of the made-up conversations that no template has."""
WORDS = ("apple", "seven", "why", "no", "Yes.", "3.5", "over\nthere", "left", "{x}", "end")
TRIALS = 12
"""Random conversations that a template is tried on."""
THOUGHT = "<think>\nfirst this\n</think>\n\n"
"""Before some answers: templates of models that reason leave it out of earlier turns."""


class TurnMarkers:
    """Writes the environment's replies between turns of the agent.

    Args:
        tokenizer: of the model.
        before: the text between the agent's words and the environment's.
        after: the text between the environment's words and where the agent goes on.
        strips: whether white space around the environment's words is dropped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: str, after: str, *, strips: bool = False) -> None:
        self.before, self.after, self.strips = before, after, strips
        self.codec = codec(tokenizer)
        # Markers without special tokens are text: they are encoded with the words between them.
        self._is_text = self.codec.name.search(before + after) is None
        self._before = [] if self._is_text else self.codec.template(before)
        self._after = [] if self._is_text else self.codec.template(after)
        ends = [place for place, token in enumerate(self._before) if token in self.codec.special]
        self._rest = ends[0] + 1 if ends else 0
        self.end_id: int | None = self._before[ends[0]] if ends else None
        """The special token by which the agent ends its turn; None: these markers have none."""

    def encode(self, text: str, last_id: int, written: str = "") -> list[int]:
        """Token ids of a reply with its markers, to be appended behind a turn of the agent.

        Args:
            text: the environment's words; names of special tokens in them are letters.
            last_id: the last token of the agent's turn. Where it is `end_id` that is not written again.
            written: the stop string that the agent's turn ended with, which may be the beginning of `before`.

        Raises:
            ValueError: naming a word that the tokenizer has no token for.
        """
        text = text.strip() if self.strips else text
        if self._is_text:
            before = self.before[len(written) :] if self.before.startswith(written) else self.before
            return self.codec.behind(before + text + self.after) if before + text + self.after else []
        before_ids = self._before[self._rest :] if last_id == self.end_id else self._before
        return [*before_ids, *(self.codec.behind(text) if text else ()), *self._after]


def markers_of_template(tokenizer: PreTrainedTokenizerBase, how: TurnTemplate = "exact") -> TurnMarkers:
    """The markers of a tokenizer's chat template, by the difference of two conversations that it writes.

    Args:
        how: "exact" tries the template on random conversations; "raw" takes the markers of its first turns, whatever it
            does to the turns before.

    Raises:
        ValueError: the template does not write a conversation as a continuation of a shorter one.
    """
    begun, longer = _written(tokenizer, [USER]), _written(tokenizer, [USER, AGENT, USER[::-1]])
    gap, agent, rest = longer.removeprefix(begun).partition(AGENT)
    before, middle, after = rest.partition(USER[::-1])
    # White space before the answer is the model's to write: "assistant:" begins what is " yes" then.
    if not longer.startswith(begun) or gap.strip() or not agent or not middle:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} writes an answered turn otherwise than it begins one "
            f"({begun[-50:]!r} and {longer[: len(begun) + 9][-50:]!r}): the tokens of a conversation would not be "
            'those that the model wrote. template="none" writes turns as text'
        )
    strips = f" {USER} " not in _written(tokenizer, [f" {USER} "])
    if how == "exact":
        _try_out(tokenizer, gap, before, after)
    return TurnMarkers(tokenizer, before, after, strips=strips)


def _try_out(tokenizer: PreTrainedTokenizerBase, gap: str, before: str, after: str) -> None:
    """Hold that conversations put together by these markers are what the template writes."""
    rng = random.Random(0)
    for trial in range(TRIALS):
        words = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(3 + 2 * (trial % 3))]
        if trial % 2:
            words[1::2] = [THOUGHT + said for said in words[1::2]]
        text = _written(tokenizer, words[:1])
        for agent, user in zip(words[1::2], words[2::2], strict=True):
            text += gap + agent + before + user + after
        whole = _written(tokenizer, words)
        if text != whole:
            place = next(n for n, (a, b) in enumerate(zip(text + "\0", whole + "\1", strict=False)) if a != b)
            what = "drops <think> from earlier turns" if trial % 2 and THOUGHT in text else "rewrites earlier turns"
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} {what}: where the model has "
                f"{text[place : place + 40]!r} it writes {whole[place : place + 40]!r}, so that the tokens of a "
                'conversation would not be those that the model saw. turn_template="raw" leaves earlier turns as they '
                'were generated; template="none" writes turns as text'
            )


def _written(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> str:
    """A conversation whose turns are the user's and the assistant's in turn, up to where the assistant is to speak."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": said} for n, said in enumerate(words)]
    try:
        return cast("str", tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # whatever a template raises
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} writes no conversation of {len(words)} turns "
            f'({type(error).__name__}: {error}): template="none" writes turns as text'
        ) from error
