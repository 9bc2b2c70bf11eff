"""Rewards as TRL calls them: asynchronous ones, None for a row, trainer_state, log_extra, log_metric, any columns."""

from __future__ import annotations

import asyncio
import functools
import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from textrl_gym.agents import GRPO, SB3PPO
from textrl_gym.agents.grpo import group_advantages
from textrl_gym.core import Rollout
from textrl_gym.envs.tldr_summarize import TLDRSummarize
from textrl_gym.judges.judge import Answer, load_judge
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.pipeline import sft
from textrl_gym.rewards import RewardFunction, load_reward

PROMPTS = ["p", "p", "q", "p"]
TEXTS = ["a", "b c", "d", "e f g"]
QUIET: dict[str, Any] = {"eval_every": 1, "eval_episodes": 4, "progress_bar": False, "on_bad_health": "warn"}


def mixture(**parts: Any) -> RewardFunction:
    return RewardFunction("both", {name: (1.0, function) for name, function in parts.items()})


# -- asynchronous -----------------------------------------------------------------------------------------------------


def test_asynchronous_rewards_run_side_by_side() -> None:
    started: list[str] = []

    def waiting(own: str, other: str) -> Any:
        async def reward(completions: list[str], answer: list[float], **kwargs: Any) -> list[float]:
            started.append(own)
            while other not in started:  # for ever, if one ran after the other
                await asyncio.sleep(0)
            return answer

        return reward

    both = mixture(one=waiting("one", "two"), length=load_reward("length"), two=waiting("two", "one"))
    expected = [2 * n + len(text.split()) for n, text in enumerate(TEXTS)]
    assert both(PROMPTS, TEXTS, answer=[0.0, 1.0, 2.0, 3.0]).tolist() == expected

    async def notebook() -> list[float]:
        """Where a loop runs already."""
        return both(PROMPTS, TEXTS, answer=[0.0, 1.0, 2.0, 3.0]).tolist()

    assert asyncio.run(notebook()) == expected


def test_asynchronous_rewards_keep_one_loop() -> None:
    loops = []

    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        load_reward(reward)(PROMPTS, TEXTS)
    assert loops[0] is loops[1]


def test_an_exception_of_an_asynchronous_reward_names_the_row() -> None:
    async def mine(completions: list[str], **kwargs: Any) -> list[float]:
        return [1 / (len(text) - 3) for text in completions]

    with pytest.raises(RuntimeError, match=r"reward 'mine' raised on row 1, completion 'b c': ZeroDivisionError"):
        load_reward(mine)(PROMPTS, TEXTS)

    def fails(completions: list[str], **kwargs: Any) -> list[float]:
        raise KeyError("x")

    with pytest.raises(RuntimeError, match="reward 'fails' raised on row 0"):  # and no coroutine is left over
        mixture(mine=mine, fails=fails)(PROMPTS, TEXTS)


# -- None -------------------------------------------------------------------------------------------------------------


def test_none_is_a_part_that_does_not_apply(capsys: pytest.CaptureFixture[str]) -> None:
    def maths(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0, None, 2.0, None]

    def code(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None, 5.0, 0.5, None]

    both = RewardFunction("both", {"maths": (1.0, maths), "code": (2.0, code)})
    for _ in range(2):
        scores = both.score(PROMPTS, TEXTS, {})
        # 1; 2 * 5; 2 + 2 * 0.5; nothing: the mean of its prompt's others, (1 + 10) / 2.
        assert scores.total_B.tolist() == [1.0, 10.0, 3.0, 5.5]
    assert scores.components["maths"].isnan().tolist() == [False, True, False, True]
    said = capsys.readouterr().err
    assert said.count("reward 'both' gave None for completion 'e f g'") == 1


