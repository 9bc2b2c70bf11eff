"""Pure tensor functions that algorithms share. Every mask is a bool [B, T] made from lengths.

Shape legend: B rows, T response places, V vocabulary (see core.py). Places outside a mask hold finite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from textrl_gym import processes

T = TypeVar("T")
Aggregation = Literal["token", "sequence"]
Credit = Literal["trajectory", "turn"]
"""What completions of a prompt are compared by: the return of the whole, or that from each turn on."""


class NonFiniteError(RuntimeError):
    """NaN or infinity where training needs a number: no optimizer step is taken from it."""


def require_finite(name: str, values: Tensor | float) -> None:
    """Raise NonFiniteError, with the name and the first bad value, unless all values are finite numbers."""
    flat_N = processes.whole(torch.as_tensor(values)).flatten()
    # One wait for the device; which values are bad is asked only where some are.
    if not flat_N.isfinite().all():
        bad_N = flat_N[~flat_N.isfinite()]
        share = "" if len(flat_N) == 1 else f" at {len(bad_N):,} of {len(flat_N):,} positions"
        raise NonFiniteError(f"{name} is {float(bad_N[0])}{share}")


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the places inside the mask; 0 where there are none. Scalar."""
    assert x_BT.shape == mask_BT.shape, (x_BT.shape, mask_BT.shape)
    return (x_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to unit variance (and zero mean) under the mask; 0 outside it.

    The variance is the biased one, as TensorFlow's moments in OpenAI's code (lm-human-preferences). With
    shift_mean=False the mean is kept, as for rewards, whose sign carries meaning.
    """
    mean = masked_mean(x_BT, mask_BT)
    variance = masked_mean((x_BT - mean) ** 2, mask_BT)
    white_BT = (x_BT - mean) * torch.rsqrt(variance + eps)
    return (white_BT if shift_mean else white_BT + mean) * mask_BT


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over complete episodes.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   A_t = delta_t + gamma lam A_{t+1}

    V after the last action is 0: the episode is over, by EOS or by its budget, which is part of the task. Nothing
    leaks in from padding. Places outside the mask between two actions, where the environment speaks, are no steps: the
    state after an action is the one before the next action.

    Returns:
        advantage_BT and return_BT = advantage + value, both 0 outside the mask.
    """
    assert reward_BT.shape == value_BT.shape == mask_BT.shape, (reward_BT.shape, value_BT.shape, mask_BT.shape)
    advantage_BT = torch.zeros_like(reward_BT)
    next_advantage_B = torch.zeros_like(reward_BT[:, 0])
    next_value_B = torch.zeros_like(next_advantage_B)
    # From the end, as A_t needs A_{t+1}; T steps on B numbers are little beside one pass of the model.
    for t in reversed(range(reward_BT.shape[1])):
        inside_B = mask_BT[:, t]
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        # Outside the mask both stay as they are: 0 behind the end, and between two turns those of the next action.
        next_advantage_B = torch.where(inside_B, delta_B + gamma * lam * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(inside_B, value_BT[:, t], next_value_B)
        advantage_BT[:, t] = next_advantage_B
    return advantage_BT * mask_BT, torch.where(mask_BT, advantage_BT + value_BT, 0.0)


def clipped_surrogate(
    logp_BT: Tensor, old_logp_BT: Tensor, advantage_BT: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's pessimistic surrogate (Schulman et al. 2017, eq. 7) as a loss per token.

        loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - clip_low, 1 + clip_high))

    Returns:
        loss_BT, ratio_BT, and clipped_BT (bool): where the clipped branch is the one taken, so the gradient is 0.
    """
    assert logp_BT.shape == old_logp_BT.shape == advantage_BT.shape
    ratio_BT = (logp_BT - old_logp_BT).exp()
    # The pessimistic one of both: without the maximum a ratio beyond the clip that makes things worse had no gradient.
    free_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(free_BT, clipped_BT), ratio_BT, clipped_BT > free_BT


def importance_weights(logp: Tensor, sampler_logp: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of tokens that another distribution has sampled (Yao et al. 2025, TIS).

        w_t = min(pi_old(y_t) / pi_sampler(y_t), cap)

    Of a rollout server whose kernels give other probabilities than the training forward, or whose weights are those of
    an update before. The truncation bounds the variance, at the cost of a bias where it applies.

    Args:
        logp, sampler_logp: of the training forward and of the sampler, [B, T], or of whole completions, [B].
    """
    assert logp.shape == sampler_logp.shape, (logp.shape, sampler_logp.shape)
    # Clamped before exp: a token that the sampler finds impossible must not become infinity times 0.
    return (logp - sampler_logp).detach().clamp(max=math.log(cap)).exp()


def approx_kl(logp_BT: Tensor, old_logp_BT: Tensor) -> Tensor:
    """How far the policy has moved from the one that sampled, nats per token, without gradient: Schulman's k3 (2020).

    Of a sampled token, with d = log pi - log pi_old: exp(d) - 1 - d, which is never negative.
    """
    assert logp_BT.shape == old_logp_BT.shape, (logp_BT.shape, old_logp_BT.shape)
    log_ratio_BT = (logp_BT - old_logp_BT).detach()
    return log_ratio_BT.exp() - 1 - log_ratio_BT


def aggregate(loss_BT: Tensor, mask_BT: Tensor, how: Aggregation, rows: int, tokens: int) -> Tensor:
    """Sum of a per-token loss over one micro-batch, divided by the counts of the whole minibatch.

    "token": every token weighs the same, sum / tokens. "sequence": the mean of the rows' own means (GRPO's original
    form, which favours short correct and long wrong answers). Dividing by global counts makes the gradients of
    micro-batches add up to the gradient of one batch.

    Args:
        rows, tokens: how many rows and masked tokens the whole minibatch has, over all its micro-batches.
    """
    assert loss_BT.shape == mask_BT.shape, (loss_BT.shape, mask_BT.shape)
    kept_BT = loss_BT * mask_BT
    if how == "token":
        return kept_BT.sum() / max(tokens, 1)
    return (kept_BT.sum(1) / mask_BT.sum(1).clamp(min=1)).sum() / max(rows, 1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; a float64 one as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def token_logprobs(logits_BTV: Tensor, token_BT: Tensor) -> Tensor:
    """log softmax(logits)[token] in at least float32. [B, T]; any leading dimensions.

    By PyTorch's fused cross entropy: its backward pass is one sweep over the logits, where gather and logsumexp take
    four (12 against 46 ms, forward and backward, for 3,072 places of 2,048 tokens on two threads).
    """
    # At least float32: bfloat16 has 8 bits, so that a log-probability of -10 would be off by up to 0.03.
    flat_NV = at_least_float32(logits_BTV).reshape(-1, logits_BTV.shape[-1])
    return -F.cross_entropy(flat_NV, token_BT.reshape(-1), reduction="none").view(token_BT.shape)


def entropy(logits_BTV: Tensor) -> Tensor:
    """Entropy in nats of the next-token distribution, in at least float32. [B, T]."""
    logp_BTV = at_least_float32(logits_BTV).log_softmax(-1)
    return -(logp_BTV.exp() * logp_BTV).sum(-1)


def inverse_cdf(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds uniform_B in [0, 1): a sample of softmax(logp).

    One number decides one token, so that two drivers with the same numbers take the same actions. [B] int64.
    """
    cdf_BV = logp_BV.float().exp().cumsum(-1)
    # The float32 sum may end at 0.9999998; scaling by it keeps the last tokens reachable and the index in range.
    target_B1 = (uniform_B.to(cdf_BV.dtype) * cdf_BV[:, -1])[:, None]
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1).clamp(max=logp_BV.shape[-1] - 1)


def mean_of(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the optimizer steps of an update."""
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def returns_to_go(reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """G_t = r_t + r_{t+1} + ... to the end of the episode, undiscounted. [B, T], 0 outside the mask."""
    assert reward_BT.shape == mask_BT.shape, (reward_BT.shape, mask_BT.shape)
    return (reward_BT * mask_BT).flip(1).cumsum(1).flip(1) * mask_BT


def without_noise(return_B: Tensor) -> Tensor:
    """Returns rounded to a hundred-thousandth of the largest, so that those that differ by rounding alone are equal.

    Before completions are ranked: two of one score differ by 1e-8 through their KL to a reference that is the policy
    itself, and another machine, or another number of processes, would rank them the other way.
    """
    if not return_B.numel():
        return return_B
    # Clamped, as a comparison with 0 would wait for a GPU.
    unit = (return_B.abs().max() * 1e-5).clamp(min=torch.finfo(return_B.dtype).tiny)
    return (return_B / unit).round() * unit


def turn_returns(reward_BT: Tensor, mask_BT: Tensor, turn_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The return from each turn's beginning on: the rewards of this turn and of all later ones, undiscounted.

    Args:
        turn_BT: int64, the number of the turn that an action belongs to, from 0.

    Returns:
        return_BK for K turns, and there_BK (bool): which turns a row has.
    """
    assert reward_BT.shape == mask_BT.shape == turn_BT.shape, (reward_BT.shape, mask_BT.shape, turn_BT.shape)
    # A sum for each of a few turns, and not one by scatter, whose last digit is not the same in each run on a GPU.
    kept_BT, turns = reward_BT * mask_BT, range(int((turn_BT * mask_BT).max()) + 1)
    return_BK = torch.stack([(kept_BT * (turn_BT >= k)).sum(1) for k in turns], 1)
    return return_BK, torch.stack([(mask_BT & (turn_BT == k)).any(1) for k in turns], 1)


def turn_advantages(
    reward_BT: Tensor,
    mask_BT: Tensor,
    turn_BT: Tensor,
    group_B: Tensor,
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The advantage of each turn's actions: its return, compared with that of the group's others at the same turn.

    As GRPO's process supervision (Shao et al. 2024, section 4.1.3) with a turn for a step, but that steps are compared
    with those of the same number alone. A turn that only one row of the group has come to is compared with nothing.

    Args:
        compare: (return_N, group_N) -> advantage_N, as for whole completions.

    Returns:
        advantage_BT, 0 outside the mask.
    """
    return_BK, there_BK = turn_returns(reward_BT, mask_BT, turn_BT)
    number_BK = group_B[:, None] * there_BK.shape[1] + torch.arange(there_BK.shape[1], device=group_B.device)
    advantage_N = compare(return_BK[there_BK], number_BK[there_BK])
    advantage_BK = torch.zeros_like(return_BK).masked_scatter(there_BK, advantage_N)
    return advantage_BK.gather(1, turn_BT * mask_BT) * mask_BT


def turn_ends(mask_BT: Tensor, turn_BT: Tensor) -> Tensor:
    """The last action of each turn. bool [B, T]."""
    assert mask_BT.shape == turn_BT.shape, (mask_BT.shape, turn_BT.shape)
    goes_on_BT = mask_BT[:, 1:] & (turn_BT[:, 1:] == turn_BT[:, :-1])
    return mask_BT & ~F.pad(goes_on_BT, (0, 1))


def last_places(mask_BT: Tensor) -> Tensor:
    """Index of the last True of each row, which must have one; there may be False before it. [B] int64."""
    # Of rising numbers the greatest, and not argmax of the flipped mask, whose first of equals a GPU does not promise.
    return (mask_BT * torch.arange(mask_BT.shape[1], device=mask_BT.device)).amax(1)


def pad(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids [N, S] padded with 0 on the "left" or "right", and their bool mask."""
    width = max(map(len, rows))
    # The mask is by length and never by token: 0 is a real id too, EOS in the tiny models.
    length_N1 = torch.tensor([[len(row)] for row in rows])
    place_S = torch.arange(width)
    if side == "left":
        ids_NS = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        return ids_NS, place_S >= width - length_N1
    ids_NS = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
    return ids_NS, place_S < length_N1


def unique_ids(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each different prompt once, left-padded, its mask, and which of them each row has."""
    # A dict keeps the order of first sight, so that U prompts stand in the order of their first rows.
    first_of: dict[tuple[int, ...], int] = {}
    source_B = torch.tensor([first_of.setdefault(tuple(ids), len(first_of)) for ids in prompts])
    prompt_UP, mask_UP = pad(list(first_of), "left")
    return prompt_UP.to(device), mask_UP.to(device), source_B.to(device)


def rows_of_groups(group_B: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each group in their order, groups by rising number, filled up with row 0 to the largest group.

    A matrix instead of sums by scatter, whose order, and so whose last digit, is not the same in each run on a GPU.

    Returns:
        row_GN (int64) and mask_GN (bool): which of them are rows of the group.
    """
    assert group_B.ndim == 1, group_B.shape
    _, number_B, size_G = group_B.unique(return_inverse=True, return_counts=True)
    mask_GN = torch.arange(int(size_G.max()), device=group_B.device) < size_G[:, None]
    order_B = number_B.argsort(stable=True)  # stable: a group's rows keep their order
    return torch.zeros_like(mask_GN, dtype=torch.long).masked_scatter(mask_GN, order_B), mask_GN


def halved(batches: list[list[T]], multiple_of: int) -> list[list[T]]:
    """The batches, the largest of them halved until their number is a multiple of another, or each has one item."""
    batches = list(batches)
    while len(batches) % multiple_of:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[largest]
        if len(batch) == 1:
            break
        middle = len(batch) // 2
        batches[largest : largest + 1] = [batch[:middle], batch[middle:]]
    return batches
