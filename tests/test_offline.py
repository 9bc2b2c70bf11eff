"""Offline RL: trajectories in files, rollouts and Minari, and the agents that learn from them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import test_turns
import torch
from minibatches import minibatch
from torch import Tensor

import textrl_gym
from textrl_gym.agents import AWR, PPO, FilteredBC
from textrl_gym.agents.awr import AWRConfig, awr_loss
from textrl_gym.agents.filtered_bc import best_share
from textrl_gym.agents.raft import raft_loss
from textrl_gym.cli import main
from textrl_gym.core import Rollout, StopReason
from textrl_gym.data.trajectories import (
    Trajectory,
    as_rollout,
    read_trajectories,
    trajectories_of,
    vocabulary_hash,
    write_trajectories,
)
from textrl_gym.envs import known_optimum
from textrl_gym.mdp.text_env import TextVectorEnv, vector_env
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_agent
from textrl_gym.rollouts.collect import collect
from textrl_gym.rollouts.recording import record
from textrl_gym.training.agent import Agent
from textrl_gym.training.minibatch import places_of_update

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 16}
CPU = torch.device("cpu")


def recorded(env_id: str = "CopyText-v0", episodes: int = 40, seed: int = 0) -> tuple[TextVectorEnv, list[Trajectory]]:
    """The environment, and trajectories of its initial policy."""
    mdp = vector_env(gym.make_vec(env_id, num_envs=16, array="torch", autoreset_mode="Disabled"))
    play = functools.partial(collect, policy=Policy(mdp.task.load_model()), kl_coef=0.0)
    return mdp, [one for batch in record(mdp, play, episodes, seed, CPU) for one in batch]


def conversations() -> tuple[TextVectorEnv, Rollout]:
    mdp = test_turns.make_env(12)
    mdp.reset(seed=3)
    rollout = collect(mdp, Policy(test_turns.make_model()), uniform_BT=test_turns.uniforms(12))
    assert rollout.reply_BT is not None and rollout.reply_BT.any()
    return mdp, rollout


# -- data -------------------------------------------------------------------------------------------------------------


def test_recording_passes_over_the_prompts_and_is_a_function_of_the_seed() -> None:
    mdp, trajectories = recorded(episodes=40)
    assert len(trajectories) == 40 and recorded(episodes=40)[1] == trajectories
    assert recorded(seed=1)[1] != trajectories
    prompts = [one.prompt for one in trajectories]
    for first in (0, 16):  # CopyText has 16 prompts: each once in a pass
        assert sorted(prompts[first : first + 16]) == sorted(mdp.source[i]["prompt"] for i in range(16))
    assert all(one.total == one.score and one.rewards[:-1] == [0.0] * (len(one.rewards) - 1) for one in trajectories)


@pytest.mark.parametrize("spoken", [False, True], ids=["single", "turns"])
def test_a_rollout_becomes_a_file_and_the_same_rollout(spoken: bool, tmp_path: Path) -> None:
    if spoken:
        mdp, rollout = conversations()
    else:
        mdp, trajectories = recorded()
        rollout = as_rollout(trajectories, CPU)
    write_trajectories(tmp_path / "t.jsonl", trajectories_of(rollout), mdp.tokenizer, environment="some")
    facts, trajectories = read_trajectories(tmp_path / "t.jsonl", mdp.tokenizer)
    assert facts["environment"] == "some" and trajectories == trajectories_of(rollout)
    again = as_rollout(trajectories, CPU)
    for field in dataclasses.fields(Rollout):
        ours, theirs = getattr(again, field.name), getattr(rollout, field.name)
        if isinstance(theirs, Tensor) and field.name not in ("ref_logp_BT", "group_B", "turn_BT"):
            # A turn's reward is a difference of float32 sums.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if theirs.dtype.is_floating_point else 0)
        elif field.name in ("prompts", "completions", "turns"):
            assert ours == theirs
    if spoken:
        assert rollout.turn_BT is not None and again.turn_BT is not None
        present = rollout.present_BT
        assert torch.equal(again.turn_BT[present], rollout.turn_BT[present])
        assert torch.equal(again.mask_BT, rollout.mask_BT) and not torch.equal(again.mask_BT, again.present_BT)


def test_wrong_files_name_themselves(tmp_path: Path) -> None:
    mdp, trajectories = recorded(episodes=2)
    file = tmp_path / "t.jsonl"
    write_trajectories(file, trajectories, mdp.tokenizer)
    head, first, second = file.read_text().splitlines()
    with pytest.raises(ValueError, match=r"has ids of a tokenizer with the hash .* its ids mean other tokens"):
        read_trajectories(file, gym.make("KnownOptimum-v0").unwrapped.tokenizer)  # type: ignore[attr-defined]
    for lines, words in (
        ([first], "holds no trajectories: its first line must have 'trajectories': 1"),
        ([head], "holds no episode"),
        ([head, first, json.dumps(json.loads(second) | {"stop": "END"})], "line 3: stop must be one of RUNNING, EOS"),
        ([head, json.dumps(json.loads(first) | {"rewards": [1.0] * 9})], "line 2: rewards must have one value for"),
        ([head, json.dumps(json.loads(first) | {"token_ids": [-1]})], "line 2: token_ids must be token ids"),
        ([head, json.dumps(json.loads(first) | {"score": "high"})], "line 2: score must be a finite number"),
        ([head, json.dumps({"prompt_ids": [1]})], "line 2: an episode has completion, logp, prompt"),
        ([head, json.dumps(json.loads(first) | {"turn": 3})], "line 2: turn must be a list, got 3"),
    ):
        file.write_text("".join(line + "\n" for line in lines))
        with pytest.raises(ValueError, match=words):
            read_trajectories(file)
    with pytest.raises(ValueError, match="there is no file of trajectories"):
        read_trajectories(tmp_path / "none.jsonl")


# -- Minari -----------------------------------------------------------------------------------------------------------


def test_minari_gives_back_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari", reason="the extra minari is not installed")
    from textrl_gym.integrations.minari import from_minari, to_minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    mdp, trajectories = recorded(episodes=6)
    env = gym.make("CopyText-v0")
    dataset = to_minari(trajectories, "copy/reference-v0", env, author="me")
    assert dataset.total_episodes == 6 and dataset.total_steps == sum(len(one.token_ids) for one in trajectories)
    assert from_minari("copy/reference-v0", mdp.tokenizer) == trajectories
    # What Minari's own users see: stepping the actions gives its observations and rewards.
    again = minari.load_dataset("copy/reference-v0").recover_environment()
    places = {mdp.source[place]["prompt"]: place for place in range(16)}
    for episode, one in zip(dataset.iterate_episodes(), trajectories, strict=True):
        observation, _ = again.reset(options={"prompt_indices": [places[one.prompt]]})
        for n, action in enumerate(episode.actions):
            assert all((episode.observations[name][n] == observation[name]).all() for name in observation)
            observation, reward, terminated, truncated, _ = again.step(action)
            ends = (reward, terminated, truncated)
            assert (episode.rewards[n], episode.terminations[n], episode.truncations[n]) == ends
    with pytest.raises(ValueError, match=r"'copy/reference-v0' already: minari\.delete_dataset removes it"):
        to_minari(trajectories, "copy/reference-v0", env)
    with pytest.raises(ValueError, match="no local Minari data set 'copy/none-v0'"):
        from_minari("copy/none-v0")
    with pytest.raises(ValueError, match="its ids mean other tokens"):
        from_minari("copy/reference-v0", gym.make("KnownOptimum-v0").unwrapped.tokenizer)  # type: ignore[attr-defined]


def test_minari_keeps_turns_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari", reason="the extra minari is not installed")
    from textrl_gym.integrations.minari import from_minari, to_minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    _, rollout = conversations()
    trajectories = trajectories_of(rollout)
    env = textrl_gym.TextEnv(task=test_turns.Echo, reward=test_turns.points)
    dataset = to_minari(trajectories, "echo/reference-v0", env)
    assert dataset.total_steps == rollout.num_tokens < int(rollout.present_BT.sum())
    for ours, theirs in zip(from_minari(dataset), trajectories, strict=True):
        acts = [not reply for reply in theirs.replies]
        # A reply's number of its turn is the turn's before it.
        assert [t for t, act in zip(ours.turn, acts, strict=True) if act] == [
            t for t, act in zip(theirs.turn, acts, strict=True) if act
        ]
        assert dataclasses.replace(ours, turn=[]) == dataclasses.replace(theirs, turn=[])


# -- what is learnt from them -----------------------------------------------------------------------------------------


def test_updates_pass_over_all_items_in_orders_of_their_own() -> None:
    places = [i for update in range(6) for i in places_of_update(update, 5, 10, seed=1)]
    passes = [places[first : first + 10] for first in (0, 10, 20)]
    assert all(sorted(one) == list(range(10)) for one in passes) and len({tuple(one) for one in passes}) == 3
    assert places_of_update(0, 4, 10, seed=1, first_in_order=True) == [0, 1, 2, 3]
    assert places_of_update(1, 7, 3, 0) == [i for u in range(14) for i in places_of_update(u, 1, 3, 0)][7:]


def test_best_share_by_hand() -> None:
    return_N = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0])
    assert best_share(return_N, 0.2).tolist() == [1]  # the first of equals
    assert best_share(return_N, 0.5).tolist() == [1, 2, 3]  # ceil(2.5)
    assert best_share(return_N, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_awr_loss_by_hand() -> None:
    # G - V = 1, -1 | 3, beta 2: weights e^0.5, e^-0.5 | e^1.5 = 4.48, clipped to 4. log pi -1, -2 | -0.5.
    # policy: (e^0.5 + 2 e^-0.5 + 4 * 0.5) / 3; value: half the mean of 1, 1, 9 = 11 / 6
    mask_BT = torch.tensor([[True, True], [True, False]])
    logp_BT = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]], dtype=torch.float64)
    value_BT = torch.tensor([[0.0, 1.0], [-1.0, 9.0]], dtype=torch.float64, requires_grad=True)
    part = minibatch(mask_BT, return_BT=torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64))
    loss, metrics = awr_loss(logp_BT, value_BT, part, AWRConfig(max_weight=4.0, vf_coef=0.3), 2.0)
    policy = (math.exp(0.5) + 2 * math.exp(-0.5) + 2) / 3
    assert metrics["policy_loss"].item() == pytest.approx(policy, abs=1e-12)
    assert metrics["clipped_weights"].item() == pytest.approx(1 / 3)
    assert loss.item() == pytest.approx(policy + 0.3 * 11 / 6, abs=1e-12)
    loss.backward()  # through the squared error alone: 0.3 (V - G) / 3
    assert value_BT.grad is not None
    expected = torch.tensor([[-0.1, 0.1], [-0.3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(value_BT.grad, expected, rtol=0, atol=1e-12)


def test_awr_with_a_huge_beta_is_behaviour_cloning() -> None:
    # exp(A / beta) -> 1
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    logp_BT = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    part = minibatch(mask_BT, return_BT=torch.ones(2, 3, dtype=torch.float64))
    loss, _ = awr_loss(logp_BT, torch.zeros_like(logp_BT), part, AWRConfig(vf_coef=0.0), 1e12)
    assert loss.item() == pytest.approx(raft_loss(logp_BT, part)[0].item(), abs=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: awr_loss(x, torch.zeros_like(x), part, AWRConfig(), 0.5)[0], (logp_BT.requires_grad_(),)
    )


def target(agent: AWR, prompt: str) -> Tensor:
    """The distribution that AWR's objective has its optimum at on these very data. float64 [40]."""
    place_of = {tuple(ids): n for n, ids in enumerate(known_optimum.completions())}
    weight_Y = torch.zeros(len(place_of), dtype=torch.float64)
    for one in agent.trajectories:
        if one.prompt == prompt:
            weight_Y[place_of[tuple(one.token_ids)]] += math.exp(one.total / agent.kl.coef)
    return weight_Y / weight_Y.sum()


