"""The world of tables: a few facts about a place to eat or a player, to be said in one or two sentences.

    name : Juno | food : Thai | area : harbour | price : low  Text :
    Juno serves Thai food , lies near the harbour and has low prices .

The reference texts are like those that people write: one kind of fact is mostly left out, and something that is not in
the table is often said. So are the references of real data (Dhingra et al. 2019, arXiv:1906.01081, who found that a
metric against such references prefers texts that diverge from their tables too). How often is our own choice.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import Any

from textrl_gym.core import Row
from textrl_gym.worlds.claims import Claim, Marks, listed, marks_of
from textrl_gym.worlds.world import in_split, one_word_off

ANSWER = " Text :"
MOST_SENTENCES = 2
LEFT_OUT = 0.7
"""How often a reference leaves out the fact that it mostly leaves out."""
INVENTED = 0.5
"""How often a reference says what is not in the table."""
USUAL = 0.75
"""How often a reference chooses the first of two wordings."""


@dataclasses.dataclass(frozen=True)
class Topic:
    """What a table can be about."""

    names: tuple[str, ...]
    again: str
    """The subject of a second sentence."""
    values: dict[str, tuple[str, ...]]
    """Slot -> its values, each of one word."""
    wordings: dict[str, tuple[str, str]]
    """Slot -> the two predicates that say it, the usual one first; in the order of the references."""
    neglected: str
    """The slot that references mostly leave out."""
    invented: str
    """A predicate that is of no slot."""


def _years(first: int) -> tuple[str, ...]:
    return tuple(str(year) for year in range(first, first + 20))


PLACES = (
    "Aroma", "Bella", "Cosmo", "Dolce", "Ember", "Fiesta", "Grotto", "Haven",
    "Indigo", "Juno", "Kettle", "Lantern", "Mango", "Nectar", "Olive", "Pepper",
)  # fmt: skip
PLAYERS = (
    "Adler", "Brandt", "Costa", "Duval", "Eriks", "Ferro", "Gomez", "Haas",
    "Ibsen", "Jansen", "Kovac", "Lopez", "Moreau", "Novak", "Olsen", "Petrov",
)  # fmt: skip
TOPICS = {
    "place": Topic(
        names=PLACES,
        again="The place",
        values={
            "type": ("cafe", "pub", "bistro", "diner", "bar", "canteen", "tavern", "grill"),
            "food": ("Thai", "Greek", "Indian", "French", "Cuban", "Irish", "Korean", "Turkish", "Polish", "Swiss"),
            "area": ("harbour", "station", "park", "market", "castle", "river", "museum", "bridge", "theatre", "zoo"),
            "price": ("low", "high", "fair", "steep", "modest", "fixed"),
            "rating": ("one", "two", "three", "four", "five"),
            "opened": _years(1990),
        },
        wordings={
            "type": ("is a {}", "works as a {}"),
            "food": ("serves {} food", "offers {} dishes"),
            "area": ("lies near the {}", "stands by the {}"),
            "price": ("has {} prices", "asks {} prices"),
            "rating": ("has {} stars", "got {} stars"),
            "opened": ("opened in {}", "dates from {}"),
        },
        neglected="opened",
        invented="is worth a visit",
    ),
    "player": Topic(
        names=PLAYERS,
        again="The player",
        values={
            "position": ("goalkeeper", "defender", "striker", "winger", "sweeper", "captain"),
            "country": ("Chile", "Ghana", "Japan", "Spain", "Kenya", "Peru", "Norway", "Malta", "Egypt", "Nepal"),
            "club": ("Rovers", "United", "Wanderers", "Athletic", "Rangers", "Albion", "Dynamo", "City"),
            "goals": tuple(str(number) for number in range(11, 41)),
            "debut": _years(2001),
            "number": tuple(str(number) for number in range(2, 11)),
        },
        wordings={
            "position": ("is a {}", "plays as a {}"),
            "country": ("comes from {}", "is from {}"),
            "club": ("plays for {}", "belongs to {}"),
            "goals": ("scored {} goals", "has {} goals"),
            "debut": ("started in {}", "began in {}"),
            "number": ("wears number {}", "has number {}"),
        },
        neglected="number",
        invented="is a fan favourite",
    ),
}


def _words() -> tuple[str, ...]:
    texts = [ANSWER, ": | , and . name"]
    for topic in TOPICS.values():
        texts += [*topic.names, topic.again, topic.invented, *topic.values]
        texts += [word for values in topic.values.values() for word in values]
        texts += [wording.format("") for pair in topic.wordings.values() for wording in pair]
    return tuple(dict.fromkeys(" ".join(texts).split()))


SYMBOLS = _words()
"""The words of the bundled model."""


def written(topic: Topic, name: str, predicates: Sequence[str], cut: int | None = None) -> str:
    """One sentence, or two, of which the first has `cut` predicates; behind a blank."""
    parts = [predicates] if cut is None else [predicates[:cut], predicates[cut:]]
    sentences = []
    for subject, some in zip((name, topic.again), parts, strict=False):
        # Full stops and commas are words of their own, since the bundled tokenizer parts texts at blanks only.
        *first, last = some
        sentences.append(f"{subject} {' , '.join(first)} and {last} ." if first else f"{subject} {last} .")
    return " " + " ".join(sentences)


def draw(split: str, rng: random.Random) -> Row:
    """A table of a split: `topic`, `name`, `slots` (slot -> value) and `completion`, the one reference."""
    while True:
        kind = rng.choice(list(TOPICS))
        topic = TOPICS[kind]
        name = rng.choice(topic.names)
        # In a random order: a text that goes through the table from left to right is not yet one that people write.
        chosen = rng.sample(list(topic.values), rng.randint(3, 6))
        slots = {slot: rng.choice(topic.values[slot]) for slot in chosen}
        # By the facts in a fixed order, so that no table of another split says the same in another order.
        if in_split(f"{name}|" + "|".join(f"{slot}:{slots[slot]}" for slot in sorted(slots)), split):
            break
    prompt = " | ".join([f"name : {name}", *(f"{slot} : {value}" for slot, value in slots.items())]) + ANSWER
    row = {"prompt": prompt, "topic": kind, "name": name, "slots": slots}
    return {**row, "completion": human_text(row, rng)}


def human_text(row: Row, rng: random.Random) -> str:
    """A reference as people write them: in a usual order and wording, one fact mostly left out, one often invented."""
    topic, slots = TOPICS[row["topic"]], row["slots"]
    predicates = [
        pair[rng.random() > USUAL].format(slots[slot])
        for slot, pair in topic.wordings.items()
        if slot in slots and (slot != topic.neglected or rng.random() > LEFT_OUT)
    ]
    if rng.random() < INVENTED:
        predicates.append(topic.invented)
    # The rule is fixed, so that a policy can learn it by the metric: style is most of what the metric sees.
    cut = (len(predicates) + 1) // 2 if len(predicates) > 3 else None
    return written(topic, row["name"], predicates, cut)


# -- gold --------------------------------------------------------------------------------------------------------------


def _patterns(topic: Topic) -> tuple[tuple[str | None, re.Pattern[str]], ...]:
    pairs = [(slot, wording) for slot, both in topic.wordings.items() for wording in both]
    # Any word may stand for a value, so that a value of another slot is a claim, and a wrong one.
    known = [(slot, re.compile(re.escape(wording).replace(r"\{\}", r"(\S+)"))) for slot, wording in pairs]
    # What references invent counts as said, and wrongly: else it would be a break of grammar, and cost a sentence.
    return (*known, (None, re.compile(f"({re.escape(topic.invented)})")))


PATTERNS = {name: _patterns(topic) for name, topic in TOPICS.items()}


def claims_of(topic_name: str, predicate: str) -> list[Claim]:
    """What a predicate can mean: "has 7 goals" is of one slot, "is a captain" may be read in one way only."""
    matches = ((slot, pattern.fullmatch(predicate)) for slot, pattern in PATTERNS[topic_name])
    return [Claim(slot, match[1]) for slot, match in matches if match is not None]


def sentence_claims(topic_name: str, name: str, sentence: str, first: bool) -> list[Claim] | None:
    """The claims of a sentence without its full stop; None where it is not of the grammar or of another subject.

    Args:
        first: whether it is the first of its text, whose subject is the name.
    """
    # "The place" in a first sentence could be any place: a text without the name says nothing of this table.
    subjects = (name,) if first else (name, TOPICS[topic_name].again)
    for subject in subjects:
        if sentence.startswith(f"{subject} "):
            # One predicate of no wording spoils its sentence: else a list of all that is likely would be worth trying.
            claims = [claims_of(topic_name, predicate) for predicate in listed(sentence.removeprefix(f"{subject} "))]
            return [some[0] for some in claims] if all(claims) else None
    return None


def marks(topic_name: str, name: str, slots: dict[str, str], text: str) -> Marks:
    """The marks of a text about a table; form is the share of the words in well-formed sentences, of two at most.

    Args:
        topic_name: of TOPICS.
        name: that the text must be about.
        slots: slot -> value.
    """
    words = text.split()
    # Words behind the last full stop make a sentence that does not end.
    sentences = [part.strip() for part in " ".join(words).split(" .")]
    open_end = sentences.pop()
    claims: list[Claim] = []
    good = 0
    for number, sentence in enumerate(sentences):
        of_sentence = sentence_claims(topic_name, name, sentence, number == 0)
        if of_sentence is not None:
            claims += of_sentence
            good += len(sentence.split()) + 1
    # Half a sentence at the end counts, or a third one that is cut off by the budget would be free.
    fits = len(sentences) + bool(open_end) <= MOST_SENTENCES
    form = good / len(words) if words and fits else 0.0
    return marks_of(claims, slots, form)


def gold(
    prompts: list[str],
    completions: list[str],
    topic: list[str],
    name: list[str],
    slots: list[dict[str, str]],
    **columns: list[Any],
) -> list[float]:
    """Slot accuracy (covered, and none invented or said twice) times form, of each text."""
    rows = zip(topic, name, slots, completions, strict=True)
    return [marks(*row).gold for row in rows]


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Means over texts: slots covered, those that references neglect, claims that are not in the table, and form.

    `neglected_covered` is the mean over the tables that have such a slot.
    """
    count = max(len(completions), 1)
    pairs = list(zip(rows, completions, strict=True))
    some = [marks(row["topic"], row["name"], row["slots"], text) for row, text in pairs]
    neglected = []
    for row, text in pairs:
        slot = TOPICS[row["topic"]].neglected
        if slot in row["slots"]:
            # A table of this slot alone: whether it is said does not depend on what else is.
            neglected.append(marks(row["topic"], row["name"], {slot: row["slots"][slot]}, text).covered)
    return {
        "slots_covered": sum(one.covered for one in some) / count,
        "neglected_covered": sum(neglected) / max(len(neglected), 1),
        "unsupported": sum(one.invented for one in some) / count,
        "grammatical": sum(one.form for one in some) / count,
    }


