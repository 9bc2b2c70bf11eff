"""A conversation for tests of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textrl_gym.core import Message, Reply, Row
from textrl_gym.mdp.task import Task
from textrl_gym.models import tiny

SYMBOLS = ("a", "b", "c", "lower", "higher", "yes")


class Halving(Task):
    """Find a letter: "lower" and "higher" are the replies, 1 the reward of the turn that has it."""

    max_prompt_tokens, max_new_tokens, max_turns, max_turn_tokens = 1, 12, 3, 2
    turn_markers = ("", "")
    model = "made in code"
    reward = "zero"

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        """One for each letter, with a prompt that misleads but tells rows apart."""
        return [{"prompt": shown, "letter": letter} for shown, letter in zip("bca", "abc", strict=True)]

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        """Where the letter is from the one that was said; -0.25 for none."""
        words = turns[-1]["content"].split()
        if len(words) != 1 or words[0] not in "abc":
            return Reply("yes", -0.25)
        if words[0] == row["letter"]:
            return Reply("yes", 1.0, done=True)
        return Reply("lower" if row["letter"] < words[0] else "higher")

    def load_tokenizer(self, name: str | None = None) -> Any:
        """Of the letters and words."""
        return tiny.symbol_tokenizer(SYMBOLS)
