"""The health card: what must hold before the first update, and the likely cause where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout, StopReason
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.batching import MICRO_BATCH_TOKENS, micro_batches

SERVER_NATS = 0.1
"""Mean |log-ratio| a token from which on a rollout server is taken for broken: bfloat16 differs by some hundredths."""


class HealthError(RuntimeError):
    """A line of the health card failed."""


@dataclass(frozen=True)
class Line:
    """One line of the card."""

    name: str
    value: str
    ok: bool
    cause: str


@torch.no_grad()
def card(policy: Policy, rollout: Rollout, end_ids: Sequence[int], *, fresh: bool) -> list[Line]:
    """Examine a rollout of a policy.

    Args:
        end_ids: the tokens that end a completion.
        fresh: the policy still is its reference, so that their KL must be 0.
    """
    ratio_max, ratio_mean = _log_ratio(policy, rollout)
    # float32 rounding accumulates over layers; bf16 has 8 bits of mantissa (measured spread of the ratio: 0.9 to 1.1)
    limit = 1e-3 if policy.dtype == torch.float32 else 0.5
    kl_B = ((rollout.logp_BT - rollout.ref_logp_BT) * rollout.mask_BT).sum(1)
    # Pads often share EOS's number: EOS is counted inside the mask only.
    eos_BT = torch.isin(rollout.token_BT, torch.tensor(end_ids, device=rollout.token_BT.device)) & rollout.mask_BT
    if rollout.turn_BT is None:
        once = torch.equal(eos_BT.sum(1), (rollout.stop_B == StopReason.EOS).long())
    else:  # in a conversation it ends turns
        once = not bool((eos_BT & ~functional.turn_ends(rollout.mask_BT, rollout.turn_BT)).any())
    finite = bool(torch.isfinite(rollout.reward_BT).all() and torch.isfinite(rollout.score_B).all())
    lines = [
        Line(
            "ratio 1 on the first minibatch: log-ratio of sampler to training forward",
            f"max {ratio_max:.1e}, mean {ratio_mean:.1e}",
            ratio_max < limit,
            "position ids under left padding, dropout, or a temperature that only one of them uses",
        ),
        Line(
            "KL to the reference at step 0 (nats a sequence)",
            f"{kl_B.mean():.1e}" if fresh else f"{kl_B.mean():.3f} (not at step 0)",
            # A sequence's KL is a sum over its places, each with the rounding that the log-ratio may have.
            not fresh or float(kl_B.abs().max()) < limit * rollout.token_BT.shape[1],
            "the reference is another model, or sees other prompts or another temperature",
        ),
        Line("EOS counted once", str(once), once, "the mask leaves EOS out, or goes on after it"),
        Line("rewards finite", str(finite), finite, "the reward, or log-probabilities at masked places"),
    ]
    if rollout.sampler_logp_BT is not None:
        difference_N = (rollout.logp_BT - rollout.sampler_logp_BT)[rollout.mask_BT].abs()
        lines.append(
            Line(
                "log-ratio of training forward to rollout server",
                f"max {difference_N.max():.1e}, mean {difference_N.mean():.1e}",
                float(difference_N.mean()) < SERVER_NATS,
                "the server has another model, other weights or a coarser dtype, or gives log-probabilities of another "
                "temperature (--logprobs-mode processed_logprobs)",
            )
        )
    share = share_without_spread(rollout.outcome_B, rollout.group_B)
    if share is not None:
        lines.append(
            Line(
                "groups with no spread of scores",
                f"{share:.0%}",
                share < 1.0,
                "every completion of a prompt scores the same: there is nothing to learn from",
            )
        )
    return lines


def _log_ratio(policy: Policy, rollout: Rollout) -> tuple[float, float]:
    """Largest and mean |log ratio| of the training forward to the rollout's log-probabilities."""
    worst, total = 0.0, 0.0
    # In micro-batches, as the update will do it: other shapes would add rounding of their own.
    for rows in micro_batches(rollout, MICRO_BATCH_TOKENS):
        part = rollout.select(rows)
        difference_BT = (policy.logprobs(part) - part.logp_BT).abs() * part.mask_BT
        worst = max(worst, float(difference_BT.max()))
        total += float(difference_BT.sum())
    return worst, total / max(rollout.num_tokens, 1)


def share_without_spread(score_B: Tensor, group_B: Tensor) -> float | None:
    """Share of groups whose scores are all equal; None where groups have one row."""
    row_GN, mask_GN = functional.rows_of_groups(group_B)
    if len(row_GN) == len(score_B):
        return None
    score_GN = score_B[row_GN]
    # Places that fill up a smaller group hold row 0's score, which is not the group's: they must win neither extreme.
    highest_G = score_GN.masked_fill(~mask_GN, -torch.inf).amax(1)
    lowest_G = score_GN.masked_fill(~mask_GN, torch.inf).amin(1)
    return float((highest_G == lowest_G).float().mean())


def text(lines: list[Line]) -> str:
    """The card for a terminal, with the likely cause under each line that failed."""
    rows = []
    for line in lines:
        rows.append(f"  {'ok  ' if line.ok else 'FAIL'} {line.name}: {line.value}")
        if not line.ok:
            rows.append(f"       likely cause: {line.cause}")
    return "Health card\n" + "\n".join(rows)