# -- what models learn -------------------------------------------------------------------------------------------------


def _arranged(topic: Topic, name: str, predicates: list[str], rng: random.Random) -> str:
    # No style of its own: what people prefer is to be learnt from the metric and not from the start.
    rng.shuffle(predicates)
    cut = rng.randint(1, len(predicates) - 1) if len(predicates) > 1 and rng.random() < 0.5 else None
    return written(topic, name, predicates, cut)


def draw_reference(split: str, rng: random.Random) -> Row:
    """A table with a careful text: every slot and nothing else, in any order and wording."""
    row = draw(split, rng)
    topic = TOPICS[row["topic"]]
    predicates = [rng.choice(topic.wordings[slot]).format(value) for slot, value in row["slots"].items()]
    return {**row, "completion": _arranged(topic, row["name"], predicates, rng)}


def careless_text(row: Row, rng: random.Random) -> str:
    """A text that leaves out, mistakes, repeats and invents, in any order and wording."""
    topic = TOPICS[row["topic"]]
    predicates = []
    for slot, value in row["slots"].items():
        # Rates that leave a sampled gold of about 0.4, so that every habit has room to grow or to go.
        chance = rng.random()
        if chance < 0.2:
            continue
        shown = rng.choice(topic.values[slot]) if chance < 0.4 else value
        predicates += [rng.choice(topic.wordings[slot]).format(shown)] * (2 if chance > 0.93 else 1)
    if rng.random() < 0.3 or not predicates:
        predicates.append(topic.invented)
    text = _arranged(topic, row["name"], predicates, rng)
    return one_word_off(text, rng) if rng.random() < 0.1 else text


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A table with a careless text."""
    row = draw(split, rng)
    return {**row, "completion": careless_text(row, rng)}
