"""The token MDP as pure functions on [B, L] tensors. Both drivers, stepping and collect(), are made of these.

Shape legend: B rows, P prompt places, T response places, L = P + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_gym.core import StopReason


@dataclass
class State:
    """s_t of B rows: prompt and prefix, how many tokens were generated, and why a row ended."""

    token_BL: Tensor
    mask_BL: Tensor
    count_B: Tensor
    stop_B: Tensor


def initial_state(prompts: Sequence[Sequence[int]], max_prompt: int, max_new: int, device: torch.device) -> State:
    """B prompts, left-padded, with nothing generated."""
    token_BL = torch.zeros((len(prompts), max_prompt + max_new), dtype=torch.int64)
    mask_BL = torch.zeros_like(token_BL, dtype=torch.int8)
    for b, ids in enumerate(prompts):
        token_BL[b, max_prompt - len(ids) : max_prompt] = torch.as_tensor(ids)
        mask_BL[b, max_prompt - len(ids) : max_prompt] = 1
    rows = torch.zeros(len(prompts), dtype=torch.int64)
    return State(token_BL.to(device), mask_BL.to(device), rows.to(device), rows.clone().to(device))


def append(state: State, action_B: Tensor, active_B: Tensor, max_new: int, eos_id: int) -> State:
    """s_{t+1}: the action at place P + t of every active row, and the row's end by EOS or by its budget."""
    place_B1 = (state.mask_BL.shape[1] - max_new + state.count_B).clamp(max=state.mask_BL.shape[1] - 1)[:, None]
    token_BL = state.token_BL.scatter(
        1, place_B1, torch.where(active_B[:, None], action_B[:, None], state.token_BL.gather(1, place_B1))
    )
    mask_BL = state.mask_BL.scatter(1, place_B1, torch.where(active_B[:, None], 1, state.mask_BL.gather(1, place_B1)))
    count_B = state.count_B + active_B
    ended_B = torch.where(count_B >= max_new, StopReason.BUDGET.value, StopReason.RUNNING.value)
    ended_B = torch.where(action_B == eos_id, StopReason.EOS.value, ended_B)
    return State(token_BL, mask_BL, count_B, torch.where(active_B, ended_B, state.stop_B))


def shape_reward(score_B: Tensor, stop_B: Tensor, kl_B: Tensor, kl_coef: float, missing_eos_penalty: float) -> Tensor:
    """r_t = [episode ends at t] (score - penalty where the budget ran out) - kl_coef KL_t. float32 [B]."""
    ended_B = stop_B != StopReason.RUNNING
    terminal_B = score_B - missing_eos_penalty * (stop_B == StopReason.BUDGET)
    return torch.where(ended_B, terminal_B, 0.0) - kl_coef * kl_B


def select(chosen_B: Tensor, new: State, old: State) -> State:
    """The rows of `new` where chosen_B is True, those of `old` elsewhere."""
    return State(
        torch.where(chosen_B[:, None], new.token_BL, old.token_BL),
        torch.where(chosen_B[:, None], new.mask_BL, old.mask_BL),
        torch.where(chosen_B, new.count_B, old.count_B),
        torch.where(chosen_B, new.stop_B, old.stop_B),
    )
