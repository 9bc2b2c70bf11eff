"""The world of a few hundred things, and an oracle that says what of an attribute is left after a question.

    what is it ?
    agent:  is it red or blue
    oracle: no green black
    agent:  is it green
    oracle: yes green
    agent:  is it a tiny green wooden spoon
    oracle: no

A thing has four attributes of four values, so there are 256. A question names one value of an attribute or two, and its
answer names all values of the attribute that are still possible: so the oracle keeps the score, and what has to be
learnt is what to ask. Halves are the best questions: eight of them find any thing, seven leave two things, of which one
is guessed. No strategy needs fewer turns in the mean, since no answer tells more than one bit (a test tries all).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from textrl_gym.conversations.replay import replay
from textrl_gym.core import Message, Reply, Row

ATTRIBUTES: tuple[tuple[str, ...], ...] = (
    ("tiny", "small", "large", "giant"),
    ("red", "blue", "green", "black"),
    ("wooden", "iron", "glass", "paper"),
    ("spoon", "hat", "boat", "drum"),
)
ASK, OR, GUESS, YES, NO, UNCLEAR = "is it", "or", "a", "yes", "no", "what ?"
PROMPT = "what is it ?"
SYMBOLS = (*(value for values in ATTRIBUTES for value in values), *ASK.split(), OR, GUESS, YES, NO, *UNCLEAR.split())
"""The words of the bundled model."""
MAX_TURNS = 20
COST = 0.025
"""Of each turn that does not find the thing."""
FEWEST_TURNS = 7.5
"""Before the one that finds the thing, in the mean over all things: seven halves, and a guess among two."""
_PLACE = {value: number for number, values in enumerate(ATTRIBUTES) for value in values}


class Game(NamedTuple):
    """How a game went."""

    turns: int
    """All, with the one that found the thing."""
    questions: int
    halves: int
    """Questions whose answer left half of the values that were possible, whatever it was."""
    idle: int
    """Questions that no answer could have told anything."""
    guesses: int
    solved: bool


def asked(text: str) -> tuple[str, ...] | None:
    """The values that a question names, one or two of one attribute; None where the text is no question."""
    values = tuple(text.removeprefix(f"{ASK} ").split(f" {OR} "))
    if not text.startswith(f"{ASK} ") or len(values) > 2 or not set(values) <= set(_PLACE):
        return None
    # "red or tiny" has an answer too, which would say of two attributes what no list of values can.
    return values if len({_PLACE[value] for value in values}) == 1 else None


def guess(values: Sequence[str]) -> str:
    """The turn that names a thing by its values."""
    return f"{ASK} {GUESS} {' '.join(values)}"


def possible(thing: str, lines: Sequence[str]) -> list[tuple[str, ...]]:
    """The values of each attribute that answers to these lines leave."""
    left: list[tuple[str, ...]] = list(ATTRIBUTES)
    for line in lines:
        values = asked(line)
        if values is not None:
            place = _PLACE[values[0]]
            right = thing.split()[place] in values
            left[place] = tuple(value for value in left[place] if (value in values) == right)
    return left


def reply(row: Row, turns: Sequence[Message]) -> Reply:
    """What the oracle answers. The rewards of a game in which the thing is found sum to its `quickness`."""
    lines = [turn["content"].strip() for turn in turns[::2]]
    if lines[-1] == guess(row["thing"].split()):
        return Reply("", 1.0, done=True)
    values = asked(lines[-1])
    if values is None:
        # A wrong guess is answered, though nothing is kept of it: it is one of many things that are left.
        return Reply(NO if lines[-1].startswith(f"{ASK} {GUESS} ") else UNCLEAR, -COST)
    place = _PLACE[values[0]]
    word = YES if row["thing"].split()[place] in values else NO
    return Reply(" ".join((word, *possible(row["thing"], lines)[place])), -COST)


def draw(split: str, rng: random.Random) -> Row:
    """A thing: `prompt`, `thing` and `completion`, the turns of the best player. All splits have all things.

    A policy knows nothing of the thing at the start, so that one which training never had would be one that there is
    not.
    """
    thing = tuple(rng.choice(values) for values in ATTRIBUTES)
    return {"prompt": PROMPT, "thing": " ".join(thing), "completion": "\n".join(_halves(thing))}


def _halves(thing: tuple[str, ...]) -> Iterator[str]:
    """The turns of the best player, who halves the values of one attribute after the other and guesses among two."""
    for place, values in enumerate(ATTRIBUTES):
        yield f"{ASK} {values[0]} {OR} {values[1]}"
        half = values[:2] if thing[place] in values[:2] else values[2:]
        if place < len(ATTRIBUTES) - 1:
            yield f"{ASK} {half[0]}"
        else:
            yield from (guess((*thing[:-1], value)) for value in half[: half.index(thing[place]) + 1])


def draw_reference(split: str, rng: random.Random) -> Row:
    """A game of a competent player: halves in any order, and a guess when the thing is known."""
    return _game(draw(split, rng), rng, haste=0.0, halves=1.0)


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A game of a careless player, who asks for single values, also for what is known, and guesses too early."""
    return _game(draw(split, rng), rng, haste=0.2, halves=0.15, idle=0.5)