@pytest.mark.slow
def test_awr_reaches_the_known_optimum_without_the_environment(tmp_path: Path) -> None:
    agent = AWR(
        "KnownOptimum-v0", seed=0, num_trajectories=4_000, rollout_episodes=256, learning_rate=5e-3, max_weight=100.0,
        out=tmp_path,
    )  # fmt: skip
    reference = agent.policy.reference
    assert reference is not None
    before = known_optimum.distance(agent.policy, reference, agent.kl.coef)
    agent.learn(30_000, **QUIET)
    assert before > 0.1 and known_optimum.distance(agent.policy, reference, agent.kl.coef) < 0.04
    for prompt in known_optimum.PROMPTS:
        target_Y, logp_Y = target(agent, prompt), known_optimum.sequence_logprobs(agent.policy, prompt)
        assert float(torch.special.xlogy(target_Y, target_Y).sum() - (target_Y * logp_Y).sum()) < 0.08


@pytest.mark.parametrize("cls", [FilteredBC, pytest.param(AWR, marks=pytest.mark.slow)])
def test_they_are_better_than_the_policy_that_wrote_the_data(cls: type[Agent], tmp_path: Path) -> None:
    mdp, trajectories = recorded(episodes=1_000)
    write_trajectories(tmp_path / "t.jsonl", trajectories, mdp.tokenizer)
    agent = cls("CopyText-v0", seed=0, learning_rate=3e-3, dataset=str(tmp_path / "t.jsonl"), out=tmp_path / "run")
    agent.learn(8_000, **QUIET)
    behaviour = sum(one.score for one in trajectories) / len(trajectories)
    score = textrl_gym.evaluate(agent, episodes=64)["score"]
    assert behaviour < 0.12 and score > behaviour + 0.1


