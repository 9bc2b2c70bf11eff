"""The world of orders: a list of things with one to three constraints that a program can check.

    List fruits. Use exactly three words. End with an exclamation mark.
    plum, fig, melon!

As in IFEval (Zhou et al. 2023, arXiv:2311.07911) every constraint is checked by a program; each prompt has at least
one. A list is of its topic's words, each once, and where nothing else is asked it is written in lower case, with
commas between its words and a full stop behind them. The split is by a hash of the topic and the constraints.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from textrl_gym.core import Row
from textrl_gym.worlds.world import in_split

TOPICS: Mapping[str, tuple[str, ...]] = {
    "colours": ("red", "blue", "green", "pink", "brown", "grey", "black", "white", "gold", "teal"),
    "fruits": ("plum", "fig", "melon", "pear", "lemon", "grape", "mango", "lime", "date", "kiwi"),
    "animals": ("dog", "cat", "horse", "goat", "wolf", "lion", "sheep", "bear", "mouse", "fox"),
    "tools": ("saw", "drill", "axe", "rake", "spade", "file", "chisel", "hoe", "level", "nail"),
    "clothes": ("hat", "coat", "scarf", "shirt", "sock", "glove", "belt", "dress", "boot", "vest"),
    "drinks": ("tea", "water", "milk", "cocoa", "juice", "wine", "cider", "beer", "soda", "rum"),
    "trees": ("oak", "pine", "birch", "elm", "maple", "beech", "cedar", "ash", "yew", "larch"),
    "rooms": ("hall", "attic", "cellar", "study", "pantry", "garage", "porch", "lounge", "den", "loft"),
    "birds": ("crow", "owl", "swan", "duck", "goose", "robin", "eagle", "hawk", "stork", "gull"),
    "dishes": ("soup", "rice", "pasta", "stew", "salad", "pie", "curry", "bread", "toast", "cake"),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
SEPARATORS = {", ": "commas", "; ": "semicolons", " and ": "the word and", " or ": "the word or", " - ": "dashes"}
ENDS = {".": "a full stop", "!": "an exclamation mark", "?": "a question mark"}
OPENINGS = ("List {topic}.", "Name some {topic}.", "Write a list of {topic}.", "Which {topic} do you know?")
WORDINGS: Mapping[str, tuple[str, ...]] = {
    "exactly": ("Use exactly {n} words.", "Write {n} words, no more and no fewer.", "I want {n} of them."),
    "at_most": ("Use at most {n} words.", "Write no more than {n} words.", "Stop after {n} words or fewer."),
    "at_least": ("Use at least {n} words.", "Write {n} words or more."),
    "first": ("Begin with {a}.", "The first word is {a}."),
    "last": ("Put {a} at the end.", "The last word is {a}."),
    "mention": ("Mention {a}.", "The word {a} must be there."),
    "avoid": ("Do not mention {a}.", "Leave out {a}."),
    "before": ("Put {a} before {b}.", "Let {b} come after {a}."),
    "twice": ("Say {a} twice.", "Write {a} two times."),
    "separator": ("Write {a} between the words.", "Separate them by {a}."),
    "end": ("End with {a}.", "Close with {a}."),
    "capitals": ("Use capital letters.", "Write everything in capitals."),
    "sorted": ("Sort them by the alphabet.", "Put them in alphabetical order."),
}
"""How each constraint is said; {n} is a number, {a} and {b} words or names of signs."""
COUNTS = ("exactly",) * 4 + ("at_most",) * 4 + ("at_least",)
"""Constraints on the number of words, by how often they are drawn."""
COPIED = ("first", "last", "mention", "before", "twice")
"""Constraints that take words of the prompt into the list."""
OTHERS = tuple(kind for kind in WORDINGS if kind not in COUNTS)
ANSWER = "\nAnswer:"
MOST = 13
"""Words of the longest list that anybody writes here."""

Constraint = tuple[str, str, str]
"""A key of WORDINGS and its arguments, "" where it has none: numbers in digits, words, a separator or an end."""


class Style(NamedTuple):
    """How a list is written."""

    separator: str = ", "
    end: str = "."
    capitals: bool = False


class Listing(NamedTuple):
    """A list that was read."""

    words: tuple[str, ...]
    """In lower case."""
    style: Style


def written(words: Sequence[str], style: Style) -> str:
    """A completion: a blank, and the list."""
    text = style.separator.join(words) + style.end
    return " " + (text.upper() if style.capitals else text)


_WORD = re.compile(r"[a-z]+")


def parse(text: str) -> Listing | None:
    """The list that a text is; None where it is none: two separators, no end, or letters of both cases."""
    text = text.strip()
    if not text or text[-1] not in ENDS or not (text == text.lower() or text == text.upper()):
        return None
    body, capitals = text[:-1].lower(), text != text.lower()
    separator = next((some for some in SEPARATORS if some in body), ", ")
    words = tuple(body.split(separator))
    if not all(_WORD.fullmatch(word) for word in words):
        return None
    return Listing(words, Style(separator, text[-1], capitals))


def keeps(constraint: Constraint, listing: Listing) -> bool:
    """Whether a list keeps a constraint."""
    kind, a, b = constraint
    words, style = listing
    if kind in COUNTS:
        return {"exactly": len(words) == int(a), "at_most": len(words) <= int(a), "at_least": len(words) >= int(a)}[
            kind
        ]
    if kind == "before":
        return a in words and b in words and words.index(a) < words.index(b)
    return {
        "first": words[0] == a,
        "last": words[-1] == a,
        "mention": a in words,
        "avoid": a not in words,
        "twice": words.count(a) == 2,
        "separator": len(words) > 1 and style.separator == a,
        "end": style.end == a,
        "capitals": style.capitals,
        "sorted": list(words) == sorted(words),
    }[kind]


def form(topic: str, constraints: Sequence[Constraint], listing: Listing) -> float:
    """Share of a list's words that belong there: words of the topic, each once, or twice where that is asked.

    0 where a separator, an end or capitals are used that nobody asked for.
    """
    asked = {kind for kind, *_ in constraints}
    usual = Style()
    for kind, own, unasked in zip(("separator", "end", "capitals"), listing.style, usual, strict=True):
        if kind not in asked and own != unasked:
            return 0.0
    allowed = dict.fromkeys(TOPICS[topic], 1) | {a: 2 for kind, a, _ in constraints if kind == "twice"}
    right = 0
    for word in listing.words:
        right += allowed.get(word, 0) > 0
        allowed[word] = allowed.get(word, 0) - 1
    return right / len(listing.words)


class Marks(NamedTuple):
    """What a text is worth; each in [0, 1]."""

    kept: float
    """Share of the constraints that are kept."""
    form: float

    @property
    def gold(self) -> float:
        """Share of the constraints kept times form."""
        return self.kept * self.form


def marks(topic: str, constraints: Sequence[Constraint], text: str) -> Marks:
    """Check a text; what is no list keeps nothing."""
    listing = parse(text)
    if listing is None:
        return Marks(0.0, 0.0)
    share = sum(keeps(one, listing) for one in constraints) / len(constraints)
    return Marks(share, form(topic, constraints, listing))


def gold(
    prompts: list[str],
    completions: list[str],
    topic: list[str],
    constraints: list[Sequence[Constraint]],
    **columns: list[Any],
) -> list[float]:
    """Share of the constraints that a list keeps, times the share of its words that belong there."""
    rows = zip(topic, constraints, completions, strict=True)
    return [marks(of_row, asked, text).gold for of_row, asked, text in rows]


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Constraints kept, prompts all of whose constraints are kept, words, and well-formed lists: means over prompts."""
    count = max(len(completions), 1)
    checked = [marks(row["topic"], row["constraints"], text) for row, text in zip(rows, completions, strict=True)]
    return {
        "constraints_kept": sum(one.kept for one in checked) / count,
        "all_kept": sum(one.gold == 1 for one in checked) / count,
        "words": sum(len(text.split()) for text in completions) / count,
        "well_formed": sum(one.form == 1 for one in checked) / count,
    }


