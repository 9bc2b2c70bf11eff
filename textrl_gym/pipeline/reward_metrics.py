"""What reward models say of comparisons, and how often that is right.

Shape legend: B prompts, K completions a prompt, D width, L = P + K T places of a packed prompt and its completions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from textrl_gym.models.packing import pack
from textrl_gym.pipeline.simulated_comparisons import Comparison
from textrl_gym.stats.pairwise import agreement

CLEAR = 0.2  # a difference of the judge's scores from which on the reward model should agree with it


def raw_rewards(model: Any, batch: Sequence[Comparison]) -> Tensor:
    """Rewards of every completion before normalisation, float32 [B, K]; 0 where a prompt has fewer than K.

    Equal to scoring each prompt + completion alone at its last token, at a fraction of the cost.
    """
    packed = pack([(c.prompt_ids, c.completion_ids) for c in batch])
    width = packed.token_BKT.shape[2]
    length_BK = packed.mask_BKT.sum(2)
    start_K = packed.prompt_places + torch.arange(packed.token_BKT.shape[1]) * width
    last_BK = (start_K + length_BK - 1).to(model.device)
    hidden_BLD = model.base_model(**packed.inputs(model))[0]
    last_BKD = hidden_BLD[torch.arange(len(batch), device=model.device)[:, None], last_BK]
    return model.score(last_BKD).squeeze(2).float() * (length_BK > 0).to(model.device)


@torch.no_grad()
def score_all(model: Any, comparisons: Sequence[Comparison], batch_size: int = 8) -> list[list[float]]:
    """Raw rewards of every completion."""
    found: list[list[float]] = []
    for start in range(0, len(comparisons), batch_size):
        batch = comparisons[start : start + batch_size]
        raw_BK = raw_rewards(model, batch)
        found += [row[: len(c.completion_ids)] for row, c in zip(raw_BK.tolist(), batch, strict=True)]
    return found


def gaps(raw: Sequence[Sequence[float]], comparisons: Sequence[Comparison]) -> list[float]:
    """r_w - r_l of every pair: the reward of the chosen completion minus that of the rejected one."""
    return [raw[row][chosen] - raw[row][rejected] for row, c in enumerate(comparisons) for chosen, rejected in c.pairs]


def gold_agreement(
    raw: Sequence[Sequence[float]], comparisons: Sequence[Comparison], samples_only: bool = False, gap: float = CLEAR
) -> float | None:
    """Agreement of the rewards with the judge on pairs whose judge's scores differ by at least `gap`.

    See stats.pairwise.agreement. With samples_only, of pairs of the policy's samples. None where there is no such
    pair.
    """
    differences = []
    for row, c in enumerate(comparisons):
        places = range(c.sampled if samples_only else len(c.completion_ids))
        for a, b in itertools.combinations(places, 2):
            if abs(c.gold[a] - c.gold[b]) >= gap:
                better, worse = (a, b) if c.gold[a] > c.gold[b] else (b, a)
                differences.append(raw[row][better] - raw[row][worse])
    return agreement(differences) if differences else None


def normalisation(reference_N: Sequence[float], sample_N: Sequence[float]) -> dict[str, float]:
    """{"bias", "scale"} with which references have mean 0 and samples of the start policy standard deviation 1.

    The scale is taken on samples, so that a KL coefficient buys as much of the policy's spread under any reward model.
    """
    deviation = torch.tensor(sample_N).std().item()
    return {"bias": sum(reference_N) / len(reference_N), "scale": 1 / max(deviation, 1e-6)}


def references(task: Any, tokenizer: Any, rows: Sequence[Any]) -> list[Comparison]:
    """The rows' reference texts, as comparisons of one completion each."""
    found = []
    for row in rows:
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        prompt_ids = task.encode(row, tokenizer, task.max_prompt_tokens)
        found.append(Comparison(prompt_ids, [ids[: task.max_new_tokens]], []))
    return found
