"""collect(): prompts -> tokens -> score -> KL-shaped reward, B complete episodes at once.

The fast driver of the MDP that TextVectorEnv.step() defines: given the same uniform random numbers, both give the same
tokens, rewards, ends and infos (a test). Shape legend: U unique prompts, B rows, P prompt places, T response places.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from textrl_gym import functional, kl
from textrl_gym.core import Rollout, Row, StopReason
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv
from textrl_gym.mdp.transition import shape_reward
from textrl_gym.models.packing import pad
from textrl_gym.policy.policy import CHUNK_NUMBERS, Policy
from textrl_gym.rollouts import sampler

MICRO_BATCH_TOKENS = 16_384
"""Prompt and response places of one teacher-forced pass without gradients."""


def collect(
    env: Any,
    policy: Policy,
    *,
    kl_coef: float | None = None,
    greedy: bool = False,
    uniform_BT: Tensor | None = None,
    generator: torch.Generator | None = None,
    prompt_indices: Any = None,
) -> Rollout:
    """Play one complete episode in each row of an environment.

    Args:
        env: a text environment (TextVectorEnv or TextEnv, wrapped or not). Its rows' random streams give the prompts,
            as reset() would; the episodes that it is stepping through are not touched otherwise.
        policy: whose completions. The KL is measured to the policy's reference, or else to the environment's.
        kl_coef: the penalty's coefficient; None for the environment's own.
        greedy: take the most likely tokens.
        uniform_BT: the random numbers in [0, 1) to sample with, T >= max_new_tokens; drawn where None.
        generator: on the policy's device, to draw them from.
        prompt_indices: fixes the prompts, as reset(options={"prompt_indices": ...}) does.

    Returns:
        a Rollout on the policy's device, cut to its longest prompt and completion.

    Raises:
        ValueError: kl_coef > 0 and neither the policy nor the environment has a reference.
    """
    mdp = vector_env(env)
    kl_coef = mdp.kl_coef if kl_coef is None else kl_coef
    if kl_coef > 0 and policy.reference is None and mdp.reference is None:
        raise ValueError(f"kl_coef={kl_coef} needs a reference: Policy(model, reference=...) or the environment's")

    # 1. Prompts, and a completion of each.
    rows, prompt_ids = mdp.draw(indices=prompt_indices)
    if uniform_BT is None and not greedy:
        shape = (len(rows), mdp.max_new_tokens)
        uniform_BT = torch.rand(shape, generator=generator, device=policy.device)
    out = complete(mdp, policy, prompt_ids, None if greedy else uniform_BT)

    # 2. Scores, reference and rewards.
    return rollout_of(mdp, policy, rows, prompt_ids, out, kl_coef=kl_coef)


def complete(
    mdp: TextVectorEnv, policy: Policy, prompt_ids: list[list[int]], uniform_BT: Tensor | None
) -> sampler.Completions:
    """A completion of each prompt within mdp's budget and stop strings; equal prompts are computed once.

    Args:
        uniform_BT: the random numbers in [0, 1) to sample with; None: the most likely tokens.
    """
    return sampler.generate(
        policy,
        *unique_ids(prompt_ids, policy.device),
        None if uniform_BT is None else uniform_BT.to(policy.device),
        max_new_tokens=mdp.max_new_tokens,
        eos_id=mdp.eos_id,
        stopped=mdp.stopped if mdp.stop else None,
    )


def rollout_of(
    mdp: TextVectorEnv,
    policy: Policy,
    rows: Sequence[Row],
    prompt_ids: list[list[int]],
    out: sampler.Completions,
    *,
    kl_coef: float = 0.0,
    guided: bool = False,
) -> Rollout:
    """Completions with their scores, reference log-probabilities and rewards; neighbours in mdp's groups.

    Args:
        mdp: whose reward scores them.
        policy: whose reference, or else mdp's, the KL is measured to.
        rows, prompt_ids: what mdp.draw() gave.
        kl_coef: the penalty's coefficient.
        guided: out.logp_BT is of another distribution than the policy's: it is kept as it is, and so is out.value_BT.
    """
    prompt_UP, prompt_mask_UP, source_B = unique_ids(prompt_ids, policy.device)
    # 1. Scores, by the same function as step().
    completion_ids = [ids[:n] for ids, n in zip(out.token_BT.tolist(), out.mask_BT.sum(1).tolist(), strict=True)]
    scores = mdp.score(rows, prompt_ids, completion_ids)
    rollout = Rollout(
        prompt_BP=prompt_UP[source_B],
        prompt_mask_BP=prompt_mask_UP[source_B],
        ref_logp_BT=out.logp_BT,
        kl_BT=torch.zeros_like(out.logp_BT),
        score_B=scores.score_N.to(policy.device),
        reward_BT=torch.zeros_like(out.logp_BT),
        group_B=torch.arange(len(rows), device=policy.device) // mdp.group_size,
        prompts=[row["prompt"] for row in rows],
        completions=scores.texts,
        components={name: part_B.to(policy.device) for name, part_B in scores.components.items()},
        **vars(out),
    ).trim()

    # 2. One teacher-forced pass each for the policy (where something of it is missing) and the reference.
    # What the sampler gave is the training forward's to 1e-5 in float32; in bf16 ratios would spread by 5%.
    exact = policy.samples_exactly or guided
    rollout = _with_passes(rollout, policy, policy.reference or mdp.reference, mdp.kl_estimator, exact, guided)
    return dataclasses.replace(rollout, reward_BT=_reward(rollout, kl_coef, mdp.missing_eos_penalty))


def as_written_by(policy: Policy, rollout: Rollout, mdp: TextVectorEnv, *, kl_coef: float = 0.0) -> Rollout:
    """The rollout of the same texts and scores, had the policy written them: its log-probabilities, values, rewards."""
    rollout = _with_passes(rollout, policy, policy.reference or mdp.reference, mdp.kl_estimator, False, False)
    return dataclasses.replace(rollout, reward_BT=_reward(rollout, kl_coef, mdp.missing_eos_penalty))


def unique_ids(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each different prompt once, left-padded, its mask, and which of them each row has."""
    first_of: dict[tuple[int, ...], int] = {}
    source_B = torch.tensor([first_of.setdefault(tuple(ids), len(first_of)) for ids in prompts])
    prompt_UP, mask_UP = pad(list(first_of), "left")
    return prompt_UP.to(device), mask_UP.to(device), source_B.to(device)


