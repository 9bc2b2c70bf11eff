"""ReasoningGym-v0, and the problems of reasoning-gym behind it."""

from __future__ import annotations

import builtins
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import reasoning_gym

import textrl_gym
from textrl_gym.envs.reasoning_gym import ReasoningGym
from textrl_gym.questions.problems import (
    SPELLING,
    Problems,
    draw_misspelled,
    exact,
    is_scored_by_rule,
    level_settings,
    measures,
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
    env = gym.make("ReasoningGym-v0", dataset='spell_backward:{"min_word_len": 4, "max_word_len": 4}')
    _, info = env.reset(seed=0)
    row = env.unwrapped.source[int(info["prompt_index"])]  # type: ignore[attr-defined]
    talk = textrl_gym.TextActions(env)
    _, info = talk.reset(seed=0)
    _, reward, terminated, _, info = talk.step(row["completion"])
    assert terminated and reward == info["score"] == pytest.approx(1.0)
    assert info["prompt"] == row["prompt"] and "(example: sun -> nus)" in row["prompt"]
    _, info = talk.reset(seed=0)
    _, reward, _, _, info = talk.step(row["completion"][:2] + "##")
    assert reward == pytest.approx(0.5)  # two of four letters stand where they should


def test_rows_are_taken_from_the_settings_of_a_list_in_turn() -> None:
    rows = [Problems(SPELLING, "train")[i] for i in range(30)]
    lengths = [len(row["completion"]) for row in rows]
    assert all(length in ((3, 4), (5, 6), (7, 8))[i % 3] for i, length in enumerate(lengths)), lengths
    assert [row["hardest"] for row in rows] == [False, False, True] * 10
    assert set(lengths) == set(range(3, 9))


def test_what_is_measured_is_exact_answers_to_the_hardest() -> None:
    rows = [Problems(SPELLING, "validation")[i] for i in range(6)]
    texts = [row["completion"] for row in rows]
    assert measures(rows, [*texts[:5], "no"])["solved_hardest"] == pytest.approx(0.5)  # rows 2 and 5 are of 7 and 8
    assert measures(rows, [*["no"] * 5, texts[5]])["solved_hardest"] == pytest.approx(0.5)
    assert str(measures(rows[:2], texts[:2])["solved_hardest"]) == "nan"


def test_levels_are_those_of_the_librarys_curriculum() -> None:
    assert level_settings("spell_backward", 2) | {"data_file": ""} == {
        "min_word_len": 3,
        "max_word_len": 7,
        "data_file": "",
    }
    lengths = {len(Problems('spell_backward:{"level": 0}', "train")[i]["completion"]) for i in range(20)}
    assert lengths == {3}
    # What is said beside the level holds.
    mixed = Problems('spell_backward:{"level": 0, "max_word_len": 4}', "train")
    assert {len(mixed[i]["completion"]) for i in range(40)} == {3, 4}


def test_the_policy_is_taught_wrong_letters() -> None:
    rows = [draw_misspelled("train", random.Random(i)) for i in range(300)]
    pairs = [
        (letter, right)
        for row in rows
        for letter, right in zip(row["completion"], row["prompt"].split()[-2][::-1], strict=True)
    ]
    wrong = sum(letter != right for letter, right in pairs) / len(pairs)
    # 0.6, of which about one in five is the same letter again: of n letters one is the right one, and some are twice.
    assert 0.42 < wrong < 0.54, wrong
    assert all(row["prompt"].endswith("\nAnswer:") for row in rows)


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_reasoning_gym(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "reasoning_gym":
            raise ImportError("No module named 'reasoning_gym'")
        return real(name, *args, **kwargs)

    open_problems.cache_clear()
    monkeypatch.setattr(builtins, "__import__", no_reasoning_gym)
    with pytest.raises(ValueError, match=r"needs reasoning-gym .*pip install 'reasoning-gym"):
        gym.make("ReasoningGym-v0")


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        ("no_such_task", "unknown task of reasoning-gym 'no_such_task'; allowed: ab, "),
        ('chain_sum:{"terms": 2}', "refuses .*terms"),
        ('chain_sum:{"min_terms": 0}', "refuses"),
        ("chain_sum:{", "no JSON"),
        ("chain_sum:3", "a JSON object, or a list"),
        ("chain_sum:[]", "a JSON object, or a list"),
        ("chain_sum:[{}, 3]", "a JSON object, or a list"),
        ('chain_sum:[{}, {"terms": 2}]', "refuses .*terms"),
        ('acre:{"level": 0}', "no curriculum for 'acre'"),
        ('chain_sum:{"level": 99}', "no level 99; allowed: 0 to"),
        ('chain_sum:{"level": true}', "no level True"),
    ],
)
def test_bad_names(problems: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReasoningGym().rows("train", problems)
    with pytest.raises(ValueError, match="unknown split"):
        ReasoningGym().rows("dev")
