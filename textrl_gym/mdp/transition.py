"""The token MDP as functions on [B, L] arrays. Both drivers, stepping and collect(), are made of these.

The arrays are numpy's where the environment is stepped on the CPU, since a step of one row is a dozen operations on a
few numbers and numpy's take a third of torch's time, and torch tensors elsewhere. The functions are the same for both.

Shape legend: B rows, P prompt places, T response places, L = P + T, R some of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textrl_gym.core import StopReason

# Not the union of the two: a function gets arrays of one kind, and neither library's operators take the other's.
BatchArray = Any
"""numpy.ndarray or torch.Tensor."""

# Plain ints, of which both libraries make int64 arrays.
RUNNING, BY_EOS, BY_STOP_STRING, BY_LENGTH, BY_TURNS, BY_REPLY = (reason.value for reason in StopReason)


@dataclass
class State:
    """s_t of B rows: prompt and prefix, how many tokens stand behind the prompt, and why a row ended."""

    token_BL: BatchArray
    """int64, 0 where mask_BL is 0."""
    mask_BL: BatchArray
    """int8."""
    count_B: BatchArray
    """int64."""
    stop_B: BatchArray
    """int64, StopReason."""
    row_B: BatchArray
    """int64: 0, 1, ..., B - 1."""
    turn_B: BatchArray = None
    """int64: turns that the agent has ended; None where a task has a single turn."""
    start_B: BatchArray = None
    """int64: the tokens behind the prompt before the agent's current turn; None where a task has a single turn."""

    def to(self, device: torch.device) -> State:
        """The same as torch tensors."""
        arrays = vars(self).values()
        return State(*(None if array is None else torch.from_numpy(array).to(device) for array in arrays))


def initial_state(prompts: Sequence[Sequence[int]], max_prompt: int, max_new: int, turns: bool = False) -> State:
    """B prompts, left-padded into the first max_prompt places, with nothing generated; numpy arrays."""
    token_BL = np.zeros((len(prompts), max_prompt + max_new), np.int64)
    mask_BL = np.zeros(token_BL.shape, np.int8)
    for b, ids in enumerate(prompts):
        assert 0 < len(ids) <= max_prompt, (len(ids), max_prompt)
        token_BL[b, max_prompt - len(ids) : max_prompt] = ids
        mask_BL[b, max_prompt - len(ids) : max_prompt] = 1
    count_B = np.zeros(len(prompts), np.int64)
    state = State(token_BL, mask_BL, count_B, count_B.copy(), np.arange(len(prompts)))
    if turns:
        state.turn_B, state.start_B = count_B.copy(), count_B.copy()
    return state


def begun_state(state: State | None, chosen_B: np.ndarray, fresh: State, rows_R: BatchArray) -> State:
    """The state with R new episodes in the chosen rows: the new one itself where all are chosen."""
    if chosen_B.all():
        return fresh
    assert state is not None
    restart_(state, rows_R, fresh)
    return state


def restart_(state: State, rows_R: BatchArray, fresh: State) -> None:
    """Put R new episodes into the given rows, in place."""
    # row_B stays: it says where a row stands, not what is in it.
    state.token_BL[rows_R] = fresh.token_BL
    state.mask_BL[rows_R] = fresh.mask_BL
    state.count_B[rows_R] = fresh.count_B
    state.stop_B[rows_R] = fresh.stop_B
    if state.turn_B is not None:
        state.turn_B[rows_R], state.start_B[rows_R] = fresh.turn_B, fresh.start_B


def stop_reasons(
    last_B: BatchArray, length_B: BatchArray, hit_B: BatchArray | None, max_new: int, end_ids: Sequence[int]
) -> BatchArray:
    """Why each completion ends, as StopReason: EOS before stop string before length. int64 [B].

    This is the one rule; stepping, the sampler, guided decoding and given pairs all ask it.

    Args:
        last_B: the last token of each completion.
        length_B: its tokens, the last included.
        hit_B: bool, whether the text contains a stop string; None where there are no stop strings.
        max_new: the token budget.
        end_ids: the tokens that end a completion, EOS and others.
    """
    xp: Any = torch if isinstance(last_B, Tensor) else np
    # From the weakest reason to the strongest: a row that ends in EOS with its last token has ended by itself, and must
    # not be charged the penalty of a text that was cut off.
    stop_B = xp.where(length_B >= max_new, BY_LENGTH, RUNNING)
    if hit_B is not None:
        stop_B = xp.where(hit_B, BY_STOP_STRING, stop_B)
    for end_id in end_ids:  # they are few, and as a tensor they would have to be sent to a GPU
        stop_B = xp.where(last_B == end_id, BY_EOS, stop_B)
    return stop_B