def vector_env(env: Any, **settings: Any) -> TextVectorEnv:
    """The TextVectorEnv under any wrappers; a TextEnv's own one-row one; of an id, one made with the settings.

    Raises:
        ValueError: it is not a text environment.
    """
    if isinstance(env, str):
        env = gym.make_vec(env, **settings)
    bare = getattr(env, "unwrapped", None)
    if isinstance(bare, TextEnv):
        return bare.vector
    if not isinstance(bare, TextVectorEnv):
        raise ValueError(f"{env!r} is not a text environment (TextEnv or TextVectorEnv)")
    return bare


def micro_batches(rollout: Rollout, max_tokens: int, whole_groups: bool = False) -> list[Tensor]:
    """Rows of the rollout by length, groups together, filled up to a budget of places, so that little is padding.

    A group's prompt is computed once (Policy.response), so a micro-batch of U prompts and B rows has
    U * longest prompt + B * longest response places. Only a single row, or a single group that is kept whole, may
    pass the budget.

    Args:
        whole_groups: never part a group, for losses that compare its rows.

    Returns:
        index tensors that together hold every row once.
    """
    prompt_B, response_B = rollout.prompt_mask_BP.sum(1).tolist(), rollout.mask_BT.sum(1).tolist()
    groups = rollout.group_B.tolist()
    longest: dict[int, int] = {}
    for group, prompt, response in zip(groups, prompt_B, response_B, strict=True):
        longest[group] = max(longest.get(group, 0), prompt + response)
    order = sorted(range(len(groups)), key=lambda b: (longest[groups[b]], groups[b], response_B[b]))
    units = [[b] for b in order]
    if whole_groups:
        units = [list(rows) for _, rows in itertools.groupby(order, key=lambda b: groups[b])]
    batches: list[list[int]] = []
    for unit in units:
        rows = [*batches[-1], *unit] if batches else unit
        prompts = len({groups[b] for b in rows})
        places = prompts * max(prompt_B[b] for b in rows) + len(rows) * max(response_B[b] for b in rows)
        if batches and places <= max_tokens:
            batches[-1] = rows
        else:
            batches.append(unit)
    return [torch.tensor(rows, device=rollout.group_B.device) for rows in batches]


