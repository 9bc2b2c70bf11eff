"""Reading before judging: a reward model's body first learns which tokens of a text are not what its prompt says.

Replaced-token detection (Clark et al. 2020, "ELECTRA", arXiv:2003.10555): after every token the scalar head says
whether it is the true one. False tokens come from the task's own falsified texts and, in half of them, from slips of
the pen such as a language model makes that is sampled from. Labels are dense and certain where preferences are one
noisy bit a pair: without this step 5,000 prompts of comparisons taught a body of a million parameters to count facts
and to see bad grammar, but not to check a value (53% right on pairs that differ in one).

Shape legend: B prompts, K texts a prompt, T places a text, N tokens of texts.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from textrl_gym.core import PromptSource, Row
from textrl_gym.models.packing import pack
from textrl_gym.pipeline.optim import RunningMean, adamw, cosine, descend

TEXTS = 4  # falsified texts of one prompt


@dataclass(frozen=True)
class Reading:
    """Texts of one prompt, and which of their tokens are true."""

    prompt_ids: list[int]
    text_ids: list[list[int]]
    true: list[list[bool]]


def true_tokens(original_ids: Sequence[int], false_ids: Sequence[int]) -> list[bool]:
    """For each token of a falsified text, whether it is the original's (aligned as a diff aligns lines)."""
    true = [False] * len(false_ids)
    blocks = difflib.SequenceMatcher(None, original_ids, false_ids, autojunk=False).get_matching_blocks()
    for _, start, size in blocks:
        true[start : start + size] = [True] * size
    return true


def slip(ids: Sequence[int], prompt_ids: Sequence[int], vocab_size: int, rng: random.Random) -> list[int]:
    """The tokens with 1 to 3 replaced or put in: from the prompt, the text itself or anywhere in the vocabulary."""
    slipped = list(ids)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(slipped))
        wrong = rng.choice((rng.choice(prompt_ids), rng.choice(slipped), rng.randrange(vocab_size)))
        slipped[at : at + rng.randint(0, 1)] = [wrong]
    return slipped


def falsify(task: Any, tokenizer: Any, row: Row, rng: random.Random) -> Reading:
    """Some texts of a row with false tokens. Texts that share less than half with their original are left out."""
    prompt_ids = task.encode(row, tokenizer, task.max_prompt_tokens)
    reading = Reading(prompt_ids, [], [])
    for original, false in task.falsified(row, rng, TEXTS):
        true_ids, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (original, false))
        if ids and rng.random() < 0.5:
            ids = slip(ids, prompt_ids, len(tokenizer), rng)
        true = true_tokens(true_ids, ids)[: task.max_new_tokens]
        if sum(true) > 0.5 * len(true):
            reading.text_ids.append(ids[: task.max_new_tokens])
            reading.true.append(true)
    return reading


def reading_loss(model: Any, batch: Sequence[Reading]) -> Tensor:
    """Mean over all tokens of -log P(token is labelled rightly), with P(true) = sigmoid(score after the token)."""
    packed = pack([(reading.prompt_ids, reading.text_ids) for reading in batch])
    hidden_BLD = model.base_model(**packed.inputs(model))[0][:, packed.prompt_places :]
    score_BKT = model.score(hidden_BLD).float().view(packed.mask_BKT.shape)
    true_N = torch.tensor([token for reading in batch for text in reading.true for token in text], dtype=torch.float32)
    return F.binary_cross_entropy_with_logits(score_BKT[packed.mask_BKT.to(model.device)], true_N.to(model.device))


def learn_to_read(
    model: Any,
    task: Any,
    tokenizer: Any,
    source: PromptSource,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    seed: int,
    report: Callable[[float], None] = lambda loss: None,
) -> float:
    """Train body and head; the running mean of the loss at the end, in nats a token."""
    rng = random.Random(seed)
    optimizer = adamw(model, learning_rate)
    mean_loss = RunningMean()
    for step in range(steps):
        batch: list[Reading] = []
        while len(batch) < batch_size:
            reading = falsify(task, tokenizer, source[rng.randrange(len(source))], rng)
            if reading.text_ids:
                batch.append(reading)
        loss = reading_loss(model, batch)
        descend(model, optimizer, loss, learning_rate * cosine(step, steps, warmup_steps))
        report(mean_loss.update(loss.item()))
    return mean_loss.value
