"""Scores finished completions: from token ids to the text that the reward sees, and the terminal score.

Shape legend: N completions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from textrl_gym.core import Message, Row, Scores
from textrl_gym.data.encoding import codec
from textrl_gym.rewards import RewardFunction, columns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What bytes that are no UTF-8 decode to."""
SLACK_TOKENS = 4
"""Decoded before the tokens that can hold a stop string: three for a character of four bytes that the tail begins
inside of, and one whose leading space the tokenizer strips at the beginning of a text."""
LOCAL_DECODERS = frozenset(
    ("BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece")
)
"""Decoders of the tokenizers library by which a token changes no more of the text than its own and its neighbours'."""


class Scorer:
    """Decodes completions, finds stop strings in them, and scores them.

    Args:
        tokenizer: of transformers.
        stop: strings that end an episode; the text that the reward sees ends before the first of them.
        reward: what scores.
        device: where the scores go.
        shown: special tokens whose names are in the text that the reward sees.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        reward: RewardFunction,
        device: torch.device,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.tokenizer, self.stop, self.reward, self.device = tokenizer, tuple(stop), reward, device
        self.codec = codec(tokenizer)
        names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in self.codec.special}
        # A stop string may be the name of a special token, or have one in it.
        self.shown = shown | {i for i, name in names.items() if any(name in s for s in self.stop)}
        # A stop string is completed by the newest token, and each token before it that has text holds a byte or more.
        self._tail_tokens = max((len(s.encode()) for s in self.stop), default=0) + SLACK_TOKENS
        self._whole = any(REPLACEMENT in s for s in self.stop) or not decodes_locally(tokenizer)
        self._has_text: dict[int, bool] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens but those that are shown."""
        return self.codec.decode(ids, shown=self.shown)

    def stopped(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the text of each completion contains a stop string, wherever it is."""
        return [self._found_in(self.decode(ids)) for ids in completions]

    def completes_stop(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the last token of each list of generated ids completes a stop string.

        The tokens before the last one have completed none: the episode would be over. So no more is decoded than the
        last tokens that can hold a stop string, however long the completion is. The whole is decoded with tokenizers
        of which that is not known to be enough (see `decodes_locally`).
        """
        return [self._completes(ids) for ids in completions]

    def _completes(self, ids: Sequence[int]) -> bool:
        if not self.stop:
            return False
        if not self._whole and not self._found_in(self._tail(ids)):
            return False
        return self._found_in(self.decode(ids))

    def _found_in(self, text: str) -> bool:
        return any(s in text for s in self.stop)

    def _tail(self, ids: Sequence[int]) -> str:
        """The text of as many last tokens as can hold a stop string that the last of them completes."""
        start, remaining = len(ids), self._tail_tokens
        while start > 0 and remaining > 0:
            start -= 1
            remaining -= self._holds_text(ids[start])
        text = self.decode(ids[start:])
        # A tail that begins inside a character: byte-fallback tokenizers then decode no byte of the run of bytes.
        while text.startswith(REPLACEMENT) and start > 0:
            start = max(0, 2 * start - len(ids))
            text = self.decode(ids[start:])
        return text

    def _holds_text(self, token: int) -> bool:
        """Whether the token alone has text; special tokens have none, nor has a lone space that is stripped."""
        if token not in self._has_text:
            self._has_text[token] = bool(self.decode([token]))
        return self._has_text[token]

    def text(self, ids: Sequence[int]) -> str:
        """The text that the reward sees: it ends before EOS and before the first stop string."""
        text = self.decode(ids)
        return text[: min((text.index(s) for s in self.stop if s in text), default=len(text))]

    def score(
        self,
        rows: Sequence[Row],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        reward: RewardFunction | None = None,
        turns: Sequence[list[Message]] = (),
        action_masks: Sequence[list[bool]] = (),
    ) -> Scores:
        """Raw scores of finished completions, on the device, and their texts.

        Both drivers score by this, and evaluation, with the gold reward. The ids are given to the reward as generated.

        Args:
            rows: of the task; each column is given to the reward as a list.
            completion_ids: in a conversation all tokens behind the prompt, the environment's too.
            reward: scores instead of the environment's own.
            turns: of conversations, in a column `turns` for the reward; the texts are then what the agent has said, a
                line for each turn.
            action_masks: of conversations, which of completion_ids are the agent's, in a column `action_mask`.
        """
        columns = columns_of(rows) | {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        if turns:
            texts = [
                "\n".join(turn["content"] for turn in dialogue if turn["role"] == "assistant") for dialogue in turns
            ]
            columns |= {"turns": list(turns), "action_mask": list(action_masks)}
        else:
            texts = [self.text(ids) for ids in completion_ids]
        scores = (reward or self.reward).score([row["prompt"] for row in rows], texts, columns)
        mixed = scores.components if len(scores.components) > 1 else {}
        parts = {name: part.to(self.device) for name, part in mixed.items()}
        return Scores(scores.total_B.to(self.device), texts, parts, scores.logged)


def decodes_locally(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text of a list of ids is known to end as the text of its last ids does.

    Known of the tokenizers library's byte-level, sentencepiece-like, word-piece and whitespace decoders. Not of a
    tokenizer written in Python, whose decode() may be anything, nor of a decoder that is not in LOCAL_DECODERS.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return False
    return inner.decoder is None or _decoder_types(json.loads(inner.decoder.__getstate__())) <= LOCAL_DECODERS


def _decoder_types(state: dict[str, Any]) -> set[str]:
    """The types of a decoder and of those that it is a sequence of."""
    return {state["type"]}.union(*map(_decoder_types, state.get("decoders", ())))
