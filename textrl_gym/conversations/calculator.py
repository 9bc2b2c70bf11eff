"""The world of a calculator: sums of which some can be done by heart, and a tool for the others.

    Sam has 12 boxes of 7 eggs and 35 more . How many ?
    agent:       CALC 12 * 7
    environment: = 84
    agent:       CALC 84 + 35
    environment: = 119
    agent:       #### 119

A call costs, a wrong one more, and the right answer is worth 1. Sums of small numbers can be known by heart; the others
are split by a hash of the calls that they need, so that those of one split are not in another. That language
models can learn to call a calculator by a mark in their text is of Schick et al. 2023 (arXiv:2302.04761).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textrl_gym.conversations.replay import replay
from textrl_gym.core import Message, Reply, Row
from textrl_gym.worlds.world import in_split

NAMES = ("Sam", "Ann", "Tom", "Eva", "Max", "Ida", "Leo", "Amy", "Ben", "Zoe", "Jim", "Kim", "Ron", "Una", "Dan", "Mia")
THINGS = ("shells", "pears", "coins", "books", "cards", "stamps", "eggs", "keys", "plates", "roses", "hats", "nails")
MOST = 200
"""The largest number that is a word of the bundled model."""
SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
CALL, ANSWER, RESULT, UNCLEAR = "CALC", "####", "=", "= ?"
COST = 0.1
"""Of a call."""
WRONG_COST = 0.3
"""Of a call that the calculator cannot work out, and of a turn that neither calls nor answers."""
KINDS = ("easy",) * 6 + ("one",) * 8 + ("two",) * 6
"""30, 40 and 30 of 100 problems: by heart, by one call, by two."""
SYMBOLS = (
    *(str(number) for number in range(MOST + 1)),
    *NAMES,
    *THINGS,
    *SIGNS,
    *(CALL, ANSWER, RESULT, "?", ".", "has", "finds", "loses", "boxes", "of", "and", "more", "How", "many"),
)
"""The words of the bundled model."""

_CALL = re.compile(rf"^{CALL}\b(.*)$", re.MULTILINE)
_SUM = re.compile(r"\s*(\d+)\s*([-+*])\s*(\d+)\s*")
_ANSWER = re.compile(rf"{ANSWER}\s*(-?\d+)\s*\Z")
LONGEST = 12
"""Digits of a number that the calculator takes."""


def calculate(text: str) -> int | None:
    """What the calculator makes of "12 * 7"; None where that is no sum, difference or product of two whole numbers."""
    match = _SUM.fullmatch(text)
    if match is None or max(len(match[1]), len(match[3])) > LONGEST:
        return None
    return SIGNS[match[2]](int(match[1]), int(match[3]))


def reply(row: Row, turns: Sequence[Message]) -> Reply:
    """The calculator's result, or the end. A turn with a call is a call, whatever else is in it."""
    text = turns[-1]["content"]
    call = _CALL.search(text)
    if call is not None:
        result = calculate(call[1])
        # A result that the model has no word for would be no reply to it.
        if result is None or not -1 < result <= row.get("most", MOST):
            return Reply(UNCLEAR, -WRONG_COST)
        return Reply(f"{RESULT} {result}", -COST)
    answer = _ANSWER.search(text)
    if answer is None:
        return Reply(UNCLEAR, -WRONG_COST)
    right = int(answer[1]) == row["answer"]
    return Reply("right" if right else f"wrong: {row['answer']}", float(right), done=True)


class Problem(NamedTuple):
    """The numbers of a problem and what works it out."""

    words: str
    equations: tuple[tuple[int, str, int], ...]


def draw_problem(kind: str, rng: random.Random) -> Problem:
    """Numbers of a problem that a call or two works out, or, of the kind "easy", that are small."""
    if kind == "easy":
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return Problem(f"{a} {{things}} and finds {b} more", ((a, "+", b),))
    if kind == "two":
        a, b = rng.randint(3, 30), rng.randint(3, 9)
        if a * b > MOST - 10:
            return draw_problem(kind, rng)
        c = rng.randint(10, min(99, MOST - a * b))
        return Problem(f"{a} boxes of {b} {{things}} and {c} more", ((a, "*", b), (a * b, "+", c)))
    way = rng.choice(("product", "sum", "difference"))
    if way == "product":
        a, b = rng.randint(11, 66), rng.randint(3, 9)
        if a * b > MOST:
            return draw_problem(kind, rng)
        return Problem(f"{a} boxes of {b} {{things}}", ((a, "*", b),))
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    if way == "sum":
        return Problem(f"{a} {{things}} and finds {b} more", ((a, "+", b),))
    a, b = max(a, b), min(a, b)
    return Problem(f"{a} {{things}} and loses {b}", ((a, "-", b),))


