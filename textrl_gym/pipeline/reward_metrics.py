"""Metrics of reward models on held-out pairs: accuracy by data set, calibration, agreement with the gold scores.

With r_w - r_l the difference of the raw rewards of a pair's chosen and rejected completion:

    accuracy       share of pairs with r_w > r_l, equal rewards counting half (textrl_gym.stats.pairwise.agreement)
    interval       Wilson's score interval of that share (textrl_gym.stats.pairwise.win_rate), 95%. It takes pairs for
                   independent; those of one prompt are not, so with many pairs a prompt it is too narrow.
    predicted      sigmoid(|r_w - r_l|): how sure the model is of its own order, which is what it was trained to say
    ECE            sum over bins of (pairs in bin / pairs) |mean predicted - accuracy in bin|  (Guo et al. 2017,
                   arXiv:1706.04599, equation 3)

Shape legend: B prompts, K completions a prompt, D width, L = P + K T places of a packed prompt and its completions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.models.packing import pack
from textrl_gym.stats.estimates import outcomes
from textrl_gym.stats.pairwise import agreement, win_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BINS = 10
ALL = "all"
CLEAR = 0.2  # a difference of the gold scores from which on the reward model should agree with it


def raw_rewards(model: nn.Module, batch: Sequence[RankedCompletions]) -> Tensor:
    """Rewards of every completion before normalisation, float32 [B, K]; 0 where a prompt has fewer than K.

    Equal to scoring each prompt + completion alone at its last token, at a fraction of the cost.
    """
    classifier, head = cast("PreTrainedModel", model), cast(nn.Linear, model.score)
    device = classifier.device
    packed = pack([(c.prompt_ids, c.completion_ids) for c in batch])
    width = packed.token_BKT.shape[2]
    length_BK = packed.mask_BKT.sum(2)
    # Completion k begins behind the prompt and k completions; its reward is read at its last token.
    start_K = packed.prompt_places + torch.arange(packed.token_BKT.shape[1]) * width
    last_BK = (start_K + length_BK - 1).to(device)
    # The body and the head apart: transformers' own forward reads one place a row, and a packed row has K.
    hidden_BLD = classifier.base_model(**packed.inputs(classifier))[0]
    last_BKD = hidden_BLD[torch.arange(len(batch), device=device)[:, None], last_BK]
    return head(last_BKD).squeeze(2).float() * (length_BK > 0).to(device)


@torch.no_grad()
def score_all(model: nn.Module, comparisons: Sequence[RankedCompletions], batch_size: int = 8) -> list[list[float]]:
    """Raw rewards of every completion."""
    scores: list[list[float]] = []
    for start in range(0, len(comparisons), batch_size):
        batch = comparisons[start : start + batch_size]
        raw_BK = raw_rewards(model, batch)
        scores += [row[: len(c.completion_ids)] for row, c in zip(raw_BK.tolist(), batch, strict=True)]
    return scores


def gaps(raw: Sequence[Sequence[float]], comparisons: Sequence[RankedCompletions]) -> list[float]:
    """r_w - r_l of every pair: the reward of the chosen completion minus that of the rejected one."""
    return [raw[row][chosen] - raw[row][rejected] for row, c in enumerate(comparisons) for chosen, rejected in c.pairs]


def gold_agreement(
    raw: Sequence[Sequence[float]],
    comparisons: Sequence[RankedCompletions],
    samples_only: bool = False,
    gap: float = CLEAR,
) -> float | None:
    """Agreement of the rewards with the gold score on pairs whose gold scores differ by at least `gap`.

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
    """{"bias", "scale"} with which references have mean 0 and samples of the initial policy standard deviation 1.

    The scale is taken on samples, so that a KL coefficient buys as much of the policy's spread under any reward model.
    """
    deviation = torch.tensor(sample_N).std().item()
    return {"bias": sum(reference_N) / len(reference_N), "scale": 1 / max(deviation, 1e-6)}


# -- accuracy and calibration -----------------------------------------------------------------------------------------


def accuracy_row(name: str, gap_N: Sequence[float]) -> dict[str, Any]:
    """One line of the table of accuracies."""
    share = win_rate(outcomes(gap_N, 0.0))
    return {"data": name, "pairs": len(gap_N), "accuracy": agreement(gap_N), "low": share.low, "high": share.high}


def by_subset(
    raw: Mapping[str, Sequence[Sequence[float]]], compared: Mapping[str, Sequence[RankedCompletions]]
) -> dict[str, list[float]]:
    """The gaps of every data set's pairs, in parts by their column `subset` where they have one."""
    parts: dict[str, list[float]] = {}
    for name, pairs in compared.items():
        for c, values in zip(pairs, raw[name], strict=True):
            place = f"{name} / {c.subset}" if c.subset else name
            parts.setdefault(place, []).extend(gaps([values], [c]))
    return parts


def accuracy_table(gaps_of: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A line for each data set and, of several, one for all their pairs."""
    rows = [accuracy_row(name, gap_N) for name, gap_N in gaps_of.items()]
    return rows if len(rows) == 1 else [*rows, accuracy_row(ALL, [gap for gap_N in gaps_of.values() for gap in gap_N])]


def calibration(gap_N: Sequence[float], bins: int = BINS) -> dict[str, Any]:
    """{"ece", "bins"}: predicted against observed shares, in bins of equal width of what was predicted, 0.5 to 1."""
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]  # (predicted, gap)
    for gap in gap_N:
        predicted = 1 / (1 + math.exp(-abs(gap)))
        place = min(bins - 1, int((predicted - 0.5) * 2 * bins))
        members[place].append((predicted, gap))
    rows = [
        {
            "from": 0.5 + place / (2 * bins),
            "to": 0.5 + (place + 1) / (2 * bins),
            "pairs": len(some),
            "predicted": sum(predicted for predicted, _ in some) / len(some),
            "observed": agreement([gap for _, gap in some]),
        }
        for place, some in enumerate(members)
        if some
    ]
    error = sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in rows) / len(gap_N)
    return {"ece": error, "bins": rows}
