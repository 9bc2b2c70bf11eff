"""REINFORCE, RLOO, REINFORCE++ and GRPO's relatives: numbers worked by hand, gradients, and what equals what."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minibatches import last_gradient, minibatch
from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents import CISPO, DAPO, GRPO, GSPO, PPO, RLOO, DrGRPO, Reinforce, ReinforcePP
from textrl_gym.agents.cispo import CISPOConfig, cispo_loss
from textrl_gym.agents.dapo import overlong, with_spread
from textrl_gym.agents.grpo import GRPOConfig, group_advantages, grpo_loss
from textrl_gym.agents.gspo import GSPOConfig, gspo_loss, sequence_log_ratio
from textrl_gym.agents.reinforce import reinforce_loss
from textrl_gym.agents.reinforce_pp import reinforce_pp_loss
from textrl_gym.agents.rloo import leave_one_out, rloo_loss
from textrl_gym.core import Rollout
from textrl_gym.training.minibatch import Minibatch

MASK_BT = torch.tensor([[True, True, True], [True, False, False]])
OLD_BT = torch.full((2, 3), -1.0, dtype=torch.float64)
LOGP_BT = OLD_BT + torch.tensor([[1.0, 2.0, 0.5], [1.0, 9.0, 9.0]], dtype=torch.float64).log()  # ratios
ADVANTAGE_B = torch.tensor([1.0, -2.0], dtype=torch.float64)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_returns_to_go_by_hand() -> None:
    reward_BT = torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]])
    assert functional.returns_to_go(reward_BT, MASK_BT).tolist() == [[7.0, 6.0, 4.0], [8.0, 0.0, 0.0]]


def test_leave_one_out_by_hand() -> None:
    # group 7: 1, 2, 6: 1 - 4, 2 - 3.5, 6 - 1.5; group 3: 5, 1: 5 - 1, 1 - 5; group 9 alone
    return_B = torch.tensor([1.0, 5.0, 2.0, 6.0, 1.0, 3.0])
    group_B = torch.tensor([7, 3, 7, 7, 3, 9])
    assert leave_one_out(return_B, group_B).tolist() == [-3.0, 4.0, -1.5, 4.5, -4.0, 0.0]


def test_reinforce_loss_by_hand() -> None:
    # - (1 * -1 + 2 * (-1 + log 2) + 3 * (-1 + log 0.5) - 4 * -1) / 4 = - (-2 - log 2) / 4
    advantage_BT = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 9.0, 9.0]], dtype=torch.float64)
    loss, _ = reinforce_loss(LOGP_BT, minibatch(MASK_BT, advantage_BT=advantage_BT))
    assert loss.item() == pytest.approx((2 + math.log(2)) / 4, abs=1e-12)


def test_rloo_loss_by_hand() -> None:
    # log pi of row 0 is -3 + log 2 + log 0.5 = -3, of row 1 -1: - (1 * -3 - 2 * -1) / 2 = 0.5
    loss, _ = rloo_loss(LOGP_BT, minibatch(MASK_BT, advantage_B=ADVANTAGE_B))
    assert loss.item() == pytest.approx(0.5, abs=1e-12)


def test_reinforce_pp_loss_by_hand() -> None:
    # advantages 1, 1, 1 | -2: -1, -1.2 (clipped), -0.5 | 2
    advantage_BT = torch.tensor([[1.0, 1.0, 1.0], [-2.0, 9.0, 9.0]], dtype=torch.float64)
    part = minibatch(MASK_BT, logp_BT=OLD_BT, advantage_BT=advantage_BT)
    loss, metrics = reinforce_pp_loss(LOGP_BT, part, 0.2)
    assert loss.item() == pytest.approx(-0.7 / 4, abs=1e-12)
    assert metrics["clip_fraction"].item() == 0.25


def test_gspo_loss_by_hand() -> None:
    # row 0: log s = (log 1 + log 2 + log 0.5) / 3 = 0, so s = 1; row 1: s = 1: -(1 * 1 + -2 * 1) / 2 = 0.5
    config = GSPOConfig()
    loss, _ = gspo_loss(LOGP_BT, minibatch(MASK_BT, logp_BT=OLD_BT, advantage_B=ADVANTAGE_B), config, 0.0)
    assert loss.item() == pytest.approx(0.5, abs=1e-12)
    # ratios of 4 and 1 in two tokens: s = 2, clipped to 1.5 for advantage 1; row 1: s = 1
    logp_BT = OLD_BT + torch.tensor([[4.0, 1.0, 9.0], [1.0, 9.0, 9.0]], dtype=torch.float64).log()
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_log_ratio(logp_BT, OLD_BT, mask_BT).exp().tolist() == pytest.approx([2.0, 1.0])
    wide = GSPOConfig(clip_low=0.5, clip_high=0.5)
    part = minibatch(mask_BT, logp_BT=OLD_BT, ref_logp_BT=logp_BT - 1, advantage_B=ADVANTAGE_B)
    loss, metrics = gspo_loss(logp_BT, part, wide, 0.0)
    assert loss.item() == pytest.approx((-1.5 + 2) / 2, abs=1e-12)
    assert metrics["clip_fraction"].item() == 0.5
    # the KL of k2 to a reference 1 nat below, at every token 1/2: + 0.1 / 2
    loss, _ = gspo_loss(logp_BT, part, wide, 0.1)
    assert loss.item() == pytest.approx(0.25 + 0.05, abs=1e-12)


def test_cispo_loss_by_hand() -> None:
    # weights 1, min(2, 1.2), 0.5 | 1; log pi -1, -1 + log 2, -1 - log 2 | -1
    expected = -(1 * -1 + 1.2 * (-1 + math.log(2)) + 0.5 * (-1 - math.log(2)) - 2 * -1) / 4
    logp_BT = LOGP_BT.clone().requires_grad_()
    part = minibatch(MASK_BT, logp_BT=OLD_BT, ref_logp_BT=LOGP_BT, advantage_B=ADVANTAGE_B)
    loss, metrics = cispo_loss(logp_BT, part, CISPOConfig(), 0.0)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert metrics["clip_fraction"].item() == 0.25
    loss.backward()
    # no gradient through the weight, and the clipped token keeps its own
    assert logp_BT.grad is not None
    expected_BT = torch.tensor([[-1.0, -1.2, -0.5], [2.0, 0.0, 0.0]], dtype=torch.float64) / 4
    torch.testing.assert_close(logp_BT.grad, expected_BT, atol=1e-12, rtol=0)


def test_overlong_by_hand() -> None:
    # budget 8, the last half of it, penalty 2: 0 up to 4, then -0.5 a token, -2 at 8
    length_B = torch.tensor([1, 4, 5, 7, 8])
    assert overlong(length_B, 8, 0.5, 2.0).tolist() == [0.0, 0.0, -0.5, -1.5, -2.0]
    assert overlong(length_B, 8, 0.0, 2.0).tolist() == [0.0] * 5


# -- gradients --------------------------------------------------------------------------------------------------------


def test_losses_pass_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logp_BT = (OLD_BT + 0.3 * torch.randn(2, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    advantage_BT = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    part = minibatch(
        MASK_BT, logp_BT=OLD_BT, ref_logp_BT=OLD_BT - 0.3, advantage_BT=advantage_BT, advantage_B=ADVANTAGE_B
    )
    wide = GSPOConfig(clip_low=0.2, clip_high=0.2)
    for loss in (
        lambda x: reinforce_loss(x, part)[0],
        lambda x: rloo_loss(x, part)[0],
        lambda x: reinforce_pp_loss(x, part, 0.2)[0],
        lambda x: gspo_loss(x, part, wide, 0.1)[0],
    ):
        assert torch.autograd.gradcheck(loss, (logp_BT,))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_advantages_ignore_what_is_outside_the_mask(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))
    mask_BT = torch.arange(5) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    reward_BT = torch.randn(mask_BT.shape, generator=generator)
    noise_BT = torch.where(mask_BT, 0.0, 1e6)
    for advantage in (
        lambda r: functional.returns_to_go(r, mask_BT),
        lambda r: functional.whiten(functional.returns_to_go(r, mask_BT), mask_BT),
    ):
        clean_BT = advantage(reward_BT)
        assert torch.equal(clean_BT, advantage(reward_BT + noise_BT))
        assert not clean_BT[~mask_BT].any()
    group_B = torch.arange(len(lengths)) // 2
    left_B = leave_one_out(reward_BT.sum(1), group_B)
    for group in group_B.unique():  # what is above the others is below them too
        assert float(left_B[group_B == group].sum()) == pytest.approx(0, abs=1e-4)


# -- equivalences -----------------------------------------------------------------------------------------------------


def gradient(agent: Any, rollout: Rollout) -> Tensor:
    with last_gradient(agent) as found:
        agent.update(rollout)
    return found[-1][: sum(p.numel() for p in agent.policy.model.parameters())]  # a critic's are after them


COMMON: dict[str, Any] = {"rollout_episodes": 16, "group_size": 4, "max_grad_norm": 1e9, "kl_coef": 0.1, "seed": 2}


@pytest.fixture
def rollout() -> Rollout:
    """With different lengths, and the KL of 0 at the start."""
    return RLOO("CopyText-v0", **COMMON).collect()


def test_rloo_with_two_samples_is_half_the_difference() -> None:
    agent = RLOO("CopyText-v0", **(COMMON | {"rollout_episodes": 2, "group_size": 2}))
    r = agent.collect()
    r.reward_BT[0, 0] += 1.0  # whatever was drawn, the two differ
    ours = gradient(agent, r)
    logp_B = RLOO("CopyText-v0", **COMMON).policy
    difference = r.reward_BT[0].sum() - r.reward_BT[1].sum()
    loss = -0.5 * difference * logp_B.logprobs(r).sum(1).diff().neg().squeeze()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in logp_B.model.parameters()])
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_group_mean_baseline_is_leave_one_out_scaled() -> None:
    # R_i - mean = (G - 1)/G (R_i - mean of the others)
    return_B = torch.randn(12, dtype=torch.float64)
    group_B = torch.arange(12) // 4
    mean_B, _ = group_advantages(return_B, group_B, scale_by_std=False, std_eps=0.0)
    torch.testing.assert_close(mean_B, 0.75 * leave_one_out(return_B, group_B), atol=1e-12, rtol=0)


def test_dr_grpo_is_rloo_scaled(rollout: Rollout) -> None:
    # mean over rows of A_i sum_t log pi, A by the group's mean, divided by the budget N: (G - 1)/G 1/N of RLOO's
    dr = DrGRPO("CopyText-v0", kl_in="reward", **COMMON)
    rloo = RLOO("CopyText-v0", **COMMON)
    ours, theirs = gradient(dr, rollout), gradient(rloo, rollout)
    assert theirs.norm() > 0
    torch.testing.assert_close(ours * dr.env.max_new_tokens, 0.75 * theirs, atol=1e-6, rtol=0)


def test_dr_grpo_divides_its_loss_by_the_budget_and_its_metrics_by_the_tokens(rollout: Rollout) -> None:
    # At the first step every ratio is 1, and so is their mean over the tokens, however short the completions are.
    agent = DrGRPO("CopyText-v0", **COMMON)
    assert rollout.num_tokens < len(rollout) * agent.env.max_new_tokens
    assert agent.update(rollout)["ratio"] == pytest.approx(1, abs=1e-5)


def test_on_policy_the_clipped_ones_are_grpo(rollout: Rollout) -> None:
    # At ratio 1 nothing is clipped; CISPO's weight is 1.
    one_step = COMMON | {"minibatches": 1}
    expected = gradient(GRPO("CopyText-v0", **one_step), rollout)
    for cls in (DAPO, CISPO):
        torch.testing.assert_close(gradient(cls("CopyText-v0", **one_step), rollout), expected, atol=1e-6, rtol=0)


def test_on_policy_reinforce_pp_is_reinforce_with_its_advantages(rollout: Rollout) -> None:
    ours = gradient(ReinforcePP("CopyText-v0", **(COMMON | {"minibatches": 1})), rollout)
    agent = Reinforce("CopyText-v0", **COMMON)
    advantage_BT = functional.whiten(functional.returns_to_go(rollout.reward_BT, rollout.mask_BT), rollout.mask_BT)
    batch = Minibatch.of(rollout.with_(advantage_BT=advantage_BT))
    loss, _ = reinforce_loss(agent.policy.logprobs(batch), batch)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in agent.policy.model.parameters()])
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_ppo_without_a_critic_is_reinforce_pp(rollout: Rollout) -> None:
    # V = 0 at the start and lambda 1: GAE is the return-to-go.
    ours = gradient(ReinforcePP("CopyText-v0", **(COMMON | {"minibatches": 1})), rollout)
    ppo = PPO("CopyText-v0", **(COMMON | {"minibatches": 1, "epochs": 1, "vf_coef": 0.0}))
    torch.testing.assert_close(ours, gradient(ppo, rollout), atol=1e-6, rtol=0)


def test_gspo_of_one_token_is_grpo() -> None:
    generator = torch.Generator().manual_seed(1)
    old_B1, ref_B1 = (torch.randn(6, 1, dtype=torch.float64, generator=generator) for _ in range(2))
    logp_B1 = (old_B1 + 0.4 * torch.randn(6, 1, dtype=torch.float64, generator=generator)).requires_grad_()
    advantage_B = torch.randn(6, dtype=torch.float64, generator=generator)
    mask_B1 = torch.ones(6, 1, dtype=torch.bool)
    grads = []
    for loss, config in (
        (grpo_loss, GRPOConfig(aggregation="sequence")),
        (gspo_loss, GSPOConfig(clip_low=0.2, clip_high=0.2)),
    ):
        part = minibatch(mask_B1, logp_BT=old_B1, ref_logp_BT=ref_B1, advantage_B=advantage_B)
        value, _ = loss(logp_B1, part, config, 0.1)  # type: ignore[arg-type]
        grads.append(torch.cat([value[None], *torch.autograd.grad(value, logp_B1)[0]]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=0)


# -- what is kept, and what is drawn again ----------------------------------------------------------------------------


def test_the_running_baseline_is_of_the_batches_before(tmp_path: Path, rollout: Rollout) -> None:
    agent = Reinforce("CopyText-v0", baseline_decay=0.5, out=tmp_path, **COMMON)
    baselines = []
    for mean in (2.0, 6.0, 0.0):
        flat = torch.zeros_like(rollout.reward_BT)
        flat.scatter_(1, rollout.mask_BT.sum(1, keepdim=True) - 1, mean)  # each return-to-go is `mean`
        baselines.append(agent.update(dataclasses.replace(rollout, reward_BT=flat))["baseline"])
    assert baselines == [2.0, 2.0, 4.0]  # the first has none before it
    agent.save(tmp_path)
    assert Reinforce.load(tmp_path).running == agent.running == 2.0


def test_dapo_draws_until_groups_have_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = DAPO("CopyText-v0", overlong_share=0.0, **(COMMON | {"most_draws": 3}))
    drawn: list[Rollout] = []

    def collect(self: Any) -> Rollout:
        r = plain(self)
        score_B = torch.arange(len(r)) % 4 * 1.0
        if len(drawn) < 2:
            score_B[r.group_B >= 1 + len(drawn)] = 0.5  # one group with spread, then two
        r.reward_BT.zero_().scatter_(1, r.mask_BT.sum(1, keepdim=True) - 1, score_B[:, None])
        drawn.append(r)
        return r

    plain = GRPO.collect
    monkeypatch.setattr(GRPO, "collect", collect)
    rollout = agent.collect()
    assert len(drawn) == 3
    assert len(rollout) == 16 and with_spread(rollout).all()
    assert rollout.group_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert rollout.prompts == [*drawn[0].prompts[:4], *drawn[1].prompts[:8], *drawn[2].prompts[:4]]
    assert agent.dropped_tokens == sum(r.num_tokens for r in drawn) - rollout.num_tokens > 0


def test_rollouts_below_each_other_are_rollouts(rollout: Rollout) -> None:
    short = rollout.select(torch.tensor([4, 5, 0]))
    joined = Rollout.cat([short, rollout])
    assert len(joined) == 19
    assert joined.group_B.tolist() == [1, 1, 0] + [2 + g for g in rollout.group_B.tolist()]
    for part, rows in ((short, torch.arange(3)), (rollout, torch.arange(3, 19))):
        again = joined.select(rows)
        for field in ("prompt_BP", "prompt_mask_BP", "token_BT", "mask_BT", "logp_BT", "reward_BT", "score_B"):
            assert torch.equal(getattr(again, field), getattr(part.trim(), field)), field
        assert again.completions == part.completions


def test_bad_settings_name_themselves() -> None:
    for cls, bad, message in (
        (Reinforce, {"baseline": "mean"}, "baseline must be one of none, batch, running, got 'mean'"),
        (Reinforce, {"epochs": 2}, "REINFORCE takes one step a rollout, got 2 epochs x 1"),
        (RLOO, {"group_size": 1}, "group_size must be at least 2, got 1"),
        (DAPO, {"most_draws": 0}, "most_draws must be at least 1, got 0"),
        (GSPO, {"group_size": 1}, "group_size must be at least 2, got 1"),
        (ReinforcePP, {"clip_range": 0.0}, "clip_range must be > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            cls("CopyText-v0", **bad)
