"""Cached decoding: unique prompts are prefilled once, finished rows leave the batch, log-probabilities are kept.

Shape legend: U unique prompts, B rows, P prompt places, T response places, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import StopReason
from textrl_gym.mdp.transition import stop_reasons
from textrl_gym.policy.policy import Policy

POLL_EVERY = 8  # on a GPU, tokens between two questions "has every row ended?": each one waits for the device


@dataclass(frozen=True)
class Completions:
    """B sampled completions; 0 outside the mask, which includes the final EOS."""

    token_BT: Tensor
    mask_BT: Tensor
    logp_BT: Tensor
    value_BT: Tensor
    """V before each action, of a critic that shares the policy's trunk; else 0."""
    stop_B: Tensor


@torch.no_grad()
def generate(
    policy: Policy,
    prompt_UP: Tensor,
    prompt_mask_UP: Tensor,
    source_B: Tensor,
    uniform_BT: Tensor | None,
    *,
    max_new_tokens: int,
    eos_id: int,
    stopped: Callable[[list[list[int]]], list[bool]] | None = None,
) -> Completions:
    """Sample one completion for each row, token by token from the full softmax at the policy's temperature.

    Args:
        prompt_UP, prompt_mask_UP: int64 and bool, left-padded, each unique prompt once.
        source_B: int64, which unique prompt a row answers.
        uniform_BT: float in [0, 1), T >= max_new_tokens: number [b, t] decides token t of row b. None: greedy.
        max_new_tokens: the budget of every row.
        eos_id: the token that ends a row; it is part of the completion.
        stopped: asked at each token whether the rows' tokens so far complete a stop string (Scorer.completes_stop).

    Returns:
        Completions with T = max_new_tokens.
    """
    device = policy.device
    rows = len(source_B)
    shape = (rows, max_new_tokens)
    token_BT = torch.zeros(shape, dtype=torch.long, device=device)
    logp_BT, value_BT = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
    stop_B = torch.full((rows,), StopReason.RUNNING.value, device=device)
    length_B = torch.full((rows,), max_new_tokens, device=device)

    # 1. Prefill each unique prompt once.
    decoder = policy.decoder(prompt_UP, prompt_mask_UP.bool(), source_B, max_new_tokens)
    row_b, hidden_bD = torch.arange(rows, device=device), decoder.first_BD

    for t in range(max_new_tokens):
        # 2. Choose a token for every row still in the batch (row_b); rows that ended since the last poll are ignored.
        logp_bV = policy.logits(hidden_bD).log_softmax(-1)
        token_b = logp_bV.argmax(-1) if uniform_BT is None else functional.inverse_cdf(logp_bV, uniform_BT[row_b, t])
        alive_b = stop_B[row_b] == StopReason.RUNNING
        token_BT[row_b, t] = torch.where(alive_b, token_b, 0)
        if policy.shares_trunk:
            value_BT[row_b, t] = policy.value_of(hidden_bD)
        logp_BT[row_b, t] = torch.where(alive_b, logp_bV.gather(1, token_b[:, None]).squeeze(1).float(), 0.0)

        # 3. Who ended with this token?
        hit_b = None if stopped is None else torch.tensor(stopped(token_BT[row_b, : t + 1].tolist()), device=device)
        length_b = torch.full_like(token_b, t + 1)
        reason_b = stop_reasons(token_b, length_b, hit_b, max_new_tokens, eos_id)
        stop_B[row_b] = torch.where(alive_b, reason_b, stop_B[row_b])
        ended_b = alive_b & (reason_b != StopReason.RUNNING)
        length_B[row_b] = torch.where(ended_b, length_b, length_B[row_b])
        if t == max_new_tokens - 1:
            break

        # 4. Finished rows leave the batch.
        if device.type == "cpu" or t % POLL_EVERY == POLL_EVERY - 1:
            keep_k = (stop_B[row_b] == StopReason.RUNNING).nonzero().squeeze(1)
            if len(keep_k) == 0:
                break
            if len(keep_k) < len(row_b) and len(keep_k) <= (1 - decoder.compaction_threshold) * len(row_b):
                decoder.keep(keep_k)
                row_b, token_b = row_b[keep_k], token_b[keep_k]

        # 5. One more place for each row.
        hidden_bD = decoder.step(token_b)

    mask_BT = torch.arange(max_new_tokens, device=device) < length_B[:, None]
    return Completions(token_BT * mask_BT, mask_BT, logp_BT * mask_BT, value_BT * mask_BT, stop_B)