def test_none_gives_no_advantage() -> None:
    def mine(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0, 4.0, None, None]

    score_B = load_reward(mine)(["p"] * 4, TEXTS)
    assert score_B.tolist() == [1.0, 4.0, 2.5, 2.5]
    advantage_B, _ = group_advantages(score_B, torch.zeros(4, dtype=torch.long), scale_by_std=False, std_eps=1e-4)
    assert advantage_B.tolist() == [-1.5, 1.5, 0.0, 0.0]  # as TRL: the mean is of the scored ones


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, None, 4.0], [1.0, 2.0, 7 / 3, 4.0]),  # no other completion of its prompt: the mean of all
        ([None, None, None, None], [0.0] * 4),
    ],
)
def test_none_without_others(values: list[float | None], expected: list[float]) -> None:
    assert load_reward(lambda p, c: values)(PROMPTS, TEXTS).tolist() == pytest.approx(expected)


def test_nan_is_an_error_all_the_same() -> None:
    with pytest.raises(ValueError, match="gave nan for row 1"):
        load_reward(lambda p, c: [None, math.nan, 0.0, 0.0])(PROMPTS, TEXTS)


# -- what TRL gives ---------------------------------------------------------------------------------------------------


def copied(
    prompts: list[str],
    completions: list[str],
    *,
    trainer_state: Any,
    log_extra: Any,
    log_metric: Any,
    **kwargs: Any,
) -> list[float]:
    STATES.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch))
    log_extra("words", [len(text.split()) for text in completions])
    log_extra("odd", [{1: object()}] * len(completions))
    log_metric("mean_words", np.mean([len(text.split()) for text in completions]))
    scores = [float(p[:1] == c[:1]) for p, c in zip(prompts, completions, strict=True)]
    log_metric("mean_score", np.mean(scores))
    return scores


STATES: list[tuple[int, int, float]] = []


@pytest.mark.parametrize("cls", [GRPO, SB3PPO])
def test_a_reward_of_trl_in_training(cls: Any, tmp_path: Path) -> None:
    STATES.clear()
    env = gym.make_vec("CopyText-v0", num_envs=8, group_size=4, reward=copied)
    agent = cls(env, out=tmp_path, seed=0)
    agent.learn(72, **QUIET)
    assert [step for step, *_ in STATES] == sorted(step for step, *_ in STATES)
    assert {step for step, *_ in STATES} == set(range(agent.num_updates + 1))
    assert STATES[0][1:] == (3, 0.0)  # 72 tokens, 8 completions of at most 3; no pass over the prompts is done
    assert STATES[-1][1] >= agent.num_updates
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert all(0 <= row["logged/mean_words"] <= 3 for row in rows)
    if cls is GRPO:  # which calls it once a rollout, and whose evaluations are no part of training's means
        assert STATES[-1][2] == pytest.approx(agent.num_updates * 2 / 16)
        assert [row["logged/mean_score"] for row in rows] == pytest.approx([row["rollout/score"] for row in rows])
        assert len({row["rollout/score"] for row in rows}) > 1
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all(sample["logged"]["words"] == len(sample["completion"].split()) for sample in samples)
    assert all(sample["logged"]["odd"].startswith("{1: <object") for sample in samples)
    evaluations = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    for number, row in enumerate(
        evaluations
    ):  # of the policy's own completions, not the reference's or the greedy ones
        words = [sample["logged"]["words"] for sample in samples[4 * number : 4 * number + 4]]
        assert row["logged/mean_words"] == pytest.approx(sum(words) / 4)


def test_what_is_logged_goes_with_its_row() -> None:
    env = gym.make_vec("CopyText-v0", num_envs=8, group_size=4, reward=copied, array="torch")
    agent = GRPO(env, seed=0)
    rollout = agent.collect()
    words = [len(text.split()) for text in rollout.completions]
    assert rollout.logged["words"] == words
    assert rollout.select(torch.tensor([3, 1])).logged["words"] == [words[3], words[1]]
    agent.set_env(gym.make_vec("CopyText-v0", num_envs=8, group_size=4, reward="exact_match", array="torch"))
    joined = Rollout.cat([rollout, agent.collect()])
    assert joined.logged["words"] == [*words, *[None] * 8]


