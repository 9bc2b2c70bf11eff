"""Quark: quantiles, loss and KL by hand, tokens in front of prompts, the pool, save and load, and that it learns."""

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from minibatches import minibatch
from torch import Tensor

import textrl_gym
from textrl_gym.agents import Quark
from textrl_gym.agents.quark import FILE, draw_evenly, logp_and_forward_kl, quantile_of, quark_loss
from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.quantile_policy import PLAIN, QuantilePolicy
from textrl_gym.policy.step_cache import StepCache
from textrl_gym.registry import load_agent
from textrl_gym.rollouts.collect import collect
from textrl_gym.training.minibatch import Minibatch

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 16}


def copy_policy(quantile: int = PLAIN, kind: Any = tiny.gpt2) -> QuantilePolicy:
    model = tiny.gpt2(5, 7, seed=1) if kind is tiny.gpt2 else tiny.llama(5, scale=0.5, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = QuantilePolicy(model, "copy", quantiles=3, vocab_size=5)
    policy.quantile = quantile
    return policy


def envs() -> Any:
    vector = gym.make_vec("CopyText-v0", num_envs=16, array="torch", autoreset_mode="Disabled")
    vector.reset(seed=0)
    return vector


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_quantiles_by_hand() -> None:
    # Without ties equal parts, in any order; F = 2/6 -> ceil(3 / 3) - 1 = 0 and so on.
    assert quantile_of(torch.tensor([0.1, 0.6, 0.2, 0.5, 0.4, 0.3]), 3).tolist() == [0, 2, 0, 2, 1, 1]
    # Equal scores are of one quantile: F(0) = 3/4, F(1) = 1, of 2: ceil(1.5) - 1 = 1 and 1
    assert quantile_of(torch.tensor([0.0, 1.0, 0.0, 0.0]), 2).tolist() == [1, 1, 1, 1]
    assert quantile_of(torch.tensor([0.0, 1.0, 1.0, 0.0]), 2).tolist() == [0, 1, 1, 0]
    # Few episodes leave the lower quantiles empty, and never the best: F = 1/2, 1, of 5: ceil(2.5) - 1 = 2, 4
    assert quantile_of(torch.tensor([3.0, 4.0]), 5).tolist() == [2, 4]
    assert quantile_of(torch.tensor([3.0]), 5).tolist() == [4]


def test_each_quantile_is_drawn_alike_however_many_it_has() -> None:
    quantile_N = torch.tensor([0] * 97 + [2] * 2 + [4])
    places = draw_evenly(quantile_N, 3000, np.random.default_rng(0))
    counts = torch.bincount(quantile_N[places], minlength=5).tolist()
    assert counts[1] == counts[3] == 0
    assert all(900 < counts[k] < 1100 for k in (0, 2, 4))  # 1000, with a standard deviation of 26
    assert len(set(places) & set(range(97))) > 90


def test_loss_by_hand() -> None:
    # nll (1 + 2 + 3 + 2) / 4 = 2, KL (0.5 + 0.1 + 0.2 + 0) / 4 = 0.2; with beta 0.5: 2.1
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    logp_BT = torch.tensor([[-1.0, -2, -3], [-2, 9, 9]], dtype=torch.float64)
    kl_BT = torch.tensor([[0.5, 0.1, 0.2], [0.0, 9, 9]], dtype=torch.float64)
    loss, metrics = quark_loss(logp_BT, kl_BT, minibatch(mask_BT, tokens=4), 0.5)
    assert loss.item() == pytest.approx(2.1, abs=1e-12)
    assert metrics["forward_kl"].item() == pytest.approx(0.2, abs=1e-12)
    pair = (logp_BT.clone().requires_grad_(), kl_BT.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: quark_loss(x, y, minibatch(mask_BT, tokens=4), 0.5)[0], pair)


def test_the_kl_is_exact_and_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = copy_policy(2)
    rollout = collect(envs(), policy, kl_coef=0.0, generator=torch.Generator().manual_seed(0))
    logp_BT, kl_BT = logp_and_forward_kl(policy, policy.reference, rollout)  # type: ignore[arg-type]
    torch.testing.assert_close(logp_BT, rollout.logp_BT, atol=1e-5, rtol=0)
    # One state by hand: row 0 before its first token, with the token in front.
    ids = rollout.prompt_BP[0][rollout.prompt_mask_BP[0]]
    with torch.no_grad():
        own_V = policy.model(torch.cat([torch.tensor([5 + 2]), ids])[None]).logits[0, -1, :5].log_softmax(-1)
        ref_V = policy.reference.model(ids[None]).logits[0, -1].log_softmax(-1)  # type: ignore[union-attr]
    expected = float((ref_V.exp() * (ref_V - own_V)).sum())
    assert expected > 1e-3
    assert kl_BT[0, 0].item() == pytest.approx(expected, abs=1e-5)
    assert (kl_BT[~rollout.mask_BT] == 0).all() and (kl_BT > -1e-6).all()
    # A few positions at a time give the same numbers and the same gradient.
    gradients = []
    for numbers in (2**23, 15):
        monkeypatch.setattr("textrl_gym.agents.quark.CHUNK_NUMBERS", numbers)
        logp_BT, kl_BT = logp_and_forward_kl(policy, policy.reference, rollout)  # type: ignore[arg-type]
        policy.zero_grad()
        (kl_BT.sum() + logp_BT.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=0)


# -- a token in front -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny.gpt2, tiny.llama])
def test_a_policy_without_a_token_is_its_model(kind: Any) -> None:
    policy = copy_policy(PLAIN, kind)
    plain = Policy(tiny.gpt2(5, 7, seed=1) if kind is tiny.gpt2 else tiny.llama(5, scale=0.5, seed=1), vocab_size=5)
    rollout = collect(envs(), policy, kl_coef=0.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain.logprobs(rollout), policy.logprobs(rollout), atol=1e-6, rtol=0)
    assert float((rollout.logp_BT - rollout.ref_logp_BT).abs().max()) < 1e-5
    assert policy.reference is not None and type(policy.reference) is Policy
    assert policy.reference.model.get_input_embeddings().weight.shape[0] == 5


@pytest.mark.parametrize("kind", [tiny.gpt2, tiny.llama])
def test_sampling_stepping_and_training_see_the_same_token(kind: Any) -> None:
    policy = copy_policy(1, kind)
    rollout = collect(envs(), policy, kl_coef=0.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.logprobs(rollout), rollout.logp_BT, atol=1e-5, rtol=0)
    # By the model itself: the token, the prompt and the completion of each row, with no padding at all.
    for b in range(4):
        ids, n = rollout.prompt_BP[b][rollout.prompt_mask_BP[b]], int(rollout.mask_BT[b].sum())
        text = torch.cat([torch.tensor([5 + 1]), ids, rollout.token_BT[b, :n]])[None]
        with torch.no_grad():
            logp_TV = policy.model(text).logits[0, len(ids) : -1, :5].log_softmax(-1)
        expected_T = logp_TV.gather(1, rollout.token_BT[b, :n, None]).squeeze(1)
        torch.testing.assert_close(rollout.logp_BT[b, :n], expected_T, atol=1e-5, rtol=0)
    # Observations padded on the left and on the right, with and without a cache.
    input_BL, mask_BL = (
        torch.tensor([[0, 2, 3, 1, 0], [4, 1, 3, 0, 0]]),
        torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    )
    stepped_BV = policy.next_logprobs(input_BL, mask_BL)
    for b, seen in enumerate(([2, 3, 1], [4, 1, 3])):
        with torch.no_grad():
            expected_V = policy.model(torch.tensor([[6, *seen]])).logits[0, -1, :5].log_softmax(-1)
        torch.testing.assert_close(stepped_BV[b], expected_V, atol=1e-5, rtol=0)
    policy.steps = StepCache(policy.trunk)
    policy.next_logprobs(
        torch.tensor([[0, 2, 3, 0, 0], [4, 1, 0, 0, 0]]), torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    )
    torch.testing.assert_close(policy.next_logprobs(input_BL, mask_BL), stepped_BV, atol=1e-5, rtol=0)


def test_rows_of_a_rollout_have_their_own_quantiles() -> None:
    policy = copy_policy(2)
    rollout = collect(envs(), policy, kl_coef=0.0, generator=torch.Generator().manual_seed(0))
    quantile_B = torch.tensor([0, 1, 2, PLAIN] * 4)
    mixed_BT = policy.logprobs(Minibatch.of(rollout.with_(quantile_B=quantile_B))).detach()
    for quantile in (0, 1, 2, PLAIN):
        policy.quantile = quantile
        alone_BT = policy.logprobs(rollout).detach()
        rows = quantile_B == quantile
        torch.testing.assert_close(mixed_BT[rows], alone_BT[rows], atol=1e-5, rtol=0)
        assert float((mixed_BT - alone_BT)[~rows].abs().max()) > 1e-4


def test_only_tokens_of_the_tokenizer_are_sampled_and_the_new_rows_learn(tmp_path: Path) -> None:
    agent = Quark("CopyText-v0", quantiles=3, seed=0, out=tmp_path, minibatches=1)
    before: Tensor = agent.policy.model.get_input_embeddings().weight[-3:].detach().clone()
    assert len(before.unique(dim=0)) == 3
    agent.update(agent.collect())
    moved_K = (agent.policy.model.get_input_embeddings().weight[-3:] - before).detach().abs().amax(1)
    learnt = quantile_of(torch.tensor([one.total for one in agent.pool]), 3).unique().tolist()
    assert len(learnt) > 1 and (moved_K > 1e-5).nonzero().squeeze(1).tolist() == learnt
    rollout = agent.collect()
    assert int(rollout.token_BT.max()) < agent.env.vocab_size == agent.env.single_action_space.n
    assert agent.policy.vocab_size == agent.env.vocab_size


# -- the agent --------------------------------------------------------------------------------------------------------


def test_the_first_round_is_of_the_initial_policy_and_the_next_ask_for_the_best(tmp_path: Path) -> None:
    agent = Quark("CopyText-v0", seed=0, out=tmp_path, pool_size=100)
    first = agent.collect()
    assert float((first.logp_BT - first.ref_logp_BT).abs().max()) < 1e-5
    assert agent.policy.quantile == PLAIN
    agent.update(first)
    assert agent.policy.quantile == agent.config.quantiles - 1
    agent.update(agent.collect())
    assert len(agent.pool) == 100  # of 128, the newest
    assert [one.completion for one in agent.pool[:36]] == first.completions[-36:]


def test_save_and_load_evaluate_the_same(tmp_path: Path) -> None:
    agent = Quark("CopyText-v0", seed=0, out=tmp_path).learn(600, **QUIET)
    again = load_agent(tmp_path)
    assert isinstance(again, Quark) and again.policy.quantile == 4 and again.pool == agent.pool != []
    for name in ("score", "kl_sequence", "entropy_token"):
        values = [textrl_gym.evaluate(one, episodes=32)[name] for one in (agent, again)]
        assert values[0] == pytest.approx(values[1], abs=1e-6)
    observation, _ = agent.env.reset(seed=5)
    assert (
        agent.predict(observation, deterministic=True)[0] == again.predict(observation, deterministic=True)[0]
    ).all()
    # Without a pool it has never been updated, and is the initial policy.
    Quark("CopyText-v0", seed=0, out=tmp_path / "fresh").save(tmp_path / "fresh")
    assert not (tmp_path / "fresh" / FILE).exists()
    assert load_agent(tmp_path / "fresh").policy.quantile == PLAIN


def test_another_run_may_start_from_its_model(tmp_path: Path) -> None:
    agent = Quark("CopyText-v0", seed=0, out=tmp_path / "first").learn(300, **QUIET)
    more = Quark("CopyText-v0", model=str(tmp_path / "first" / "model"), out=tmp_path / "second")
    assert more.policy.quantiles == 5
    rows = [one.policy.model.get_input_embeddings().weight for one in (agent, more)]
    torch.testing.assert_close(rows[0], rows[1], atol=0, rtol=0)
    with pytest.raises(ValueError, match="the model has 5 quantile tokens: give quantiles=5"):
        Quark("CopyText-v0", model=str(tmp_path / "first" / "model"), quantiles=3, out=tmp_path / "third")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_rank": 4}, "lora_rank=4 freezes the quantile tokens' embeddings"),
        ({"frozen_layers": 1}, "frozen_layers=1 freezes the quantile tokens' embeddings"),
        ({"quantiles": 1}, "quantiles must be at least 2, got 1"),
        ({"pool_size": 0}, "pool_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_name_themselves(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Quark("CopyText-v0", **settings)


@pytest.mark.slow
def test_copy_text_is_learnt_and_the_tokens_mean_what_they_say(tmp_path: Path) -> None:
    agent = Quark("CopyText-v0", seed=0, learning_rate=3e-3, quantiles=10, pool_size=1024, out=tmp_path)
    before = textrl_gym.evaluate(agent, episodes=64)["score"]
    agent.learn(16_000, **QUIET)
    best = textrl_gym.evaluate(agent, episodes=64)["score"]
    agent.policy.quantile = 0
    worst = textrl_gym.evaluate(agent, episodes=64)["score"]
    assert before < 0.3 and best > 0.8 and worst < best - 0.2


@pytest.mark.slow
def test_conversations_have_the_token_in_front(tmp_path: Path) -> None:
    agent = Quark("GuessNumber-v0", seed=0, rollout_episodes=8, out=tmp_path)
    agent.update(agent.collect())
    rollout = agent.collect()
    assert rollout.reply_BT is not None and rollout.reply_BT.any()
    torch.testing.assert_close(agent.policy.logprobs(rollout), rollout.logp_BT, atol=1e-4, rtol=0)
    assert dataclasses.asdict(agent.config)["quantiles"] == 5
