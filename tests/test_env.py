"""Every registered environment, because it is registered: Gymnasium's, Stable-Baselines3's and our own checkers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import textrl_gym
from textrl_gym import registry
from textrl_gym.agents import Reinforce
from textrl_gym.core import Row, StopReason
from textrl_gym.evaluation.check_env import PROPERTIES, check_env
from textrl_gym.mdp.render import Renderer
from textrl_gym.mdp.task import load_task
from textrl_gym.mdp.text_env import TextEnv, TextVectorEnv

IDS = sorted(registry.env_ids())
COPY = "textrl_gym.envs.copy_text"
EOS_ID = 0


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_checker(env_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.make(env_id, disable_env_checker=True)
    assert isinstance(env.unwrapped, TextEnv)
    gymnasium_check(env.unwrapped)


@pytest.mark.parametrize("env_id", IDS)
def test_sb3_checker(env_id: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        sb3_check(gym.make(env_id).unwrapped)  # asserts; what it would rather have, it says
    assert not said


# One of each kind: symbols, a reward model, a rule, a reply to each turn.
QUICK = {"CopyText-v0", "TLDRSummarize-v0", "MathWords-v0", "GuessNumber-v0", "Tool-v0"}
IN_TURN = [pytest.param(env_id, marks=[] if env_id in QUICK else [pytest.mark.slow]) for env_id in IDS]


@pytest.mark.parametrize("env_id", IN_TURN)
def test_own_checker(env_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert textrl_gym.check_env(env_id) == list(PROPERTIES)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("env_id", IDS)
def test_spec_round_trip(env_id: str) -> None:
    one = gym.make(env_id, max_new_tokens=2, stop=["x y"], missing_eos_penalty=0.5)
    assert one.spec is not None
    two = EnvSpec.from_json(one.spec.to_json()).make()
    obs_one, info_one = one.reset(seed=5)
    obs_two, info_two = two.reset(seed=5)
    assert info_one == info_two
    assert all((obs_one[k] == obs_two[k]).all() for k in obs_one)
    for name in ("max_new_tokens", "stop", "missing_eos_penalty"):
        assert getattr(one.unwrapped, name) == getattr(two.unwrapped, name)


@pytest.mark.parametrize("env_id", IDS)
def test_card(env_id: str) -> None:
    """The docstring of a task is a card with a section for all that a user must know."""
    card = type(gym.make(env_id).unwrapped.task).__doc__ or ""  # type: ignore[attr-defined]
    sections = ("Description", "Observation Space", "Action Space", "Reward", "Episode End", "Information")
    for section in (*sections, "Arguments", "References", "Version History"):
        assert f"## {section}\n" in card, section


def test_id_needs_no_import(root: Path) -> None:
    code = """
import gymnasium as gym, json
env = gym.make("textrl_gym:CopyText-v0")
envs = gym.make_vec("textrl_gym:CopyText-v0", num_envs=2)
gym.make("TLDRSummarize-v0").reset(seed=0)
import sys
loaded = [name for name in ("textrl_gym.policy.policy", "peft", "transformers.modeling_utils") if name in sys.modules]
print(json.dumps([env.reset(seed=0)[1], type(envs.unwrapped).__name__, loaded]))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info, vector, loaded = json.loads(done.stdout)
    assert loaded == []  # what models need takes seconds to import, and stepping needs none
    assert set(info) == {"prompt_index"}
    assert vector == "TextVectorEnv"


def test_an_episode() -> None:
    env = TextEnv(task=COPY)
    observation, info = env.reset(options={"prompt_indices": [6]})  # the seventh of aa, ab, ac, ad, ba, bb, bc: "b c"
    assert info == {"prompt_index": 6}
    assert observation["input_ids"].tolist() == [2, 3, 0, 0, 0]  # EOS 0, a 1, b 2, c 3, d 4
    assert observation["attention_mask"].tolist() == [1, 1, 0, 0, 0]
    for action, place in ((2, 2), (3, 3)):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation["input_ids"][place] == action
        assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    observation, reward, terminated, truncated, info = env.step(np.int64(EOS_ID))
    assert observation["input_ids"].tolist() == [2, 3, 2, 3, 0]
    assert observation["attention_mask"].tolist() == [1] * 5
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info == {
        "score": 1.0,
        "prompt": "b c",
        "completion": "b c",
        "reference": "b c",
        "stop_reason": StopReason.EOS,
    }


