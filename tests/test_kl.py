"""KL estimators and controllers: by hand, and in expectation by exact enumeration over a small vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from textrl_gym import kl

# A policy and a reference over two tokens: log(1/2) - log(1/4) = log 2 and log(1/2) - log(3/4) = log(2/3).
LOGP_V = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
REF_V = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
LOG2, LOG23 = math.log(2), math.log(2 / 3)


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("k1", [LOG2, LOG23]),  # d
        ("k2", [LOG2**2 / 2, LOG23**2 / 2]),  # d^2 / 2
        ("k3", [0.5 - 1 + LOG2, 1.5 - 1 + LOG23]),  # exp(-d) - 1 + d, exp(-d) = ref / pi = 1/2 and 3/2
    ],
)
def test_sampled_estimators(estimator: str, wanted: list[float]) -> None:
    got_V = kl.estimate(estimator, LOGP_V, REF_V)
    torch.testing.assert_close(got_V, torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def test_full() -> None:
    # 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3)
    got = kl.estimate("full", LOGP_V, REF_V)
    torch.testing.assert_close(got, torch.tensor(math.log(4 / 3) / 2, dtype=torch.float64), atol=1e-12, rtol=0)


def distributions(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn((50, 7), generator=generator, dtype=torch.float64)
    other_NV = logits_NV + scale * torch.randn((50, 7), generator=generator, dtype=torch.float64)
    return logits_NV.log_softmax(-1), other_NV.log_softmax(-1)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: str) -> None:
    logp_NV, ref_NV = distributions(scale=2.0)
    expected_N = (logp_NV.exp() * kl.estimate(estimator, logp_NV, ref_NV)).sum(-1)
    torch.testing.assert_close(expected_N, kl.estimate("full", logp_NV, ref_NV), atol=1e-12, rtol=0)


def test_k2_is_right_to_second_order() -> None:
    # E[d^2 / 2] = KL + O(d^3): with a tenth of the distance the error falls by about a thousand.
    errors = []
    for scale in (0.1, 0.01):
        logp_NV, ref_NV = distributions(scale)
        expected_N = (logp_NV.exp() * kl.estimate("k2", logp_NV, ref_NV)).sum(-1)
        errors.append(float((expected_N - kl.estimate("full", logp_NV, ref_NV)).abs().mean()))
    assert errors[1] < errors[0] / 500


def test_k2_has_the_gradient_of_the_kl() -> None:
    """On-policy, E[grad k2] = E[d grad log pi] = grad KL (Schulman 2020)."""
    logits_V = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logp_V = logits_V.log_softmax(-1)
    (by_k2,) = torch.autograd.grad(
        (logp_V.detach().exp() * kl.estimate("k2", logp_V, ref_V)).sum(), logits_V, retain_graph=True
    )
    (exact,) = torch.autograd.grad(kl.estimate("full", logp_V, ref_V), logits_V)
    torch.testing.assert_close(by_k2, exact, atol=1e-12, rtol=0)


def test_k3_and_full_are_never_negative_but_k1_is() -> None:
    logp_NV, ref_NV = distributions(scale=1.0)
    assert (kl.estimate("k3", logp_NV, ref_NV) >= 0).all()
    assert (kl.estimate("full", logp_NV, ref_NV) >= 0).all()
    assert (kl.estimate("k1", logp_NV, ref_NV) < 0).any()


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="unknown kl_estimator 'k4'; allowed: k1, k2, k3, full"):
        kl.estimate("k4", LOGP_V, REF_V)


def test_fixed_controller() -> None:
    penalty = kl.KLPenalty(0.05)
    penalty.adapt(sequence_kl=100.0, episodes=64)
    assert penalty.coef == 0.05


def test_the_penalty_is_in_one_place() -> None:
    in_reward, in_loss = kl.KLPenalty(0.05), kl.KLPenalty(0.05, where="loss")
    assert (in_reward.coef_in_reward, in_reward.coef_in_loss) == (0.05, 0.0)
    assert (in_loss.coef_in_reward, in_loss.coef_in_loss) == (0.0, 0.05)


@pytest.mark.parametrize(("settings", "message"), [((-0.1,), "got -0.1"), ((0.1, "k7"), "'k7'; allowed: k1")])
def test_a_wrong_penalty_is_refused(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl.KLPenalty(*settings)


def test_adaptive_controller() -> None:
    controller = kl.KLPenalty(0.2, target=6.0, horizon=1000)
    controller.adapt(sequence_kl=6.6, episodes=100)
    # 6.6 / 6 - 1 = 0.1 lies within 0.2: 0.2 * (1 + 0.1 * 100 / 1000) = 0.2 * 1.01
    assert controller.coef == pytest.approx(0.202, abs=1e-12, rel=0)
    controller.adapt(sequence_kl=60.0, episodes=100)
    # clipped at 0.2: 0.202 * 1.02
    assert controller.coef == pytest.approx(0.20604, abs=1e-12, rel=0)
    controller.adapt(sequence_kl=-5.0, episodes=500)
    # clipped at -0.2: 0.20604 * (1 - 0.2 * 0.5) = 0.20604 * 0.9
    assert controller.coef == pytest.approx(0.185436, abs=1e-12, rel=0)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10), (-1.0, 10), (6.0, 0)])
def test_adaptive_controller_refuses(target: float, horizon: int) -> None:
    with pytest.raises(ValueError, match=f"target > 0 .* got {target}, {horizon}"):
        kl.KLPenalty(0.1, target=target, horizon=horizon)


def test_expected_gradients_of_the_estimators_as_losses() -> None:
    # E_pi[grad k] over a vocabulary of 5, in closed form: k1 gives 0, k2 the gradient of KL(pi || ref), k3 that of
    # KL(ref || pi).
    generator = torch.Generator().manual_seed(3)
    logits_V = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    ref_V = torch.randn(5, dtype=torch.float64, generator=generator).log_softmax(0)

    def expected(estimator: str) -> torch.Tensor:
        logp_V = logits_V.log_softmax(0)
        weighted = (logp_V.exp().detach() * kl.estimate(estimator, logp_V, ref_V)).sum()  # the sampling is not followed
        return torch.autograd.grad(weighted, logits_V)[0]

    logp_V = logits_V.log_softmax(0)
    forward = torch.autograd.grad((logp_V.exp() * (logp_V - ref_V)).sum(), logits_V, retain_graph=True)[0]
    backward = torch.autograd.grad((ref_V.exp() * (ref_V - logp_V)).sum(), logits_V)[0]
    torch.testing.assert_close(expected("k1"), torch.zeros_like(forward), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected("k2"), forward, atol=1e-12, rtol=0)
    torch.testing.assert_close(expected("k3"), backward, atol=1e-12, rtol=0)
    assert (forward - backward).abs().max() > 0.1


def test_an_adaptive_coefficient_does_not_begin_at_zero() -> None:
    with pytest.raises(ValueError, match=r"kl_target=0\.05 needs a kl_coef above 0"):
        kl.KLPenalty(0.0, target=0.05)
    assert kl.KLPenalty(0.1, target=0.05).coef > 0