@torch.no_grad()
def token_logprobs(rollout: Rollout, policy: Policy) -> Tensor:
    """log pi of a rollout's actions by teacher-forced passes without gradients. float32 [B, T], 0 outside the mask."""
    logp_BT = torch.zeros_like(rollout.logp_BT)
    for rows in micro_batches(rollout, MICRO_BATCH_TOKENS):
        part = rollout.select(rows)
        logp_BT[rows, : part.token_BT.shape[1]] = policy.logprobs(part).float()
    return logp_BT


@torch.no_grad()
def token_entropy(rollout: Rollout, policy: Policy) -> Tensor:
    """Entropy of the distribution that each action was taken from, nats. float32 [B, T], 0 outside the mask."""
    entropy_BT, size = torch.zeros_like(rollout.logp_BT), max(1, CHUNK_NUMBERS // policy.vocab_size)
    for rows in micro_batches(rollout, MICRO_BATCH_TOKENS):
        part = rollout.select(rows)
        # Not Policy.response: that asks a critic too, which may have a trunk of its own.
        flat = policy.hidden(part)[part.mask_BT].split(size), part.token_BT[part.mask_BT].split(size)
        found_N = torch.cat([functional.entropy(policy.logits(*chunk)).float() for chunk in zip(*flat, strict=True)])
        placed_BT = torch.zeros_like(part.logp_BT).masked_scatter(part.mask_BT, found_N)
        entropy_BT[rows, : part.token_BT.shape[1]] = placed_BT
    return entropy_BT


@torch.no_grad()
def _with_passes(
    rollout: Rollout, policy: Policy, reference: Policy | None, estimator: str, exact: bool, guided: bool
) -> Rollout:
    """The rollout with reference log-probabilities, KL and values; and, where not `exact`, the policy's recomputed."""
    full = estimator == "full" and reference is not None and not guided
    logp_BT, value_BT = rollout.logp_BT.clone(), rollout.value_BT.clone()
    ref_logp_BT, kl_BT = rollout.logp_BT.clone(), rollout.kl_BT.clone()
    for rows in micro_batches(rollout, MICRO_BATCH_TOKENS):
        part = rollout.select(rows)
        width = part.token_BT.shape[1]
        own_BTD = policy.hidden(part) if full or not exact else None
        if not exact:
            own = policy.response(part, hidden_BTD=own_BTD)
            logp_BT[rows, :width], value_BT[rows, :width] = own.logp_BT.float(), own.value_BT.float()
        elif policy.value_head is not None and not policy.shares_trunk and not guided:
            value_BT[rows, :width] = policy.values(part).float()
        if reference is None:
            ref_logp_BT[rows, :width] = logp_BT[rows, :width]
            continue
        if own_BTD is None or not full:
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
    size = max(1, CHUNK_NUMBERS // policy.vocab_size)
    chunks = zip(*(hidden_BTD[mask_BT].split(size) for hidden_BTD in (own_BTD, ref_BTD)), strict=True)
    found = [
        kl.estimate("full", policy.logits(own_nD).log_softmax(-1), reference.logits(ref_nD).log_softmax(-1))
        for own_nD, ref_nD in chunks
    ]
    return torch.zeros(mask_BT.shape, device=mask_BT.device).masked_scatter(mask_BT, torch.cat(found).float())


def _reward(rollout: Rollout, kl_coef: float, missing_eos_penalty: float) -> Tensor:
    """shape_reward of every step: the score on the last action. [B, T]."""
    columns = []
    last_B = functional.last_places(rollout.mask_BT)
    for t in range(rollout.mask_BT.shape[1]):
        stop_B = torch.where(last_B == t, rollout.stop_B, StopReason.RUNNING.value)
        columns.append(shape_reward(rollout.score_B, stop_B, rollout.kl_BT[:, t], kl_coef, missing_eos_penalty))
    return torch.stack(columns, 1)
