"""Micro-batches: the rows of a rollout in parts of about the same length, within a budget of token positions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout

MICRO_BATCH_TOKENS = 16_384
"""Prompt and response places of one teacher-forced pass without gradients."""


def micro_batches(rollout: Rollout, max_tokens: int, whole_groups: bool = False, multiple_of: int = 1) -> list[Tensor]:
    """Rows of the rollout by length, groups together, filled up to a budget of places, so that little is padding.

    A group's prompt is computed once (Policy.response), so a micro-batch of U prompts and B rows has
    U * longest prompt + B * longest response places. Only a single row, or a single group that is kept whole, may
    pass the budget.

    Args:
        whole_groups: never part a group, for losses that compare its rows.
        multiple_of: so many, or twice so many, ..., as far as there are rows (or groups): as many for each process.

    Returns:
        index tensors that together hold every row once.
    """
    prompt_B, response_B = rollout.prompt_mask_BP.sum(1).tolist(), rollout.present_BT.sum(1).tolist()
    groups = rollout.group_B.tolist()
    longest: dict[int, int] = {}
    for group, prompt, response in zip(groups, prompt_B, response_B, strict=True):
        longest[group] = max(longest.get(group, 0), prompt + response)
    # The longest row of a group counts for all of it: that keeps a group's rows together in the order. The group's
    # number then keeps two groups of one length apart.
    order = sorted(range(len(groups)), key=lambda b: (longest[groups[b]], groups[b], response_B[b]))
    units = [[b] for b in order]
    if whole_groups:
        units = [list(rows) for _, rows in itertools.groupby(order, key=lambda b: groups[b])]
    batches: list[list[list[int]]] = []
    for unit in units:
        rows = [b for one in (*batches[-1], unit) for b in one] if batches else unit
        prompts = len({groups[b] for b in rows})
        # Padding counts: in a rectangle every prompt is as wide as the widest, and so is every completion.
        places = prompts * max(prompt_B[b] for b in rows) + len(rows) * max(response_B[b] for b in rows)
        if batches and places <= max_tokens:
            batches[-1].append(unit)
        else:
            batches.append([unit])
    batches = functional.halved(batches, multiple_of)
    return [torch.tensor([b for unit in batch for b in unit], device=rollout.group_B.device) for batch in batches]