def test_observations_are_copies() -> None:
    env = TextEnv(task=COPY)
    first, _ = env.reset(seed=0)
    kept = first["input_ids"].copy()
    second, *_ = env.step(1)
    assert (first["input_ids"] == kept).all()
    second["input_ids"][:] = 4  # an agent may write into what it was given
    third, *_ = env.step(2)
    assert third["input_ids"][:4].tolist() == [*kept[:2].tolist(), 1, 2]


def test_torch_arrays() -> None:
    env = TextEnv(task=COPY, array="torch")
    observation, _ = env.reset(seed=0)
    assert isinstance(observation["input_ids"], torch.Tensor)
    observation, reward, terminated, _, _ = env.step(torch.tensor(1))
    assert observation["input_ids"][2] == 1
    assert type(reward) is float
    assert type(terminated) is bool


def test_render_ansi() -> None:
    env = gym.make("CopyText-v0", render_mode="ansi")
    env.reset(options={"prompt_indices": [6]})
    env.step(1)
    assert env.render() == "b c a"
    env.step(EOS_ID)
    assert env.render() == "b c a <eos> [EOS]"


def test_render_rgb_array() -> None:
    env: Any = gym.make("TLDRSummarize-v0", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert isinstance(first, np.ndarray) and first.shape == (480, 640, 3) and first.dtype == np.uint8
    env.step(env.unwrapped.tokenizer(" word")["input_ids"][0])
    second = env.render()
    assert isinstance(second, np.ndarray)
    blue = (second == (0, 70, 140)).all(-1)
    assert blue.any() and not (first == (0, 70, 140)).all(-1).any(), "the completion has a colour of its own"


@pytest.mark.parametrize("text", ["x" * 5000, "", " ", "\n\n", "word " * 500, "日本語" * 50, "a\x00\x1b[2Jb"])
def test_any_text_is_a_picture(text: str) -> None:
    tokenizer = load_task("textrl_gym.envs.tldr_summarize").load_tokenizer()
    ids = tokenizer(text)["input_ids"]
    frame = Renderer(tokenizer).picture(ids, ids, StopReason.LENGTH)
    assert frame.shape == (480, 640, 3)
    margin = np.concatenate([frame[:, :8].reshape(-1), frame[:, -8:].reshape(-1)])
    assert (margin == 255).all(), "no line runs out of the picture"


def test_render_human(capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.make("CopyText-v0", render_mode="human")
    assert capsys.readouterr().out == ""  # nothing before an episode begins
    env.reset(options={"prompt_indices": [6]})
    for action in (2, 3, EOS_ID):
        env.step(action)
    assert env.render() is None
    assert capsys.readouterr().out == "\nb c b c <eos>\n[EOS] score 1.000\n"


def test_render_without_a_mode_warns() -> None:
    env = TextEnv(task=COPY)
    env.reset()
    with pytest.warns(UserWarning, match="without a render_mode"):
        assert env.render() is None


def test_carries_what_it_is_made_of() -> None:
    bare = gym.make("CopyText-v0").unwrapped
    for name in ("tokenizer", "task", "reward_model", "reference"):
        assert hasattr(bare, name), name
    assert not hasattr(bare, "nonsense")
    assert bare.reference is None  # type: ignore[attr-defined]
    penalised = gym.make("CopyText-v0", kl_coef=0.1).unwrapped
    assert penalised.reference is not None  # type: ignore[attr-defined]


def test_record_episode_statistics() -> None:
    env = gym.wrappers.RecordEpisodeStatistics(gym.make("CopyText-v0"))
    env.reset(options={"prompt_indices": [0]})
    env.step(1)
    *_, info = env.step(EOS_ID)
    # one of two symbols right, ended after one instead of two: 0.5 * 0 + 0.5 * 1/2
    assert (info["episode"]["r"], info["episode"]["l"]) == (0.25, 2)


def test_sb3_monitor_and_vec_env() -> None:
    envs = DummyVecEnv([lambda: Monitor(gym.make("CopyText-v0")) for _ in range(2)])
    envs.seed(0)
    observation = envs.reset()
    assert isinstance(observation, dict)
    assert observation["input_ids"].shape == (2, 5)
    envs.step(np.array([1, 1]))
    _, _, dones, infos = envs.step(np.array([EOS_ID, 1]))
    assert dones.tolist() == [True, False]
    assert infos[0]["episode"]["l"] == 2
    assert infos[0]["terminal_observation"]["attention_mask"].tolist() == [1, 1, 1, 1, 0]


def test_sb3_ppo_trains() -> None:
    agent = PPO("MultiInputPolicy", gym.make("CopyText-v0"), n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    agent.learn(64)
    assert agent.num_timesteps == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 2}, "num_envs is a setting of vector environments"),
        ({"autoreset_mode": "SameStep"}, "autoreset_mode is a setting of vector environments"),
        ({"group_size": 2}, "group_size=2 needs a vector environment"),
    ],
)
def test_settings_of_vector_environments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnv(task=COPY, **settings)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_completion_length", "(here max_new_tokens)"),  # TRL's
        ("beta", "(here kl_coef)"),
        ("max_tokens", "(here max_new_tokens)"),  # OpenAI's and vLLM's
        ("n_envs", "(did you mean 'num_envs'?)"),  # of an agent it is rollout_episodes, which no environment has
        ("max_new_token", "(did you mean 'max_new_tokens'?)"),
        ("output_dir", ""),
    ],
)
def test_settings_of_other_libraries_are_told_by_their_names_here(
    make: Callable[..., Any], name: str, hint: str
) -> None:
    words = re.escape(f"a text environment has no setting {name!r} {hint}".strip())
    with pytest.raises(ValueError, match=f"^{words}; allowed: num_envs, task, split, .*max_new_tokens"):
        make("CopyText-v0", **{name: 3})


