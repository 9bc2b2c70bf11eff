"""The infos of episodes that end, in the form of gymnasium.vector.VectorEnv: `_key` masks, final_info, final_obs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_gym.core import Row, StopReason
from textrl_gym.data.prompt_streams import Prompt
from textrl_gym.mdp.transition import BatchArray
from textrl_gym.mdp.turns import Answer

Infos = dict[str, Any]


def reset_infos(prompts: Sequence[Prompt], chosen_B: np.ndarray) -> dict[str, Any]:
    """Which prompts the rows that begin now (bool chosen_B) have, as places in the split; 0 in the others."""
    index_B = np.zeros(len(prompts), np.int64)
    index_B[chosen_B] = [prompts[b].index for b in np.flatnonzero(chosen_B).tolist()]
    return {"prompt_index": index_B, "_prompt_index": chosen_B.copy()}


def turn_infos(
    number_B: np.ndarray, active_B: np.ndarray, rows: np.ndarray, answers: Sequence[Answer]
) -> dict[str, Any]:
    """What a step of a conversation tells: which turn each action belongs to, and of turns that ended what followed.

    Args:
        number_B: int64, the turns that the agent has ended before the action.
        active_B: bool, rows that took an action.
        rows: those whose turn ended with it, and what was answered to each.
    """
    infos: dict[str, Any] = {}
    if active_B.any():
        infos |= {"turn": np.where(active_B, number_B, 0), "_turn": active_B.copy()}
    if len(rows):
        over_B = np.zeros(len(active_B), bool)
        over_B[rows] = True
        reward_B, reply_B = np.zeros(len(active_B)), np.full(len(active_B), None, object)
        reward_B[rows], reply_B[rows] = [a.reward for a in answers], [a.text for a in answers]
        infos |= {"turn_reward": reward_B, "_turn_reward": over_B, "reply": reply_B, "_reply": over_B.copy()}
    return infos


def final_info(
    row: Row,
    completion: str,
    score: float,
    stop_reason: StopReason,
    components: dict[str, float],
    logged: dict[str, Any],
) -> dict[str, Any]:
    """What an episode's last info tells beside the step's own.

    Args:
        components: of a reward that is a mixture, the unweighted score of each part; else empty.
        logged: what the reward said by log_extra.
    """
    final = {"score": score, "prompt": row["prompt"], "completion": completion, "stop_reason": stop_reason}
    if row.get("completion") is not None:
        final["reference"] = row["completion"]
    if components:
        final["components"] = components
    if logged:
        final["logged"] = logged
    return final


def with_finals(
    infos: Infos,
    ended_B: np.ndarray,
    finals: list[dict[str, Any]],
    final_obs: dict[str, Any] | None,
    add_info: Callable[[Infos, Infos, int], Infos],
) -> Infos:
    """The step's infos with those of the rows that ended.

    Args:
        infos: of the step, each an array [B] with its mask.
        ended_B: bool.
        finals: one for each True of ended_B, in order.
        final_obs: None where the next episode begins later. In SAME_STEP mode the last observations, whose rows go to
            "final_obs"; the finals and the step's own infos of those rows go to "final_info" then, because their places
            in `infos` are those of the new episode.
        add_info: VectorEnv's, which puts one row's infos into those of all rows.
    """
    ended = np.flatnonzero(ended_B)
    if final_obs is None:
        for name in sorted({name for final in finals for name in final}):
            values = [final.get(name) for final in finals]
            is_number = isinstance(values[0], float)  # as Gymnasium does: others are kept as objects
            infos[name] = np.zeros(len(ended_B), float) if is_number else np.full(len(ended_B), None, object)
            if name == "turns":  # one by one: numpy would take a list of lists for a matrix
                for b, value in zip(ended.tolist(), values, strict=True):
                    infos[name][b] = value
            else:
                infos[name][ended] = values
            infos[f"_{name}"] = ended_B.copy()  # a copy: the environment goes on using its own
            if None in values:
                infos[f"_{name}"][ended] = [name in final for final in finals]
        return infos
    names = [name for name in infos if not name.startswith("_")]
    ongoing: dict[str, Any] = {}
    for name in names:
        going_B = infos[f"_{name}"] & ~ended_B
        if going_B.any():  # as Gymnasium does, a name that no row has is left out
            ongoing[name], ongoing[f"_{name}"] = _keep(infos[name], going_B), going_B
    for b, final in zip(ended.tolist(), finals, strict=True):
        step_info = {name: _plain(infos[name][b]) for name in names if infos[f"_{name}"][b]}
        last = {"final_obs": {k: v[b] for k, v in final_obs.items()}, "final_info": step_info | final}
        ongoing = add_info(ongoing, last, b)
    return ongoing


def _keep(value_B: BatchArray, kept_B: np.ndarray) -> BatchArray:
    """The values where kept_B is True, 0 (of objects None) elsewhere."""
    if isinstance(value_B, Tensor):
        return torch.where(torch.as_tensor(kept_B, device=value_B.device), value_B, 0.0)
    return np.where(kept_B, value_B, None if value_B.dtype == object else value_B.dtype.type(0))


def _plain(value: Any) -> Any:
    """A number of an array or a tensor as Python's own; anything else as it is."""
    return value.item() if hasattr(value, "item") else value