def test_the_data_of_a_file_are_resumed(tmp_path: Path) -> None:
    mdp, trajectories = recorded(episodes=30)
    write_trajectories(tmp_path / "t.jsonl", trajectories, mdp.tokenizer)
    settings: dict[str, Any] = {"dataset": str(tmp_path / "t.jsonl"), "rollout_episodes": 8, "share": 0.5, "seed": 2}
    whole = FilteredBC("CopyText-v0", out=tmp_path / "whole", **settings).learn(150, **QUIET)
    parted = FilteredBC("CopyText-v0", out=tmp_path / "parted", **settings)

    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        if parted.num_updates == 2:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        parted.learn(150, callback=stop, **QUIET)
    again = load_agent(tmp_path / "parted", out=tmp_path / "parted")
    again.learn(150 - again.num_timesteps, reset_num_timesteps=False, **QUIET)
    ours, theirs = (torch.cat([p.flatten() for p in a.policy.parameters()]) for a in (again, whole))
    assert torch.equal(ours, theirs) and again.num_timesteps == whole.num_timesteps


def test_bad_data_and_settings_name_themselves(tmp_path: Path) -> None:
    mdp, trajectories = recorded(episodes=4)
    write_trajectories(tmp_path / "t.jsonl", trajectories, mdp.tokenizer)
    with pytest.raises(ValueError, match=r"episode \d has 3 tokens, over max_new_tokens=2"):
        FilteredBC(gym.make("CopyText-v0", max_new_tokens=2), dataset=str(tmp_path / "t.jsonl"))
    with pytest.raises(ValueError, match="its ids mean other tokens"):
        AWR("KnownOptimum-v0", dataset=str(tmp_path / "t.jsonl"))
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        FilteredBC("CopyText-v0", share=0.0)
    with pytest.raises(ValueError, match="kl_coef is beta, by which advantages become weights: it must be > 0, got 0"):
        AWR("CopyText-v0", kl_coef=0.0)


# -- the command ------------------------------------------------------------------------------------------------------


def test_collect_writes_what_a_saved_agent_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PPO("CopyText-v0", seed=0, rollout_episodes=8, out=tmp_path / "ppo").learn(30, **QUIET)
    file = tmp_path / "t.jsonl"
    args = ["collect", "CopyText-v0", "--agent", str(tmp_path / "ppo"), "--episodes", "20", "--out", str(file)]
    assert main.main(args) == 0
    facts, trajectories = read_trajectories(file)
    assert facts["environment"] == "CopyText-v0" and facts["agent"] == str(tmp_path / "ppo") and len(trajectories) == 20
    assert facts["tokens"] == vocabulary_hash(gym.make("CopyText-v0").unwrapped.tokenizer)  # type: ignore[attr-defined]
    assert {one.stop for one in trajectories} <= {StopReason.EOS, StopReason.LENGTH}
    assert main.main(args) == 2 and "there is" in capsys.readouterr().err  # never written over
    assert main.main(["collect", "CopyText-v0", "--episodes", "5", "--out", str(tmp_path / "r.jsonl")]) == 0
    assert read_trajectories(tmp_path / "r.jsonl").facts["agent"] is None
