"""The world of a car dealer, who has a reserve price and comes down to it by a rule.

    Sam sells a red wagon of 2015 for 84
    agent:  offer 43
    dealer: then 73
    agent:  offer 43
    dealer: last 65
    agent:  deal

The rule: after a serious offer, half of the first price or more, the dealer asks less by a quarter of what is between
the two, and never less than the reserve. An offer that is not serious loses a turn, and a second one the sale. After
some turns, which nobody knows before, the price is the last one: what is no deal then is none at all. The best that
this script can be brought to is known: the lowest serious offer, again and again, and a deal at the last price. No
other offers bring it lower (a test tries them all), and it takes no knowledge of what the dealer hides.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from textrl_gym.conversations.replay import replay
from textrl_gym.core import Message, Reply, Row
from textrl_gym.worlds.world import in_split

NAMES = ("Sam", "Ann", "Tom", "Eva", "Max", "Ida", "Leo", "Amy", "Ben", "Zoe", "Jim", "Kim", "Ron", "Una", "Dan", "Mia")
COLOURS = ("red", "blue", "green", "white", "black", "grey", "yellow", "brown", "silver", "orange")
CARS = ("wagon", "van", "truck", "jeep", "coupe", "sedan", "bus", "pickup", "minivan", "roadster")
YEARS = tuple(range(2000, 2025))
LEAST, MOST = 20, 98
"""The numbers that are words of the bundled model."""
LIST_PRICES = tuple(range(60, MOST + 1, 2))
RESERVES = (0.6, 0.65, 0.7, 0.75)
"""Shares of the list price."""
PATIENCE = (3, 4, 5)
"""Offers that the dealer answers: the last of the answers is the last price."""
SERIOUS = 0.5
"""Share of the list price from which an offer is serious."""
INSULTS = 2
"""Offers that are not serious, of which the last one ends the talk."""
OFFER, DEAL = "offer", "deal"
SYMBOLS = (
    *(str(number) for number in range(LEAST, MOST + 1)),
    *map(str, YEARS),
    *NAMES,
    *COLOURS,
    *CARS,
    *(OFFER, DEAL, "sells", "a", "of", "for", "then", "last", "no", "bye"),
)
"""The words of the bundled model."""
_OFFER = re.compile(rf"{OFFER}\s+(\d{{1,9}})")


@dataclasses.dataclass(frozen=True)
class State:
    """Where a talk stands."""

    ask: int
    """What the dealer asks now."""
    answers: int = 0
    """That the dealer has given."""
    insults: int = 0
    price: int | None = None
    """What was paid."""
    over: bool = False


def step(row: Row, state: State, text: str) -> State:
    """The dealer's rule: the state after a turn of the agent."""
    last = state.answers == row["patience"]
    offer = _OFFER.fullmatch(text.strip())
    amount = state.ask if text.strip() == DEAL else int(offer[1]) if offer else 0
    if amount >= state.ask:
        return dataclasses.replace(state, price=state.ask, over=True)
    insults = state.insults + (amount < SERIOUS * row["first"])
    if last or insults == INSULTS:
        return dataclasses.replace(state, insults=insults, over=True)
    if insults > state.insults:
        return dataclasses.replace(state, answers=state.answers + 1, insults=insults)
    ask = max(row["reserve"], state.ask - (state.ask - amount) // 4)
    return dataclasses.replace(state, ask=ask, answers=state.answers + 1)


def reply(row: Row, turns: Sequence[Message]) -> Reply:
    """What the dealer says. The reward of a turn is what the price came down by it, as a share of the most possible.

    So the rewards of a talk with a deal sum to how low the price is, and without one to 0.
    """
    before = state = State(row["first"])
    for turn in turns[::2]:
        before, state = state, step(row, state, turn["content"])
    most = row["first"] - row["best"]
    if state.over and state.price is None:
        return Reply("bye", -(row["first"] - before.ask) / most, done=True)
    reward = (before.ask - state.ask) / most
    if state.over:
        return Reply(f"{DEAL} for {state.price}", reward, done=True)
    word = "last" if state.answers == row["patience"] else "no" if state.insults > before.insults else "then"
    return Reply(f"{word} {state.ask}", reward)


def draw(split: str, rng: random.Random) -> Row:
    """A car of a split: `prompt`, `first`, `reserve`, `patience`, `best` (price) and `completion` (the best turns)."""
    while True:
        first = rng.choice(LIST_PRICES)
        words = (rng.choice(NAMES), rng.choice(COLOURS), rng.choice(CARS), rng.choice(YEARS))
        name, colour, car, year = words
        prompt = f"{name} sells a {colour} {car} of {year} for {first}"
        if in_split(prompt, split):
            break
    row = {"prompt": prompt, "first": first, "patience": rng.choice(PATIENCE)}
    row["reserve"] = round(rng.choice(RESERVES) * first)
    state = State(first)
    lines = patient_turns(row)
    for line in lines:
        state = step(row, state, line)
    return {**row, "best": state.price, "completion": "\n".join(lines)}


def patient_turns(row: Row) -> list[str]:
    """The turns of a patient buyer: the lowest serious offer, again and again, and a deal at the last price."""
    return [f"{OFFER} {lowest_serious(row)}"] * row["patience"] + [DEAL]


def lowest_serious(row: Row) -> int:
    """The lowest offer that is serious."""
    return math.ceil(SERIOUS * row["first"])


def draw_reference(split: str, rng: random.Random) -> Row:
    """A talk with a competent buyer, who waits for the last price; offers are the lowest serious ones, or higher."""
    return _talk(draw(split, rng), rng, 0.0, lambda low, ask: low if rng.random() < 0.6 else rng.randrange(low, ask))


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A talk with a careless buyer: any offer, also one that is not serious, and often a deal long before the last."""
    return _talk(draw(split, rng), rng, 0.35, lambda low, ask: rng.randrange(low - 4, ask))


def _talk(row: Row, rng: random.Random, haste: float, offer: Callable[[int, int], int]) -> Row:
    """A row with the turns of a buyer who takes any answer with the probability `haste`, and the last one."""
    state, lines = State(row["first"]), list[str]()
    while not state.over:
        deal = state.answers == row["patience"] or (lines and rng.random() < haste) or state.ask <= lowest_serious(row)
        lines.append(DEAL if deal else f"{OFFER} {offer(lowest_serious(row), state.ask)}")
        state = step(row, state, lines[-1])
    text = "\n".join(lines)
    return {"prompt": row["prompt"], "completion": text, "turns": replay(reply, row, text)[0]}


# -- what is measured --------------------------------------------------------------------------------------------------


def bargain(
    prompts: list[str], completions: list[str], first: Sequence[int], **columns: Sequence[Any]
) -> Sequence[float]:
    """How low the price is: 1 for the lowest that the script can be brought to, 0 for the first, or for no deal."""
    names = ("reserve", "patience", "best")
    rows = [{"first": price} | {name: columns[name][n] for name in names} for n, price in enumerate(first)]
    return [talk(row, text).bargain for row, text in zip(rows, completions, strict=True)]


class Talk(NamedTuple):
    """How a talk went."""

    bargain: float
    deal: bool
    answers: int
    """That the dealer gave."""
    insults: int


def talk(row: Row, text: str) -> Talk:
    """How a talk went, from the agent's turns, a line each."""
    state = State(row["first"])
    for line in text.split("\n"):
        if not state.over:
            state = step(row, state, line)
    deal = state.price is not None
    low = (row["first"] - state.price) / (row["first"] - row["best"]) if state.price is not None else 0.0
    return Talk(low, deal, state.answers, state.insults)


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Means over talks: deals, the share of the dealer's answers that were waited for, and offers not serious."""
    talks = [talk(row, text) for row, text in zip(rows, completions, strict=True)]
    count = max(len(talks), 1)
    return {
        "deals": sum(one.deal for one in talks) / count,
        "patience": sum(one.answers / row["patience"] for one, row in zip(talks, rows, strict=True)) / count,
        "insults": sum(one.insults for one in talks) / count,
    }
