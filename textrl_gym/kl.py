"""KL of the policy to its reference: estimators per token, and the penalty with its coefficient.

With d = log pi(a|s) - log pi_ref(a|s) of a sampled token (Schulman 2020, "Approximating KL divergence"):

    k1 = d                 unbiased, may be negative; the one used in rewards, never clamped
    k2 = d^2 / 2           biased, never negative
    k3 = exp(-d) - 1 + d   unbiased, never negative
    full                   sum_v pi(v|s) (log pi(v|s) - log pi_ref(v|s)): exact, given both distributions

As terms of a loss, summed over the tokens of on-policy completions, their expected gradients are

    k1         0
    k2         that of KL(pi(.|s) || pi_ref(.|s)) at the sampled states s
    k3         that of KL(pi_ref(.|s) || pi(.|s)) at the sampled states s
    sequence   that of the sequence KL, E[sum_t k1_t], which the reward's penalty has and evaluations report

The first three hold the states fixed: they leave out that a token decides which states come after it. docs/kl.md has
how far that takes them off, by enumeration: k2 by a relative error of 0.08 at 0.009 nats a sequence, 1.04 at 0.8 nats
and 0.73 at 8.6 nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # the names of estimators are needed by those who load no torch
    from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "full"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
LossEstimator = Literal["k1", "k2", "k3", "sequence"]
LOSS_ESTIMATORS: tuple[str, ...] = get_args(LossEstimator)


def check_estimator(name: str) -> None:
    """Raise ValueError for a name that is no estimator."""
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ValueError(f"unknown kl_estimator {name!r}; allowed: {', '.join(ESTIMATORS)}")


def estimate(estimator: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token KL in nats from the log-probabilities of the sampled tokens (any shape).

    For "full" both arguments carry the whole distribution in a last dimension of V log-probabilities, which is summed.
    """
    assert logp.shape == ref_logp.shape, (logp.shape, ref_logp.shape)
    # k1 is not clamped at 0: single tokens are negative, and their sum is unbiased only with them.
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    check_estimator(estimator)
    return (logp.exp() * difference).sum(-1)


def check_loss_estimator(name: str) -> None:
    """Raise ValueError for a name that is no estimator of the KL in a loss."""
    if name not in LOSS_ESTIMATORS:
        raise ValueError(f"kl_loss must be one of {', '.join(LOSS_ESTIMATORS)}, got {name!r}")


def token_loss(estimator: str, logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Per-token KL in nats as a term of a loss over sampled completions. [B, T].

    The gradient flows through logp_BT. Rows do not mix, so that a micro-batch needs no others.

    Args:
        estimator: one of LOSS_ESTIMATORS; all but "sequence" are those of `estimate`.
        logp_BT: under the policy that is being updated.
    """
    check_loss_estimator(estimator)
    if estimator == "sequence":
        return sequence_loss(logp_BT, ref_logp_BT, mask_BT)
    return estimate(estimator, logp_BT, ref_logp_BT)


def sequence_loss(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Per-token term with the value of k1 and, on-policy, the expected gradient of the sequence KL. [B, T].

    By the policy gradient theorem that is E[sum_t grad log pi_t * sum_{s >= t} k1_s]: a token is also charged for the
    KL at the states that it leads to. The gradient of k2_t is the part s = t of it. It has no baseline, so that rows
    need not know each other; the KL in the reward has the group's.

    Off-policy, from the second minibatch of a rollout on, the KL to go is that of the policy being updated, as in
    k2 and k3. That of the rollout's policy would charge once more for KL that an earlier minibatch has removed.
    As with k2 and k3, no importance weight corrects for where the tokens were sampled from.
    """
    assert logp_BT.shape == ref_logp_BT.shape == mask_BT.shape, (logp_BT.shape, ref_logp_BT.shape, mask_BT.shape)
    k1_BT = (logp_BT.detach() - ref_logp_BT) * mask_BT
    to_go_BT = k1_BT.flip(1).cumsum(1).flip(1)
    # logp - logp.detach() is 0 with the gradient of logp: the value stays that of k1, which is what is logged.
    return k1_BT + to_go_BT * (logp_BT - logp_BT.detach())


@dataclass
class KLPenalty:
    """KL penalty of an agent: its coefficient, its estimator, and whether it is in the reward or in the loss.

    The coefficient is fixed, or adaptive where `target` is given (Ziegler et al. 2019, section 2.2):

        coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon

    Raises:
        ValueError: a negative coefficient, or an adaptive one of 0, or with target <= 0 nats or horizon <= 0 episodes.
    """

    coef: float
    """Reward, or loss, per nat. An adaptive penalty changes it."""
    estimator: str = "k1"
    """Of the per-token KL that a rollout carries, and that is in the reward: k1, k2, k3 or full."""
    where: Literal["reward", "loss"] = "reward"
    """In the rewards of a rollout, or a term of the agent's loss."""
    target: float | None = None
    """Nats per sequence that the coefficient steers to; None keeps it fixed."""
    horizon: int = 10_000
    """Episodes over which an adaptive coefficient moves."""

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(f"kl_coef must be a finite number >= 0, got {self.coef}")
        if self.target is not None and not (math.isfinite(self.target) and self.target > 0 and self.horizon > 0):
            raise ValueError(
                f"an adaptive KL needs target > 0 nats and horizon > 0 episodes, got {self.target}, {self.horizon}"
            )
        if self.target is not None and self.coef == 0:
            raise ValueError(
                f"kl_target={self.target:g} needs a kl_coef above 0 to begin with: it is multiplied, and stays 0 at 0"
            )

    @property
    def coef_in_reward(self) -> float:
        """The coefficient of the rewards' penalty: 0 where the penalty is in the loss."""
        return self.coef if self.where == "reward" else 0.0

    @property
    def coef_in_loss(self) -> float:
        """The coefficient of the loss's penalty: 0 where the penalty is in the reward."""
        return self.coef if self.where == "loss" else 0.0

    def adapt(self, sequence_kl: float, episodes: int) -> None:
        """Move an adaptive coefficient after a rollout; a fixed one stays.

        Args:
            sequence_kl: KL in nats summed over each sequence, mean over the rollout's episodes.
            episodes: how many episodes the rollout had.
        """
        if self.target is not None:
            # Clipped to 20%, as in section 2.2: one odd rollout must not throw the coefficient.
            error = min(max(sequence_kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self.horizon
