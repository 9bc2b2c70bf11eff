"""The world of sums: word problems of one to three steps, with their working, as in GSM8K (Cobbe et al. 2021).

    Sam has 12 shells. Ann has 5 pears. Sam finds 7 more shells. How many shells does Sam have?
    12 + 7 = 19. #### 19

Numbers go to 20, and a sentence with a number that does not matter may stand anywhere but first. The split is by a hash
of the equations: no sequence of them stands in two splits.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

from textrl_gym.core import Row
from textrl_gym.worlds.world import in_split

NAMES = ("Sam", "Ann", "Tom", "Eva", "Max", "Ida", "Leo", "Amy", "Ben", "Zoe", "Jim", "Kim", "Ron", "Una", "Dan", "Mia")
THINGS = ("shells", "pears", "coins", "books", "cards", "stamps", "eggs", "keys", "plates", "roses", "hats", "nails")
MOST = 20
"""The largest number of a problem."""
GAINS = ("{name} finds {n} more.", "{name} buys {n} more {things}.", "{other} gives {name} {n} {things}.")
LOSSES = ("{name} loses {n}.", "{name} sells {n} of them.", "{name} gives {n} {things} to {other}.")
BAGS = ("{name} gets {k} bags with {n} {things} each.", "{other} brings {k} boxes of {n} {things}.")
ASIDES = ("{other} has {n} {others}.", "{other} is {n} years old.", "There are {n} {others} on the table.")
ANSWER = "\nAnswer:"


Equation = tuple[int, str, int]
"""Left, sign, right."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a problem: its sentence, and the equations that work it out."""

    kind: str
    numbers: tuple[int, ...]
    equations: tuple[Equation, ...]


SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def draw_steps(rng: random.Random) -> tuple[int, list[Step]]:
    """The first number and one to three steps that keep every number from 0 to MOST."""
    total = first = rng.randint(2, 18)
    steps = []
    for _ in range(rng.choice((1, 1, 2, 2, 2, 3))):
        kinds = [
            kind for kind, fits in (("gain", total < MOST - 1), ("loss", total > 2), ("bags", total < MOST - 7)) if fits
        ]
        kind = rng.choice(kinds)
        if kind == "bags":
            k = rng.randint(2, 4)
            n = rng.randint(2, (MOST - total) // k)
            equations: tuple[Equation, ...] = ((k, "*", n), (total, "+", k * n))
            numbers: tuple[int, ...] = (k, n)
            total += k * n
        else:
            n = rng.randint(1, min(15, MOST - total if kind == "gain" else total - 1))
            sign = "+" if kind == "gain" else "-"
            equations = ((total, sign, n),)
            numbers = (n,)
            total = SIGNS[sign](total, n)
        steps.append(Step(kind, numbers, equations))
    return first, steps


def written(left: int, sign: str, right: int) -> str:
    """An equation with its result: "12 + 7 = 19"."""
    return f"{left} {sign} {right} = {SIGNS[sign](left, right)}"


def draw(split: str, rng: random.Random) -> Row:
    """A problem of a split: `prompt`, `completion` (the working and the answer) and `equations`."""
    while True:
        first, steps = draw_steps(rng)
        equations = [equation for step in steps for equation in step.equations]
        if in_split(" ".join(written(*equation) for equation in equations), split):
            break
    name, other = rng.sample(NAMES, 2)
    things, others = rng.sample(THINGS, 2)
    words = {"name": name, "other": other, "things": things, "others": others}
    sentences = [f"{name} has {first} {things}."]
    for step in steps:
        texts = {"gain": GAINS, "loss": LOSSES, "bags": BAGS}[step.kind]
        numbers = dict(zip(("k", "n") if step.kind == "bags" else ("n",), step.numbers, strict=True))
        sentences.append(rng.choice(texts).format(**words, **numbers))
    if rng.random() < 0.5:
        aside = rng.choice(ASIDES).format(**words, n=rng.randint(2, 20))
        sentences.insert(rng.randint(1, len(sentences)), aside)
    sentences.append(f"How many {things} does {name} have?")
    return {"prompt": " ".join(sentences) + ANSWER, "completion": working(equations), "equations": equations}


def working(equations: list[Equation], signs: dict[int, str] | None = None) -> str:
    """The working and the answer; signs: place of an equation -> a sign to write in place of its own.

    What follows a wrong equation goes on from its result, as a learner's mistake would.
    """
    texts, carried = [], dict[int, int]()
    result = 0
    for place, (left, sign, right) in enumerate(equations):
        left, right = carried.get(left, left), carried.get(right, right)
        sign = (signs or {}).get(place, sign)
        result = SIGNS[sign](left, right)
        right_result = SIGNS[equations[place][1]](*equations[place][::2])
        if result != right_result:
            carried[right_result] = result
        texts.append(f"{left} {sign} {right} = {result}.")
    return " " + " ".join(texts) + f" #### {result}"


def spoiled(row: Row, rng: random.Random) -> str:
    """A poor solution: most often the answer alone, sometimes working with a wrong sign or without the mark."""
    equations = row["equations"]
    if rng.random() < 0.45:
        result = SIGNS[equations[-1][1]](equations[-1][0], equations[-1][2])
        return f" #### {result}"
    signs = {place: rng.choice("+-") for place in range(len(equations)) if rng.random() < 0.15}
    text = working(equations, signs)
    return text.partition(" ####")[0] if rng.random() < 0.25 else text


def draw_spoiled(split: str, rng: random.Random) -> Row:
    """A problem with a poor solution."""
    row = draw(split, rng)
    return {"prompt": row["prompt"], "completion": spoiled(row, rng)}


def draw_teaching(split: str, rng: random.Random) -> Row:
    """A problem with its solution or, as often, an equation without a story: a start has to learn to reckon."""
    row = draw(split, rng)
    if rng.random() < 0.5:
        return row
    left, sign, right = rng.choice(row["equations"])
    return {"prompt": f"{left} {sign} {right} =", "completion": f" {SIGNS[sign](left, right)}."}


EQUATION = re.compile(r"\d [-+*] \d+ = -?\d")
ANSWERED = re.compile(r"####\s*-?\d+\s*\Z")


def measures(completions: Sequence[str]) -> dict[str, float]:
    """The shares of solutions with working and with the mark at the end, right or wrong."""
    count = max(len(completions), 1)
    return {
        "working": sum(EQUATION.search(text) is not None for text in completions) / count,
        "format": sum(ANSWERED.search(text) is not None for text in completions) / count,
    }
