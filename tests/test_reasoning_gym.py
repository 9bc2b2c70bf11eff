"""Tasks of reasoning-gym as environments, with the library itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import textrl_gym
from textrl_gym.mdp.text_env import TextEnv
from textrl_gym.models.tokenizer import train_tokenizer

reasoning_gym = pytest.importorskip(
    "reasoning_gym", reason="needs reasoning-gym: pip install textrl-gym[reasoning-gym]"
)

from textrl_gym.integrations.reasoning_gym import (  # noqa: E402
    Problems,
    ReasoningGym,
    exact,
    is_scored_by_rule,
    open_problems,
    score,
    split_of,
)


def scores(name: str, answer: str, index: int = 0) -> tuple[float, float]:
    """The reward and the gold score of an answer to a problem."""
    row = Problems(name, "train")[index]
    columns: Any = {"problems": [name], "entry": [row["entry"]]}
    return score([answer], **columns)[0], exact([answer], **columns)[0]


def test_rows_are_those_of_the_library() -> None:
    settings = 'chain_sum:{"min_terms": 2, "max_terms": 2}'
    row = Problems(settings, "test", "\nAnswer:")[3]
    library = reasoning_gym.create_dataset("chain_sum", min_terms=2, max_terms=2, seed=0, size=1_000_000)
    expected = library[row["entry"]["metadata"]["source_index"]]
    assert row["prompt"] == expected["question"] + "\nAnswer:"
    assert row["completion"] == expected["answer"]
    assert len(Problems(settings, "train")) == 1_000_000


def test_no_problem_is_in_two_splits() -> None:
    one, two = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=10) for seed in (5, 6))
    assert one[1]["question"] == two[0]["question"]  # why a seed for each split would not do
    few = reasoning_gym.create_dataset("coin_flip", seed=0, size=2_000)
    early = {few[i]["question"] for i in range(500)}
    assert sum(few[i]["question"] in early for i in range(1_000, 1_100)) > 50  # nor would ranges of one seed
    splits = [{Problems("coin_flip", s)[i]["prompt"] for i in range(60)} for s in ("train", "validation", "test")]
    assert sum(len(prompts) for prompts in splits) == len(set().union(*splits))


def test_a_task_with_too_few_problems_is_refused() -> None:
    single = 'tower_of_hanoi:{"min_disks": 3, "max_disks": 3, "size": 1}'
    splits = ["train", "validation", "test"]
    splits.remove(split_of(open_problems(single)[0]["question"]))
    for split in splits:
        with pytest.raises(ValueError, match="too few different ones"):
            Problems(single, split)


@pytest.mark.parametrize("name", ["chain_sum", "list_functions", "countdown", "mini_sudoku"])
def test_a_row_is_a_function_of_its_place(name: str) -> None:
    random.seed(7)
    before = random.getstate()
    first = [Problems(name, "train")[i]["prompt"] for i in (0, 1, 2)]
    random.seed(8)
    assert first == [Problems(name, "train")[i]["prompt"] for i in (2, 1, 0)][::-1]
    random.setstate(before)
    assert Problems(name, "train")[0] and random.getstate() == before  # nor does it draw from the process's generator


def test_the_librarys_default_scorer_pays_what_is_wrong_and_ours_does_not() -> None:
    row = Problems("basic_arithmetic", "train")[0]
    wrong = f"{row['completion']}0"
    assert open_problems("basic_arithmetic").score_answer(wrong, row["entry"]) >= 0.5
    assert scores("basic_arithmetic", wrong) == pytest.approx((0.0, 0.0))
    assert scores("basic_arithmetic", f" {row['completion']}\n") == pytest.approx((1.0, 1.0))


def test_own_rules_score_answers_other_than_the_reference() -> None:
    assert is_scored_by_rule("knights_knaves") and not is_scored_by_rule("basic_arithmetic")
    answer = Problems("knights_knaves", "train")[0]["completion"]
    assert scores("knights_knaves", f"So {answer}") == pytest.approx((1.0, 0.0))
    assert scores("prime_factorization", "none") == pytest.approx((0.0, 0.0))  # the library's scorer raises ValueError


@pytest.mark.parametrize(
    "name",
    [
        *("binary_matrix", "spiral_matrix", "string_insertion", "number_sorting", "n_queens", "countdown", "puzzle24"),
        *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
    ],
)
def test_a_completion_is_never_run_as_code(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    assert not is_scored_by_rule(name)
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for answer in (code, f"[{code}]"):
        assert scores(name, answer) == pytest.approx((0.0, 0.0))
    assert not mark.exists()
    if name == "binary_matrix":  # the library's own scorer runs it
        open_problems(name).score_answer(code, Problems(name, "train")[0]["entry"])
        assert mark.exists()


def test_an_environment_of_it() -> None:
    tokenizer = train_tokenizer(["State the final answer: 1 + 2 ="], 300)
    env = TextEnv(
        task=ReasoningGym(), dataset='chain_sum:{"min_terms": 2, "max_terms": 2}', tokenizer=tokenizer, max_new_tokens=8
    )
    _, info = env.reset(seed=0)
    row = env.source[int(info["prompt_index"])]
    talk = textrl_gym.TextActions(env)
    _, info = talk.reset(seed=0)
    _, reward, terminated, _, info = talk.step(row["completion"])
    assert terminated and reward == info["score"] == pytest.approx(1.0)
    assert info["prompt"] == row["prompt"]


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        ("no_such_task", "unknown task of reasoning-gym 'no_such_task'; allowed: ab, "),
        ('chain_sum:{"terms": 2}', "refuses .*terms"),
        ('chain_sum:{"min_terms": 0}', "refuses"),
        ("chain_sum:{", "refuses"),
    ],
)
def test_bad_names(problems: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReasoningGym().rows("train", problems)
    with pytest.raises(ValueError, match="unknown split"):
        ReasoningGym().rows("dev")