# -- rows --------------------------------------------------------------------------------------------------------------


def draw_constraints(topic: str, rng: random.Random) -> list[Constraint]:
    """One to three constraints that can be kept together, in any order."""
    names = list(TOPICS[topic])
    rng.shuffle(names)
    # Few with one: there are not many of them, and a held-out split would have the same ones again and again.
    number = rng.choice((1, 2, 2, 2, 2, 2, 3, 3, 3, 3))
    counted = rng.random() < 0.8
    kinds = rng.sample(OTHERS, number - counted) + ([rng.choice(COUNTS)] if counted else [])
    rng.shuffle(kinds)
    constraints = []
    for kind in kinds:
        a = b = ""
        if kind in COUNTS:
            a = str(rng.randint(2, 6) if kind == "exactly" else rng.randint(3, 5))
        elif kind == "separator":
            a = rng.choice([some for some in SEPARATORS if some != ", "])
        elif kind == "end":
            a = rng.choice("!?")
        elif kind not in ("capitals", "sorted"):
            a = names.pop()
            b = names.pop() if kind == "before" else ""
        constraints.append((kind, a, b))
    return constraints


def length_of(constraints: Sequence[Constraint], rng: random.Random) -> int:
    """A number of words that the constraints allow."""
    for kind, a, _ in constraints:
        if kind == "exactly":
            return int(a)
        if kind == "at_most":
            return rng.randint(2, int(a))
        if kind == "at_least":
            return int(a) + rng.randint(0, 2)
    return rng.randint(2, 5)


