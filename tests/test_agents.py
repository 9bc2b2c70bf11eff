"""PPO and GRPO: losses against numbers worked by hand, equivalences, known optima, resume and determinism."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from minibatches import last_gradient, minibatch
from torch import Tensor

import textrl_gym
from textrl_gym import functional, registry
from textrl_gym.agents import AWR, DAPO, GRPO, PPO, SB3PPO, SB3TRPO, FilteredBC
from textrl_gym.agents.grpo import GRPOConfig, group_advantages, grpo_loss
from textrl_gym.agents.ppo import PPOConfig, ppo_loss
from textrl_gym.envs import known_optimum
from textrl_gym.evaluation import health
from textrl_gym.registry import load_agent
from textrl_gym.training.agent import Agent

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 16}
# Those that do not train have no gradients, no weights that change and nothing to resume: see test_decoding.py.
AGENTS = [cls for cls in map(registry.load_agent_class, registry.names("agents")) if cls.trains]


def weights(agent: Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


# -- advantages and losses against numbers ----------------------------------------------------------------------------


def test_group_advantages_by_hand() -> None:
    # group 0: 1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; group 1: no spread
    return_B = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    group_B = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage_B, flat_B = group_advantages(return_B, group_B, scale_by_std=False, std_eps=1e-4)
    torch.testing.assert_close(advantage_B, torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]).double(), atol=1e-12, rtol=0)
    assert flat_B.tolist() == [False] * 3 + [True] * 3
    scaled_B, _ = group_advantages(return_B, group_B, scale_by_std=True, std_eps=0.5)
    expected = torch.tensor([-2.0, -1.0, 3.0, 0, 0, 0]).double() / (7**0.5 + 0.5)
    torch.testing.assert_close(scaled_B, expected, atol=1e-12, rtol=0)


def test_group_advantages_do_not_depend_on_where_the_rows_stand() -> None:
    return_B = torch.tensor([1.0, 5.0, 2.0, 6.0])
    advantage_B, _ = group_advantages(return_B, torch.tensor([0, 1, 0, 1]), scale_by_std=False, std_eps=0.0)
    assert advantage_B.tolist() == [-0.5, -0.5, 0.5, 0.5]


def ragged() -> dict[str, Tensor]:
    """Two rows of 3 and 1 tokens; 9s where the mask is False, to be ignored."""
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    ratio_BT = torch.tensor([[1.0, 2.0, 0.5], [1.0, 9.0, 9.0]], dtype=torch.float64)
    old_BT = torch.full((2, 3), -1.0, dtype=torch.float64)
    return {"mask": mask_BT, "old": old_BT, "logp": old_BT + ratio_BT.log()}


def test_grpo_loss_by_hand() -> None:
    # advantages 1 and -2, clip 0.2: row 0 gives -min(1, 1) = -1, -min(2, 1.2) = -1.2 (clipped), -min(0.5, 0.8) = -0.5;
    # row 1 gives -min(-2, -2) = 2. Token mean: (-1 - 1.2 - 0.5 + 2) / 4 = -0.175;
    # mean of row means: (-0.9 + 2) / 2 = 0.55
    d, advantage_B = ragged(), torch.tensor([1.0, -2.0], dtype=torch.float64)
    for aggregation, expected in (("token", -0.175), ("sequence", 0.55)):
        config = GRPOConfig(aggregation=aggregation)  # type: ignore[arg-type]
        part = minibatch(d["mask"], logp_BT=d["old"], ref_logp_BT=d["logp"], advantage_B=advantage_B)
        loss, metrics = grpo_loss(d["logp"], part, config, 0.0)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert metrics["clip_fraction"].item() == 0.25
    # with beta 0.1 and k2 against a reference 1 nat below: + 0.1 * 1/2 everywhere
    config = GRPOConfig(kl_loss="k2")
    part = minibatch(d["mask"], logp_BT=d["old"], ref_logp_BT=d["logp"] - 1, advantage_B=advantage_B)
    loss, _ = grpo_loss(d["logp"], part, config, 0.1)
    assert loss.item() == pytest.approx(-0.175 + 0.05, abs=1e-12)


def test_ppo_loss_by_hand() -> None:
    # policy: advantages 1, 1, -1 | 2: -1, -1.2, -min(-0.5, -0.8) = 0.8 | -2, mean -3.4 / 4 = -0.85
    # value: V_old 0, V = 0.5, 0.1, 0 | 1, returns 1, 0, 0 | 1, clip 0.2:
    #   max(0.25, (0.2 - 1)^2 = 0.64) = 0.64, max(0.01, 0.01) = 0.01, 0 | max(0, 0.64) = 0.64; half the mean 1.29 / 8
    d = ragged()
    advantage_BT = torch.tensor([[1.0, 1, -1], [2, 9, 9]], dtype=torch.float64)
    value_BT = torch.tensor([[0.5, 0.1, 0], [1, 9, 9]], dtype=torch.float64)
    return_BT = torch.tensor([[1.0, 0, 0], [1, 9, 9]], dtype=torch.float64)
    zero = torch.zeros_like(value_BT)
    config = PPOConfig(vf_coef=0.5)
    part = minibatch(d["mask"], logp_BT=d["old"], value_BT=zero, advantage_BT=advantage_BT, return_BT=return_BT)
    loss, metrics = ppo_loss(d["logp"], value_BT, None, part, config)
    assert metrics["policy_loss"].item() == pytest.approx(-0.85, abs=1e-12)
    assert metrics["value_loss"].item() == pytest.approx(1.29 / 8, abs=1e-12)
    assert loss.item() == pytest.approx(-0.85 + 0.5 * 1.29 / 8, abs=1e-12)
    with_bonus, _ = ppo_loss(d["logp"], value_BT, zero + 2.0, part, dataclasses.replace(config, entropy_coef=0.1))
    assert with_bonus.item() == pytest.approx(loss.item() - 0.1 * 2.0, abs=1e-12)


def test_losses_pass_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logp, value = (torch.randn(2, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    d, advantage_BT = ragged(), torch.randn(2, 3, dtype=torch.float64, generator=generator)

    def ppo(logp_BT: Tensor, value_BT: Tensor) -> Tensor:
        part = minibatch(d["mask"], logp_BT=d["old"], advantage_BT=advantage_BT, return_BT=advantage_BT * 2)
        return ppo_loss(logp_BT, value_BT, None, part, PPOConfig())[0]

    def grpo(logp_BT: Tensor) -> Tensor:
        part = minibatch(d["mask"], logp_BT=d["old"], ref_logp_BT=d["old"] - 0.3, advantage_B=advantage_BT[:, 0])
        return grpo_loss(logp_BT, part, GRPOConfig(), 0.1)[0]

    assert torch.autograd.gradcheck(ppo, (logp, value))
    assert torch.autograd.gradcheck(grpo, (logp,))


# -- equivalences -----------------------------------------------------------------------------------------------------


def test_first_minibatch_of_ppo_is_reinforce_with_the_same_advantages(tmp_path: Path) -> None:
    agent = PPO("CopyText-v0", epochs=1, minibatches=1, vf_coef=0.0, gae_lambda=0.95, max_grad_norm=1e9, out=tmp_path)
    rollout = agent.collect()
    with last_gradient(agent) as found:
        agent.update(rollout)
    ours = found[-1][: sum(p.numel() for p in agent.policy.model.parameters())]  # the critic's are after them

    fresh = PPO("CopyText-v0", out=tmp_path)
    advantage_BT, _ = functional.gae(rollout.reward_BT, rollout.value_BT, rollout.mask_BT, 1.0, 0.95)
    advantage_BT = functional.whiten(advantage_BT, rollout.mask_BT)
    # Williams 1992: the gradient of -E[A log pi]
    (-(advantage_BT * fresh.policy.logprobs(rollout)).sum() / rollout.num_tokens).backward()
    reinforce = torch.cat([p.grad.flatten() for p in fresh.policy.model.parameters()])
    torch.testing.assert_close(ours, reinforce, atol=1e-6, rtol=0)


def test_only_agents_that_compare_completions_refuse_an_environment_without_groups(tmp_path: Path) -> None:
    envs = gym.make_vec("CopyText-v0", num_envs=4, array="torch", autoreset_mode="Disabled")
    with pytest.raises(ValueError, match=r"GRPO compares completions of a prompt: make .* with group_size > 1"):
        GRPO(envs, out=tmp_path)
    PPO(envs, out=tmp_path).learn(16, **QUIET)


@pytest.mark.parametrize("cls", [cls for cls in AGENTS if cls is not SB3TRPO])  # CG magnifies float32's rounding
def test_micro_batches_are_one_batch(cls: type[Agent], tmp_path: Path) -> None:
    gradients = []
    for places in (1_000_000, 40):
        agent = cls("CopyText-v0", seed=1, micro_batch_tokens=places, epochs=1, minibatches=1, out=tmp_path)
        with last_gradient(agent) as found:
            agent.update(agent.collect())
        gradients.append(found[-1])
    norm = gradients[0].norm()
    assert norm > 0
    assert (gradients[0] - gradients[1]).norm() / norm < 1e-5


SAMPLES_FIRST = (AWR, FilteredBC)
"""Offline agents, which sample thousands of episodes before they learn."""


@pytest.mark.parametrize(
    ("cls", "env", "timesteps"),
    [(cls, "CopyText-v0", 60 if cls is SB3TRPO else 100) for cls in AGENTS if cls not in SAMPLES_FIRST]
    + [pytest.param(cls, "CopyText-v0", 250, marks=pytest.mark.slow) for cls in SAMPLES_FIRST]
    + [pytest.param(cls, "TLDRSummarize-v0", 150, marks=pytest.mark.slow) for cls in (PPO, GRPO)],
)
def test_same_seed_same_weights_and_another_seed_others(
    cls: type[Agent], env: str, timesteps: int, tmp_path: Path
) -> None:
    runs = [
        weights(cls(env, seed=seed, out=tmp_path / str(i), rollout_episodes=8).learn(timesteps, **QUIET))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


LONG = {"SB3TRPO", "NLPO", "FilteredBC", "AWR"}


@pytest.mark.parametrize(
    "cls", [pytest.param(cls, marks=pytest.mark.slow) if cls.__name__ in LONG else cls for cls in AGENTS]
)
def test_resume_is_never_stopped(cls: type[Agent], tmp_path: Path) -> None:
    class Stop:
        """Interrupts after the third update, as a user would."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, local: dict[str, Any], _: dict[str, Any]) -> bool:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return True

    options = QUIET | {"eval_episodes": 8}
    whole = cls("CopyText-v0", seed=3, out=tmp_path / "whole", kl_target=1.0).learn(1500, **options)
    parted = cls("CopyText-v0", seed=3, out=tmp_path / "parted", kl_target=1.0)
    with pytest.raises(KeyboardInterrupt):
        parted.learn(1500, callback=Stop(), **options)
    again = load_agent(tmp_path / "parted", out=tmp_path / "parted")
    assert again.num_updates == 3
    again.learn(1500 - again.num_timesteps, reset_num_timesteps=False, **options)
    assert again.num_timesteps == whole.num_timesteps
    assert torch.equal(weights(again), weights(whole))


