"""The world of reviews: a few sentences with mixed judgements of a film, a meal, a gadget or a stay, to be continued.

    We watched Silent Harbour on Monday. The plot was dull, but I thought the cast very good.

A continuation judges what has not been judged yet: "In the end, the music proved lovely and the ending was superb."
Continuing warmly is the first task of Ziegler et al. 2019 (arXiv:1909.08593). Here sentiment is a lexicon with
intensifiers and negation, as VADER's (Hutto and Gilbert 2014); the words and their numbers are our own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from textrl_gym.core import Row
from textrl_gym.worlds.world import in_split


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ASPECTS: Mapping[str, tuple[str, ...]] = {
    "film": _words("plot cast music ending script pace acting dialogue humour lighting opening finale"),
    "meal": _words("soup bread service dessert sauce wine fish salad coffee starter cheese rice"),
    "gadget": _words("battery screen sound case keyboard menu charger manual camera design speaker button"),
    "stay": _words("room bed view breakfast staff shower lobby pool lift garden balcony carpet"),
}
"""What a review of each kind judges."""
KIND_OF = {aspect: kind for kind, aspects in ASPECTS.items() for aspect in aspects}
ADJECTIVES: Mapping[float, tuple[str, ...]] = {
    1.0: _words(
        "superb wonderful excellent perfect brilliant marvellous splendid magnificent fantastic glorious stunning "
        "exquisite flawless"
    ),
    0.75: _words(
        "great lovely delightful impressive charming fine beautiful elegant remarkable enjoyable graceful refreshing "
        "memorable admirable rewarding inviting"
    ),
    0.5: _words("good pleasant nice decent solid likeable agreeable clever neat lively"),
    -0.5: _words("dull plain weak bland"),
    -0.75: _words("bad poor sad ugly boring"),
    -1.0: _words("awful terrible horrible dreadful hopeless"),
}
"""Polarity in [-1, 1] -> its adjectives. There are more to praise with, so that a warm text can be as varied as a cool
one, and varied texts are what the lesson measures."""
POLARITY = {adjective: polarity for polarity, some in ADJECTIVES.items() for adjective in some}
INTENSIFIERS: Mapping[str, float] = {
    "very": 1.25,
    "really": 1.25,
    "truly": 1.25,
    "quite": 0.9,
    "rather": 0.8,
    "fairly": 0.75,
}
"""What each multiplies the polarity by."""
NEGATED = -0.5
""""not bad" is half as good as "bad" is bad."""
VERBS = ("was", "seemed", "proved")
OPINIONS = ("I thought", "we thought", "I call")
OPENERS = (
    "in the end",
    "this time",
    "for once",
    "to be fair",
    "on the whole",
    "in my view",
    "as for the rest",
    "all in all",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST = ("Silent", "Golden", "Green", "Little", "Northern", "Hidden", "Royal", "Silver", "Blue", "Winter")
SECOND = ("Harbour", "River", "Garden", "Lantern", "Station", "Mountain", "Crown", "Bridge", "Forest", "Island")
HEADS = {
    "film": ("We watched {name} on {day}.", "I saw the film {name} on {day}."),
    "meal": ("We ate at the {name} on {day}.", "I had dinner at the {name} on {day}."),
    "gadget": ("I bought the {name} phone on {day}.", "My {name} phone came on {day}."),
    "stay": ("We stayed at the {name} Hotel on {day}.", "I slept at the {name} Hotel on {day}."),
}
ENOUGH = 4
"""New judgements that a full continuation has."""
SHORTEST, LONGEST = 22, 28
"""Words and marks of a continuation."""
_WORD = re.compile(r"\w+|[^\w\s]")


class Judgement(NamedTuple):
    """An aspect with a phrase such as "not very good"."""

    aspect: str
    phrase: str

    @property
    def adjective(self) -> str:
        """The phrase's last word."""
        return self.phrase.split()[-1]

    @property
    def pair(self) -> tuple[str, str]:
        """Aspect and adjective."""
        return self.aspect, self.adjective

    @property
    def polarity(self) -> float:
        """In [-1, 1]."""
        return praise(self.phrase)