def test_step_before_reset_and_after_the_end() -> None:
    env = TextEnv(task=COPY)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(1)
    env.reset(seed=0)
    env.step(EOS_ID)
    with pytest.raises(ValueError, match=r"^the episode has ended: call reset\(\)$"):
        env.step(1)


# -- check_env sees what is wrong -------------------------------------------------------------------------------------


class Faulty(TextVectorEnv):
    """A vector environment with one fault, named by the class attribute."""

    fault = ""

    def step(self, actions: Any) -> Any:
        if self.fault == "silent zero" and self.kl_coef > 0 and not isinstance(actions, dict):
            actions = {"token": actions, "logprob": np.zeros(self.num_envs, np.float32)}
        observation, reward_B, terminated_B, truncated_B, infos = super().step(actions)
        if self.fault == "early reward":
            reward_B = reward_B + 0.25
        if self.fault == "tokens behind the end":
            observation["input_ids"][:, -1] = 1
        return observation, reward_B, terminated_B, truncated_B, infos

    def _observation(self) -> dict[str, Any]:
        observation = super()._observation()
        if self.fault == "right-padded":
            observation = {k: np.roll(v, -1, axis=1) for k, v in observation.items()}
        if self.fault == "mask forgets EOS":
            observation["attention_mask"] *= observation["input_ids"] != self.eos_id
        return observation

    def draw(self, indices: Any = None) -> Any:
        rows, ids = super().draw(indices)
        if self.fault == "ungrouped":
            rows = [{"prompt": str(b)} for b in range(self.num_envs)]
        return rows, ids


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("early reward", "the score comes only at the end: row 0, step 0: reward 0.25, expected 0.0"),
        ("tokens behind the end", "left-padded: row 0, step 0: tokens where the mask is 0"),
        ("mask forgets EOS", "a step appends one token, .*: step 1, attention_mask, row"),
        ("silent zero", "a KL penalty without the policy's log-probability is an error: .* raised no ValueError"),
        ("right-padded", "left-padded: row 0, step 0: the prompt is not left-padded"),
        ("ungrouped", "rows of a group share their prompts: rows 0 and 1: another prompt"),
    ],
)
def test_faults_are_seen(fault: str, message: str) -> None:
    faulty = type("Faulty", (Faulty,), {"fault": fault})(2, task=COPY)
    with pytest.raises(AssertionError, match=message):
        check_env(faulty)


