"""The token MDP as functions on [B, L] tensors. Both drivers, stepping and collect(), are made of these.

Shape legend: B rows, P prompt places, T response places, L = P + T, R some of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from textrl_gym.core import StopReason


@dataclass
class State:
    """s_t of B rows: prompt and prefix, how many tokens were generated, and why a row ended."""

    token_BL: Tensor
    """int64, 0 where mask_BL is 0."""
    mask_BL: Tensor
    """int8."""
    count_B: Tensor
    """int64."""
    stop_B: Tensor
    """int64, StopReason."""


def initial_state(prompts: Sequence[Sequence[int]], max_prompt: int, max_new: int, device: torch.device) -> State:
    """B prompts, left-padded into the first max_prompt places, with nothing generated."""
    token_BL = np.zeros((len(prompts), max_prompt + max_new), np.int64)
    mask_BL = np.zeros(token_BL.shape, np.int8)
    for b, ids in enumerate(prompts):
        assert 0 < len(ids) <= max_prompt, (len(ids), max_prompt)
        token_BL[b, max_prompt - len(ids) : max_prompt] = ids
        mask_BL[b, max_prompt - len(ids) : max_prompt] = 1
    count_B = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    return State(
        torch.from_numpy(token_BL).to(device), torch.from_numpy(mask_BL).to(device), count_B, torch.zeros_like(count_B)
    )


def restart_(state: State, rows_R: Tensor, fresh: State) -> None:
    """Put R new episodes into the given rows, in place."""
    state.token_BL[rows_R] = fresh.token_BL
    state.mask_BL[rows_R] = fresh.mask_BL
    state.count_B[rows_R] = fresh.count_B
    state.stop_B[rows_R] = fresh.stop_B


def append_(state: State, action_B: Tensor, max_new: int, eos_id: int) -> None:
    """s_{t+1}, in place: the action at place P + t of every running row, and the row's end by EOS or by its budget.

    In place because L may be in the thousands and a step changes one place of it. Rows that have ended stay as they
    are.
    """
    running_B = state.stop_B == StopReason.RUNNING.value
    # A row that has used its budget would point one past the end; what it writes there is what stands there.
    place_B1 = (state.count_B + (state.mask_BL.shape[1] - max_new)).clamp_(max=state.mask_BL.shape[1] - 1)[:, None]
    running_B1 = running_B[:, None]
    token_B1, mask_B1 = state.token_BL.gather(1, place_B1), state.mask_BL.gather(1, place_B1)
    state.token_BL.scatter_(1, place_B1, torch.where(running_B1, action_B[:, None], token_B1))
    state.mask_BL.scatter_(1, place_B1, mask_B1 | running_B1)
    state.count_B += running_B
    end_B = torch.where(state.count_B >= max_new, StopReason.BUDGET.value, StopReason.RUNNING.value)
    end_B.masked_fill_(action_B == eos_id, StopReason.EOS.value)
    state.stop_B = torch.where(running_B, end_B, state.stop_B)


def shape_reward(score_B: Tensor, stop_B: Tensor, kl_B: Tensor, kl_coef: float, missing_eos_penalty: float) -> Tensor:
    """r_t = [episode ends at t] (score - penalty where the budget ran out) - kl_coef KL_t. float32 [B]."""
    ended_B = stop_B != StopReason.RUNNING
    terminal_B = score_B - missing_eos_penalty * (stop_B == StopReason.BUDGET)
    return torch.where(ended_B, terminal_B, 0.0) - kl_coef * kl_B