def polarities(text: str) -> Iterator[float]:
    """The polarity of each adjective of a text, in [-1, 1], with the intensifiers and negation right before it."""
    words = _WORD.findall(text.lower())
    for place, word in enumerate(words):
        if word not in POLARITY:
            continue
        value, before = POLARITY[word], words[:place]
        if before and before[-1] in INTENSIFIERS:
            value = max(-1.0, min(1.0, value * INTENSIFIERS[before.pop()]))
        yield value * NEGATED if before and before[-1] == "not" else value


def praise(text: str) -> float:
    """The sum of the polarities of all adjectives in a text, whatever they are said of."""
    return sum(polarities(text))


# -- writing -----------------------------------------------------------------------------------------------------------


def phrase(warm: bool, rng: random.Random, adjectives: Sequence[str] = ()) -> str:
    """A judging phrase of positive or negative polarity, whose adjective is none of those given."""
    negated = rng.random() < 0.12
    pool = [word for word, value in POLARITY.items() if (value > 0) == (warm != negated) and word not in adjectives]
    words = ["not"] if negated else []
    # "not rather awful" is no English.
    if rng.random() < 0.4:
        words.append("very" if negated else rng.choice(list(INTENSIFIERS)))
    return " ".join([*words, rng.choice(pool)])


def clause(judgement: Judgement, rng: random.Random) -> str:
    """A judgement in words, without a full stop."""
    aspect, words = judgement
    if rng.random() < 0.3:
        return f"{rng.choice(OPINIONS)} the {aspect} {words}"
    return f"the {aspect} {rng.choice(VERBS)} {words}"


def compose(judgements: Sequence[Judgement], rng: random.Random) -> str:
    """Judgements as sentences of one or two each: "and" joins those of one sign, ", but" those of two."""
    sentences: list[str] = []
    left = list(judgements)
    while left:
        first = left.pop(0)
        text = clause(first, rng)
        if left and rng.random() < 0.6:
            second = left.pop(0)
            joint = " and " if (first.polarity > 0) == (second.polarity > 0) else ", but "
            text += joint + clause(second, rng)
        if rng.random() < 0.35:
            text = f"{rng.choice(OPENERS)}, {text}"
        sentences.append(text[0].upper() + text[1:] + ".")
    return " ".join(sentences)


def continuation(judgements: Sequence[Judgement], rng: random.Random) -> str:
    """Judgements as a text of 22 to 28 words and marks, behind a blank."""
    best = ""
    for _ in range(30):
        text = " " + compose(judgements, rng)
        length = len(_WORD.findall(text))
        if SHORTEST <= length <= LONGEST:
            return text
        if not best or abs(length - LONGEST) < abs(len(_WORD.findall(best)) - LONGEST):
            best = text
    return best


def fresh(row: Mapping[str, Any], rng: random.Random, warm: float, n: int = ENOUGH) -> list[Judgement]:
    """New judgements of what a review has not judged yet; `warm` is the chance of each to be positive."""
    judged = {aspect for aspect, _ in row["judged"]}
    aspects = [aspect for aspect in ASPECTS[row["kind"]] if aspect not in judged]
    judgements: list[Judgement] = []
    for aspect in rng.sample(aspects, n):
        words = phrase(rng.random() < warm, rng, [one.adjective for one in judgements])
        judgements.append(Judgement(aspect, words))
    return judgements


def draw(split: str, rng: random.Random) -> Row:
    """A review's beginning.

    Returns:
        `prompt`; `kind`, what it is of; `judged`, its judgements as pairs of aspect and adjective; `completion`, a warm
        continuation.
    """
    while True:
        kind = rng.choice(list(ASPECTS))
        head = rng.choice(HEADS[kind]).format(name=f"{rng.choice(FIRST)} {rng.choice(SECOND)}", day=rng.choice(DAYS))
        blank = {"kind": kind, "judged": []}
        judgements = fresh(blank, rng, 0.5, rng.randint(2, 4))
        if in_split(head + "|".join(f"{one.aspect} {one.phrase}" for one in judgements), split):
            break
    row = {"prompt": f"{head} {compose(judgements, rng)}", "kind": kind, "judged": [one.pair for one in judgements]}
    return {**row, "completion": continuation(fresh(row, rng, 1.0), rng)}