def test_a_reward_that_looks_at_its_batch_is_seen() -> None:
    def crowd(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(prompts))] * len(prompts)

    with pytest.raises(AssertionError, match="a vector of N is N singles"):
        check_env(TextVectorEnv(2, task=COPY, reward=crowd))


def test_a_random_reward_is_seen() -> None:
    rng = np.random.default_rng(0)

    def dice(prompts: list[str], completions: list[str]) -> list[float]:
        return rng.random(len(prompts)).tolist()

    with pytest.raises(AssertionError, match="same seed"):
        check_env(TextEnv(task=COPY, reward=dice))


def test_a_warning_is_a_failure() -> None:
    def loud(prompts: list[str], completions: list[str]) -> list[float]:
        warnings.warn("loud", stacklevel=2)
        return [0.0] * len(prompts)

    with pytest.raises(AssertionError, match="loud"):
        check_env(TextEnv(task=COPY, reward=loud))


def test_check_env_leaves_the_environment_alone() -> None:
    env = gym.make("CopyText-v0")
    env.reset(options={"prompt_indices": [6]})
    env.step(2)
    check_env(env)
    env.step(3)
    assert env.step(EOS_ID)[1] == 1.0


def test_check_env_of_another_environment() -> None:
    with pytest.raises(ValueError, match="is not a text environment"):
        check_env("CartPole-v1")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Blackjack-v1"])  # with a vector environment, and without one
def test_an_agent_of_another_environment_is_refused_by_its_name(env_id: str) -> None:
    with pytest.raises(ValueError, match=f"^'{env_id}' is not a text environment"):
        Reinforce(env_id)
    agent = Reinforce("CopyText-v0", rollout_episodes=8)
    with pytest.raises(ValueError, match=f"^'{env_id}' is not a text environment"):
        agent.set_env(env_id)
    with pytest.raises(ValueError, match=f"^'{env_id}' is not a text environment"):
        textrl_gym.evaluate(agent, env_id, episodes=2)


def test_check_env_of_a_task_of_ones_own() -> None:
    assert check_env(TextEnv(task=Mine, reward="length")) == list(PROPERTIES)


class Mine(registry.load_object("textrl_gym.envs.copy_text:CopyText")):  # type: ignore[misc]
    """Prompts of unequal length and a long budget."""

    max_new_tokens = 20

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        return [{"prompt": "a"}, {"prompt": "b c"}, {"prompt": "d"}]


# -- a TimeLimit below the budget -------------------------------------------------------------------------------------


def test_a_time_limit_that_leaves_episodes_without_a_score_is_told() -> None:
    env = gym.wrappers.TimeLimit(gym.make("TLDRSummarize-v0", reward="length"), 5)
    for seed in range(5):
        env.reset(seed=seed)
        for _ in range(5):
            _, _, terminated, truncated, info = env.step(40)
        assert truncated and not terminated and "score" not in info
    with pytest.warns(UserWarning, match=r"5 episodes in a row were left after 5 tokens, .* give max_new_tokens=5"):
        env.reset(seed=5)


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5, 6, 5), (5, 5, 5, 48, 5, 5), (1, 1, 1, 1, 1, 1)])
def test_episodes_that_are_left_on_purpose_are_not(lengths: tuple[int, ...]) -> None:
    env = gym.make("TLDRSummarize-v0", reward="length", max_new_tokens=48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in lengths:
            env.reset(seed=0)
            for _ in range(length):
                _, _, _, truncated, _ = env.step(40)
            assert truncated == (length == 48)
        env.reset()