def draw(split: str, rng: random.Random) -> Row:
    """A problem of a split: `prompt`, `answer`, `calls` (that it needs) and `completion` (the best player's turns)."""
    while True:
        kind = rng.choice(KINDS)
        problem = draw_problem(kind, rng)
        name, things = rng.choice(NAMES), rng.choice(THINGS)
        prompt = f"{name} has {problem.words.format(things=things)} . How many ?"
        # What is to be known by heart must be in training; it is the wording then that is new.
        key = prompt if kind == "easy" else " ".join(f"{a}{sign}{b}" for a, sign, b in problem.equations)
        if in_split(key, split):
            break
    a, sign, b = problem.equations[-1]
    row = {"prompt": prompt, "answer": SIGNS[sign](a, b), "calls": 0 if kind == "easy" else len(problem.equations)}
    row["equations"] = problem.equations
    return {**row, "completion": "\n".join(best_turns(row))}


def best_turns(row: Row) -> list[str]:
    """The turns of a player who calls where a problem needs it, and only there."""
    calls = [call_of(equation) for equation in row["equations"]] if row["calls"] else []
    return [*calls, f"{ANSWER} {row['answer']}"]


def call_of(equation: tuple[int, str, int]) -> str:
    """A call: "CALC 12 * 7"."""
    return " ".join((CALL, *map(str, equation)))


def taught(row: Row, lines: Sequence[str]) -> Row:
    """A row with the conversation that an agent's turns give, to learn from."""
    return {"prompt": row["prompt"], "completion": "\n".join(lines), "turns": replay(reply, row, "\n".join(lines))[0]}


def draw_reference(split: str, rng: random.Random) -> Row:
    """A problem as a competent player does it; easy ones at times with a needless call, so that both are known."""
    row = draw(split, rng)
    lines = best_turns(row)
    if not row["calls"] and rng.random() < 0.3:
        lines = [call_of(row["equations"][0]), *lines]
    return taught(row, lines)


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A problem as a careless player does it: guesses where it should call, calls where it knows, calls twice."""
    row = draw(split, rng)
    calls = [call_of(equation) for equation in row["equations"]]
    chance = rng.random()
    if chance < 0.45:
        calls = calls[: len(calls) - 1]
    elif chance < 0.6:
        calls = [*calls, calls[-1]]
    elif chance < 0.7:  # a call that the calculator cannot work out
        calls = [calls[0].rpartition(" ")[0], *calls]
    return taught(row, [*calls, f"{ANSWER} {row['answer']}"])


# -- what is measured --------------------------------------------------------------------------------------------------


def right(prompts: list[str], completions: list[str], answer: list[int], **columns: list[Any]) -> list[float]:
    """1 for a conversation that ends with the right answer, else 0."""
    return [float(outcome({"answer": value}, text).right) for value, text in zip(answer, completions, strict=True)]


def calls(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
    """How often a conversation calls, to be weighed as a further cost: {"...calculator:calls": -1}."""
    return [float(outcome({"answer": None}, text).calls) for text in completions]


class Outcome(NamedTuple):
    """How a conversation went."""

    right: bool
    calls: int
    wrong_calls: int


def outcome(row: Mapping[str, Any], text: str) -> Outcome:
    """How a conversation went, from the agent's turns, a line each."""
    turns, replies = replay(reply, row, text)
    right = bool(replies) and replies[-1].done and replies[-1].reward > 0
    called = sum(_CALL.search(turn["content"]) is not None for turn in turns[::2])
    return Outcome(right, called, sum(one.text == UNCLEAR for one in replies))


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Means over problems: calls, those that it did not need and those that it lacked, and wrong ones.

    An answer that is not right lacks the calls that it left out, a right one none.
    """
    outcomes = [outcome(row, text) for row, text in zip(rows, completions, strict=True)]
    count = max(len(outcomes), 1)
    pairs = list(zip(rows, outcomes, strict=True))
    return {
        "calls": sum(one.calls for one in outcomes) / count,
        "calls_needed": sum(row["calls"] for row in rows) / count,
        "needless_calls": sum(max(0, one.calls - row["calls"]) for row, one in pairs) / count,
        "missing_calls": sum(max(0, row["calls"] - one.calls) for row, one in pairs) / count,
        "wrong_calls": sum(one.wrong_calls for one in outcomes) / count,
    }