def turns_over(
    last_B: BatchArray,
    turn_length_B: BatchArray,
    length_B: BatchArray,
    hit_B: BatchArray | None,
    max_turn: int,
    max_new: int,
    end_ids: Sequence[int],
) -> BatchArray:
    """Whether each row's last action ends the agent's turn, in a task with replies: by the one rule. bool [B].

    Args:
        turn_length_B: the actions of the turn, the last included.
        length_B: the tokens behind the prompt, the environment's too.
        max_turn: the token budget of a turn.
        max_new: that of all turns and replies.
    """
    xp: Any = torch if isinstance(last_B, Tensor) else np
    # What is left of all positions is the budget of a turn too.
    room_B = xp.minimum(max_new - length_B, max_turn - turn_length_B)
    return stop_reasons(last_B, -room_B, hit_B, 0, end_ids) != RUNNING


def turn_reasons(
    closed_N: BatchArray,
    done_N: BatchArray,
    turn_N: BatchArray,
    length_N: BatchArray,
    max_turns: int,
    max_new: int,
) -> BatchArray:
    """Why conversations end with a turn of the agent that is over, as StopReason; RUNNING where they go on. int64 [N].

    Args:
        closed_N: bool, whether the agent has ended the whole conversation with its last token.
        done_N: bool, whether the environment has, with its reply.
        turn_N: the agent's turns, the last included.
        length_N: the tokens behind the prompt, the reply's included.
        max_turns: the budget of turns.
        max_new: the token budget: a reply that leaves the agent no token of it ends the conversation.
    """
    xp: Any = torch if isinstance(length_N, Tensor) else np
    # From the weakest reason to the strongest, as in stop_reasons.
    stop_N = xp.where(length_N >= max_new, BY_LENGTH, RUNNING)
    stop_N = xp.where(turn_N >= max_turns, BY_TURNS, stop_N)
    stop_N = xp.where(done_N, BY_REPLY, stop_N)
    return xp.where(closed_N, BY_EOS, stop_N)


def append_(state: State, action_B: BatchArray, max_new: int) -> None:
    """Append the action at position P + t of every running row, in place; `end_` follows.

    In place because L may be in the thousands and a step changes one position of it. Rows that have ended stay as they
    are.
    """
    xp: Any = torch if isinstance(state.token_BL, Tensor) else np
    running_B = state.stop_B == RUNNING
    # A row that has ended may point one past the last place; what it writes to the first is what stands there.
    place_B = xp.where(running_B, state.count_B + (state.mask_BL.shape[1] - max_new), 0)
    at = (state.row_B, place_B)
    # Indexed once with all rows, not with a mask: a boolean index would ask the GPU how many rows are running.
    state.token_BL[at] = xp.where(running_B, action_B, state.token_BL[at])
    state.mask_BL[at] |= running_B
    state.count_B += running_B


def end_(state: State, action_B: BatchArray, hit_B: BatchArray | None, max_new: int, end_ids: Sequence[int]) -> None:
    """Set why the rows that were running end with their action, if they do; arguments as of `stop_reasons`."""
    xp: Any = torch if isinstance(state.token_BL, Tensor) else np
    stop_B = stop_reasons(action_B, state.count_B, hit_B, max_new, end_ids)
    state.stop_B = xp.where(state.stop_B == RUNNING, stop_B, state.stop_B)


def terminated_and_truncated(
    stop_B: np.ndarray, active_B: np.ndarray, first_B: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the rows that were running have been terminated by a step, and which truncated. bool [B] each.

    Args:
        stop_B: int64, StopReason after the step.
        active_B: the rows that were running before it.
        first_B: where the step was an episode's first; None where none that ends can have been.
    """
    ended_B = active_B & (stop_B != RUNNING)
    truncated_B = active_B & ((stop_B == BY_LENGTH) | (stop_B == BY_TURNS))
    if first_B is not None:
        # Gymnasium's checker refuses truncation at the first step.
        truncated_B &= ~first_B
    return ended_B ^ truncated_B, truncated_B


def reply_(state: State, row: int, ids: Sequence[int], max_new: int) -> None:
    """Append a reply's tokens behind the ended turn of a row, whose next turn begins, in place."""
    first = state.mask_BL.shape[1] - max_new + int(state.count_B[row])
    places = slice(first, first + len(ids))
    new: Any = ids
    state.token_BL[row, places] = torch.tensor(new) if isinstance(state.token_BL, Tensor) else np.array(new, np.int64)
    state.mask_BL[row, places] = 1
    state.count_B[row] += len(ids)
    state.start_B[row] = state.count_B[row]
    state.turn_B[row] += 1


def shape_reward(
    score_B: BatchArray, stop_B: BatchArray, kl_B: BatchArray, kl_coef: float, missing_eos_penalty: float
) -> BatchArray:
    """r_t = [episode ends at t] (score - penalty where the budget ran out) - kl_coef KL_t. float32 [B], or [B, T]."""
    xp: Any = torch if isinstance(score_B, Tensor) else np
    # The penalty goes to the score and not to the KL term: algorithms that compare scores in a group see it too.
    terminal_B = score_B - missing_eos_penalty * (stop_B == BY_LENGTH)
    return xp.where(stop_B != RUNNING, terminal_B, xp.zeros_like(score_B)) - kl_coef * kl_B