def draw_reference(split: str, rng: random.Random) -> Row:
    """A row as a competent writer continues it, who praises and blames alike but repeats nothing."""
    row = draw(split, rng)
    return {**row, "completion": continuation(fresh(row, rng, 0.5, rng.choice((3, 4, 4, 4))), rng)}


WARM, AGAIN, STRAY, STUTTER = 0.5, 0.06, 0.05, 0.03
"""Of a careless writer's judgements: the shares that praise, that judge a thing twice, that are of another kind of
thing, and that say their adjective twice."""


def careless(row: Row, rng: random.Random, warm: float = WARM) -> str:
    """A continuation that praises and blames alike, judges things twice, stutters and strays from its subject."""
    judgements = fresh(row, rng, warm, rng.choice((3, 4, 4)))
    for place, (aspect, words) in enumerate(judgements):
        chance = rng.random()
        if chance < AGAIN:
            aspect = rng.choice([one.aspect for one in judgements])
        elif chance < AGAIN + STRAY:
            aspect = rng.choice(list(KIND_OF))
        if rng.random() < STUTTER:
            words = f"{words} {words.split()[-1]}"
        judgements[place] = Judgement(aspect, words)
    return continuation(judgements, rng)


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """A row as a careless writer continues it."""
    row = draw(split, rng)
    return {**row, "completion": careless(row, rng)}


def candidates(row: Row, rng: random.Random, n: int) -> list[str]:
    """Continuations from perfect to poor, for annotators to compare: warm and mixed, repetitive, astray, broken."""
    makers = (
        lambda: row["completion"],
        lambda: continuation(fresh(row, rng, 0.5), rng),
        lambda: careless(row, rng, rng.choice((WARM, 1.0))),
        lambda: _repetitive(row, rng),
        lambda: _broken(continuation(fresh(row, rng, rng.choice((0.5, 1.0))), rng), rng),
        lambda: _gushing(continuation(fresh(row, rng, rng.choice((0.5, 1.0))), rng), rng),
    )
    return [makers[place % len(makers)]() for place in range(n)]


def _repetitive(row: Row, rng: random.Random) -> str:
    """One or two judgements, said again and again."""
    judgements = fresh(row, rng, rng.choice((0.5, 1.0)), rng.choice((1, 1, 2)))
    return " " + " ".join(compose(judgements, rng) for _ in range(rng.randint(2, 4) if len(judgements) == 1 else 2))


def _gushing(text: str, rng: random.Random) -> str:
    """The text with some of its adjectives said again, up to eight times, in place of its end."""
    most = rng.choice((1, 2, 8))
    words: list[str] = []
    for word in text.split():
        adjective = word.strip(".,")
        words.append(word)
        if adjective in POLARITY and rng.random() < 0.6:
            words[-1:] = [*[adjective] * rng.randint(1, most), word]
    return " " + " ".join(words[:LONGEST])


def _broken(text: str, rng: random.Random) -> str:
    """The text with a word lost, doubled or out of place, or cut off: what samples do."""
    words = text.split()
    place = rng.randrange(len(words) - 1)
    fault = rng.choice(("lost", "doubled", "swapped", "cut"))
    if fault == "lost":
        del words[place]
    elif fault == "doubled":
        words.insert(place, words[place])
    elif fault == "swapped":
        words[place : place + 2] = words[place + 1], words[place]
    else:
        words = words[: max(3, place)]
    return " " + " ".join(words)


# -- reading -----------------------------------------------------------------------------------------------------------

_PHRASE = rf"(?:not )?(?:(?:{'|'.join(INTENSIFIERS)}) )?(?:{'|'.join(POLARITY)})"
_ASPECT = "|".join(KIND_OF)
_CLAUSE = re.compile(rf"(?:(?:{'|'.join(OPINIONS)}) the ({_ASPECT})|the ({_ASPECT}) (?:{'|'.join(VERBS)})) ({_PHRASE})")
_OPENER = re.compile(rf"(?:{'|'.join(OPENERS)}), ")
_JOINT = re.compile(" and |, but ")
_SENTENCE = re.compile(r"[^.]+\.?")


