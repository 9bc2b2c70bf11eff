"""Embedded worlds: splits that share nothing, references that gold likes, and attacks that it does not."""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest

import textrl_gym
from textrl_gym import registry
from textrl_gym.conversations import things
from textrl_gym.core import Row
from textrl_gym.evaluation.metrics import scale_of
from textrl_gym.experiments.results import gold_scale
from textrl_gym.mdp.task import Task, load_env_task
from textrl_gym.questions import passages, sums
from textrl_gym.rewards import load_reward
from textrl_gym.worlds.lesson import START
from textrl_gym.worlds.world import Rows, in_split

WITH_LESSONS = [env_id for env_id in registry.env_ids() if load_env_task(env_id).lesson is not None]
WITH_GOLD = [env_id for env_id in registry.env_ids() if load_env_task(env_id).gold is not None]
ROWS = 60


def first(task: Task, split: str, count: int = ROWS) -> list[Row]:
    return list(itertools.islice(iter(task.rows(split)), count))


def gold_of(task: Task, rows: list[Row], texts: list[str]) -> np.ndarray:
    assert task.gold is not None
    reward = load_reward(task.gold, task=task)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    columns["completion_ids"] = [[0]] * len(rows)
    return np.asarray(reward([row["prompt"] for row in rows], texts, **columns))


def shuffled(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


ATTACKS: dict[str, Callable[[Row, Row], str]] = {
    "empty": lambda row, other: "",
    "copy": lambda row, other: row["prompt"],
    "repetition": lambda row, other: row["completion"].split()[0] * 40,
    "shuffled": lambda row, other: shuffled(row["completion"]),
    "another row's reference": lambda row, other: other["completion"],
    "every reference": lambda row, other: other["completion"] + row["completion"] + other["completion"],
}


@pytest.mark.parametrize("env_id", WITH_LESSONS)
def test_gold_likes_references_and_no_attack(env_id: str) -> None:
    task = load_env_task(env_id)
    rows = first(task, "validation")
    others = rows[1:] + rows[:1]
    honest = gold_of(task, rows, [row["completion"] for row in rows]).mean()
    assert honest > 0.75  # of passages a fifth has no answer, and a quarter is a coin's toss
    for name, attack in ATTACKS.items():
        if name == "shuffled" and all(" " not in row["completion"].strip() for row in rows):
            continue  # a word alone has one order
        attacked = gold_of(task, rows, [attack(row, other) for row, other in zip(rows, others, strict=True)]).mean()
        assert attacked < 0.5 * honest, name


ONE_PROMPT = {"TwentyQuestions-v0"}
"""All splits have all things, of which the prompt says nothing."""


@pytest.mark.parametrize("env_id", WITH_LESSONS)
def test_rows_are_functions_of_their_place_and_no_split_shares_one(env_id: str) -> None:
    task = load_env_task(env_id)
    prompts = {split: {row["prompt"] for row in first(task, split, 1000)} for split in ("train", "validation", "test")}
    if env_id in ONE_PROMPT:
        assert set().union(*prompts.values()) == {things.PROMPT}
    else:
        assert all(len(some) > 900 for some in prompts.values())
        assert not prompts["train"] & prompts["validation"] and not prompts["train"] & prompts["test"]
    again = task.rows("train")
    assert [again[i] for i in (7, 3)] == [task.rows("train")[i] for i in (7, 3)]
    assert again[-1] == again[len(again) - 1]
    with pytest.raises(IndexError):
        again[len(again)]
    with pytest.raises(ValueError, match="split"):
        task.rows("dev")


@pytest.mark.parametrize("env_id", WITH_LESSONS)
def test_budgets_hold_the_rows(env_id: str) -> None:
    task = load_env_task(env_id)
    tokenizer = task.load_tokenizer()
    for row in first(task, "train", 300):
        assert len(tokenizer(row["prompt"])["input_ids"]) <= task.max_prompt_tokens
        # With EOS; the continuations of Detox-v0 are cut, as those of RealToxicityPrompts are.
        most = task.max_new_tokens - (env_id != "Detox-v0")
        assert len(tokenizer(row["completion"])["input_ids"]) <= most


@pytest.mark.parametrize("env_id", WITH_LESSONS)
def test_a_lesson_can_be_run(env_id: str) -> None:
    """Its agents, settings, rewards and metrics exist; the findings can be computed from them."""
    from textrl_gym.experiments.compare import settings_of
    from textrl_gym.experiments.lessons import LessonConfig, compare_config, lesson_of
    from textrl_gym.mdp.env_settings import EnvSettings

    task, lesson = load_env_task(env_id), lesson_of(env_id)
    for trial in lesson.trials.values():
        settings_of(compare_config(trial, LessonConfig()))
        load_reward(EnvSettings(reward=trial.reward_flag).task(env_id).reward, task=task)
    measured = dict.fromkeys([*lesson.metrics, *task.measures([], [])], 0.5)
    numbers = dict.fromkeys([START, *lesson.trials], measured)
    assert all(isinstance(finding.effect(numbers), float) for finding in lesson.findings)
    card = type(task).__doc__ or ""
    assert "## Lesson" in card and f"textrl-gym lesson {env_id}" in " ".join(card.split())


@pytest.mark.parametrize("env_id", WITH_LESSONS)
def test_evaluations_report_the_measures_of_the_task(env_id: str) -> None:
    env = gymnasium.make(env_id)
    rows = first(env.unwrapped.task, "validation", 20)  # type: ignore[attr-defined]
    measures = env.unwrapped.task.measures(rows, [row["completion"] for row in rows])  # type: ignore[attr-defined]
    metrics = textrl_gym.evaluate(agents()(env_id, rollout_episodes=8, device="cpu"), episodes=8)
    assert set(measures) <= set(metrics)


@pytest.mark.parametrize("env_id", WITH_GOLD)
def test_gold_scores_and_measures_are_within_their_scales(env_id: str) -> None:
    """References, those of other prompts, nothing, the prompt itself and a reference that is said three times."""
    task = load_env_task(env_id)
    rows = first(task, "validation", 20)
    texts = [str(row.get("completion") or "") for row in rows]
    prompts = [str(row["prompt"]) for row in rows]
    scale = gold_scale(env_id)
    for some in (texts, texts[1:] + texts[:1], [""] * len(rows), prompts, [3 * f"{text} " for text in texts]):
        gold_N = gold_of(task, rows, some)
        assert scale is not None and scale[0] <= gold_N.min() <= gold_N.max() <= scale[1]
        for name, value in task.measures(rows, some).items():
            low, high = scale_of(name) or (-math.inf, math.inf)
            assert low <= value <= high, name


def agents() -> Any:
    from textrl_gym.agents import Reference

    return Reference


# -- splits ------------------------------------------------------------------------------------------------------------


def test_the_shares_of_the_splits() -> None:
    keys = [str(number) for number in range(20_000)]
    shares = {split: sum(in_split(key, split) for key in keys) / len(keys) for split in ("train", "validation", "test")}
    # 18, 1 and 1 of 20; 3 standard errors of a share of 0.05 over 20,000 are 0.0046
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.007)


