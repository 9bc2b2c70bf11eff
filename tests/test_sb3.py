"""Stable-Baselines3 on text environments: caches against full forwards, the adapter against single environments."""

import copy
import importlib
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium.vector import AutoresetMode
from sb3_contrib import TRPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import textrl_gym
from textrl_gym.agents import GRPO, SB3A2C, SB3PPO, SB3TRPO
from textrl_gym.envs import known_optimum
from textrl_gym.integrations.sb3_env import TextVecEnv
from textrl_gym.integrations.sb3_policy import CausalLMPolicy, PolicyLogprob, longest_texts
from textrl_gym.models import onednn, tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.policy.step_cache import SLACK, StepCache
from textrl_gym.registry import load_agent

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 16}


def weights(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# -- caches against full forwards -------------------------------------------------------------------------------------


def mistral() -> Any:
    """A model whose layers keep the last two keys only."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=2,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "cached"),
    [(lambda: tiny.gpt2(5, 5), True), (lambda: tiny.llama(5), True), (mistral, False)],
    ids=["gpt2", "llama", "sliding"],
)
def test_steps_are_the_full_forward(make: Any, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().double()
    with_steps, plain = Policy(model), Policy(model)
    with_steps.steps = StepCache(with_steps.trunk)
    whole_rows: list[int] = []
    whole = StepCache._whole

    def spy(self: StepCache, input_BL: Tensor, mask_BL: Tensor) -> Any:
        whole_rows.append(len(input_BL))
        return whole(self, input_BL, mask_BL)

    monkeypatch.setattr(StepCache, "_whole", spy)
    envs = gym.make_vec("CopyText-v0", num_envs=8, array="torch", autoreset_mode="SameStep")
    observation, _ = envs.reset(seed=0)
    rng, starts, steps = np.random.default_rng(0), 8, 2 * SLACK + 10
    for _ in range(steps):
        inputs = (observation["input_ids"], observation["attention_mask"])
        logp_BV = with_steps.next_logprobs(*inputs)
        torch.testing.assert_close(logp_BV, plain.next_logprobs(*inputs), atol=1e-10, rtol=0)
        assert torch.equal(with_steps.next_logprobs(*inputs), logp_BV)  # asked again
        observation, _, terminated, truncated, _ = envs.step(torch.as_tensor(rng.integers(0, 5, 8)))
        starts += int((terminated | truncated).sum())
    starts -= int((terminated | truncated).sum())  # those were not shown
    assert sum(whole_rows) == (starts if cached else 8 * steps)


def test_steps_in_float32_on_real_texts() -> None:
    envs = gym.make_vec("TLDRSummarize-v0", num_envs=4, array="torch", autoreset_mode="SameStep", max_new_tokens=6)
    policy = Policy(envs.unwrapped.task.load_model())  # type: ignore[attr-defined]
    steps = StepCache(policy.trunk)
    observation, _ = envs.reset(seed=0)
    for t in range(12):
        inputs = (observation["input_ids"], observation["attention_mask"])
        full_BD = policy.last_hidden(*inputs)
        assert float((steps(*inputs) - full_BD).abs().max() / full_BD.abs().max()) < 1e-5
        action_B = torch.tensor([5, 6, 7, 0 if t % 3 else 8])
        observation = envs.step(action_B)[0]


def test_steps_are_forgotten_when_weights_change_and_found_row_by_row() -> None:
    policy = Policy(tiny.llama(5))
    policy.steps = StepCache(policy.trunk)
    ids_BL, mask_BL = torch.tensor([[1, 2, 0], [3, 4, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    hidden_BD = policy.last_hidden(ids_BL, mask_BL)
    found_BD = policy.steps.find(ids_BL[1:], mask_BL[1:])
    assert found_BD is not None
    assert torch.equal(found_BD, hidden_BD[1:])
    assert policy.steps.find(ids_BL[:1] + 1, mask_BL[:1]) is None
    with torch.no_grad():
        next(policy.model.parameters()).mul_(2.0)
    assert policy.steps.find(ids_BL, mask_BL) is None
    full_BV = Policy(policy.model).next_logprobs(ids_BL, mask_BL)
    torch.testing.assert_close(policy.next_logprobs(ids_BL, mask_BL), full_BV, atol=1e-6, rtol=0)


def test_updates_forget_the_steps() -> None:
    policy = policy_on(gym.make("CopyText-v0"))
    obs, _ = states(3)
    policy.set_training_mode(False)
    with torch.no_grad():
        policy.forward(obs)
        assert policy.lm.steps is not None
        assert policy.lm.steps.find(obs["input_ids"], obs["attention_mask"]) is not None
        policy.set_training_mode(True)
        assert policy.lm.steps.find(obs["input_ids"], obs["attention_mask"]) is None


def test_longest_texts_by_hand() -> None:
    rows = [b"ab", b"abc", b"b", b"a", b"abc", b"abd"]
    kept, text_of = longest_texts(rows)
    assert sorted(rows[row] for row in kept) == [b"abc", b"abd", b"b"]
    assert all(rows[kept[text]].startswith(row) for text, row in zip(text_of, rows, strict=True))


def policy_on(env: Any, model: Any = None, **settings: Any) -> CausalLMPolicy:
    return CausalLMPolicy(env.observation_space, env.action_space, lambda _: 1e-3, model=model, **settings)


def states(rows: int = 40) -> tuple[dict[str, Tensor], Tensor]:
    """States of CopyText with prompts of one and two symbols, shuffled; some are beginnings of others."""
    rng = np.random.default_rng(1)
    ids_BL, mask_BL = torch.zeros(rows, 5, dtype=torch.long), torch.zeros(rows, 5, dtype=torch.int8)
    for b in range(rows):
        prompt, written = rng.integers(1, 3), rng.integers(0, 3)
        mask_BL[b, 2 - prompt : 2 + written] = 1
        ids_BL[b] = torch.as_tensor(rng.integers(1, 3, 5)) * mask_BL[b]
    return {"input_ids": ids_BL, "attention_mask": mask_BL}, torch.as_tensor(rng.integers(0, 5, rows))


@pytest.mark.parametrize("micro_batch_tokens", [65_536, 9])
def test_evaluate_actions_is_one_forward_a_state(micro_batch_tokens: int) -> None:
    policy = policy_on(gym.make("CopyText-v0"), micro_batch_tokens=micro_batch_tokens)
    policy.lm.model.double()
    assert policy.lm.value_head is not None
    policy.lm.value_head.double()
    torch.nn.init.normal_(policy.lm.value_head.weight)
    obs, action_B = states()
    texts: list[int] = []
    original = policy._texts

    def count(input_UL: Tensor, mask_UL: Tensor) -> Tensor:
        texts.append(len(input_UL))
        return original(input_UL, mask_UL)

    policy._texts = count  # type: ignore[method-assign]
    values, logp_B, entropy_B = policy.evaluate_actions(obs, action_B)
    assert entropy_B is not None
    assert sum(texts) < len(action_B) / 2, "states of one text must share its pass"
    loss = (logp_B * torch.arange(40.0)).sum() + values.sum() + entropy_B.sum()
    grads = torch.autograd.grad(loss, list(policy.lm.parameters()))

    expected = torch.tensor(0.0, dtype=torch.float64)
    for b in range(40):  # each state by itself, without padding
        ids = obs["input_ids"][b][obs["attention_mask"][b] == 1][None]
        hidden_1D = policy.lm.trunk.hidden(ids, torch.ones_like(ids).bool(), ids[:, :0], ids[:, :0].bool())[:, 0]
        logp_V = policy.lm.logits(hidden_1D).log_softmax(-1)[0]
        value = policy.lm.value_of(hidden_1D)[0]
        torch.testing.assert_close(logp_B[b], logp_V[action_B[b]], atol=1e-10, rtol=0)
        torch.testing.assert_close(values[b, 0], value, atol=1e-10, rtol=0)
        entropy = -(logp_V.exp() * logp_V).sum()
        torch.testing.assert_close(entropy_B[b], entropy, atol=1e-10, rtol=0)
        expected = expected + logp_V[action_B[b]] * b + value + entropy
    for ours, theirs in zip(grads, torch.autograd.grad(expected, list(policy.lm.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_value_is_zero_where_the_budget_has_run_out_and_dropout_stays_off() -> None:
    policy = policy_on(gym.make("CopyText-v0"), tiny.gpt2(5, 5))
    assert policy.lm.value_head is not None
    torch.nn.init.ones_(policy.lm.value_head.bias)
    full = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5).to(torch.int8)}
    full["attention_mask"][1, 4] = 0
    for training in (True, False):
        policy.set_training_mode(training)
        assert not any(module.training for module in policy.lm.modules())
        values = policy.predict_values(full)
        assert values[0] == 0
        assert values[1] != 0
    assert float(policy.predict_values({k: v[:1] for k, v in full.items()})) == 0


# -- the adapter ------------------------------------------------------------------------------------------------------


class Uniform:
    """policy_logprob of a policy that takes every token alike; a row or a batch."""

    def __call__(self, observation: Any, action: Any) -> Any:
        return np.full(np.shape(action), -np.log(5.0))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_adapter_is_n_single_environments(mode: AutoresetMode) -> None:
    kwargs: dict[str, Any] = {"kl_coef": 0.1, "policy_logprob": Uniform()}
    ours = TextVecEnv(gym.make_vec("CopyText-v0", num_envs=5, autoreset_mode=mode, **kwargs))
    theirs = DummyVecEnv([lambda: gym.make("CopyText-v0", **kwargs)] * 5)
    rng = np.random.default_rng(0)
    returns = np.zeros(5)
    for venv in (ours, theirs):
        venv.seed(7)
    observations: list[Any] = [venv.reset() for venv in (ours, theirs)]
    for _ in range(30):
        for name in ("input_ids", "attention_mask"):
            assert (observations[0][name] == observations[1][name]).all()
            assert observations[0][name].dtype == observations[1][name].dtype
        actions = rng.integers(0, 5, 5)
        (a, reward, done, infos), (b, reward_2, done_2, infos_2) = (venv.step(actions) for venv in (ours, theirs))
        observations = [a, b]
        np.testing.assert_allclose(reward, reward_2, atol=1e-6, rtol=0)
        assert (done == done_2).all()
        returns += reward
        for row, (info, info_2) in enumerate(zip(infos, infos_2, strict=True)):
            episode = info.pop("episode", None)
            assert (episode is not None) == bool(done[row])
            if episode is not None:
                assert episode["r"] == pytest.approx(returns[row], abs=1e-5)
                assert episode["l"] == info["terminal_observation"]["attention_mask"][2:].sum()
                returns[row] = 0.0
            assert set(info) == set(info_2)
            for name, value in info.items():
                if name == "terminal_observation":
                    assert all((value[k] == info_2[name][k]).all() for k in value)
                elif isinstance(value, float):
                    assert value == pytest.approx(info_2[name], abs=1e-6)
                else:
                    assert value == info_2[name]


def test_adapter_attributes_options_and_errors() -> None:
    venv = TextVecEnv(gym.make_vec("CopyText-v0", num_envs=3, render_mode="ansi"))
    venv.set_options({"prompt_indices": [4]})
    observation = venv.reset()
    assert (observation["input_ids"] == observation["input_ids"][0]).all()
    assert len(venv.render()) == 3
    assert venv.get_attr("kl_coef", [0, 1]) == [0.0, 0.0]
    venv.set_attr("missing_eos_penalty", 0.5)
    assert venv.mdp.missing_eos_penalty == 0.5
    assert venv.env_is_wrapped(gym.Wrapper) == [False] * 3
    with pytest.raises(ValueError, match="set_attr: the rows are one environment"):
        venv.set_attr("missing_eos_penalty", 0.5, indices=[0])
    venv.set_options({"prompts": [4]})
    with pytest.raises(ValueError, match="'prompt_indices'"):
        venv.reset()
    with pytest.raises(ValueError, match=r"kl_coef=0.1 .*policy_logprob=PolicyLogprob\(\)"):
        TextVecEnv(gym.make_vec("CopyText-v0", num_envs=2, kl_coef=0.1))
    with pytest.raises(ValueError, match="not a text environment"):
        TextVecEnv(gym.make("CartPole-v1"))
    venv.close()


# -- SB3 itself -------------------------------------------------------------------------------------------------------

FAST: dict[str, Any] = {
    "n_steps": 6,
    "batch_size": 24,
    "n_epochs": 2,
    "seed": 3,
    "device": "cpu",
    "learning_rate": 3e-3,
}


def with_kl(single: bool, **settings: Any) -> tuple[Any, PolicyLogprob]:
    logprob = PolicyLogprob()
    kwargs: dict[str, Any] = {"kl_coef": 0.1, "policy_logprob": logprob} | settings
    if single:
        return DummyVecEnv([lambda: gym.make("CopyText-v0", **kwargs)] * 8), logprob
    return TextVecEnv(gym.make_vec("CopyText-v0", num_envs=8, **kwargs)), logprob


def test_single_environments_and_the_adapter_train_alike() -> None:
    trained = []
    for single in (True, False):
        venv, logprob = with_kl(single)
        model = sb3.PPO(CausalLMPolicy, venv, **FAST)
        before = weights(model.policy)
        logprob.policy = model.policy
        model.learn(200)
        trained.append(weights(model.policy))
        assert not torch.equal(before, trained[-1])
    torch.testing.assert_close(*trained, atol=1e-4, rtol=0)


def test_penalty_is_the_policys_own() -> None:
    venv, logprob = with_kl(single=False, reference=tiny.gpt2(5, 5, seed=9))
    model = sb3.PPO(CausalLMPolicy, venv, **FAST)
    venv.seed(0)
    observation = venv.reset()
    with pytest.raises(ValueError, match="PolicyLogprob has no policy yet"):
        venv.step(np.ones(8, int))
    logprob.policy = sb3.PPO("MultiInputPolicy", venv, **FAST).policy
    with pytest.raises(ValueError, match="PolicyLogprob needs a CausalLMPolicy, got a MultiInputActorCriticPolicy"):
        venv.step(np.ones(8, int))
    logprob.policy = model.policy
    policy: Any = model.policy
    reference, plain = Policy(tiny.gpt2(5, 5, seed=9)), Policy(policy.lm.model)
    for _ in range(6):
        action_B = model.predict(observation)[0]
        inputs = (torch.as_tensor(observation["input_ids"]), torch.as_tensor(observation["attention_mask"]))
        kl_BV = plain.next_logprobs(*inputs) - reference.next_logprobs(*inputs)
        observation, reward, done, infos = venv.step(action_B)
        for b in range(8):
            expected = (infos[b]["score"] if done[b] else 0.0) - 0.1 * float(kl_BV[b, action_B[b]])
            assert reward[b] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("env_id", ["CopyText-v0", "KnownOptimum-v0", "TLDRSummarize-v0"])
def test_plain_ids_train_save_and_load(env_id: str, tmp_path: Path) -> None:
    model = sb3.PPO(CausalLMPolicy, gym.make(env_id), n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    model.learn(8)
    model.save(tmp_path / "model")
    again = sb3.PPO.load(tmp_path / "model", device="cpu")
    assert torch.equal(weights(model.policy), weights(again.policy))
    observation, _ = gym.make(env_id).reset(seed=1)
    assert model.predict(observation, deterministic=True)[0] == again.predict(observation, deterministic=True)[0]
    again.set_env(gym.make(env_id))
    again.learn(8)
    path = str(tmp_path / "policy")
    model.policy.save(path)
    assert torch.equal(weights(CausalLMPolicy.load(path, device="cpu")), weights(model.policy))


def test_other_models_and_temperatures(tmp_path: Path) -> None:
    env = gym.make("CopyText-v0")
    tiny.gpt2(7, 5, seed=4).save_pretrained(tmp_path)  # two rows more than the environment has tokens
    policy = policy_on(env, str(tmp_path), temperature=2.0)
    obs, _ = states(3)
    with torch.no_grad():
        distribution: Any = policy.get_distribution(obs).distribution
        logits_BV = distribution.logits
    assert logits_BV.shape == (3, 5)
    plain = Policy(policy.lm.model, vocab_size=5, temperature=2.0)
    expected = plain.next_logprobs(obs["input_ids"], obs["attention_mask"])
    torch.testing.assert_close(logits_BV, expected, atol=1e-5, rtol=0)


def test_sb3s_own_ways_to_name_an_environment() -> None:
    # Each asks for render_mode="rgb_array".
    short: dict[str, Any] = {"n_steps": 6, "batch_size": 6, "n_epochs": 1}
    sb3.PPO(CausalLMPolicy, "CopyText-v0", **short).learn(12)
    envs = make_vec_env("CopyText-v0", n_envs=2, seed=0)
    model = sb3.PPO(CausalLMPolicy, envs, **short).learn(24)
    sb3.PPO("MultiInputPolicy", "CopyText-v0", **short).learn(12)
    mean, _ = evaluate_policy(model, envs, n_eval_episodes=4)
    assert np.isfinite(mean)
    frame = envs.render()
    assert isinstance(frame, np.ndarray) and frame.dtype == np.uint8


def test_sb3s_eval_callback_in_our_learn(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", rollout_episodes=8, group_size=4, out=tmp_path / "run")
    envs = VecMonitor(TextVecEnv(gym.make_vec("CopyText-v0", num_envs=2)))
    log, best = str(tmp_path / "log"), str(tmp_path / "best")
    callback = EvalCallback(envs, eval_freq=1, n_eval_episodes=4, log_path=log, best_model_save_path=best)
    with warnings.catch_warnings():
        # SB3 compares the two environments' types; ours collects in its own, which is no VecEnv.
        warnings.filterwarnings("ignore", "Training and eval env are not of the same type")
        agent.learn(60, progress_bar=False, eval_every=0, eval_episodes=4, callback=callback)
    scores = np.load(tmp_path / "log" / "evaluations.npz")["results"]
    assert len(scores) == agent.num_updates and np.isfinite(scores).all()


def test_bad_arguments_name_themselves() -> None:
    env = gym.make("CopyText-v0")
    with pytest.raises(ValueError, match=r"5 tokens .* 3 rows"):
        policy_on(env, tiny.gpt2(3, 5))
    with pytest.raises(ValueError, match="value head on its trunk and vocab_size=5"):
        policy_on(env, Policy(tiny.gpt2(5, 5)))
    with pytest.raises(ValueError, match=r"temperature must be None or the Policy's 1.0, got 2.0"):
        policy_on(env, Policy(tiny.gpt2(5, 5), value_head=True), temperature=2.0)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        policy_on(env, temperature=0.0)
    with pytest.raises(ValueError, match="use_sde must be False"):
        policy_on(env, use_sde=True)
    with pytest.raises(ValueError, match="micro_batch_tokens must be at least 1, got 0"):
        policy_on(env, micro_batch_tokens=0)
    with pytest.raises(ValueError, match=r"Discrete.*policy_logprob=PolicyLogprob\(\)"):
        policy_on(gym.make("CopyText-v0", kl_coef=0.1))
    with pytest.raises(ValueError, match="must be a text environment's own"):
        CausalLMPolicy(gym.spaces.Dict(), gym.spaces.Discrete(5), lambda _: 1e-3)


# -- as agents --------------------------------------------------------------------------------------------------------


class Reseed(BaseCallback):
    """Seeds PyTorch and NumPy before each rollout and each update, as the agent does."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def _seed(self) -> None:
        seed = int(torch.randint(2**31, (), generator=self.generator))
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002

    def _on_rollout_start(self) -> None:
        self._seed()
        # The reference computes texts that were begun before whole, as a run that goes on has to.
        envs: Any = self.training_env
        envs.mdp.reference.steps.forget()

    def _on_rollout_end(self) -> None:
        self._seed()

    def _on_step(self) -> bool:
        return True


def test_agent_is_sb3s_own_learn(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollout_episodes": 16, "group_size": 1, "lr_schedule": "constant", "kl_coef": 0.1}
    agent = SB3PPO("CopyText-v0", seed=5, learning_rate=1e-3, n_steps=4, out=tmp_path, **settings)
    agent.learn(250, **QUIET)  # four rollouts of 64

    logprob = PolicyLogprob()
    venv = TextVecEnv(gym.make_vec("CopyText-v0", num_envs=16, kl_coef=0.1, policy_logprob=logprob))
    model = sb3.PPO(
        CausalLMPolicy, venv, n_steps=4, batch_size=32, n_epochs=2, gamma=1.0, gae_lambda=1.0, vf_coef=0.1,
        learning_rate=1e-3, max_grad_norm=1.0, device="cpu",
        policy_kwargs={"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"eps": 1e-5, "weight_decay": 0.0}},
    )  # fmt: skip
    logprob.policy = model.policy
    venv.mdp.reset(seed=5)  # as Agent begins; learn() then goes on with the streams
    numpy_state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        model.learn(250, callback=Reseed(torch.Generator().manual_seed(5)))
    np.random.set_state(numpy_state)  # noqa: NPY002
    assert model.num_timesteps == agent.num_timesteps == 256
    assert torch.equal(weights(agent.policy), weights(model.policy))


def test_agents_rollout_is_what_was_played(tmp_path: Path) -> None:
    agent = SB3PPO("CopyText-v0", seed=1, rollout_episodes=16, kl_coef=0.3, kl_estimator="full", out=tmp_path)
    torch.nn.init.normal_(next(agent.policy.model.parameters()))  # away from the reference
    torch_state = torch.random.get_rng_state()
    first, second = agent.collect(), agent.collect()
    assert torch.equal(torch_state, torch.random.get_rng_state())
    for rollout in (first, second):
        logp_BT = agent.policy.logprobs(rollout)
        torch.testing.assert_close(rollout.logp_BT, logp_BT.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.value_BT, agent.policy.values(rollout).detach(), atol=1e-5, rtol=0)
        hidden_BTD, reference = agent.policy.hidden(rollout), agent.policy.reference
        assert reference is not None
        own_BTV = agent.policy.logits(hidden_BTD.flatten(0, 1)).log_softmax(-1).view(*rollout.token_BT.shape, 5)
        ref_BTV = reference.logits(reference.hidden(rollout).flatten(0, 1)).log_softmax(-1).view_as(own_BTV)
        kl_BT = (own_BTV.exp() * (own_BTV - ref_BTV)).sum(-1)
        last_BT = torch.zeros_like(kl_BT)
        last_BT[torch.arange(len(rollout)), rollout.mask_BT.sum(1) - 1] = rollout.score_B
        expected_BT = ((last_BT - 0.3 * kl_BT) * rollout.mask_BT).detach()
        torch.testing.assert_close(rollout.reward_BT, expected_BT, atol=1e-4, rtol=0)
    assert 48 - 16 * 2 <= first.num_tokens <= 48  # a row's last text may miss its end, up to two tokens
    assert second.num_tokens + agent.dropped_tokens == 48


def test_resumed_agent_goes_on(tmp_path: Path) -> None:
    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if local["self"].agent.num_updates == 2:
            raise KeyboardInterrupt
        return True

    agent = SB3PPO("CopyText-v0", seed=0, out=tmp_path, rollout_episodes=16, kl_target=1.0)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(480, callback=stop, **QUIET)
    again = load_agent(tmp_path, out=tmp_path)
    assert (again.num_updates, again.num_timesteps) == (2, 96)
    assert torch.equal(weights(again.policy), weights(agent.policy))
    assert again.kl.coef == agent.kl.coef
    moments, moments_2 = (one.optimizer.state_dict()["state"] for one in (agent, again))
    assert all(torch.equal(moments[0][name], moments_2[0][name]) for name in ("exp_avg", "exp_avg_sq"))
    again.learn(480 - again.num_timesteps, reset_num_timesteps=False, **QUIET)
    assert (again.num_updates, again.num_timesteps) == (10, 480)
    whole = SB3PPO("CopyText-v0", seed=0, out=tmp_path / "whole", rollout_episodes=16, kl_target=1.0)
    assert torch.equal(weights(whole.learn(480, **QUIET).policy), weights(again.policy))
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["timesteps"] for row in rows] == [0, 480]
    assert {"train/policy_gradient_loss", "rollout/score", "time/total_timesteps"} <= set(
        json.loads((tmp_path / "progress.json").read_text().splitlines()[0])
    )
    assert not list(tmp_path.rglob("*.zip")) + list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_copy_text_is_solved_by_sb3s_ppo(tmp_path: Path) -> None:
    agent = SB3PPO("CopyText-v0", seed=0, learning_rate=3e-3, out=tmp_path)
    agent.learn(16_000, **QUIET)
    metrics = textrl_gym.evaluate(agent, episodes=64)
    assert metrics["score_greedy"] == 1.0
    assert metrics["score"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "timesteps"), [(SB3PPO, 30_000), (SB3A2C, 45_000), (SB3TRPO, 20_000)])
def test_known_optimum_is_approached(cls: Any, timesteps: int, tmp_path: Path) -> None:
    agent = cls("KnownOptimum-v0", seed=0, rollout_episodes=256, learning_rate=3e-3, out=tmp_path)
    assert agent.policy.reference is not None
    before = known_optimum.distance(agent.policy, agent.policy.reference, agent.kl.coef)
    agent.learn(timesteps, **QUIET)
    assert before > 0.1
    assert known_optimum.distance(agent.policy, agent.policy.reference, agent.kl.coef) < 0.03


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SB3A2C, {"learning_rate": 3e-3}),
        pytest.param(SB3TRPO, {"target_kl": 0.05, "rollout_episodes": 64}, marks=pytest.mark.slow),
    ],
)
def test_a2c_and_trpo_learn(cls: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    agent = cls("CopyText-v0", seed=0, out=tmp_path, **settings)
    before = float(agent.collect().score_B.mean())
    agent.learn(4_000, **QUIET)
    assert float(agent.collect().score_B.mean()) > before + 0.3


def test_trpo_takes_sb3_contribs_gradients(tmp_path: Path) -> None:
    agent = SB3TRPO("CopyText-v0", seed=0, rollout_episodes=16, out=tmp_path)
    agent.policy.double()
    agent.collect()
    algorithm = agent.algorithm
    algorithm.policy.set_training_mode(True)
    data = next(algorithm.rollout_buffer.get(batch_size=None))
    with onednn.twice_differentiable():
        with torch.no_grad():
            old = copy.copy(algorithm.policy.get_distribution(data.observations))
            old.distribution = type(old.distribution)(logits=old.distribution.logits * 0.5)  # so that no gradient is 0
        now = algorithm.policy.get_distribution(data.observations)
        objective = (data.advantages * now.log_prob(data.actions.long().flatten()).exp()).mean()
        kl = kl_divergence(now, old).mean()
        results = [
            grads(algorithm, kl, objective) for grads in (type(algorithm)._compute_actor_grad, TRPO._compute_actor_grad)
        ]
        (actor, grad, kl_grad, shapes), (actor_2, grad_2, kl_grad_2, shapes_2) = results
        assert [id(p) for p in actor] == [id(p) for p in actor_2]
        assert shapes == shapes_2
        torch.testing.assert_close(grad, grad_2, atol=1e-12, rtol=0)
        torch.testing.assert_close(kl_grad, kl_grad_2, atol=1e-12, rtol=0)
        assert float(kl_grad.detach().abs().max()) > 1e-6
        vector = torch.ones_like(kl_grad)
        products = [algorithm.hessian_vector_product(actor, of, vector.to(of)) for of in (kl_grad, kl_grad_2)]
        torch.testing.assert_close(*products, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SB3PPO, {"n_steps": 0}, "n_steps must be at least 1, got 0"),
        (SB3PPO, {"gamma": 1.1}, r"gamma must lie in \[0, 1\], got 1.1"),
        (SB3PPO, {"dtype": "bfloat16"}, "dtype must be float32, got 'bfloat16'"),
        (SB3PPO, {"clip_range": 0.0}, "clip_range must be > 0, got 0.0"),
        (SB3A2C, {"epochs": 2}, "A2C takes one step a rollout, got 2 epochs x 1"),
        (SB3TRPO, {"epochs": 2}, "TRPO takes one step a rollout, got epochs=2"),
        (SB3TRPO, {"max_grad_norm": 0.5}, "leave max_grad_norm, got 0.5"),
        (SB3TRPO, {"cg_damping": 0.0}, "cg_damping must be > 0, got 0.0"),
    ],
)
def test_bad_settings(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls("CopyText-v0", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 2}, "n_steps=2 must be at least max_new_tokens=3"),
        ({"minibatches": 5}, "minibatches=5 must divide the 192 tokens of a rollout"),
    ],
)
def test_bad_settings_of_a_rollout(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SB3PPO("CopyText-v0", **settings)


def test_missing_sb3_contrib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "textrl_gym.agents.sb3_trpo"
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'sb3-contrib"):
        importlib.import_module(name)


def test_example_of_the_documentation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (root / "docs" / "sb3.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    exec(compile(code.replace("10_000", "200"), "docs/sb3.md", "exec"), {})
    assert "->" in capsys.readouterr().out
    assert (tmp_path / "copy_text.zip").is_file()
