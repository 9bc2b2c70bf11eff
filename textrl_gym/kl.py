"""KL of the policy to its reference: estimators per token, and the penalty with its coefficient.

With d = log pi(a|s) - log pi_ref(a|s) of a sampled token (Schulman 2020, "Approximating KL divergence"):

    k1 = d                 unbiased, may be negative; the one used in rewards, never clamped
    k2 = d^2 / 2           biased as a value; on-policy, its expected gradient is that of KL(pi || pi_ref)
    k3 = exp(-d) - 1 + d   unbiased and never negative; as a loss its expected gradient is that of KL(pi_ref || pi)
    full                   sum_v pi(v|s) (log pi(v|s) - log pi_ref(v|s)): exact, given both distributions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "full"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


def check_estimator(name: str) -> None:
    """Raise ValueError for a name that is no estimator."""
    if name not in ESTIMATORS:
        raise ValueError(f"unknown kl_estimator {name!r}; allowed: {', '.join(ESTIMATORS)}")


def estimate(estimator: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token KL in nats from the log-probabilities of the sampled tokens (any shape).

    For "full" both arguments carry the whole distribution in a last dimension of V log-probabilities, which is summed.
    """
    assert logp.shape == ref_logp.shape, (logp.shape, ref_logp.shape)
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return (-difference).exp() - 1 + difference
    check_estimator(estimator)
    return (logp.exp() * difference).sum(-1)


@dataclass
class KLPenalty:
    """KL penalty of an agent: its coefficient, its estimator, and whether it is in the reward or in the loss.

    The coefficient is fixed, or adaptive where `target` is given (Ziegler et al. 2019, section 2.2):

        coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon

    Raises:
        ValueError: a negative coefficient, or an adaptive one with target <= 0 nats or horizon <= 0 episodes.
    """

    coef: float
    """Reward, or loss, per nat. An adaptive penalty changes it."""
    estimator: str = "k1"
    """Of the per-token KL that a rollout carries, and that is in the reward: k1, k2, k3 or full."""
    where: Literal["reward", "loss"] = "reward"
    target: float | None = None
    """Nats per sequence that the coefficient steers to; None keeps it fixed."""
    horizon: int = 10_000
    """Episodes over which an adaptive coefficient moves."""

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        if self.coef < 0:
            raise ValueError(f"kl_coef must be >= 0, got {self.coef}")
        if self.target is not None and (self.target <= 0 or self.horizon <= 0):
            raise ValueError(
                f"an adaptive KL needs target > 0 nats and horizon > 0 episodes, got {self.target}, {self.horizon}"
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
            error = min(max(sequence_kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self.horizon
