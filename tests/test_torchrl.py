"""Text environments as TorchRL's: its checker, its collector and PPO, and the same rewards as stepping."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode

from textrl_gym.core import Message, Reply, Row
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.models import tiny

reason = "needs TorchRL: pip install '.[torchrl]'"
utils: Any = pytest.importorskip("torchrl.envs.utils", reason=reason)

from textrl_gym.integrations.torchrl import TorchRLEnv  # noqa: E402

SYMBOLS = ("a", "b", "c")


class Echo(Task):
    """A conversation of up to three turns with a reward for each."""

    max_prompt_tokens, max_new_tokens, max_turns, max_turn_tokens = 2, 12, 3, 2
    turn_markers = ("", "")
    model = "made in code"
    reward = "zero"

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": "a b"}, {"prompt": "c"}]

    def reply(self, row: Row, turns: Sequence[Message]) -> Reply:
        words = turns[-1]["content"].split()
        return Reply("b", 0.5 * len(words), done="c" in words)

    def load_tokenizer(self, name: str | None = None) -> Any:
        return tiny.symbol_tokenizer(SYMBOLS)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_torchrls_checker_passes(kl_coef: float) -> None:
    env = TorchRLEnv("KnownOptimum-v0", num_envs=3, kl_coef=kl_coef)
    utils.check_env_specs(env, seed=0, break_when_any_done="both")


def test_torchrls_checker_passes_a_conversation() -> None:
    env = TorchRLEnv(TextVectorEnv(3, task=Echo))
    utils.check_env_specs(env, seed=0, break_when_any_done="both")
    rollout = env.rollout(12, break_when_any_done=False)
    assert rollout["next", "reward"].unique().numel() > 1
    assert (rollout["next", "score"] == 0).all()


def test_rewards_are_those_of_stepping() -> None:
    settings: dict[str, Any] = {"num_envs": 4, "kl_coef": 0.1}
    torch.manual_seed(0)
    env = TorchRLEnv("KnownOptimum-v0", **settings)
    env.set_seed(3)
    rollout = env.rollout(8, break_when_any_done=False)
    mdp: Any = gym.make_vec("KnownOptimum-v0", autoreset_mode=AutoresetMode.DISABLED, array="torch", **settings)
    observation, _ = mdp.reset(seed=3)
    for t in range(8):
        step = rollout[:, t]
        assert all(torch.equal(observation[name], step[name]) for name in observation)
        action = {"token": step["action"], "logprob": step["action_log_prob"]}
        observation, reward, terminated, truncated, infos = mdp.step(action)
        assert torch.equal(reward.float(), step["next", "reward"].squeeze(-1))
        assert torch.equal(terminated | truncated, step["next", "terminated"].squeeze(-1))
        assert torch.equal(truncated, step["next", "truncated"].squeeze(-1))
        assert torch.equal(infos["kl"].float(), step["next", "kl"].squeeze(-1))
        done = terminated | truncated
        if done.any():
            assert infos["score"][done].tolist() == step["next", "score"].squeeze(-1)[done].tolist()
            observation, _ = mdp.reset(options={"reset_mask": done})
    assert rollout["next", "truncated"].any() and rollout["next", "done"].sum() > 4


def test_what_is_refused() -> None:
    env = TorchRLEnv("KnownOptimum-v0", num_envs=2, kl_coef=0.1)
    action = env.reset().set("action", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="return_log_prob=True"):
        env.step(action)
    with pytest.raises(ValueError, match='kl_estimator="full"'):
        TorchRLEnv("KnownOptimum-v0", kl_coef=0.1, kl_estimator="full")
    with pytest.raises(ValueError, match="num_envs, kl_coef are settings of an environment that is named"):
        TorchRLEnv(TextVectorEnv(2, task=Echo), num_envs=2, kl_coef=0.1)
    with pytest.raises(ValueError, match="not a text environment"):
        TorchRLEnv(gym.make_vec("CartPole-v1", num_envs=2))


@pytest.mark.filterwarnings("default:Creating .* WeightUpdaterBase:DeprecationWarning")  # by its own import
def test_torchrls_ppo_learns_on_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "examples"))
    before, after = importlib.import_module("torchrl_ppo").main(frames=4_608)
    assert after > before + 0.1