def test_save_and_load_predict_the_same(tmp_path: Path) -> None:
    agent = PPO("CopyText-v0", seed=0, out=tmp_path, separate_value_model=True)
    agent.learn(400, **QUIET)
    other = PPO.load(tmp_path)
    assert torch.equal(weights(agent), weights(other))
    observation, _ = agent.env.reset(seed=5)
    assert (
        agent.predict(observation, deterministic=True)[0] == other.predict(observation, deterministic=True)[0]
    ).all()
    assert not list(tmp_path.rglob("*.pkl")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin"))
    with pytest.raises(ValueError, match="holds the agent 'ppo', not GRPO"):
        GRPO.load(tmp_path)
    with pytest.raises(ValueError, match=r"no saved agent.*agent\.json"):
        PPO.load(tmp_path / "nowhere")


def test_a_wrapper_that_would_not_be_applied_is_refused(tmp_path: Path) -> None:
    def env(**settings: Any) -> gym.Env[Any, Any]:
        return gym.make("CopyText-v0", **settings)

    other = gym.wrappers.TransformReward(env(), lambda reward: -10 * float(reward))
    agent = GRPO(gym.wrappers.RecordEpisodeStatistics(env(max_episode_steps=99)), rollout_episodes=8, out=tmp_path)
    play: list[Any] = [lambda: GRPO(other), lambda: textrl_gym.evaluate(agent, other, episodes=8)]
    play.append(lambda: textrl_gym.collect(other, agent.policy))
    many = gym.make_vec("CopyText-v0", num_envs=8, group_size=8)
    play.append(lambda: GRPO(gym.wrappers.vector.NormalizeReward(many)))
    for call in play:
        with pytest.raises(ValueError, match=r"the wrapper \w+Reward would not be applied: .* as reward="):
            call()
    with pytest.raises(ValueError, match=r"TimeLimit of 2 steps is not applied here: .* max_new_tokens"):
        GRPO(env(max_episode_steps=2))
    assert GRPO(other.unwrapped, rollout_episodes=8).env.num_envs == 8


def test_what_is_no_observation_is_said(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", out=tmp_path)
    observation, _ = agent.env.reset(seed=0)
    for wrong in ([1, 2, 3], "a text", {"input_ids": observation["input_ids"]}):
        with pytest.raises(ValueError, match=r"an observation is a dict with input_ids and attention_mask, .* got "):
            agent.predict(wrong)  # type: ignore[arg-type]
    unlike = {**observation, "attention_mask": observation["attention_mask"][0]}
    with pytest.raises(ValueError, match=r"must have one shape, .* got \(64, 5\) and \(5,\)"):
        agent.predict(unlike)
    one = {name: value[0] for name, value in observation.items()}
    many = agent.predict(observation, deterministic=True)[0]
    assert many.shape == (agent.env.num_envs,) and agent.predict(one, deterministic=True)[0] == many[0]


def test_a_file_and_a_folder_of_a_model_are_no_saved_agents(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", out=tmp_path / "run")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"the folder '.*file.*' cannot be written: "):
            agent.save(folder)
    agent.save(tmp_path / "run")
    model = tmp_path / "run" / "model"
    with pytest.raises(ValueError, match=f"it holds a model: `textrl-gym train reference ENV --model {model}`"):
        load_agent(model)


def test_an_interrupted_step_is_not_counted_and_nothing_is_lost(tmp_path: Path) -> None:
    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        raise KeyboardInterrupt

    agent = GRPO("CopyText-v0", out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(1000, callback=stop, **QUIET)
    assert load_agent(tmp_path).num_timesteps == 0


# -- optima -----------------------------------------------------------------------------------------------------------


IN_REWARD: dict[str, Any] = {"kl_in": "reward", "scale_by_std": False}
"""GRPO's division by the group's std changes what is maximised."""
MAXIMISERS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "reinforce": {},
    "rloo": {},
    "reinforce_pp": {},
    "grpo": IN_REWARD,
    "dr_grpo": IN_REWARD,
    "dapo": IN_REWARD | {"overlong_share": 0.0, "minibatches": 1},
    "gspo": IN_REWARD,
    "cispo": IN_REWARD,
}
"""Settings by which an agent maximises the KL-shaped return and nothing else."""


def learners(*quick: str) -> list[Any]:
    """The maximisers; all but some learn in `make reliability` alone."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MAXIMISERS]


@pytest.mark.parametrize("name", learners("grpo"))
def test_known_optimum_is_reached(name: str, tmp_path: Path) -> None:
    cls, settings = registry.load_agent_class(name), MAXIMISERS[name]
    agent = cls("KnownOptimum-v0", seed=0, rollout_episodes=256, learning_rate=3e-3, out=tmp_path, **settings)
    reference = agent.policy.reference
    assert reference is not None
    before = known_optimum.distance(agent.policy, reference, agent.kl.coef)
    agent.learn(45_000, **QUIET)
    after = known_optimum.distance(agent.policy, reference, agent.kl.coef)
    assert before > 0.1
    assert after < 0.03


@pytest.mark.slow
def test_dapo_reaches_the_optimum_of_its_own_objective(tmp_path: Path) -> None:
    # Overlong shaping is a part of the reward: with a share of 2/3 and a penalty of 0.6, 0.3 off for two tokens and
    # 0.6 off for three.
    agent = registry.load_agent_class("dapo")(
        "KnownOptimum-v0", seed=0, rollout_episodes=256, learning_rate=3e-3, out=tmp_path,
        **(IN_REWARD | {"overlong_share": 2 / 3, "overlong_penalty": 0.6}),
    )  # fmt: skip
    agent.learn(45_000, **QUIET)
    tokenizer = agent.env.tokenizer
    texts = [str(tokenizer.decode(y, skip_special_tokens=True)) for y in known_optimum.completions()]
    off_Y = torch.tensor([{1: 0.0, 2: 0.3, 3: 0.6}[len(y)] for y in known_optimum.completions()], dtype=torch.float64)
    for prompt in known_optimum.PROMPTS:
        reward_Y = torch.tensor(known_optimum.table([prompt] * len(texts), texts), dtype=torch.float64) - off_Y
        ref_Y = known_optimum.sequence_logprobs(agent.policy.reference, prompt)
        best_Y = (ref_Y + reward_Y / agent.kl.coef).log_softmax(0)
        plain_Y = known_optimum.optimum(agent.policy.reference, prompt, agent.kl.coef)
        logp_Y = known_optimum.sequence_logprobs(agent.policy, prompt)
        assert float((logp_Y.exp() * (logp_Y - best_Y)).sum()) < 0.03
        assert float((logp_Y.exp() * (logp_Y - plain_Y)).sum()) > 0.05  # another optimum


@pytest.mark.slow
def test_nlpo_reaches_the_optimum_of_its_own_objective(tmp_path: Path) -> None:
    # While the mask policy is the start, all texts but those whose every token is in the start's top-p set are
    # impossible, and of the policies on these texts pi_ref exp(r / beta), made to sum to 1, is the best.
    agent = registry.load_agent_class("nlpo")(
        "KnownOptimum-v0", seed=0, rollout_episodes=256, learning_rate=3e-3, out=tmp_path, kl_coef=0.25, top_p=0.95,
        refresh_every=10**6,
    )  # fmt: skip

    def distances() -> Tensor:
        """KL(pi || its optimum) and KL(pi || the optimum of all texts), nats a sequence, means over prompts."""
        found = []
        for prompt in known_optimum.PROMPTS:
            logp_Y = known_optimum.sequence_logprobs(agent.policy, prompt)
            possible_Y = logp_Y > -1e9
            assert 20 <= possible_Y.sum() <= 21  # of 40
            plain_Y = known_optimum.optimum(agent.policy.reference, prompt, 0.25)
            best_Y = plain_Y.masked_fill(~possible_Y, -1e30).log_softmax(0)
            found.append([float((logp_Y.exp() * (logp_Y - other_Y)).sum()) for other_Y in (best_Y, plain_Y)])
        return torch.tensor(found).mean(0)

    assert distances()[0] > 0.5
    agent.learn(45_000, **QUIET)
    own, other = distances()
    assert own < 0.03
    assert other > 0.1


def test_optimum_is_the_best_of_all_policies() -> None:
    # The objective J(pi) = E[r] - beta KL(pi || ref) of pi* is beta log Z, and no other distribution's is larger.
    task = known_optimum.KnownOptimum()
    reference = textrl_gym.Policy(task.load_model())
    tokenizer = task.load_tokenizer()
    texts = [str(tokenizer.decode(y, skip_special_tokens=True)) for y in known_optimum.completions()]
    for prompt in known_optimum.PROMPTS:
        ref_Y = known_optimum.sequence_logprobs(reference, prompt)
        assert ref_Y.exp().sum().item() == pytest.approx(1.0, abs=1e-5)  # the completions are all there are
        reward_Y = torch.tensor(known_optimum.table([prompt] * len(texts), texts), dtype=torch.float64)

        def objective(logp_Y: Tensor, ref_Y: Tensor = ref_Y, reward_Y: Tensor = reward_Y) -> float:
            return float((logp_Y.exp() * (reward_Y - 0.5 * (logp_Y - ref_Y))).sum())

        best_Y = known_optimum.optimum(reference, prompt, 0.5)
        log_z = float((ref_Y + reward_Y / 0.5).logsumexp(0))
        assert objective(best_Y) == pytest.approx(0.5 * log_z, abs=1e-6)
        for other_Y in (ref_Y, (best_Y + 0.1 * torch.randn(len(best_Y))).log_softmax(0)):
            assert objective(other_Y) < objective(best_Y)


@pytest.mark.parametrize("name", learners("ppo", "grpo"))
def test_copy_text_is_solved(name: str, tmp_path: Path) -> None:
    agent = registry.load_agent_class(name)(
        "CopyText-v0", seed=0, learning_rate=3e-3, out=tmp_path, **MAXIMISERS[name]
    )  # DAPO's overlong shaping would punish the right copy, which takes the whole budget
    agent.learn(16_000, **QUIET)
    metrics = textrl_gym.evaluate(agent, episodes=64)
    assert metrics["score_greedy"] == 1.0
    assert metrics["score"] > 0.9


# -- errors and health ------------------------------------------------------------------------------------------------


def test_bad_settings_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"PPO has no setting 'learning_rat' .*; allowed: rollout_episodes"):
        PPO("CopyText-v0", learning_rat=1.0)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        GRPO("CopyText-v0", group_size=1)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        PPO("CopyText-v0", temperature=0.0)
    with pytest.raises(ValueError, match=r"kl_estimator 'k9'.*k1, k2, k3, full"):
        PPO("CopyText-v0", kl_estimator="k9")
    with pytest.raises(ValueError, match=r"unknown agent 'pppo' \(did you mean 'ppo'\?\); allowed: "):
        registry.load_agent_class("pppo")
    with pytest.raises(ValueError, match="no setting 'eval_evry'"):
        PPO("CopyText-v0").learn(10, eval_evry=1)


def test_a_vocabulary_that_does_not_match_the_model_is_refused() -> None:
    from textrl_gym.models import tiny

    with pytest.raises(ValueError, match=r"5 tokens.*3|3.*5"):
        PPO("CopyText-v0", tiny.gpt2(3, 5))


def test_health_card_finds_a_reference_that_is_another_model(tmp_path: Path) -> None:
    from textrl_gym.models import tiny

    agent = PPO("CopyText-v0", reference=tiny.gpt2(5, 5, seed=9), out=tmp_path)
    with pytest.raises(health.HealthError, match="KL to the reference at step 0"):
        agent.learn(100, **QUIET)
    agent.learn(100, on_bad_health="warn", **QUIET)


def test_health_card_finds_dropout_and_a_second_eos(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", out=tmp_path)
    rollout = agent.collect()
    assert all(line.ok for line in health.card(agent.policy, rollout, agent.env.end_ids, fresh=True))
    shifted = dataclasses.replace(rollout, logp_BT=rollout.logp_BT - 0.1 * rollout.mask_BT)
    bad = [line.name for line in health.card(agent.policy, shifted, agent.env.end_ids, fresh=True) if not line.ok]
    assert any("ratio 1" in name for name in bad)
    longer = dataclasses.replace(rollout, mask_BT=torch.ones_like(rollout.mask_BT), token_BT=rollout.token_BT * 0)
    bad = [line.name for line in health.card(agent.policy, longer, agent.env.end_ids, fresh=False) if not line.ok]
    assert "EOS counted once" in bad
    same = dataclasses.replace(rollout, score_B=torch.ones_like(rollout.score_B))
    bad = [line.name for line in health.card(agent.policy, same, agent.env.end_ids, fresh=True) if not line.ok]
    assert bad == ["groups with no spread of scores"]


def test_spread_is_that_of_each_group() -> None:
    # Group 5 has 0.5 twice, group 7 one row, group 9 two 1s and a 2: two of three have no spread. Group 7 would have
    # some if the places that fill it up to three rows counted, which hold row 0.
    group_B = torch.tensor([5, 5, 7, 9, 9, 9])
    score_B = torch.tensor([0.5, 0.5, 0.1, 1.0, 1.0, 2.0])
    assert health.share_without_spread(score_B, group_B) == pytest.approx(2 / 3)
    assert health.share_without_spread(score_B, torch.arange(6)) is None


def test_logs_samples_and_callbacks(tmp_path: Path) -> None:
    from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

    class Count(BaseCallback):
        steps = 0

        def _on_step(self) -> bool:
            self.steps += 1
            return self.num_timesteps < 500

    count = Count()
    saver = CheckpointCallback(save_freq=2, save_path=str(tmp_path / "checkpoints"))
    agent = GRPO("CopyText-v0", out=tmp_path)
    agent.learn(100_000, callback=[count, saver], **QUIET)
    assert 500 <= agent.num_timesteps < 1000  # the callback ended it
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert len(rows) == count.steps - 1
    for key in ("rollout/score", "rollout/return", "rollout/kl_sequence", "rollout/kl_token", "train/loss"):
        assert key in rows[0]
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["timesteps"] for row in evaluations] == [0, agent.num_timesteps]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 32
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("cls", [GRPO, DAPO, SB3PPO])
def test_components_of_a_mixture_are_logged(cls: Any, tmp_path: Path) -> None:
    """Their weighted sum is the mean score of the same row, so that they are of the same texts."""
    env = gym.make_vec("CopyText-v0", num_envs=8, group_size=4, reward={"length": -0.5, "exact_match": 2.0})
    agent = cls(env, out=tmp_path, learning_rate=1e-2)
    agent.learn(600, **QUIET | {"eval_every": 1})
    for name, score in (("progress.json", "rollout/score"), ("evaluations.jsonl", "score")):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(rows) > 1
        for row in rows:
            assert -0.5 * row["reward/length"] + 2 * row["reward/exact_match"] == pytest.approx(row[score], abs=1e-5)
        assert len({row["reward/length"] for row in rows}) > 1


def test_a_custom_agent_needs_only_update(tmp_path: Path) -> None:
    class Reinforce(Agent):
        def update(self, rollout: textrl_gym.Rollout) -> dict[str, float]:
            return_B = rollout.reward_BT.sum(1)
            (-(return_B - return_B.mean()) * self.policy.logprobs(rollout).sum(1)).mean().backward()
            return {"grad_norm": self.step()}

    agent = Reinforce("CopyText-v0", learning_rate=3e-3, out=tmp_path)
    agent.learn(6_000, **QUIET)
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert rows[-1]["score"] > rows[0]["score"] + 0.2


# -- the environment, the KL penalty and the clock ---------------------------------------------------------------------


def vector(**settings: Any) -> Any:
    return gym.make_vec("CopyText-v0", num_envs=16, array="torch", autoreset_mode="DISABLED", **settings)


def test_evaluate_takes_an_id(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", out=tmp_path)
    agent.save(tmp_path)
    wanted = textrl_gym.evaluate(agent, episodes=8)
    assert textrl_gym.evaluate(agent, "CopyText-v0", episodes=8) == wanted
    assert textrl_gym.evaluate(tmp_path, "CopyText-v0", episodes=8) == pytest.approx(wanted, abs=1e-5, rel=0)
    assert textrl_gym.evaluate(agent, gym.make("CopyText-v0"), episodes=8) == wanted
    with pytest.raises(gym.error.NameNotFound):
        textrl_gym.evaluate(agent, "CopyTxt-v0", episodes=8)
    with pytest.raises(ValueError, match="is not a text environment"):
        textrl_gym.evaluate(agent, 7, episodes=8)  # type: ignore[arg-type]


def test_an_id_is_made_with_the_agents_tokenizer(tmp_path: Path) -> None:
    from textrl_gym.models import tiny

    tokenizer = tiny.symbol_tokenizer(("a", "b", "c", "d", "e", "f"))
    env = gym.make("CopyText-v0", tokenizer=tokenizer)
    agent = PPO(env, tiny.gpt2(len(tokenizer), 5), out=tmp_path)
    assert np.isfinite(textrl_gym.evaluate(agent, "CopyText-v0", episodes=4)["score"])
    agent.set_env("CopyText-v0")
    assert agent.env.vocab_size == len(tokenizer)


def test_the_given_environment_is_not_changed() -> None:
    envs = vector(group_size=4, missing_eos_penalty=0.25)
    envs.reset(seed=5)
    before = dict(vars(envs)), envs.streams()
    agent = PPO(envs, kl_estimator="k3", rollout_episodes=16)
    agent.collect()
    assert (dict(vars(envs)), envs.streams()) == before
    assert (agent.env.kl_estimator, agent.env.missing_eos_penalty) == ("k3", 0.25)
    # The agent's own environment goes on with the prompts of the given one.
    drawn = PPO(envs).env.draw()[1]
    assert drawn == envs.draw()[1]


def test_what_is_saved_is_what_was_used(tmp_path: Path) -> None:
    agent = PPO(vector(group_size=4, kl_coef=0.5, kl_estimator="k3", reference=tiny_model()), out=tmp_path)
    assert (agent.config.rollout_episodes, agent.config.group_size) == (16, 4)
    assert (agent.kl.coef, agent.kl.estimator, agent.kl.where) == (0.5, "k3", "reward")
    rollout = agent.collect()
    d_BT = rollout.logp_BT - rollout.ref_logp_BT
    torch.testing.assert_close(rollout.kl_BT, ((-d_BT).exp() - 1 + d_BT) * rollout.mask_BT, atol=1e-6, rtol=0)
    agent = PPO(vector(group_size=4, kl_coef=0.5, kl_estimator="k3"), out=tmp_path)
    agent.save(tmp_path)
    again = PPO.load(tmp_path)
    assert (again.env.num_envs, again.env.group_size, again.env.kl_estimator) == (16, 4, "k3")
    assert (again.kl.coef, again.kl.estimator) == (0.5, "k3")
    assert PPO.load(tmp_path, vector(group_size=2)).config.group_size == 2


def tiny_model() -> Any:
    from textrl_gym.models import tiny

    return tiny.gpt2(5, 5, seed=3)


@pytest.mark.parametrize(
    ("of_env", "of_agent", "message"),
    [
        ({"kl_coef": 0.5}, {"kl_coef": 0.1}, "kl_coef=0.1 of PPO and kl_coef=0.5 of the environment differ"),
        ({"kl_estimator": "k3"}, {"kl_estimator": "k2"}, "kl_estimator='k2' of PPO and kl_estimator='k3' of the env"),
        ({"missing_eos_penalty": 1.0}, {"missing_eos_penalty": 0.5}, "missing_eos_penalty=0.5 of PPO and .*=1.0 of"),
        ({"group_size": 4}, {"group_size": 8}, "group_size=8 does not fit the given .* which has group_size=4"),
        ({}, {"rollout_episodes": 32}, "rollout_episodes=32 does not fit the given .* which has num_envs=16"),
    ],
)
def test_a_setting_that_the_environment_contradicts_is_refused(
    of_env: dict[str, Any], of_agent: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PPO(vector(**of_env), **of_agent)
    PPO(vector(**of_env), **{name: of_env.get(name, 16) for name in of_agent})  # the same twice is fine


def test_set_env_refuses_another_kl_coefficient() -> None:
    agent = PPO("CopyText-v0", kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 of PPO and kl_coef=0\.5 of the environment differ"):
        agent.set_env(vector(kl_coef=0.5))
    agent.set_env(vector(kl_coef=0.1))


def test_the_clock_does_not_depend_on_collect(tmp_path: Path) -> None:
    class Own(GRPO):
        Config = GRPOConfig

        def collect(self) -> textrl_gym.Rollout:  # as docs/write-your-own-agent.md invites
            return textrl_gym.collect(self.env, self.policy, kl_coef=0.0, generator=self.generator)

    def rates(cls: type[Agent], out: Path) -> list[float]:
        cls("CopyText-v0", out=out, learning_rate=1e-3).learn(1_000, **QUIET)
        return [json.loads(line)["train/learning_rate"] for line in (out / "progress.json").read_text().splitlines()]

    own, plain = rates(Own, tmp_path / "own"), rates(GRPO, tmp_path / "plain")
    assert own[0] == plain[0] == 1e-3  # before the first rollout nothing is done
    steps = [json.loads(line) for line in (tmp_path / "own" / "progress.json").read_text().splitlines()]
    done = [0, *(row["time/total_timesteps"] for row in steps)]
    # lr = 1e-3 (1 - timesteps before the rollout / total)
    assert own == pytest.approx([1e-3 * (1 - before / 1_000) for before in done[:-1]], abs=1e-12, rel=0)
    assert len(own) > 3 and own[-1] < 4e-4


def test_the_clock_counts_updates(tmp_path: Path) -> None:
    seen = []

    class Watch(GRPO):
        def update(self, rollout: textrl_gym.Rollout) -> dict[str, float]:
            seen.append((self.clock.update, self.num_timesteps > 0))
            return super().update(rollout)

    agent = Watch("CopyText-v0", out=tmp_path)
    agent.learn(700, **QUIET)
    assert [number for number, _ in seen] == list(range(1, agent.num_updates + 1))
    agent.learn(300, reset_num_timesteps=False, **QUIET)
    assert [number for number, _ in seen] == list(range(1, agent.num_updates + 1))
