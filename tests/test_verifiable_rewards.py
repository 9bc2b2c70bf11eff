"""Rewards that a rule decides: number, format, json_valid."""

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textrl_gym.rewards import load_reward
from textrl_gym.rewards.number import final_number


def scores(name: str, completions: list[str], **columns: Any) -> list[float]:
    return load_reward(name)(["p"] * len(completions), completions, **columns).tolist()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234.50 are left", Fraction(2469, 2)),
        ("She has 3 apples.\n#### 18", 18),
        ("#### -3", -3),
        ("#### \u22123", -3),
        ("#### $1,000 in 3 days", 1000),  # behind the mark the first
        ("#### 1\n#### 2", 2),  # behind the last mark
        ("it is \\boxed{\\frac{1}{2}}, not 7", Fraction(1, 2)),
        ("\\boxed{\\dfrac{-3}{4}}", Fraction(-3, 4)),
        ("\\boxed{{12}} of 20", 12),
        ("\\boxed{12", 12),  # cut off by the budget
        ("a 1 b 2.", 2),
        ("$18.", 18),
        ("18%", 18),
        ("3.0", 3),
        ("-4", -4),
        ("(-4)", -4),
        ("5-3", 3),  # a subtraction, no sign
        ("GPT-4", 4),
        ("10,20", 20),  # no thousands
        ("1 / 3", Fraction(1, 3)),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("####", None),
        ("#### none", None),
        ("9" * 500, None),
        ("\u0661\u0662", None),  # Arabic-Indic digits
    ],
)
def test_final_number(text: str, number: Any) -> None:
    assert final_number(text) == number


@given(st.integers(-(10**12), 10**12))
def test_an_integer_is_found_however_it_is_written(number: int) -> None:
    for text in (
        f"#### {number}",
        f"#### {number:,}",
        f"The answer is {number}.",
        f"\\boxed{{{number}}}",
        f"{number}.0",
    ):
        assert final_number(text) == number


@given(st.text(max_size=60))
def test_any_text_has_a_number_or_none(text: str) -> None:
    assert final_number(text) is None or isinstance(final_number(text), Fraction)


def test_number_compares_with_the_reference() -> None:
    answers = ["I think 17, no, 18", "#### 17", "nothing"]
    assert scores("number", answers, completion=["16 + 2 = <<16+2=18>>18\n#### 18"] * 3) == [1.0, 0.0, 0.0]
    assert scores("number", answers, answer=["#### 18"] * 3) == [1.0, 0.0, 0.0], "GSM8K's own column"
    with pytest.raises(RuntimeError, match=r"row 0.*the reference text has no number: 'none'"):
        scores("number", ["1"], completion=["none"])
    with pytest.raises(RuntimeError, match="needs a reference text, column 'completion'"):
        scores("number", ["1"])
    with pytest.raises(ValueError, match="takes no argument or 'math', given 'maths'"):
        load_reward("number:maths")


def test_expressions_are_compared_by_math_verify() -> None:
    pytest.importorskip("math_verify", reason="the extra math is not installed")
    answers = ["thus \\boxed{\\frac{2}{4}}", "The answer is 0.5", "so \\boxed{x + 1}", "?"]
    assert scores("number:math", answers, completion=["\\boxed{\\frac12}"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert scores("number:math", ["\\boxed{x^2+2x+1}"], completion=["\\boxed{(x+1)^2}"]) == [1.0]


def test_format_is_of_the_whole() -> None:
    name = "format:<think>.+</think>\\s*<answer>\\d+</answer>"
    answers = ["<think>two\nlines</think>\n<answer>4</answer>\n", "<think>a</think><answer>4</answer> indeed", ""]
    assert scores(name, answers) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="needs a pattern"):
        load_reward("format")
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        load_reward("format:(")


def test_json_valid() -> None:
    valid = ['{"a": [1, null]}', " 3 ", "```json\n{}\n```", "```\n[]\n```\n"]
    invalid = [
        "",
        "{'a': 1}",
        "{} {}",
        "NaN",
        '{"a": Infinity}',
        "```json\n{\n```",
        "text ```json\n{}\n```",
        "[" * 100_000,
    ]
    assert scores("json_valid", valid) == [1.0] * len(valid)
    assert scores("json_valid", invalid) == [0.0] * len(invalid)


@pytest.mark.skipif("TEXTRL_GYM_DATA" not in os.environ, reason="TEXTRL_GYM_DATA names no folder with real data")
def test_gsm8ks_answers_have_their_own_numbers() -> None:
    lines = (Path(os.environ["TEXTRL_GYM_DATA"]) / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert scores("number", answers, completion=answers) == [1.0] * len(answers)
