"""GRPO: group relative policy optimization (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1).

For a prompt x with G completions y_i of score R_i, one advantage for all tokens of y_i:

    A_i = (R_i - mean(R)) / (std(R) + eps)                                                        (section 4.1.2)
    L   = - 1/G sum_i 1/|y_i| sum_t [ min(rho_it A_i, clip(rho_it, 1 - e, 1 + e) A_i) - beta KL_it ]   (equation 3)
    rho_it = pi(y_it | x, y_i<t) / pi_old(y_it | x, y_i<t)

Departures from the paper, each a setting:

- The loss is averaged over all tokens of the batch (aggregation="token", as DAPO), since the paper's mean per
  sequence favours short right and long wrong answers; aggregation="sequence" is the paper's.
- kl_in="reward" folds -beta KL into R_i before the group's mean is taken, as RLOO does.
- kl_loss="k2" (default) has, on-policy, the expected gradient of KL(pi || pi_ref) at the sampled states; the
  paper's "k3" estimates its value without bias, but has the expected gradient of KL(pi_ref || pi). Both leave out
  what a token does to later states (relative error of k2: 0.08 at 0.009 nats a sequence, 1.04 at 0.8 nats);
  kl_loss="sequence" and kl_in="reward" have the gradient of the sequence KL. Neither gave better policies over five
  seeds (see docs/kl.md).
- credit="turn" compares a conversation's turns (section 4.1.3, process supervision, with a turn for a step).
- scale_by_std=False leaves the division out (Dr. GRPO, Liu et al. 2025).

No value network is built. The std is the unbiased one, as in TRL and verl.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from textrl_gym import functional, kl
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of


@dataclasses.dataclass(frozen=True)
class GroupConfig(AgentConfig):
    """Settings of GRPO and all its relatives."""

    group_size: Annotated[int, Ge(2)] = 8
    """G, completions of each prompt, at least 2."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation."""
    std_eps: Annotated[float, Ge(0)] = 1e-4
    """Added to the standard deviation; groups with no spread get advantage 0 whatever it is."""
    aggregation: functional.Aggregation = "token"
    """"token": mean over all tokens of the batch; "sequence": mean over each sequence first."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL penalty goes."""
    credit: functional.Credit = "trajectory"
    """In conversations, what a turn's actions are weighed by: the return of the whole conversation, or the return from
    that turn on, compared with the group's others at the same turn."""
    kl_loss: kl.LossEstimator = "k2"
    """Estimator of the KL in the loss. On-policy "k2" has the expected gradient of the KL at the sampled states, and
    "sequence" that of the sequence KL; "k3" is the paper's; "k1" has none, and is there to be studied."""


@dataclasses.dataclass(frozen=True)
class GRPOConfig(GroupConfig):
    """Settings of GRPO."""

    clip_low: Annotated[float, Ge(0), Le(1)] = 0.2
    """The ratio is clipped to at least 1 - clip_low."""
    clip_high: Annotated[float, Ge(0)] = 0.2
    """The ratio is clipped to at most 1 + clip_high."""


def group_advantages(return_B: Tensor, group_B: Tensor, scale_by_std: bool, std_eps: float) -> tuple[Tensor, Tensor]:
    """A_i = R_i - mean of its group, divided by the group's unbiased std + eps where scale_by_std.

    Returns:
        advantage_B, and flat_B (bool): rows of groups without any spread, whose advantage is 0.
    """
    assert return_B.shape == group_B.shape and return_B.ndim == 1, (return_B.shape, group_B.shape)
    row_GN, mask_GN = functional.rows_of_groups(group_B)
    return_GN, size_G1 = return_B[row_GN], mask_GN.sum(1, keepdim=True)
    advantage_GN = (return_GN - (return_GN * mask_GN).sum(1, keepdim=True) / size_G1) * mask_GN
    if scale_by_std:  # clamped: a group of one has no spread, and its advantage is 0 below
        variance_G1 = advantage_GN.square().sum(1, keepdim=True) / (size_G1 - 1).clamp(min=1)
        advantage_GN = advantage_GN / (variance_G1.sqrt() + std_eps)
    # Not std == 0: a mean of equal numbers may be off by their last digit.
    flat_GN = (return_GN == return_GN[:, :1]).logical_or(~mask_GN).all(1, keepdim=True).expand_as(mask_GN)
    advantage_B, flat_B = torch.zeros_like(return_B), torch.zeros_like(group_B, dtype=torch.bool)
    advantage_B[row_GN[mask_GN]] = torch.where(flat_GN, 0.0, advantage_GN)[mask_GN]
    flat_B[row_GN[mask_GN]] = flat_GN[mask_GN]
    return advantage_B, flat_B