def compose(topic: str, constraints: Sequence[Constraint], length: int, rng: random.Random) -> Listing | None:
    """A list of so many words that keeps constraints; None where there is none."""
    asked = {kind: (a, b) for kind, a, b in constraints}
    must = [word for kind in ("first", "mention", "before", "last") for word in asked.get(kind, ()) if word]
    must += [asked["twice"][0]] * 2 if "twice" in asked else []
    banned = {*must, asked.get("avoid", ("",))[0]}
    rest = [word for word in TOPICS[topic] if word not in banned]
    if "sorted" in asked:
        lowest, highest = asked.get("first", ("",))[0], asked.get("last", ("~",))[0]
        rest = [word for word in rest if lowest < word < highest]
    if length < len(must) or length - len(must) > len(rest):
        return None
    words = must + rng.sample(rest, length - len(must))
    rng.shuffle(words)
    if "sorted" in asked:
        words.sort()
    if "before" in asked:
        a, b = (words.index(word) for word in asked["before"])
        if a > b:
            words[a], words[b] = words[b], words[a]
    for kind, place in (("first", 0), ("last", length - 1)):
        if kind in asked:
            own = words.index(asked[kind][0])
            words[own], words[place] = words[place], words[own]
    style = Style(asked.get("separator", (", ",))[0], asked.get("end", (".",))[0], "capitals" in asked)
    listing = Listing(tuple(words), style)
    return listing if all(keeps(one, listing) for one in constraints) else None


def draw(split: str, rng: random.Random) -> Row:
    """An order of a split: `prompt`, `completion` (a list that keeps it), `topic` and `constraints`."""
    while True:
        topic = rng.choice(list(TOPICS))
        constraints = draw_constraints(topic, rng)
        listing = compose(topic, constraints, length_of(constraints, rng), rng)
        if listing is not None and _belongs(topic, constraints, split):
            return _row(topic, constraints, listing, rng)


def draw_teaching(split: str, rng: random.Random) -> Row:
    """An order or, as often, one about words alone with a list of little else: a start has to learn to copy."""
    while rng.random() < 0.5:
        topic = rng.choice(list(TOPICS))
        names = rng.sample(TOPICS[topic], 4)
        kinds = rng.sample(COPIED, rng.randint(1, 2))
        constraints = [(kind, names.pop(), names.pop() if kind == "before" else "") for kind in kinds]
        least = sum(2 if kind in ("before", "twice") else 1 for kind in kinds)
        listing = compose(topic, constraints, least + rng.randint(0, 1), rng)
        if listing is not None and _belongs(topic, constraints, split):
            return _row(topic, constraints, listing, rng)
    return draw(split, rng)


def _belongs(topic: str, constraints: Sequence[Constraint], split: str) -> bool:
    return in_split(f"{topic}: {sorted(constraints)}", split)


