"""NaN and infinity: no optimizer step is taken from them, and a model that holds them is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from textrl_gym import functional, registry
from textrl_gym.agents import GRPO, PPO
from textrl_gym.core import Rollout
from textrl_gym.models import loading
from textrl_gym.pipeline import optim
from textrl_gym.training.agent import Agent

QUIET: dict[str, Any] = {"progress_bar": False, "eval_every": 0, "eval_episodes": 4}
AGENTS = [cls for cls in map(registry.load_agent_class, registry.names("agents")) if cls.trains]


def weights(agent: Agent) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


class Sentinel:
    """A reward that marks one completion by a sentinel, from the rollout of update `at` on."""

    def __init__(self, at: int, value: float) -> None:
        self.calls, self.at, self.value = 0, at, value

    def __call__(self, completions: list[str], **_: object) -> list[float]:
        self.calls += len(completions) == 8  # evaluations have 4
        scores = [float(len(set(text))) for text in completions]
        if self.calls >= self.at:
            scores[0] = self.value
        return scores


@pytest.mark.parametrize("cls", [PPO, registry.load_agent_class("reinforce"), registry.load_agent_class("rloo")])
def test_a_sentinel_reward_stops_the_run_before_the_step(cls: type[Agent], tmp_path: Path) -> None:
    # -3.4e38 is finite, and its square is not: the variance, the loss or the gradient overflows.
    env = gym.make_vec("CopyText-v0", num_envs=8, group_size=4, array="torch", reward=Sentinel(4, -3.4e38))
    agent = cls(env, seed=0, out=tmp_path)
    with pytest.raises(functional.NonFiniteError, match=r"update 4: the loss is (nan|-?inf)"):
        agent.learn(10_000, **QUIET)
    assert agent.num_updates == 3
    assert weights(agent).isfinite().all()


@pytest.mark.parametrize("cls", AGENTS)
def test_no_agent_steps_from_a_loss_of_nan(cls: type[Agent], tmp_path: Path) -> None:
    agent = cls("CopyText-v0", seed=0, rollout_episodes=8)
    rollout = agent.collect()
    bad = functional.NonFiniteError

    def poison(p: Tensor) -> None:
        p.register_hook(lambda grad: grad * math.nan)

    before = weights(agent)
    for p in agent.policy.parameters():
        if p.requires_grad:
            poison(p)
    with pytest.raises(bad, match="gradient norm is nan"):
        agent.update(rollout)
    assert torch.equal(weights(agent), before)


def test_the_loss_is_named_before_the_step() -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=8, group_size=4)
    rollout = agent.collect()
    before = weights(agent)
    rollout = dataclasses.replace(rollout, reward_BT=rollout.reward_BT * math.nan)
    with pytest.raises(functional.NonFiniteError, match="the loss is nan"):
        agent.update(rollout)
    assert torch.equal(weights(agent), before)


def test_a_rollout_with_an_infinite_log_probability_is_not_learnt_from(tmp_path: Path) -> None:
    class Broken(GRPO):
        def collect(self) -> Rollout:
            rollout = super().collect()
            if self.num_updates == 2:
                rollout.logp_BT[0, 0] = -math.inf
            return rollout

    agent = Broken("CopyText-v0", seed=0, rollout_episodes=8, group_size=4, out=tmp_path)
    with pytest.raises(functional.NonFiniteError, match=r"update 3: the log-probability of a token is -inf at 1 of"):
        agent.learn(10_000, **QUIET)
    assert agent.num_updates == 2


def test_a_step_to_infinite_weights_stops(tmp_path: Path) -> None:
    # Adam's first step is the learning rate times the gradient's sign: 1e30 in every weight, whose norm overflows.
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=8, group_size=4, learning_rate=1e30, out=tmp_path)
    with pytest.raises(functional.NonFiniteError, match="update 1: the norm of the weights after the optimizer step"):
        agent.learn(10_000, **QUIET)


def test_supervised_training_names_its_update() -> None:
    model = nn.Linear(2, 1)
    optimizer = optim.adamw(model, 0.1)
    optim.descend(model, optimizer, [model(torch.ones(1, 2)).sum()], 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(functional.NonFiniteError, match="update 2: the loss is nan"):
        optim.descend(model, optimizer, [model(torch.full((1, 2), math.nan)).sum()], 0.1, update=2)
    # sqrt has an infinite slope at 0: the loss is finite, and its gradient is not.
    with pytest.raises(functional.NonFiniteError, match=r"update 2: the gradient norm is (nan|inf)"):
        optim.descend(model, optimizer, [(model(torch.ones(1, 2)) * 0).sqrt().sum()], 0.1, update=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # Adam's step is about the learning rate: finite gradients, and weights whose norm is not.
    with pytest.raises(functional.NonFiniteError, match=r"update 3: the norm of the weights after it is inf"):
        optim.descend(model, optimizer, [model(torch.ones(1, 2)).sum()], 1e30, update=3)


def test_a_model_folder_with_nan_is_refused_by_the_tensor(tmp_path: Path) -> None:
    agent = GRPO("CopyText-v0", seed=0, rollout_episodes=8, group_size=4)
    agent.save(tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[3] = math.nan
    save_file(tensors, file, {"format": "pt"})
    size = tensors[name].numel()
    with pytest.raises(ValueError, match=rf"model': the tensor '{name}' has NaN or infinity at 1 of {size:,} places"):
        loading.load_model(tmp_path / "model")
    with pytest.raises(ValueError, match=name):
        GRPO("CopyText-v0", model=str(tmp_path / "model"))


def test_a_value_head_with_nan_is_refused(tmp_path: Path) -> None:
    PPO("CopyText-v0", seed=0, rollout_episodes=8).save(tmp_path)
    file = tmp_path / "value_head.safetensors"
    save_file({name: value * math.nan for name, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"value_head\.safetensors': the tensor 'weight' has NaN or infinity"):
        PPO.load(tmp_path)