def kl_penalty(
    logp_BT: Tensor, part: Minibatch, config: GroupConfig, kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """kl_coef times the KL to the reference, as a term of the loss; and the KL itself as a metric."""
    kl_BT = kl.token_loss(config.kl_loss, logp_BT, part.ref_logp_BT, part.mask_BT)
    metrics = {"kl_loss_token": part.mean(kl_BT.detach())}
    if kl_coef == 0:  # an overflow of k3 must not become 0 * inf
        return torch.zeros_like(metrics["kl_loss_token"]), metrics
    return kl_coef * part.mean(kl_BT, config.aggregation), metrics


def action_advantages(part: Minibatch, like_BT: Tensor) -> Tensor:
    """The advantage of each action: part.advantage_BT where there is one, else part.advantage_B for all of a row."""
    if "advantage_BT" in part.extra:
        return part.advantage_BT
    return part.advantage_B[:, None].expand_as(like_BT)


def grpo_loss(logp_BT: Tensor, part: Minibatch, config: GRPOConfig, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 3 of the paper: the clipped surrogate of action_advantages, and kl_coef times the KL."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    loss_BT, ratio_BT, clipped_BT = functional.clipped_surrogate(
        logp_BT, part.logp_BT, action_advantages(part, logp_BT), config.clip_low, config.clip_high
    )
    penalty, kl_metrics = kl_penalty(logp_BT, part, config, kl_coef)
    loss = part.mean(part.weighted(loss_BT), config.aggregation) + penalty
    metrics = {
        "loss": loss.detach(),
        "clip_fraction": part.mean(clipped_BT),
        "ratio": part.mean(ratio_BT.detach()),
        "approx_kl_token": part.mean(functional.approx_kl(logp_BT, part.logp_BT)),
    }
    return loss, metrics | kl_metrics


class GRPO(Agent):
    """Group relative policy optimization; see the head of this file."""

    Config: ClassVar[type[GroupConfig]] = GRPOConfig
    config: Any  # a relative's may have no clips
    needs_groups = True

    @property
    def kl_where(self) -> Literal["reward", "loss"]:  # type: ignore[override]
        return self.config.kl_in

    def compared(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """group_advantages of the rollout's completions."""
        return_B, config = rollout.reward_BT.sum(1), self.config
        return group_advantages(return_B, rollout.group_B, config.scale_by_std, config.std_eps)

    def advantages(self, rollout: Rollout) -> Tensor:
        if self.config.credit == "trajectory" or rollout.turn_BT is None:
            return self.compared(rollout)[0][:, None] * rollout.mask_BT
        config, rewards = self.config, (rollout.reward_BT, rollout.mask_BT, rollout.turn_BT)
        return functional.turn_advantages(
            *rewards, rollout.group_B, lambda r, g: group_advantages(r, g, config.scale_by_std, config.std_eps)[0]
        )

    def loss(self, logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a part, and metrics; what a relative changes."""
        return grpo_loss(logp_BT, part, self.config, self.kl.coef_in_loss)

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Advantages.
        advantage_B, flat_B = self.compared(rollout)
        batch = rollout.with_(advantage_B=advantage_B)
        if self.config.credit == "turn" and rollout.turn_BT is not None:
            batch = rollout.with_(advantage_BT=self.advantages(rollout))

        # 2. Clipped steps on minibatches.
        steps = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = self.loss(self.policy.logprobs(part), part)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})

        # 3. What to log.
        groups = {"groups_without_spread": float(flat_B.float().mean()), "advantage_std": float(advantage_B.std())}
        return functional.mean_of(steps) | groups
