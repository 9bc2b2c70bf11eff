"""The world of bookings: requests of which half lack a fact, and a person who gives it when asked.

    Ann : could you book a table at seven , thanks
    agent:  how many people ?
    person: four
    agent:  done table for four at seven

A question costs a little, a wrong booking much, and the right one is worth 1: to ask pays where a fact is missing, and
nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textrl_gym.conversations.replay import replay
from textrl_gym.core import Message, Reply, Row
from textrl_gym.worlds.world import in_split

NAMES = ("Sam", "Ann", "Tom", "Eva", "Max", "Ida", "Leo", "Amy", "Ben", "Zoe", "Jim", "Kim", "Ron", "Una", "Dan", "Mia")
OPENINGS = ("please book", "could you book", "can you get me", "I need", "we want", "get us")
ENDINGS = ("", "please", ", thanks", ", many thanks", ", it is for me", ", we are late", ", as before", ", you know me")
PEOPLE = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
HOURS = (*PEOPLE, "ten", "eleven", "noon", "midnight")
PLACES = (
    *("Oslo", "Rome", "Cairo", "Lima", "Delhi", "Paris", "Quito", "Tokyo", "Bonn", "Dakar", "Minsk", "Seoul"),
    *("London", "Madrid", "Athens", "Vienna", "Berlin", "Dublin", "Warsaw", "Lisbon"),
)
TASTES = ("lemon", "apple", "cherry", "honey", "coffee", "almond", "ginger", "plum")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
VALUES = {"people": PEOPLE, "hour": HOURS, "place": PLACES, "taste": TASTES, "day": DAYS}
QUESTIONS = {
    "people": "how many people ?",
    "hour": "at what hour ?",
    "place": "to what place ?",
    "taste": "what taste ?",
    "day": "on what day ?",
}
WORDINGS = {"people": "for {}", "hour": "at {}", "place": "to {}", "taste": "with {}", "day": "on {}"}
KINDS = {
    "table": ("people", "hour"),
    "taxi": ("place", "hour"),
    "cake": ("taste", "people"),
    "parcel": ("place", "day"),
}
"""What can be booked, and the facts that each takes."""
DONE, NOTHING, UNCLEAR = "done", "never mind", "what ?"
COST = 0.2
"""Of a question, and of what is neither a question nor a booking."""
WRONG = -1.0
"""The reward of a wrong booking."""
_TEXTS = (*OPENINGS, *ENDINGS, *QUESTIONS.values(), *WORDINGS.values(), DONE, NOTHING, UNCLEAR, "a :")
SYMBOLS = tuple(
    dict.fromkeys(word for text in (*NAMES, *KINDS, *sum(VALUES.values(), ()), *_TEXTS) for word in text.split())
)
"""The words of the bundled model."""


def booking(kind: str, facts: Mapping[str, str]) -> str:
    """A booking: "table for four at seven"."""
    return " ".join([kind, *(WORDINGS[name].format(facts[name]) for name in KINDS[kind] if name in facts)])


def reply(row: Row, turns: Sequence[Message]) -> Reply:
    """The fact that was asked for, or the end."""
    text = " ".join(turns[-1]["content"].split())
    if text.startswith(f"{DONE} "):
        # Letter for letter: a booking with its facts in another order would be a second way to be right.
        right = text == f"{DONE} {booking(row['kind'], row['facts'])}"
        return Reply(NOTHING if not right else "thanks", 1.0 if right else WRONG, done=True)
    for name, question in QUESTIONS.items():
        if text == question:
            # Also what does not belong to the request: a person says so.
            return Reply(row["facts"].get(name) or NOTHING, -COST)
    return Reply(UNCLEAR, -COST)


def draw(split: str, rng: random.Random) -> Row:
    """A request of a split: `prompt`, `kind`, `facts`, `missing` (a fact's name, or "") and `completion`."""
    while True:
        kind = rng.choice(list(KINDS))
        facts = {name: rng.choice(VALUES[name]) for name in KINDS[kind]}
        missing = rng.choice(KINDS[kind]) if rng.random() < 0.5 else ""
        stated = {name: value for name, value in facts.items() if name != missing}
        opening, ending = rng.choice(OPENINGS), rng.choice(ENDINGS)
        prompt = f"{rng.choice(NAMES)} : {opening} a {booking(kind, stated)} {ending}".rstrip()
        if in_split(prompt, split):
            break
    lines = ([QUESTIONS[missing]] if missing else []) + [f"{DONE} {booking(kind, facts)}"]
    return {"prompt": prompt, "kind": kind, "facts": facts, "missing": missing, "completion": "\n".join(lines)}


def taught(row: Row, lines: Sequence[str]) -> Row:
    """A row with the conversation that an agent's turns give, to learn from."""
    text = "\n".join(lines)
    return {"prompt": row["prompt"], "completion": text, "turns": replay(reply, row, text)[0]}


def draw_reference(split: str, rng: random.Random) -> Row:
    """A request as a competent agent handles it, who at times also asks for what was said."""
    row = draw(split, rng)
    lines = row["completion"].split("\n")
    if not row["missing"] and rng.random() < 0.3:
        lines = [QUESTIONS[rng.choice(KINDS[row["kind"]])], *lines]
    return taught(row, lines)


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A request as a careless agent handles it: asks at random, and guesses what it was not told."""
    row = draw(split, rng)
    asked = rng.choice([QUESTIONS[name] for name in KINDS[row["kind"]]]) if rng.random() < 0.4 else None
    facts = dict(row["facts"])
    if row["missing"] and asked != QUESTIONS[row["missing"]]:
        facts[row["missing"]] = rng.choice(VALUES[row["missing"]])
    return taught(row, [*([asked] if asked else []), f"{DONE} {booking(row['kind'], facts)}"])


# -- what is measured --------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a conversation went."""

    right: bool
    wrong: bool
    """A booking that is not as it should be."""
    asked: tuple[str, ...]
    """Facts that were asked for, in order."""


def outcome(row: Row, text: str) -> Outcome:
    """How a conversation went, from the agent's turns, a line each."""
    turns, replies = replay(reply, row, text)
    over = bool(replies) and replies[-1].done
    names = {question: name for name, question in QUESTIONS.items()}
    lines = [" ".join(turn["content"].split()) for turn in turns[::2]]
    right = over and replies[-1].reward > 0
    return Outcome(right, over and not right, tuple(names[line] for line in lines if line in names))


def booked(
    prompts: list[str], completions: list[str], kind: list[str], facts: list[dict[str, str]], **columns: list[Any]
) -> list[float]:
    """1 for a right booking, else 0."""
    rows = [{"kind": one, "facts": some} for one, some in zip(kind, facts, strict=True)]
    return [float(outcome(row, text).right) for row, text in zip(rows, completions, strict=True)]


def questions(
    prompts: list[str], completions: list[str], kind: list[str], facts: list[dict[str, str]], **columns: list[Any]
) -> list[float]:
    """How many questions a conversation has, to be weighed as a further cost: {"...bookings:questions": -1}."""
    rows = [{"kind": one, "facts": some} for one, some in zip(kind, facts, strict=True)]
    return [float(len(outcome(row, text).asked)) for row, text in zip(rows, completions, strict=True)]


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Shares of requests: with a missing fact that was asked for; with all facts, and a question; wrongly booked."""
    pairs = [(row, outcome(row, text)) for row, text in zip(rows, completions, strict=True)]
    missing = [row["missing"] in one.asked for row, one in pairs if row["missing"]]
    stated = [bool(one.asked) for row, one in pairs if not row["missing"]]
    return {
        "asked_missing": sum(missing) / max(len(missing), 1),
        "asked_stated": sum(stated) / max(len(stated), 1),
        "booked_wrong": sum(one.wrong for _, one in pairs) / max(len(pairs), 1),
    }