def test_stepping_tells_what_is_logged() -> None:
    env = gym.make("CopyText-v0", reward=copied)
    env.reset(seed=0)
    *_, info = env.step(0)
    assert info["logged"]["words"] == 0


def test_wrong_logs_are_named() -> None:
    def extra(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("words", [1, 2])
        return [0.0] * len(completions)

    def metric(completions: list[str], log_metric: Any) -> list[float]:
        log_metric("loss", math.nan)
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match=r"log_extra\('words'\) has 2 values for 4 completions"):
        load_reward(extra)(PROMPTS, TEXTS)
    with pytest.raises(RuntimeError, match=r"log_metric\('loss'\) must have a finite number, got nan"):
        load_reward(metric)(PROMPTS, TEXTS)


# -- columns ----------------------------------------------------------------------------------------------------------


class Judge:
    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def method(self, completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    @classmethod
    def of_class(cls, completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]


def scaled(completions: list[str], scale: float, **columns: Any) -> list[float]:
    return [scale * len(text) for text in completions]


NAMES = ["prompts", "completions", "self", "cls", "function", "name", "reward", "scale", "p", "c", "columns", "batch",
         "trainer_state", "log_extra", "log_metric"]  # fmt: skip


@pytest.mark.parametrize(
    "reward",
    [
        Judge(),
        Judge().method,
        Judge.of_class,
        functools.partial(scaled, scale=1.0),
        lambda p, c, **columns: [float(len(text)) for text in c],
        lambda p, c: [float(len(text)) for text in c],
        load_reward("length"),
    ],
)
def test_no_column_takes_the_place_of_anything(reward: Any) -> None:
    checked = load_reward(reward)
    columns: dict[str, list[Any]] = {name: ["x"] * 4 for name in NAMES}
    expected = [len(text.split()) if reward is checked else len(text) for text in TEXTS]
    assert checked.score(PROMPTS, TEXTS, columns).total_B.tolist() == expected
    rows = [{"prompt": p, **dict.fromkeys(NAMES, "x")} for p in PROMPTS]
    judge: Any = load_judge(reward)
    assert judge.score(rows, [Answer(text) for text in TEXTS]).tolist() == expected


def test_a_function_gets_the_column_that_it_names() -> None:
    def named(completions: list[str], reward: list[str], function: list[str]) -> list[float]:
        assert (reward, function) == (["r"] * 4, ["f"] * 4)
        return [1.0] * 4

    assert load_reward(named)(PROMPTS, TEXTS, reward=["r"] * 4, function=["f"] * 4).tolist() == [1.0] * 4


def test_data_with_such_columns(tmp_path: Path) -> None:
    post = "SUBREDDIT: r/tools\n\nTITLE: Key {}\n\nPOST: I lost the key.\n\nTL;DR:"
    rows = [{"prompt": post.format(n), "completion": " I lost a key.", **{key: ["a", "b"] for key in NAMES}}
            for n in range(3)]  # fmt: skip
    path = tmp_path / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for reward in ("length", "reward_model", "exact_match"):
        envs = gym.make_vec("TLDRSummarize-v0", num_envs=2, dataset=str(path), reward=reward, max_new_tokens=3)
        envs.reset(seed=0)
        *_, infos = envs.step(np.zeros(2, int))
        assert infos["completion"].tolist() == ["", ""]
    task = TLDRSummarize()
    tokenizer = task.load_tokenizer()
    row = sft.demonstrations(task, "train", EnvSettings(dataset=str(path)))[0]
    _, completions = sft.encode_row(task, tokenizer, row)
    assert [tokenizer.decode(ids) for ids in completions] == [" I lost a key.<|endoftext|>"]