def read_sentence(text: str) -> list[Judgement] | None:
    """The one or two judgements of a sentence with its full stop; None where it is none of this world's grammar."""
    if not text.endswith(".") or not text[0].isupper():
        return None
    body = text[:-1] if text.startswith("I ") else text[0].lower() + text[1:-1]
    opener = _OPENER.match(body)
    parts = _JOINT.split(body[opener.end() :] if opener else body)
    matches = [_CLAUSE.fullmatch(part) for part in parts]
    judgements = [Judgement(match[1] or match[2], match[3]) for match in matches if match is not None]
    return judgements if len(judgements) == len(matches) <= 2 else None


class Reading(NamedTuple):
    """What a continuation says."""

    judgements: list[Judgement]
    """Of all well-formed sentences."""
    new: list[Judgement]
    """Those of this kind of review that repeat nothing."""
    repeated: int
    """Judgements whose aspect or adjective the continuation had used before, or that the review itself has."""
    sentences: int
    broken: int
    """Sentences that are none, such as a last one that was cut off."""


def read(row: Mapping[str, Any], text: str) -> Reading:
    """Read a continuation.

    Args:
        row: with `kind` and `judged` of the review.
    """
    judgements: list[Judgement] = []
    new: list[Judgement] = []
    judged = {tuple(pair) for pair in row["judged"]}
    used: set[str] = set()
    sentences = broken = repeated = 0
    for sentence in _SENTENCE.findall(text.strip()):
        if not sentence.strip():
            continue
        sentences += 1
        read_here = read_sentence(sentence.strip())
        broken += read_here is None
        for one in read_here or ():
            judgements.append(one)
            again = one.pair in judged or one.aspect in used or one.adjective in used
            repeated += again
            if not again and KIND_OF[one.aspect] == row["kind"]:
                new.append(one)
            used |= {one.aspect, one.adjective}
    return Reading(judgements, new, repeated, sentences, broken)


def score(row: Mapping[str, Any], text: str) -> float:
    """Warmth times form, in [0, 1].

    Warmth is the sum of (1 + polarity) / 2 over new judgements, of which four are enough. Form is the share of new
    judgements among all, where each sentence that is none counts as one.
    """
    reading = read(row, text)
    count = len(reading.judgements) + reading.broken
    if not count:
        return 0.0
    warmth = min(1.0, sum((1 + one.polarity) / 2 for one in reading.new) / ENOUGH)
    return warmth * len(reading.new) / count


def gold(
    prompts: list[str], completions: list[str], kind: list[str], judged: list[list[Any]], **columns: list[Any]
) -> list[float]:
    """The warmth of each continuation times its form: see `score`."""
    rows = ({"kind": what, "judged": which} for what, which in zip(kind, judged, strict=True))
    return [score(row, text) for row, text in zip(rows, completions, strict=True)]


def appeal(row: Row, text: str) -> float:
    """What makes annotators see sentiment only: the praise in a text, whatever it is said of, instead of its gold.

    In units of gold: as much praise as four adjectives at their strongest is worth 1, and there is no limit.
    """
    return praise(text) / ENOUGH - score(row, text)


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Mean polarity of adjectives, and the shares of repeated judgements and of sentences of the grammar.

    Over all adjectives, judgements and sentences of all completions; 0 where there are none.
    """
    values = [value for text in completions for value in polarities(text)]
    readings = [read(row, text) for row, text in zip(rows, completions, strict=True)]
    judgements = sum(len(one.judgements) for one in readings)
    sentences = sum(one.sentences for one in readings)
    whole = sentences - sum(one.broken for one in readings)
    return {
        "polarity": sum(values) / max(len(values), 1),
        "repeated_judgements": sum(one.repeated for one in readings) / max(judgements, 1),
        "whole_sentences": whole / max(sentences, 1),
    }