def _game(row: Row, rng: random.Random, haste: float, halves: float, idle: float = 0.0) -> Row:
    """A row with the turns of a player who halves with a probability, asks any question, or guesses before it knows."""
    # What is known is asked for as well, since a policy that never did so could not learn to leave it.
    lines: list[str] = []
    while len(lines) < MAX_TURNS and (not lines or lines[-1] != guess(row["thing"].split())):
        left = possible(row["thing"], lines)
        open_places = [place for place, values in enumerate(left) if len(values) > 1]
        if not open_places or rng.random() < haste:
            lines.append(guess([rng.choice(values) for values in left]))
        elif rng.random() < idle:
            lines.append(f"{ASK} {rng.choice(rng.choice(ATTRIBUTES))}")
        else:
            values = rng.sample(left[place := rng.choice(open_places)], len(left[place]))
            both = len(values) > 2 and rng.random() < halves
            lines.append(f"{ASK} {values[0]} {OR} {values[1]}" if both else f"{ASK} {values[0]}")
    text = "\n".join(lines)
    return {**row, "completion": text, "turns": replay(reply, row, text)[0]}


# -- what is measured --------------------------------------------------------------------------------------------------


def quickness(
    prompts: list[str], completions: list[str], thing: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """The return of a game: 1 for a thing found at once, less 0.025 for each turn before it; 0 if it is not found.

    Args:
        completions: the agent's turns, a line each; those behind the right guess count for nothing.
    """
    games = [game(one, text) for one, text in zip(thing, completions, strict=True)]
    return [1 - COST * (one.turns - 1) if one.solved else 0.0 for one in games]


def game(thing: str, text: str) -> Game:
    """How a game went, from the agent's turns, a line each."""
    row, right = {"thing": thing}, guess(thing.split())
    lines = [line.strip() for line in text.split("\n")][:MAX_TURNS]
    lines = lines[: lines.index(right) + 1] if right in lines else lines
    questions = [(number, values) for number, line in enumerate(lines) if (values := asked(line)) is not None]
    halves = idle = 0
    for number, values in questions:
        # What was possible before the question, whatever was asked or guessed behind it.
        left = possible(row["thing"], lines[:number])[_PLACE[values[0]]]
        named = len(set(values) & set(left))
        halves += 2 * named == len(left)
        idle += named in (0, len(left))
    guesses = sum(line.startswith(f"{ASK} {GUESS} ") for line in lines)
    return Game(len(lines), len(questions), halves, idle, guesses, right in lines)


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Means over games: things found, turns, shares of questions that halve and that are idle, and guesses."""
    games = [game(row["thing"], text) for row, text in zip(rows, completions, strict=True)]
    count, questions = max(len(games), 1), max(sum(one.questions for one in games), 1)
    return {
        "solved": sum(one.solved for one in games) / count,
        "turns": sum(one.turns for one in games) / count,
        "halves": sum(one.halves for one in games) / questions,
        "idle": sum(one.idle for one in games) / questions,
        "guesses": sum(one.guesses for one in games) / count,
    }
