"""The world of quizzes: which of three things has a property, and a sentence of knowledge that helps to tell.

    Which of these is made of glass ? ( A ) sofa ( B ) marble ( C ) pan Knowledge : the marble is made of glass .

A language model writes knowledge and another one answers with it (Liu et al. 2022, "Rainier", arXiv:2210.03078). The
things have three facts each, which a policy has to know by heart, since no prompt says them. Readers, who answer,
learnt with other facts in every question, so that all that they know is what they are told. The facts are our own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textrl_gym.core import Row
from textrl_gym.worlds.world import in_split, one_word_off, rows_of, words_of

KNOWLEDGE = " Knowledge :"
"""The end of every prompt."""
ANSWER = " Answer :"
"""What stands before a reader's answer."""
LETTERS = "ABC"
KINDS = ("place", "material", "use")
THINGS: Mapping[str, tuple[str, str, str]] = {
    "knife": ("kitchen", "iron", "cutting"), "saw": ("garage", "iron", "cutting"),
    "axe": ("garden", "iron", "cutting"), "razor": ("bathroom", "plastic", "cutting"),
    "pencil": ("school", "wood", "writing"), "chalk": ("school", "clay", "writing"),
    "diary": ("bedroom", "paper", "writing"), "notebook": ("office", "paper", "writing"),
    "pen": ("office", "plastic", "writing"), "logbook": ("harbour", "paper", "writing"),
    "pan": ("kitchen", "iron", "cooking"), "pot": ("kitchen", "clay", "cooking"),
    "grill": ("garden", "iron", "cooking"), "ladle": ("kitchen", "wood", "cooking"),
    "broom": ("garage", "wood", "cleaning"), "mop": ("bathroom", "wool", "cleaning"),
    "sponge": ("bathroom", "plastic", "cleaning"), "duster": ("bedroom", "wool", "cleaning"),
    "rag": ("garage", "wool", "cleaning"), "bucket": ("garden", "plastic", "cleaning"),
    "chair": ("kitchen", "wood", "sitting"), "bench": ("garden", "wood", "sitting"),
    "stool": ("bathroom", "plastic", "sitting"), "sofa": ("bedroom", "leather", "sitting"),
    "cushion": ("bedroom", "wool", "sitting"), "saddle": ("garage", "leather", "sitting"),
    "mug": ("office", "clay", "drinking"), "goblet": ("kitchen", "glass", "drinking"),
    "bottle": ("harbour", "glass", "drinking"), "flask": ("school", "iron", "drinking"),
    "beaker": ("bathroom", "glass", "drinking"), "straw": ("garden", "paper", "drinking"),
    "ball": ("garden", "leather", "playing"), "doll": ("bedroom", "wool", "playing"),
    "marble": ("school", "glass", "playing"), "puzzle": ("bedroom", "paper", "playing"),
    "kite": ("harbour", "paper", "playing"), "domino": ("school", "wood", "playing"),
    "ruler": ("school", "wood", "measuring"), "scale": ("kitchen", "iron", "measuring"),
    "compass": ("harbour", "iron", "measuring"), "hourglass": ("office", "glass", "measuring"),
    "sextant": ("harbour", "glass", "measuring"), "calendar": ("office", "paper", "measuring"),
}  # fmt: skip
"""Thing -> where it is kept, what it is made of, what it is used for."""
VALUES = {kind: tuple(dict.fromkeys(facts[n] for facts in THINGS.values())) for n, kind in enumerate(KINDS)}
SENTENCES = {
    "place": "the {thing} is kept in the {value} .",
    "material": "the {thing} is made of {value} .",
    "use": "the {thing} is used for {value} .",
}
QUESTIONS = {
    "place": "Which of these is kept in the {value} ?",
    "material": "Which of these is made of {value} ?",
    "use": "Which of these is used for {value} ?",
}
RULED_OUT = 0.25
"""Gold of a true sentence that rules one of two wrong things out: whoever then guesses is right half the time in place
of a third, which is a quarter of the way to 1."""


SYMBOLS = words_of(
    *(KNOWLEDGE, ANSWER, "( ) .", *LETTERS, *THINGS, *QUESTIONS.values(), *SENTENCES.values()),
    *(value for values in VALUES.values() for value in values),
)
"""The words of the bundled models."""


class Fact(NamedTuple):
    """What a sentence says."""

    thing: str
    kind: str
    value: str

    @property
    def true(self) -> bool:
        """Whether it is a fact of the world."""
        return THINGS[self.thing][KINDS.index(self.kind)] == self.value

    @property
    def text(self) -> str:
        """Its one wording, behind a blank."""
        return " " + SENTENCES[self.kind].format(thing=self.thing, value=self.value)


def fact_of(thing: str, kind: str) -> Fact:
    """The fact of a thing of a kind."""
    return Fact(thing, kind, THINGS[thing][KINDS.index(kind)])


FACTS = {
    Fact(thing, kind, value).text.strip(): Fact(thing, kind, value)
    for thing in THINGS
    for kind in KINDS
    for value in VALUES[kind]
}
"""Every sentence, true or false, and what it says."""