def _row(topic: str, constraints: Sequence[Constraint], listing: Listing, rng: random.Random) -> Row:
    sentences = [rng.choice(OPENINGS).format(topic=topic)]
    for kind, a, b in constraints:
        names = {**SEPARATORS, **ENDS}
        number = NUMBERS[int(a)] if kind in COUNTS else ""
        sentences.append(rng.choice(WORDINGS[kind]).format(n=number, a=names.get(a, a), b=b))
    prompt = " ".join(sentences) + ANSWER
    return {"prompt": prompt, "completion": written(*listing), "topic": topic, "constraints": list(constraints)}


# -- poorer lists ------------------------------------------------------------------------------------------------------


def attempt(row: Row, rng: random.Random, forgets: float, extra: int = 0) -> Listing:
    """A list by a writer who forgets each constraint with some probability, and writes `extra` words more.

    A count that is forgotten gives another number of words; what is forgotten may still be kept by chance.
    """
    topic, constraints = row["topic"], list(row["constraints"])
    heeded = [one for one in constraints if rng.random() >= forgets]
    counted = any(kind in COUNTS for kind, *_ in heeded)
    listing = None
    while listing is None:
        listing = compose(topic, heeded, length_of(heeded, rng) if counted else rng.choice((2, 3, 3, 4, 4, 5, 6)), rng)
    words = list(listing.words)
    more = [word for word in TOPICS[topic] if word not in words]
    for _ in range(min(extra, MOST - len(words))):
        word = more.pop(rng.randrange(len(more))) if more else rng.choice(TOPICS[topic])
        # Before the last word: a longer list may still begin and end as it was asked to.
        words.insert(rng.randint(1, max(1, len(words) - 1)), word)
    return Listing(tuple(words), listing.style)


def marred(words: Sequence[str], rng: random.Random) -> list[str]:
    """A list with a fault of form: a word of another topic, or one that is said again."""
    changed = list(words)
    topic = rng.choice(list(TOPICS))
    changed[rng.randrange(len(changed))] = rng.choice(TOPICS[topic]) if rng.random() < 0.5 else rng.choice(changed)
    return changed


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """An order as a careless writer carries it out: much of what is asked is forgotten, and a fifth runs on."""
    row = draw(split, rng)
    # Lists of many lengths: of texts that are all shorter than a policy's nothing can be told at equal length.
    listing = attempt(row, rng, forgets=0.45, extra=rng.randint(2, 8) if rng.random() < 0.2 else 0)
    words = marred(listing.words, rng) if rng.random() < 0.15 else listing.words
    return {**row, "completion": written(words, listing.style)}


def candidates(row: Row, rng: random.Random, n: int) -> list[str]:
    """Lists from perfect to poor and from short to long, for annotators to compare.

    Length and quality vary apart from each other, so that a reward model can learn the annotators' taste for either.
    """
    texts = [row["completion"]]
    while len(texts) < n:
        extra = rng.choice((0, 0, 0, 1, 2, rng.randint(3, 10)))
        listing = attempt(row, rng, forgets=rng.choice((0.0, 0.2, 0.5)), extra=extra)
        words = marred(listing.words, rng) if rng.random() < 0.2 else listing.words
        texts.append(written(words, listing.style))
    return texts[:n]


def corrupted(row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Pairs of a list that keeps the order and the same with a fault, for replaced-token detection."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < n:
        right = compose(row["topic"], row["constraints"], length_of(row["constraints"], rng), rng)
        if right is None:
            continue
        words, style = list(right.words), right.style
        chance = rng.random()
        if chance < 0.35:  # another sign or case than was asked for
            style = Style(rng.choice(list(SEPARATORS)), rng.choice(list(ENDS)), rng.random() < 0.3)
        elif chance < 0.6:
            words = marred(words, rng)
        elif chance < 0.8:
            words.insert(rng.randint(0, len(words)), rng.choice(TOPICS[row["topic"]]))
        elif len(words) > 1:
            place = rng.randrange(len(words) - 1)
            words[place], words[place + 1] = words[place + 1], words[place]
        pairs.append((written(*right), written(words, style)))
    return pairs
