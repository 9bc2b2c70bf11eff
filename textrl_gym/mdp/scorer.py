"""Scoring of completions: their texts, stop strings, and the reward's terminal score. Both drivers score by this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from textrl_gym.core import Row, Scores
from textrl_gym.rewards import RewardFunction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 16  # characters: what the first token of a tail may decode to otherwise than in the whole text


@dataclass(frozen=True)
class Scorer:
    """What turns token ids into a text and a text into a score."""

    tokenizer: PreTrainedTokenizerBase
    reward: RewardFunction
    stop: tuple[str, ...]
    """Strings that end an episode."""
    device: torch.device
    """Where scores go."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        # transformers' stub says str | list[str]; of one list of ids it is a str
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stopped(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the text of each completion contains a stop string."""
        return [any(s in text for s in self.stop) for text in map(self.decode, completions)]

    def completes_stop(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """The same where no shorter beginning of a completion contains one, as while tokens are appended one by one.

        A stop string then ends with the last token's text, so that a tail of the completion decides. Its length is
        bounded by that of the stop strings and not by the completion's.
        """
        return [self._completes_stop(ids) for ids in completions]

    def _completes_stop(self, ids: Sequence[int]) -> bool:
        wanted = max(map(len, self.stop), default=0) + MARGIN
        size = wanted
        while True:
            text = self.decode(ids[-size:])
            # Tokens without a character of their own (special ones, parts of a character) make a tail too short.
            if size >= len(ids) or len(text) >= wanted:
                return any(s in text for s in self.stop)
            size *= 2

    def text(self, ids: Sequence[int]) -> str:
        """The text that the reward sees: it ends before EOS and before the first stop string."""
        text = self.decode(ids)
        cuts = [text.index(s) for s in self.stop if s in text]
        return text[: min(cuts)] if cuts else text

    def score(
        self,
        rows: Sequence[Row],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        reward: RewardFunction | None = None,
    ) -> Scores:
        """Raw scores of N finished completions, on the device, and their texts.

        Args:
            rows: the task's rows of their prompts, whose columns the reward gets.
            prompt_ids, completion_ids: as the model saw and wrote them.
            reward: another one than the environment's, such as the gold score.
        """
        texts = [self.text(ids) for ids in completion_ids]
        # Columns that some rows lack are None there: a reward gets whole columns, as with TRL. Sorted, so that what a
        # reward is called with does not depend on the order of a set.
        names = {name for row in rows for name in row} - {"prompt", "prompt_ids", "completion_ids"}
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in sorted(names)}
        columns |= {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        reward = reward or self.reward
        components = reward.components([row["prompt"] for row in rows], texts, **columns)
        score = reward.total(components).to(self.device)
        # A single part is the score itself; logging it again would only double a curve.
        mixed = components if len(components) > 1 else {}
        return Scores(score, texts, {name: part.to(self.device) for name, part in mixed.items()})