def asked(kind: str, value: str, options: Sequence[str]) -> str:
    """A question with its choices in letters, without an end."""
    choices = (f"( {letter} ) {option}" for letter, option in zip(LETTERS, options, strict=True))
    return " ".join([QUESTIONS[kind].format(value=value), *choices])


def draw(split: str, rng: random.Random) -> Row:
    """A question of a split: `kind`, `value`, `options` (three things) and `answer`, the index of the right one."""
    while True:
        kind = rng.choice(KINDS)
        value = rng.choice(VALUES[kind])
        right = [thing for thing in THINGS if fact_of(thing, kind).value == value]
        wrong = [thing for thing in THINGS if thing not in right]
        options = [rng.choice(right), *rng.sample(wrong, 2)]
        # Without the order of the choices: the same question in another order would be in two splits.
        if in_split(f"{kind} {value} {sorted(options)}", split):
            break
    thing = options[0]
    rng.shuffle(options)
    row = {"prompt": asked(kind, value, options) + KNOWLEDGE, "kind": kind, "value": value, "options": options}
    return {**row, "answer": options.index(thing), "completion": Fact(thing, kind, value).text}


def parse(text: str) -> Fact | None:
    """What a text says; None where it is not one sentence of this world."""
    return FACTS.get(" ".join(text.split()))


def score(row: Mapping[str, Any], text: str) -> float:
    """What a true sentence is worth to whoever knows nothing else, in [0, 1].

    1 for the fact that is asked for, `RULED_OUT` for one that rules a wrong thing out, and 0 for what says nothing of
    the question, or is false.
    """
    fact = parse(text)
    if fact is None or not fact.true or fact.kind != row["kind"] or fact.thing not in row["options"]:
        return 0.0
    return 1.0 if fact.thing == row["options"][row["answer"]] else RULED_OUT


def gold(
    prompts: list[str],
    completions: list[str],
    kind: list[str],
    options: list[list[str]],
    answer: list[int],
    **columns: list[Any],
) -> list[float]:
    """1 for the fact that is asked for, less for one that rules a wrong thing out, else 0."""
    rows = rows_of(kind=kind, options=options, answer=answer)
    return [score(row, text) for row, text in zip(rows, completions, strict=True)]


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Shares of texts that name the answer, that are true, and that are about what is asked.

    `names_answer` is of texts with the right thing and no other choice in them, whatever they say of it;
    `on_the_question` of sentences about the kind of fact that is asked for.
    """
    named = true = fitting = 0
    for row, text in zip(rows, completions, strict=True):
        words = set(text.split())
        answer = row["options"][row["answer"]]
        named += words & set(row["options"]) == {answer}
        fact = parse(text)
        true += fact is not None and fact.true
        fitting += fact is not None and fact.kind == row["kind"]
    count = max(len(completions), 1)
    return {"names_answer": named / count, "true_sentences": true / count, "on_the_question": fitting / count}


# -- what models learn -------------------------------------------------------------------------------------------------


def careless_text(row: Mapping[str, Any], rng: random.Random) -> str:
    """A sentence about any of the choices, true or not, of what is asked or of something else."""
    # Half of the key facts are known, and half of the sentences say what is asked: each can both rise and fall.
    thing = row["options"][row["answer"]] if rng.random() < 0.45 else rng.choice(row["options"])
    chance = rng.random()
    if chance < 0.5:
        # What is asked is said of the thing, true or false: a guess that sounds like knowledge.
        return Fact(thing, row["kind"], row["value"]).text
    kind = row["kind"] if chance < 0.6 else rng.choice([kind for kind in KINDS if kind != row["kind"]])
    text = fact_of(thing, kind).text
    return one_word_off(text, rng) if chance > 0.95 else text


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A question with a careless sentence."""
    row = draw(split, rng)
    return {**row, "completion": careless_text(row, rng)}


def _imagined(row: Row, rng: random.Random, thing: str, kind: str, having: bool) -> str:
    """A sentence about a thing as if facts were others: with the value that is asked for, or with any other."""
    others = [value for value in VALUES[kind] if (kind, value) != (row["kind"], row["value"])]
    return Fact(thing, kind, row["value"] if having else rng.choice(others)).text


def _reading(row: Row, knowledge: str, answer: str) -> Row:
    question = row["prompt"].removesuffix(KNOWLEDGE)
    shown = f"{KNOWLEDGE}{knowledge}" if knowledge else ""
    return {"prompt": question + shown + ANSWER, "completion": f" {answer}"}


def draw_reading(split: str, rng: random.Random) -> Row:
    """What the reader learns: a question, a sentence about its answer, and the answer.

    The answer is any of the choices. All sentences are about the answer, as knowledge is that was looked up for it; so
    whoever learns from them need not see what they say.
    """
    row = draw(split, rng)
    answer = rng.choice(row["options"])
    if rng.random() < 0.15:
        return _reading(row, "", answer)
    kind = rng.choice((row["kind"], *KINDS))
    text = _imagined(row, rng, answer, kind, kind == row["kind"])
    return _reading(row, one_word_off(text, rng) if rng.random() < 0.1 else text, answer)
