"""KL of the policy to its reference: estimators per token, and controllers of the coefficient.

With d = log pi(a|s) - log pi_ref(a|s) of a sampled token (Schulman 2020, "Approximating KL divergence"):

    k1 = d                 unbiased, may be negative; the one used in rewards, never clamped
    k2 = d^2 / 2           biased as a value; on-policy, its expected gradient is that of KL(pi || pi_ref)
    k3 = exp(-d) - 1 + d   unbiased and never negative; as a loss its expected gradient is that of KL(pi_ref || pi)
    full                   sum_v pi(v|s) (log pi(v|s) - log pi_ref(v|s)): exact, given both distributions
"""

from __future__ import annotations

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


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, sequence_kl: float, episodes: int) -> None:
        """Nothing to adapt."""


class AdaptiveKL:
    """Ziegler et al. 2019, section 2.2: coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * episodes / horizon."""

    def __init__(self, coef: float, target: float, horizon: int) -> None:
        if target <= 0 or horizon <= 0:
            raise ValueError(f"an adaptive KL needs target > 0 nats and horizon > 0 episodes, got {target}, {horizon}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, sequence_kl: float, episodes: int) -> None:
        """Move the coefficient after a rollout.

        Args:
            sequence_kl: KL in nats summed over each sequence, mean over the rollout's episodes.
            episodes: how many episodes the rollout had.
        """
        error = min(max(sequence_kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * episodes / self.horizon
