"""What a reward model is worth on held-out pairs: accuracy by data set, and calibration.

With r_w - r_l the difference of the raw rewards of a pair's chosen and rejected completion:

    accuracy       share of pairs with r_w > r_l, equal rewards counting half (textrl_gym.stats.pairwise.agreement)
    interval       Wilson's score interval of that share (textrl_gym.stats.pairwise.win_rate), 95%. It takes pairs for
                   independent; those of one prompt are not, so with many pairs a prompt it is too narrow.
    predicted      sigmoid(|r_w - r_l|): how sure the model is of its own order, which is what it was trained to say
    ECE            sum over bins of (pairs in bin / pairs) |mean predicted - accuracy in bin|  (Guo et al. 2017,
                   arXiv:1706.04599, equation 3)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from textrl_gym.stats.estimates import outcomes
from textrl_gym.stats.pairwise import agreement, win_rate

BINS = 10
ALL = "all"


def accuracy_row(name: str, gap_N: Sequence[float]) -> dict[str, Any]:
    """One line of the table of accuracies."""
    share = win_rate(outcomes(gap_N, 0.0))
    return {"data": name, "pairs": len(gap_N), "accuracy": agreement(gap_N), "low": share.low, "high": share.high}


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


def tables(record: Mapping[str, Any]) -> list[Table]:
    """What is in a record, for the terminal."""
    made = [_table("Accuracy on held-out pairs", record["accuracy"])]
    if "calibration" in record:
        error = record["calibration"]["ece"]
        made.append(_table(f"Calibration: expected error {error:.3f}", record["calibration"]["bins"]))
    if record.get("curve"):
        made.append(_table("Accuracy by the number of training pairs", record["curve"]))
    return made


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
