"""NLPO: its mask against numbers worked by hand, and PPO where it allows everything."""

from pathlib import Path
from typing import Any

import pytest
import torch

from textrl_gym import functional
from textrl_gym.agents import NLPO, PPO
from textrl_gym.core import Rollout
from textrl_gym.models import tiny
from textrl_gym.policy.backbone import Trunk
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.top_p_policy import MaskedPolicy, top_p_set
from textrl_gym.registry import load_agent
from textrl_gym.rollouts.collect import collect

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 16}


def weights(agent: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def test_top_p_set_by_hand() -> None:
    logits_NV = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    # sorted 0.5, 0.25, 0.15, 0.1; before each 0, 0.5, 0.75, 0.9
    for top_p, allowed in ((0.3, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert top_p_set(logits_NV, top_p)[0].nonzero().squeeze(1).tolist() == allowed


def masked(top_p: float, mask_seed: int = 5) -> MaskedPolicy:
    """A policy whose mask comes from another one."""
    policy = MaskedPolicy(tiny.llama(6, scale=0.5, seed=1), top_p=top_p, value_head=True, reference="copy")
    policy.mask.model.load_state_dict(tiny.llama(6, scale=0.5, seed=mask_seed).state_dict())
    return policy


def rollout_of(policy: Policy) -> Rollout:
    import gymnasium as gym

    envs = gym.make_vec("CopyText-v0", num_envs=16, array="torch", autoreset_mode="Disabled")
    envs.reset(seed=0)
    return collect(envs, policy, kl_coef=0.0, generator=torch.Generator().manual_seed(0))


def copy_policy(top_p: float) -> MaskedPolicy:
    policy = MaskedPolicy(tiny.gpt2(5, 5, seed=1), top_p=top_p, value_head=True, reference="copy")
    policy.mask.model.load_state_dict(tiny.gpt2(5, 5, seed=2).state_dict())
    return policy


def test_probability_is_that_of_the_allowed_tokens_alone() -> None:
    policy = masked(0.7)
    plain = Policy(policy.model)
    input_BL, mask_BL = torch.tensor([[0, 2, 3], [4, 1, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    own_BV, mask_BV = plain.next_logprobs(input_BL, mask_BL), policy.mask.next_logprobs(input_BL, mask_BL)
    allowed_BV = top_p_set(mask_BV, 0.7)
    assert 0 < allowed_BV.sum() < allowed_BV.numel()
    expected_BV = own_BV.exp() * allowed_BV
    expected_BV = expected_BV / expected_BV.sum(1, keepdim=True)
    torch.testing.assert_close(policy.next_logprobs(input_BL, mask_BL).exp(), expected_BV, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_sampling_and_training_see_the_same_distribution(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = copy_policy(0.6)
    if not shared:
        monkeypatch.setattr(Trunk, "shares_prompts", False)
    rollout = rollout_of(policy)
    for p in policy.parameters():
        p.requires_grad_(True)
    now = policy.response(rollout, entropy=True)
    torch.testing.assert_close(now.logp_BT, rollout.logp_BT, atol=1e-6, rtol=0)  # the first ratio is 1
    assert float(now.logp_BT.detach().min()) > -10  # no forbidden token was taken
    assert torch.isfinite(now.entropy_BT).all()  # type: ignore[arg-type]
    (now.logp_BT.sum() + now.entropy_BT.sum()).backward()  # type: ignore[union-attr]
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None)
    assert all(p.grad is None for p in policy.mask.model.parameters())
    # stepping sees it too, at every place of the texts
    ids_BL, mask_BL = (
        torch.cat([rollout.prompt_BP, rollout.token_BT], 1),
        torch.cat([rollout.prompt_mask_BP, rollout.mask_BT], 1),
    )
    first = rollout.prompt_BP.shape[1]
    for t in range(rollout.token_BT.shape[1]):
        rows = rollout.mask_BT[:, t]
        logp_BV = policy.next_logprobs(ids_BL[rows, : first + t], mask_BL[rows, : first + t])
        logp_B = logp_BV.gather(1, rollout.token_BT[rows, t : t + 1]).squeeze(1)
        torch.testing.assert_close(logp_B, rollout.logp_BT[rows, t], atol=1e-5, rtol=0)


def test_a_token_that_was_taken_is_allowed_whatever_rounding_does() -> None:
    policy = masked(0.1)  # one token only
    hidden_ND = policy.last_hidden(torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))
    forbidden = int(policy.logits(hidden_ND).argmin())
    logp = functional.token_logprobs(policy.logits(hidden_ND, torch.tensor([forbidden])), torch.tensor([forbidden]))
    assert logp.item() > -50


def test_all_tokens_allowed_is_ppo(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seed": 2, "epochs": 2, "minibatches": 2}
    ppo = PPO("CopyText-v0", out=tmp_path / "ppo", **settings).learn(1500, **QUIET)
    nlpo = NLPO("CopyText-v0", out=tmp_path / "nlpo", top_p=1.0, refresh_every=3, **settings).learn(1500, **QUIET)
    assert torch.equal(weights(ppo), weights(nlpo))


def test_mask_is_refreshed_and_saved(tmp_path: Path) -> None:
    agent = NLPO("CopyText-v0", out=tmp_path, top_p=0.8, refresh_every=2, rollout_episodes=16)

    def difference(agent: Any) -> float:
        pairs = zip(agent.policy.mask.model.parameters(), agent.policy.model.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    seen: list[float] = []

    def watch(local: dict[str, Any], _: dict[str, Any]) -> bool:
        seen.append(difference(agent))
        return True

    agent.learn(240, callback=watch, **QUIET)
    # before the updates 1, 2, 3, ...: the copy of the start, one update old, refreshed after the second, ...
    assert [value == 0 for value in seen[:5]] == [True, False, True, False, True]
    assert agent.num_updates % 2 == 1, "the mask that is saved must differ from the policy"
    again = load_agent(tmp_path)
    assert difference(again) == difference(agent) > 0


@pytest.mark.slow
def test_nlpo_learns_and_never_writes_what_is_forbidden(tmp_path: Path) -> None:
    agent = NLPO("CopyText-v0", seed=0, learning_rate=3e-3, out=tmp_path, top_p=0.9, refresh_every=5)
    before = float(agent.collect().score_B.mean())
    agent.learn(4_000, **QUIET)
    rollout = agent.collect()
    assert float(rollout.score_B.mean()) > before + 0.3
    assert float(rollout.logp_BT.min()) > -20


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\], got 0"):
        NLPO("CopyText-v0", top_p=0.0)
    with pytest.raises(ValueError, match="refresh_every must be at least 1, got 0"):
        NLPO("CopyText-v0", refresh_every=0)
