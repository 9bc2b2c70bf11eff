"""The registry of metrics: what the numbers of an evaluation are called, and how they are printed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

METRICS = {
    "judge": ("Judge (gold), sampled", 3),
    "judge_greedy": ("Judge (gold), greedy", 3),
    "win_rate": ("Win rate against the start", 3),
    "win_rate_human": ("Win rate against the reference texts", 3),
    "score": ("Score (training reward), sampled", 3),
    "score_greedy": ("Score (training reward), greedy", 3),
    "kl_sequence": ("KL to the reference, nats per sequence", 2),
    "kl_token": ("KL to the reference, nats per token", 4),
    "entropy_token": ("Entropy, nats per token", 3),
    "completion_tokens": ("Completion, tokens", 1),
    "eos_share": ("Share ended by EOS", 3),
    "rouge_l": ("ROUGE-L against the reference texts", 3),
    "distinct_1": ("Different words", 3),
    "distinct_2": ("Different word pairs", 3),
    "repetition": ("Repeated runs of 4 words", 3),
    "forward_passes": ("Model evaluations per token", 1),
    "scored_completions": ("Completions scored per prompt", 0),
    "generated_tokens": ("Tokens generated per prompt", 1),
    "kl_bound": ("Best-of-n's KL to its own policy, bound, nats", 2),
    "train_seconds": ("Training, seconds", 0),
}
"""Names of an evaluation's numbers -> words, and decimals to print. The order is that of the tables.

A number that is not here (reward/NAME, or one of an agent's own extra_metrics) comes after these, under its name.
"""

COUNTERS = frozenset({"timesteps", "updates"})
"""Of an evaluation: when it was, and no result of it."""

DECIMALS = 3
"""Of a number that is not in METRICS."""


def metric_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of all numbers that some evaluations have, in the order of the tables."""
    names = dict.fromkeys(name for row in rows for name in row if name not in COUNTERS)
    return [*(name for name in METRICS if name in names), *(name for name in names if name not in METRICS)]


def metric_words(key: str) -> str:
    """What a number is called."""
    return METRICS[key][0] if key in METRICS else key


def number(row: dict[str, Any], key: str) -> str:
    """An evaluation's number in the decimals of its kind; a dash where it was not measured."""
    decimals = METRICS[key][1] if key in METRICS else DECIMALS
    return f"{row[key]:z,.{decimals}f}" if key in row else "-"
