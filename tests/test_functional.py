"""Pure tensor functions against hand-worked numbers, and the properties that every algorithm leans on.

Shape legend: B rows, T response places, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from textrl_gym import functional as F


def assert_close(actual: Tensor, wanted: Tensor | list[float] | list[list[float]] | float, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=actual.dtype), atol=atol, rtol=0)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


MASK_BT = mask_of([3, 1], 3)


def test_masked_mean() -> None:
    x_BT = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, 100.0]])
    assert_close(F.masked_mean(x_BT, MASK_BT), 3.0)  # (1 + 2 + 3 + 6) / 4
    assert_close(F.masked_mean(x_BT, torch.zeros_like(MASK_BT)), 0.0)  # no places at all


def test_whiten() -> None:
    x_BT = torch.tensor([[1.0, 2.0, 3.0], [6.0, 9.0, 9.0]])
    # mean 3; deviations -2, -1, 0, 3; biased variance (4 + 1 + 0 + 9) / 4 = 3.5
    std = math.sqrt(3.5)
    assert_close(F.whiten(x_BT, MASK_BT), [[-2 / std, -1 / std, 0.0], [3 / std, 0.0, 0.0]])
    assert_close(F.whiten(x_BT, MASK_BT, shift_mean=False), [[3 - 2 / std, 3 - 1 / std, 3.0], [3 + 3 / std, 0.0, 0.0]])


def test_whiten_of_equal_numbers_is_zero() -> None:
    assert_close(F.whiten(torch.full((2, 3), 5.0), MASK_BT), [[0.0] * 3] * 2)


def test_gae_by_hand() -> None:
    reward_BT = torch.tensor([[0.0, 0.0, 1.0], [2.0, 7.0, 7.0]])
    value_BT = torch.tensor([[0.5, 0.25, 0.5], [1.0, 7.0, 7.0]])
    # gamma 0.5, lambda 0.5. Row 0, from the end:
    #   delta_2 = 1 + 0.5 * 0 - 0.5 = 0.5                A_2 = 0.5
    #   delta_1 = 0 + 0.5 * 0.5 - 0.25 = 0               A_1 = 0 + 0.25 * 0.5 = 0.125
    #   delta_0 = 0 + 0.5 * 0.25 - 0.5 = -0.375          A_0 = -0.375 + 0.25 * 0.125 = -0.34375
    # Row 1 has one token: delta_0 = 2 - 1 = 1, whatever stands in its padding.
    advantage_BT, return_BT = F.gae(reward_BT, value_BT, MASK_BT, gamma=0.5, lam=0.5)
    assert_close(advantage_BT, [[-0.34375, 0.125, 0.5], [1.0, 0.0, 0.0]], atol=0)
    assert_close(return_BT, [[0.15625, 0.375, 1.0], [2.0, 0.0, 0.0]], atol=0)  # advantage + value


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4)
seeds = st.integers(0, 2**32 - 1)


def random_BT(rows: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 5)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), generator


@given(lengths, seeds)
def test_gae_with_lambda_1_is_return_minus_value(lens: list[int], seed: int) -> None:
    reward_BT, value_BT, _ = random_BT(len(lens), seed)
    mask_BT = mask_of(lens, 5)
    advantage_BT, return_BT = F.gae(reward_BT, value_BT, mask_BT, gamma=1.0, lam=1.0)
    to_go_BT = (reward_BT * mask_BT).flip(1).cumsum(1).flip(1)
    assert_close(advantage_BT, (to_go_BT - value_BT) * mask_BT, atol=1e-5)
    assert_close(return_BT, to_go_BT * mask_BT, atol=1e-5)


@given(lengths, seeds)
def test_gae_without_a_critic_is_score_minus_future_kl(lens: list[int], seed: int) -> None:
    kl_BT, score_BT, _ = random_BT(len(lens), seed)
    mask_BT = mask_of(lens, 5)
    score_B = score_BT[:, 0]
    last_BT = torch.nn.functional.one_hot(F.last_places(mask_BT), 5)
    reward_BT = score_B[:, None] * last_BT - 0.1 * kl_BT
    advantage_BT, _ = F.gae(reward_BT, torch.zeros_like(kl_BT), mask_BT, gamma=1.0, lam=1.0)
    future_kl_BT = (kl_BT * mask_BT).flip(1).cumsum(1).flip(1)  # of this token and those after it
    assert_close(advantage_BT, (score_B[:, None] - 0.1 * future_kl_BT) * mask_BT, atol=1e-5)


@given(lengths, seeds)
def test_nothing_leaks_out_of_padding(lens: list[int], seed: int) -> None:
    x_BT, y_BT, generator = random_BT(len(lens), seed)
    mask_BT = mask_of(lens, 5)
    tokens = int(mask_BT.sum())
    garbage_BT = 1e6 * torch.randn(x_BT.shape, generator=generator)
    dirty_x_BT, dirty_y_BT = (torch.where(mask_BT, z_BT, garbage_BT) for z_BT in (x_BT, y_BT))
    for one, two in (
        (F.masked_mean(x_BT, mask_BT), F.masked_mean(dirty_x_BT, mask_BT)),
        (F.whiten(x_BT, mask_BT), F.whiten(dirty_x_BT, mask_BT)),
        (F.gae(x_BT, y_BT, mask_BT, 0.9, 0.8)[0], F.gae(dirty_x_BT, dirty_y_BT, mask_BT, 0.9, 0.8)[0]),
        (F.gae(x_BT, y_BT, mask_BT, 0.9, 0.8)[1], F.gae(dirty_x_BT, dirty_y_BT, mask_BT, 0.9, 0.8)[1]),
        (
            F.aggregate(x_BT, mask_BT, "token", len(lens), tokens),
            F.aggregate(dirty_x_BT, mask_BT, "token", len(lens), tokens),
        ),
        (
            F.aggregate(x_BT, mask_BT, "sequence", len(lens), tokens),
            F.aggregate(dirty_x_BT, mask_BT, "sequence", len(lens), tokens),
        ),
    ):
        assert torch.equal(one, two)


def test_clipped_surrogate() -> None:
    ratio_BT = torch.tensor([[1.5, 0.5, 1.1, 1.5, 0.5]])
    advantage_BT = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    loss_BT, got_BT, clipped_BT = F.clipped_surrogate(
        ratio_BT.log(), torch.zeros_like(ratio_BT), advantage_BT, clip_low=0.2, clip_high=0.25
    )
    assert_close(got_BT, ratio_BT)
    # max(-A ratio, -A clip(ratio, 0.8, 1.25)):
    #   A = 1:  1.5 -> max(-1.5, -1.25) = -1.25 clipped;  0.5 -> max(-0.5, -0.8) = -0.5 free;  1.1 -> -1.1 free
    #   A = -1: 1.5 -> max(1.5, 1.25) = 1.5 free;         0.5 -> max(0.5, 0.8) = 0.8 clipped
    assert_close(loss_BT, [[-1.25, -0.5, -1.1, 1.5, 0.8]])
    assert clipped_BT.tolist() == [[True, False, False, False, True]]


def test_no_gradient_where_the_surrogate_is_clipped() -> None:
    logp_BT = torch.tensor([[1.5, 0.5, 1.1]]).log().requires_grad_()
    loss_BT, _, clipped_BT = F.clipped_surrogate(logp_BT, torch.zeros(1, 3), torch.ones(1, 3), 0.2, 0.2)
    loss_BT.sum().backward()
    assert logp_BT.grad is not None
    assert ((logp_BT.grad == 0) == clipped_BT).all()


def test_first_epoch_is_reinforce() -> None:
    """With the ratio at 1 the gradient is that of -A log pi."""
    logp_BT = torch.tensor([[-0.3, -2.0]], requires_grad=True)
    advantage_BT = torch.tensor([[0.7, -1.3]])
    F.clipped_surrogate(logp_BT, logp_BT.detach(), advantage_BT, 0.2, 0.2)[0].sum().backward()
    assert logp_BT.grad is not None
    assert_close(logp_BT.grad, -advantage_BT)


def test_aggregate() -> None:
    loss_BT = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, 100.0]])
    assert_close(F.aggregate(loss_BT, MASK_BT, "token", rows=2, tokens=4), 3.0)  # (1 + 2 + 3 + 6) / 4
    assert_close(F.aggregate(loss_BT, MASK_BT, "sequence", rows=2, tokens=4), 4.0)  # (mean(1, 2, 3) + mean(6)) / 2


@given(lengths, seeds, st.integers(0, 4))
def test_micro_batches_add_up(lens: list[int], seed: int, cut: int) -> None:
    loss_BT, _, _ = random_BT(len(lens), seed)
    mask_BT = mask_of(lens, 5)
    tokens = int(mask_BT.sum())
    parts = [part for part in (slice(0, cut), slice(cut, None)) if len(loss_BT[part])]
    for how in ("token", "sequence"):
        whole = F.aggregate(loss_BT, mask_BT, how, len(lens), tokens)
        sums = [F.aggregate(loss_BT[p], mask_BT[p], how, len(lens), tokens) for p in parts]
        assert_close(torch.stack(sums).sum(), whole)


def test_token_logprobs_and_entropy() -> None:
    # softmax of log(1), log(2), log(5) is 1/8, 2/8, 5/8; adding 3 to every logit changes nothing
    logits_BTV = torch.tensor([[[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]]).log() + 3
    assert_close(F.token_logprobs(logits_BTV, torch.tensor([[2, 0]])), [[math.log(5 / 8), math.log(1 / 4)]])
    second = 1.5 * math.log(2)  # 2 * (1/4) log 4 + (1/2) log 2
    first = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert_close(F.entropy(logits_BTV), [[first, second]])


def test_inverse_cdf() -> None:
    logp_BV = torch.tensor([[0.25, 0.25, 0.5]]).log().expand(6, 3)
    # cumulative 0.25, 0.5, 1: the first that exceeds the number
    uniform_B = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999999])
    assert F.inverse_cdf(logp_BV, uniform_B).tolist() == [0, 0, 1, 1, 2, 2]


def test_inverse_cdf_never_takes_the_impossible() -> None:
    logp_BV = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).log().log_softmax(-1).expand(1000, 5)
    chosen_B = F.inverse_cdf(logp_BV, torch.linspace(0, 1 - 2**-24, 1000))
    assert set(chosen_B.tolist()) == {1, 3}
    assert int((chosen_B == 1).sum()) == 500


def test_last_places() -> None:
    assert F.last_places(MASK_BT).tolist() == [2, 0]


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logp_BT, old_BT, advantage_BT = (torch.randn((2, 3), generator=generator, dtype=torch.float64) for _ in range(3))
    mask_BT = MASK_BT

    def loss(x_BT: Tensor) -> Tensor:
        return F.aggregate(F.clipped_surrogate(x_BT, old_BT, advantage_BT, 0.2, 0.2)[0], mask_BT, "sequence", 2, 4)

    assert torch.autograd.gradcheck(loss, (logp_BT.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x_BT: F.whiten(x_BT, mask_BT), (old_BT.requires_grad_(),))
    assert torch.autograd.gradcheck(
        lambda r_BT, v_BT: F.gae(r_BT, v_BT, mask_BT, 0.9, 0.8), (old_BT, advantage_BT.requires_grad_())
    )


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_an_empty_row_is_no_division_by_zero(how: str) -> None:
    loss = F.aggregate(torch.ones(2, 3), mask_of([0, 0], 3), how, 2, 0)  # type: ignore[arg-type]
    assert_close(loss, 0.0)


def test_rows_of_groups_by_hand() -> None:
    row_GN, mask_GN = F.rows_of_groups(torch.tensor([7, 3, 7, 7, 9]))
    assert row_GN.tolist() == [[1, 0, 0], [0, 2, 3], [4, 0, 0]]
    assert mask_GN.tolist() == [[True, False, False], [True, True, True], [True, False, False]]


def test_returns_that_differ_by_rounding_are_equal() -> None:
    return_B = torch.tensor([1.0, 1.0 - 3e-8, 0.999, -1.0, 0.0])
    rounded_B = F.without_noise(return_B)
    assert rounded_B[0] == rounded_B[1]
    assert rounded_B.argsort(descending=True, stable=True).tolist() == [0, 1, 2, 4, 3]
    # Whatever their scale is; and nothing is divided by a largest of 0.
    assert (F.without_noise(return_B * 1e-9)[:2].diff() == 0).all()
    torch.testing.assert_close(rounded_B, return_B, atol=1e-5, rtol=0)
    assert F.without_noise(torch.zeros(3)).tolist() == [0, 0, 0]
    assert F.without_noise(torch.zeros(0)).tolist() == []
