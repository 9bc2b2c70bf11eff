"""Replaced-token detection: pretraining of the reward model's body.

After every token of a text the scalar head says whether it is the original token (Clark et al. 2020, "ELECTRA",
arXiv:2003.10555). Replaced tokens come from the task's own corrupted texts and, in half of them, from replacements at
random places, as a language model makes them when it is sampled from. Labels are dense and certain, where preferences
are one noisy bit a pair: without this step 5,000 prompts of comparisons taught a body of a million parameters to count
facts and to see bad grammar, but not to check a value (53% right on pairs that differ in one).

Shape legend: B prompts, K texts a prompt, T positions a text, N tokens of texts.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrl_gym.core import PromptSource, Row
from textrl_gym.data.encoding import codec
from textrl_gym.data.ranked import PromptEncoder
from textrl_gym.models.packing import pack
from textrl_gym.models.tokenizer import vocab_size
from textrl_gym.pipeline.optim import cosine
from textrl_gym.pipeline.trainer import Phase, restore_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CORRUPTED_TEXTS = 4  # of one prompt: they share its computation, see models.packing
MIN_ORIGINAL = 0.5  # share; a text that keeps less is another text, and its tokens are not "replaced"


@runtime_checkable
class CorruptingTask(PromptEncoder, Protocol):
    """A task that can corrupt its own reference texts."""

    def corrupted(self, row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
        """`n` pairs of a text of this row and the same text with wrong tokens."""
        ...


@dataclass(frozen=True)
class CorruptedTexts:
    """Corrupted texts of one prompt, and which of their tokens are the original ones."""

    prompt_ids: list[int]
    text_ids: list[list[int]]
    original: list[list[bool]]


def original_tokens(original_ids: Sequence[int], corrupted_ids: Sequence[int]) -> list[bool]:
    """For each token of a corrupted text, whether it is the original's (aligned as a diff aligns lines)."""
    original = [False] * len(corrupted_ids)
    blocks = difflib.SequenceMatcher(None, original_ids, corrupted_ids, autojunk=False).get_matching_blocks()
    for _, start, size in blocks:
        original[start : start + size] = [True] * size
    return original


def replace_tokens(ids: Sequence[int], prompt_ids: Sequence[int], vocab_size: int, rng: random.Random) -> list[int]:
    """Replace or insert 1 to 3 tokens: from the prompt, the text itself or the whole vocabulary."""
    slipped = list(ids)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(slipped))
        wrong = rng.choice((rng.choice(prompt_ids), rng.choice(slipped), rng.randrange(vocab_size)))
        slipped[at : at + rng.randint(0, 1)] = [wrong]
    return slipped


def corrupt(task: CorruptingTask, tokenizer: PreTrainedTokenizerBase, row: Row, rng: random.Random) -> CorruptedTexts:
    """Corrupted texts of a row. Texts that keep at most half of their original tokens are left out."""
    prompt_ids = task.encode(row, tokenizer, task.max_prompt_tokens)
    texts = CorruptedTexts(prompt_ids, [], [])
    pairs = task.corrupted(row, rng, CORRUPTED_TEXTS)
    encoded = iter(codec(tokenizer).completions(row["prompt"], [text for pair in pairs for text in pair]))
    for text_ids, ids in zip(encoded, encoded, strict=True):  # one iterator: two by two
        if ids and rng.random() < 0.5:
            ids = replace_tokens(ids, prompt_ids, vocab_size(tokenizer), rng)
        original = original_tokens(text_ids, ids)[: task.max_new_tokens]
        if sum(original) > MIN_ORIGINAL * len(original):
            texts.text_ids.append(ids[: task.max_new_tokens])
            texts.original.append(original)
    return texts


def replaced_token_loss(model: nn.Module, batch: Sequence[CorruptedTexts]) -> Tensor:
    """Binary cross-entropy, mean over all tokens, with P(original) = sigmoid(score after the token)."""
    classifier, head = cast("PreTrainedModel", model), cast(nn.Linear, model.score)
    device = classifier.device
    packed = pack([(texts.prompt_ids, texts.text_ids) for texts in batch])
    hidden_BLD = classifier.base_model(**packed.inputs(classifier))[0][:, packed.prompt_places :]
    score_BKT = head(hidden_BLD).float().view(packed.mask_BKT.shape)
    label_N = torch.tensor([token for texts in batch for text in texts.original for token in text], dtype=torch.float32)
    return F.binary_cross_entropy_with_logits(score_BKT[packed.mask_BKT.to(device)], label_N.to(device))


class ReplacedTokens(Phase):
    """Updates of body and head by replaced-token detection."""

    name = "replaced tokens"

    def __init__(
        self,
        model: nn.Module,
        task: CorruptingTask,
        tokenizer: PreTrainedTokenizerBase,
        source: PromptSource,
        *,
        steps: int,
        batch_size: int,
        rate: float,
        warmup_steps: int,
        seed: int,
    ) -> None:
        super().__init__(steps)
        self.model, self.task, self.tokenizer, self.source = model, task, tokenizer, source
        self.batch_size, self.rate, self.warmup_steps = batch_size, rate, warmup_steps
        self.rng = random.Random(seed)

    def losses(self, step: int) -> Iterator[Tensor]:
        batch: list[CorruptedTexts] = []
        while len(batch) < self.batch_size:
            row = self.source[self.rng.randrange(len(self.source))]
            texts = corrupt(self.task, self.tokenizer, row, self.rng)
            if texts.text_ids:
                batch.append(texts)
        yield replaced_token_loss(self.model, batch)

    def learning_rate(self, step: int) -> float:
        return self.rate * cosine(step, self.steps, self.warmup_steps)

    def state(self) -> dict[str, Any]:
        return {"rng": self.rng.getstate()}

    def go_to(self, step: int, state: Mapping[str, Any]) -> None:
        if state:
            restore_random(self.rng, state["rng"])

    def measured(self, steps: int, mean_loss: float) -> dict[str, float]:
        """The running mean of the loss at the end, in nats a token."""
        return {"replaced_token_loss": mean_loss}