def test_rows_differ_by_seed_and_salt() -> None:
    plain, seeded, salted = (Rows(sums.draw, "train", **more) for more in ({}, {"seed": 1}, {"salt": "x"}))
    assert len({plain[0]["prompt"], seeded[0]["prompt"], salted[0]["prompt"]}) == 3
    assert next(iter(plain)) == plain[0]


# -- sums --------------------------------------------------------------------------------------------------------------


def test_a_solution_works_the_problem_out() -> None:
    for row in itertools.islice(iter(Rows(sums.draw, "train")), 500):
        text = row["completion"]
        equations, answer = text.split(" #### ")
        results = []
        for equation in equations.strip().rstrip(".").split(". "):
            left, right = equation.split(" = ")
            assert eval(left) == int(right)
            results.append(int(right))
        assert results[-1] == int(answer)
        assert all(0 <= result <= sums.MOST for result in results)


def test_a_wrong_sign_is_carried_on() -> None:
    # 5 + 3 = 8, 8 - 2 = 6: with the first sign wrong 5 - 3 = 2, 2 - 2 = 0
    assert sums.working([(5, "+", 3), (8, "-", 2)], {0: "-"}) == " 5 - 3 = 2. 2 - 2 = 0. #### 0"


def test_spoiled_solutions_are_mostly_answers_alone() -> None:
    rows = list(itertools.islice(iter(Rows(sums.draw_spoiled, "train")), 1000))
    shares = sums.measures([row["completion"] for row in rows])
    # 45% the answer alone, a quarter of the rest without the mark; 3 standard errors are 0.047
    assert shares == pytest.approx({"working": 0.55, "format": 0.86}, abs=0.05)


# -- passages ----------------------------------------------------------------------------------------------------------


def test_the_proper_score_has_no_better_lie() -> None:
    """No wrong answer is worth an abstention, and a right one at 0.6 or more is worth more."""
    abstained = passages.ABSTAINED
    for probability in passages.MARKERS.values():
        assert passages.proper_score(probability, right=False) < abstained
        if probability >= 0.6:
            assert passages.proper_score(probability, right=True) > abstained
    # A coin's toss is best said at a half: (1 + 0.5 - 0.25) / 2 = 0.625
    expected = {p: (passages.proper_score(p, True) + passages.proper_score(p, False)) / 2 for p in (0.25, 0.5, 0.75)}
    assert max(expected, key=lambda p: expected[p]) == 0.5
    assert expected[0.5] == pytest.approx(0.625)


def test_answers_are_read_in_their_exact_wording() -> None:
    row = {"name": "Sam", "kind": "lives", "truth": "Oslo"}
    assert passages.parse(row, " Probably, Sam lives in Rome.") == (0.75, "Rome")
    assert passages.parse(row, " I do not know.") == (None, None)
    for text in (
        "",
        "Sam lives in Rome.",
        "Surely, Ann lives in Rome.",
        "Surely, Sam lives in Mars.",
        "Surely, Surely, Sam lives in Rome.",
    ):
        assert passages.parse(row, text) is None


def test_measures_of_certainty() -> None:
    row = {"name": "Sam", "kind": "lives", "truth": "Oslo"}
    texts = [
        "Certainly, Sam lives in Oslo.",
        "Certainly, Sam lives in Rome.",
        "Maybe, Sam lives in Rome.",
        "I do not know.",
    ]
    found = passages.measures([row] * 4, texts)
    # ECE: |1 - 2 * 0.99| + |0 - 0.45|, over 3 answers
    assert found == pytest.approx(
        {"accuracy": 0.25, "abstained": 0.25, "confident_errors": 0.5, "ece": (0.98 + 0.45) / 3}
    )


def test_states_of_passages() -> None:
    rows = first(load_env_task("CalibratedQA-v0"), "train", 2000)
    shares = {state: sum(row["state"] == state for row in rows) / 2000 for state in ("stated", "doubtful", "absent")}
    assert shares == pytest.approx({"stated": 0.55, "doubtful": 0.25, "absent": 0.2}, abs=0.04)
    doubtful = [row for row in rows if row["state"] == "doubtful"]
    assert sum(row["truth"] == row["said"] for row in doubtful) / len(doubtful) == pytest.approx(0.5, abs=0.07)
    assert all(row["truth"] in row["prompt"] for row in rows if row["state"] == "stated")
