"""Log-probabilities, entropy, KL, values and rewards of a rollout, by teacher-forced passes without gradients.

Shape legend: B rows, T response positions, D hidden width, n positions of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from textrl_gym import functional, kl, processes
from textrl_gym.core import Rollout, StopReason
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.mdp.transition import shape_reward
from textrl_gym.policy.policy import CHUNK_NUMBERS, Policy
from textrl_gym.rollouts.batching import MICRO_BATCH_TOKENS, micro_batches
from textrl_gym.rollouts.phases import phase


def rescore(policy: Policy, rollout: Rollout, mdp: TextVectorEnv, *, kl_coef: float = 0.0) -> Rollout:
    """The rollout of the same texts and scores, had the policy written them: its log-probabilities, values, rewards."""
    rollout = with_passes(rollout, policy, policy.reference or mdp.reference, mdp.kl_estimator, False, False)
    return dataclasses.replace(rollout, reward_BT=token_rewards(rollout, kl_coef, mdp.missing_eos_penalty))


@torch.no_grad()
def rollout_logprobs(rollout: Rollout, policy: Policy) -> Tensor:
    """log pi of a rollout's actions by teacher-forced passes without gradients. float32 [B, T], 0 outside the mask."""
    logp_BT = torch.zeros_like(rollout.logp_BT)
    for rows in _own_parts(rollout):
        part = rollout.select(rows)
        logp_BT[rows, : part.token_BT.shape[1]] = policy.logprobs(part).float()
    return processes.total(logp_BT)  # 0 in the rows of other processes


def _own_parts(rollout: Rollout) -> Sequence[Tensor]:
    """The micro-batches of a pass without gradients that this process computes of a rollout that all have."""
    return processes.own(micro_batches(rollout, MICRO_BATCH_TOKENS, multiple_of=processes.size()))


@torch.no_grad()
def token_entropy(rollout: Rollout, policy: Policy) -> Tensor:
    """Entropy of the distribution that each action was taken from, nats. float32 [B, T], 0 outside the mask."""
    entropy_BT, size = torch.zeros_like(rollout.logp_BT), max(1, CHUNK_NUMBERS // policy.vocab_size)
    for rows in _own_parts(rollout):
        part = rollout.select(rows)
        # Not Policy.response: that asks a critic too, which may have a trunk of its own.
        flat = policy.hidden(part)[part.mask_BT].split(size), part.token_BT[part.mask_BT].split(size)
        found_N = torch.cat([functional.entropy(policy.logits(*chunk)).float() for chunk in zip(*flat, strict=True)])
        placed_BT = torch.zeros_like(part.logp_BT).masked_scatter(part.mask_BT, found_N)
        entropy_BT[rows, : part.token_BT.shape[1]] = placed_BT
    return processes.total(entropy_BT)


@torch.no_grad()
def with_passes(
    rollout: Rollout, policy: Policy, reference: Policy | None, estimator: str, exact: bool, guided: bool
) -> Rollout:
    """The rollout with reference log-probabilities, KL and values; and, where not `exact`, the policy's recomputed."""
    # A guided completion is of another distribution than the policy's, whose exact KL would say nothing of it.
    full = estimator == "full" and reference is not None and not guided
    logp_BT, value_BT = rollout.logp_BT.clone(), rollout.value_BT.clone()
    ref_logp_BT, kl_BT = rollout.logp_BT.clone(), rollout.kl_BT.clone()
    for rows in micro_batches(rollout, MICRO_BATCH_TOKENS):
        part = rollout.select(rows)
        width = part.token_BT.shape[1]
        # One pass of the body serves log-probabilities, values and the exact KL.
        own_BTD = policy.hidden(part) if full or not exact else None
        if not exact:
            own = policy.response(part, hidden_BTD=own_BTD)
            logp_BT[rows, :width], value_BT[rows, :width] = own.logp_BT.float(), own.value_BT.float()
        elif policy.value_head is not None and not policy.shares_trunk and not guided:
            with phase("values"):
                value_BT[rows, :width] = policy.values(part).float()
        if reference is None:
            ref_logp_BT[rows, :width] = logp_BT[rows, :width]
            continue
        if own_BTD is None or not full:
            with phase("reference"):
                ref_logp_BT[rows, :width] = reference.logprobs(part).float()
            continue
        ref_BTD = reference.hidden(part)
        ref_logp_BT[rows, :width] = reference.response(part, hidden_BTD=ref_BTD).logp_BT.float()
        kl_BT[rows, :width] = _full_kl(policy, own_BTD, reference, ref_BTD, part.mask_BT)
    if not full:
        sampled_BT = kl.estimate("k1" if estimator == "full" else estimator, logp_BT, ref_logp_BT)
        kl_BT = sampled_BT * rollout.mask_BT
    return dataclasses.replace(rollout, logp_BT=logp_BT, ref_logp_BT=ref_logp_BT, kl_BT=kl_BT, value_BT=value_BT)


def _full_kl(policy: Policy, own_BTD: Tensor, reference: Policy, ref_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The exact KL of every action's distribution, [B, T], with the logits of a few places at a time."""
    # Two distributions for each place: with 50,000 tokens those of a whole micro-batch would be gigabytes.
    size = max(1, CHUNK_NUMBERS // policy.vocab_size)
    chunks = zip(*(hidden_BTD[mask_BT].split(size) for hidden_BTD in (own_BTD, ref_BTD)), strict=True)
    parts = [
        kl.estimate("full", policy.logits(own_nD).log_softmax(-1), reference.logits(ref_nD).log_softmax(-1))
        for own_nD, ref_nD in chunks
    ]
    return torch.zeros(mask_BT.shape, device=mask_BT.device).masked_scatter(mask_BT, torch.cat(parts).float())


def token_rewards(rollout: Rollout, kl_coef: float, missing_eos_penalty: float) -> Tensor:
    """shape_reward of every step: the score on the last action, and the rewards of turns. [B, T]."""
    last_B1 = functional.last_places(rollout.mask_BT)[:, None]
    # One scatter, and not a loop over rows: the reason of the end stands at the last action, RUNNING everywhere else.
    running_BT = torch.full(rollout.kl_BT.shape, StopReason.RUNNING.value, device=rollout.kl_BT.device)
    stop_BT = running_BT.scatter(1, last_B1, rollout.stop_B[:, None])
    score_BT = rollout.score_B[:, None].expand_as(rollout.kl_BT)
    reward_BT = shape_reward(score_BT, stop_BT, rollout.kl_BT, kl_coef, missing_eos_penalty)
    return reward_BT if rollout.turn_reward_BT is None else reward_BT + rollout.turn_reward_BT
