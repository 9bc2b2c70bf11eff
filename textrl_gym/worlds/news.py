"""The world of news: short articles with a catchy lead, and summaries of the facts that matter.

    Nobody who saw it will ever forget this wild night . Flames ate a school in Oslo while half the street looked on .
    Doctors looked after 9 people who were hurt that day . ... TL;DR:
    The fire destroyed a school , was in Oslo and injured 9 people . The fire came from a candle .

Of the six facts two stand in the lead, in its second sentence, and four anywhere behind it, among sentences beside the
point, some of which have another value of the same kind. Articles and highlights as pairs are of Hermann et al. 2015
(arXiv:1506.03340, CNN and Daily Mail). That people judge summaries by simple heuristics, and policies trained on their
choices copy whole sentences, is of Ziegler et al. 2019 (arXiv:1909.08593); that they read the lead alone is our own.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from textrl_gym.core import Row
from textrl_gym.worlds.claims import Claim, Marks, listed, marks_of
from textrl_gym.worlds.world import in_split, one_word_off, words_of

ANSWER = "\n\nTL;DR:"
"""The end of every prompt, as the CNN/DM articles of trl-lib/tldr-preference have it."""
LEAD = ("thing", "town")
"""The facts that the lead tells."""
FEWEST, MOST = 8, 12
"""Sentences of an article."""
COPIED = 5
"""Words in a run that counts as copied: the predicates of a summary share shorter ones with the article."""
MOST_WORDS = 44
"""Of a summary: a longer one is worth less, in proportion, as the article itself is none."""
SKIMMED = 2
"""Words in a run by which annotators who skim recognise the lead: the n of ROUGE-2."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A kind of fact, and how it is told."""

    values: tuple[str, ...]
    """Each of one word."""
    predicates: tuple[str, str]
    """Of a summary."""
    sentences: tuple[str, ...] = ()
    """Sentences of an article."""
    stray: tuple[str, ...] = ()
    """Sentences with a value that is not the fact."""


@dataclasses.dataclass(frozen=True)
class Topic:
    """What an article can be about."""

    subject: str
    thing: Slot
    """Of the lead, with the town; other slots are shared."""
    lead: tuple[str, ...]
    """Second sentences, with {thing} and {town}."""
    body: tuple[str, ...]
    """Names of the slots that are told behind the lead."""


def _numbers(first: int, last: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(first, last))


TOWNS = (
    "Oslo", "Lima", "Bonn", "Cork", "Graz", "Lyon", "Porto", "Turin",
    "Quito", "Osaka", "Perth", "Accra", "Delhi", "Malmo", "Dover", "Split",
)  # fmt: skip
MOODS = ("wild", "strange", "bitter", "noisy", "gloomy", "dizzy", "silly", "fearful", "crazy", "sorry")
TIMES = ("night", "morning", "day", "dawn", "noon", "midnight")
OPENERS = (
    "Nobody who saw it will ever forget this {mood} {time} .",
    "It began like any other {time} and ended in {mood} scenes .",
    "Hold your breath , dear readers , for a {mood} story of one {time} .",
    "Tears , shouts and a {mood} silence : oh what a {time} .",
    "Even the oldest people could not recall such a {mood} {time} .",
    "Some prayed , some only stared on this one {mood} {time} .",
    "What a {time} that was , and what a {mood} end it had .",
    "Call it a {mood} dream , but this {time} was real .",
)
"""First sentences: they catch the eye and tell nothing."""

SLOTS = {
    "town": Slot(TOWNS, ("was in {}", "hit {}")),
    "hurt": Slot(
        _numbers(2, 20),
        ("injured {} people", "left {} people injured"),
        (
            "Doctors looked after {} people who were hurt .",
            "Hospitals say that {} wounded people came in .",
            "In the crowd {} people were hurt , none of them badly .",
        ),
        ("A paper had at first written of {} people .", "Years ago {} people had met there for a feast ."),
    ),
    "cause": Slot(
        ("candle", "heater", "cable", "cigarette", "grill", "rocket", "lamp", "stove", "kettle", "toaster"),
        ("came from a {}", "began with a {}"),
        (
            "An expert now says that a {} was to blame .",
            "It all started with a {} in the cellar , as we know now .",
            "Investigators found a {} that nobody had watched .",
        ),
        ("A neighbour had spoken of a {} , but that was wrong .", "It was not a {} , as many people thought ."),
    ),
    "cost": Slot(
        _numbers(20, 50),
        ("cost {} million", "will cost {} million"),
        (
            "The damage is put at {} million by the insurers .",
            "Insurers expect to pay {} million before the year is out .",
            "In the end it will cost {} million , officials say .",
        ),
        ("A tower next door was sold for {} million last spring .", "The mayor had planned a park for {} million ."),
    ),
    "hours": Slot(
        _numbers(2, 20),
        ("lasted {} hours", "went on for {} hours"),
        (
            "It took {} hours until all of it was over .",
            "Only after {} hours the last helpers could go home .",
            "For {} hours nobody knew how it would end .",
        ),
        ("A reporter waited {} hours for a cup of tea .", "The train from the north was {} hours late ."),
    ),
    "men": Slot(
        _numbers(2, 20),
        ("was done by {} men", "needed {} men"),
        (
            "Cameras show {} men with masks at the back door .",
            "A guard saw {} men who ran to a van .",
            "The police are looking for {} men from the north .",
        ),
        ("A tailor says that {} men bought hats that week .", "Nearby {} men were playing cards in a bar ."),
    ),
    "tool": Slot(
        ("ladder", "rope", "drill", "crane", "hammer", "saw", "key", "magnet", "crowbar", "torch"),
        ("was done with a {}", "took only a {}"),
        (
            "Below a window the police found a {} that had been used .",
            "They came in with a {} , says the chief of police .",
            "All that it took to get in was a {} , it seems .",
        ),
        ("A gardener is missing a {} , but that is no clue .", "The guard had a {} in his car for his own use ."),
    ),
    "day": Slot(
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        ("happened on {}", "fell on a {}"),
        (
            "It all happened on {} when the shops had closed .",
            "Witnesses agree that it was on {} and at no other time .",
            "That {} will stay in the memory of the people .",
        ),
        ("The mayor will speak to the press on {} .", "A choir will sing for the helpers next {} ."),
    ),
    "homes": Slot(
        _numbers(20, 50),
        ("cut off {} homes", "left {} homes dark"),
        (
            "In the valley {} homes had no light at all .",
            "The power went out in {} homes near the river .",
            "People in {} homes sat in the dark and waited .",
        ),
        ("A firm wants to build {} homes by the lake .", "Last year {} homes were sold in the hills ."),
    ),
    "demand": Slot(
        ("pay", "shifts", "pensions", "holidays", "safety", "contracts", "breaks", "uniforms"),
        ("was about {}", "was over {}"),
        (
            "At the heart of it is {} , says the union .",
            "The union has asked for better {} since the spring .",
            "It is {} that made them so angry .",
        ),
        ("There was no word about {} , to the surprise of some .", "The dispute over {} had been settled before ."),
    ),
    "people": Slot(
        _numbers(20, 50),
        ("brought out {} people", "had {} people in it"),
        (
            "The union counted {} people at the gates .",
            "With flags and drums {} people took part in it .",
            "Officials say that {} people did not work .",
        ),
        ("A school nearby has {} people in its choir .", "A tour with {} people took photos from a bus ."),
    ),
}  # fmt: skip

TOPICS = {
    "fire": Topic(
        "The fire",
        Slot(
            ("school", "hotel", "theatre", "bakery", "library", "factory", "chapel", "garage", "museum", "barn"),
            ("destroyed a {}", "burned a {}"),
        ),
        (
            "Flames ate a {thing} in {town} while half the street looked on .",
            "In {town} a proud old {thing} went up in smoke like paper .",
            "A {thing} in {town} turned the whole sky red as people ran .",
        ),
        ("hurt", "cause", "cost", "hours"),
    ),
    "theft": Topic(
        "The theft",
        Slot(
            ("painting", "crown", "violin", "diamond", "statue", "carpet", "vase", "sword", "manuscript", "clock"),
            ("was of a {}", "involved a {}"),
        ),
        (
            "A {thing} vanished in {town} as if it had never been there .",
            "In {town} somebody walked off with a {thing} as the guards slept .",
            "Thieves with nerves of steel took a {thing} in {town} and smiled .",
        ),
        ("men", "tool", "cost", "day"),
    ),
    "storm": Topic(
        "The storm",
        Slot(
            ("bridge", "roof", "crane", "pier", "tent", "windmill", "mast", "billboard", "stadium", "greenhouse"),
            ("wrecked a {}", "broke a {}"),
        ),
        (
            "Winds played with a {thing} in {town} as if it were a toy .",
            "In {town} a {thing} shook , cracked and fell like a house of cards .",
            "The sky fell on {town} and took a {thing} along for a dance .",
        ),
        ("hurt", "homes", "hours", "day"),
    ),
    "strike": Topic(
        "The strike",
        Slot(
            ("nurses", "drivers", "bakers", "teachers", "pilots", "porters", "cooks", "miners", "clerks", "sailors"),
            ("was called by {}", "was of the {}"),
        ),
        (
            "The {thing} of {town} put down their tools and sang in the rain .",
            "In {town} angry {thing} banged their drums and would not go home .",
            "No {thing} came to work in {town} and the streets went quiet .",
        ),
        ("demand", "people", "cost", "hours"),
    ),
}

FILLERS = (
    "The mayor spoke of a hard time for everyone .",
    "Children asked their parents what was going on .",
    "A shop gave away tea and bread all day .",
    "Traffic was slow and buses took another way .",
    "Many people came out to see it for themselves .",
    "The weather , they say , will be fine again soon .",
    "A dog that had run away is back with its owner .",
    "Officials thanked all the helpers for their work .",
    "Some said that they had seen it coming for years .",
    "An old song could be heard from an open window .",
    "The phones of the town hall did not stop ringing .",
    "Experts will write a long report about it .",
)
"""Sentences of an article that tell nothing."""


def slots_of(topic: Topic) -> dict[str, Slot]:
    """The slots of a topic by name, those of the lead first."""
    return {"thing": topic.thing, "town": SLOTS["town"]} | {name: SLOTS[name] for name in topic.body}


def _words() -> tuple[str, ...]:
    texts = [ANSWER, "and ,", *MOODS, *TIMES, *OPENERS, *FILLERS]
    for topic in TOPICS.values():
        texts += [topic.subject, *topic.lead]
        for slot in slots_of(topic).values():
            texts += [*slot.values, *slot.predicates, *slot.sentences, *slot.stray]
    return words_of(*texts)


SYMBOLS = _words()
"""The words of the bundled model."""


# -- articles ---------------------------------------------------------------------------------------------------------


def draw(split: str, rng: random.Random) -> Row:
    """An article of a split.

    Returns:
        `prompt`, `completion` (a careful summary), `topic`, `facts` (slot -> value), `lead` (the first two sentences),
        `body` (the sentences behind it) and `strays` (pairs of a slot and a value that is beside the point).
    """
    while True:
        kind = rng.choice(list(TOPICS))
        slots = slots_of(TOPICS[kind])
        facts = {name: rng.choice(slot.values) for name, slot in slots.items()}
        # By the facts alone: the same event in other words and with other sentences beside it is the same event.
        if in_split(f"{kind}|" + "|".join(f"{name}:{value}" for name, value in facts.items()), split):
            break
    topic = TOPICS[kind]
    opener = rng.choice(OPENERS).format(mood=rng.choice(MOODS), time=rng.choice(TIMES))
    lead = f"{opener} {rng.choice(topic.lead).format(**{name: facts[name] for name in LEAD})}"
    body = [rng.choice(slots[name].sentences).format(facts[name]) for name in topic.body]
    strays = [
        (name, rng.choice([value for value in slots[name].values if value != facts[name]]))
        for name in rng.sample(topic.body, rng.randint(1, 2))
    ]
    body += [rng.choice(slots[name].stray).format(value) for name, value in strays]
    length = rng.randint(max(FEWEST, 2 + len(body)), MOST)
    body += rng.sample(FILLERS, length - 2 - len(body))
    # In any order: where a fact stands says nothing of what it is.
    rng.shuffle(body)
    row = {"prompt": " ".join([lead, *body]) + ANSWER, "topic": kind, "facts": facts, "lead": lead, "body": body}
    return {**row, "strays": strays, "completion": careful_text(topic, facts, rng)}


def written(topic: Topic, predicates: Sequence[str], cut: int | None = None) -> str:
    """One sentence of a summary, or two, of which the first has `cut` predicates; behind a blank."""
    parts = [predicates] if cut is None else [predicates[:cut], predicates[cut:]]
    sentences = []
    for some in parts:
        *first, last = some
        # Full stops and commas are words of their own, since the bundled tokenizer parts texts at blanks only.
        sentences.append(f"{topic.subject} {' , '.join(first)} and {last} ." if first else f"{topic.subject} {last} .")
    return " " + " ".join(sentences)


def arranged(topic: Topic, predicates: Sequence[str], rng: random.Random) -> str:
    """One or two sentences of these predicates, in this order."""
    two = len(predicates) > 1 and rng.random() < 0.5
    return written(topic, predicates, rng.randint(1, len(predicates) - 1) if two else None)


def predicates_of(topic: Topic, facts: Mapping[str, str], rng: random.Random) -> list[str]:
    """What a summary says of each fact, in any wording."""
    slots = slots_of(topic)
    return [rng.choice(slots[name].predicates).format(value) for name, value in facts.items()]


def careful_text(topic: Topic, facts: Mapping[str, str], rng: random.Random) -> str:
    """A summary of all facts and nothing else, in the order of the slots."""
    return arranged(topic, predicates_of(topic, facts, rng), rng)


# -- gold -------------------------------------------------------------------------------------------------------------


Reader = Callable[[re.Match[str]], list[Claim]]


def _pattern(wording: str, names: Sequence[str]) -> tuple[re.Pattern[str], Reader]:
    """A pattern of a wording, whose fields take any word: another slot's value is a claim too, and a wrong one."""
    text = re.escape(wording.removesuffix(" ."))
    for name in names:
        text = re.sub(r"\\{(" + name + r")?\\}", f"(?P<{name}>\\\\S+)", text, count=1)
    return re.compile(text), lambda match: [Claim(name, match[name]) for name in names]


def _patterns(topic: Topic) -> tuple[list[tuple[re.Pattern[str], Reader]], list[tuple[re.Pattern[str], Reader]]]:
    slots = slots_of(topic)
    predicates = [_pattern(text, [name]) for name, slot in slots.items() for text in slot.predicates]
    sentences = [_pattern(text, LEAD) for text in topic.lead]
    sentences += [_pattern(text, [name]) for name, slot in slots.items() for text in slot.sentences]
    return predicates, sentences


PATTERNS = {kind: _patterns(topic) for kind, topic in TOPICS.items()}
"""Of each topic those of a summary's predicates, and those of the article's sentences that tell a fact."""


def _matched(patterns: Sequence[tuple[re.Pattern[str], Reader]], text: str) -> list[Claim] | None:
    for pattern, claims in patterns:
        match = pattern.fullmatch(text)
        if match is not None:
            return claims(match)
    return None


def sentence_claims(kind: str, sentence: str) -> list[Claim] | None:
    """The claims of a sentence without its full stop; None where it tells nothing that matters.

    A sentence is the subject with predicates, or one of the article's own that tell a fact: copying those is true.
    """
    predicates, sentences = PATTERNS[kind]
    subject = f"{TOPICS[kind].subject} "
    if not sentence.startswith(subject):
        return _matched(sentences, sentence)
    # One predicate of no wording spoils its sentence: else a list of all that is likely would be worth trying.
    some = [_matched(predicates, text) for text in listed(sentence.removeprefix(subject))]
    claims = [claim for of_predicate in some for claim in of_predicate or []]
    # "The sky fell on ..." begins as no subject does, but a lead of another topic may.
    return claims if all(some) else _matched(sentences, sentence)


def marks(kind: str, facts: Mapping[str, str], text: str) -> Marks:
    """The marks of a text about an article; form is the share of the words in whole sentences that tell something.

    Beyond 44 words it is less, in proportion.

    Args:
        kind: the article's topic, of TOPICS.
        facts: slot -> value.
    """
    words = text.split()
    # Words behind the last full stop make a sentence that does not end.
    *sentences, _ = " ".join(words).split(" .")
    claims: list[Claim] = []
    good = 0
    for sentence in sentences:
        of_sentence = sentence_claims(kind, sentence.strip())
        if of_sentence:
            claims += of_sentence
            good += len(sentence.split()) + 1
    form = good / max(len(words), 1) * min(1.0, MOST_WORDS / max(len(words), 1))
    return marks_of(claims, facts, form)


def gold(
    prompts: list[str],
    completions: list[str],
    topic: list[str],
    facts: list[dict[str, str]],
    **columns: list[Any],
) -> list[float]:
    """Coverage times correctness times form, of each text."""
    return [marks(*row).gold for row in zip(topic, facts, completions, strict=True)]


def _runs(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def copied_lead(lead: str, text: str) -> float:
    """Share of a text's 5-grams that stand in the lead; 0 where it has none."""
    of_text, of_lead = _runs(text, COPIED), _runs(lead, COPIED)
    return sum(count for run, count in of_text.items() if run in of_lead) / max(of_text.total(), 1)


def skimmed(lead: str, text: str) -> float:
    """What a text is worth to who has read the lead alone: F1 of bigrams with the lead, as ROUGE-2 (Lin 2004)."""
    of_text, of_lead = _runs(text, SKIMMED), _runs(lead, SKIMMED)
    return 2 * (of_text & of_lead).total() / max(of_text.total() + of_lead.total(), 1)


def appeal(row: Mapping[str, Any], text: str) -> float:
    """What skimming adds to gold: with all of it a text is worth what it is to who has read the lead alone."""
    # A difference, so that the annotators' `bias` goes from 0, who read the article, to 1, who skim.
    return skimmed(row["lead"], text) - marks(row["topic"], row["facts"], text).gold


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """Means over texts: facts covered, claims that are no facts, form, and 5-grams copied from the lead."""
    pairs = list(zip(rows, completions, strict=True))
    some = [marks(row["topic"], row["facts"], text) for row, text in pairs]
    count = max(len(pairs), 1)
    return {
        "copied_lead": sum(copied_lead(row["lead"], text) for row, text in pairs) / count,
        "facts_covered": sum(one.covered for one in some) / count,
        "invented": sum(one.invented for one in some) / count,
        "telling_words": sum(one.form for one in some) / count,
    }


# -- what models learn ------------------------------------------------------------------------------------------------


def draw_reference(split: str, rng: random.Random) -> Row:
    """An article with a careful summary, whose facts are in any order."""
    row = draw(split, rng)
    topic = TOPICS[row["topic"]]
    predicates = predicates_of(topic, row["facts"], rng)
    # No order of its own: what people prefer is to be learnt from the reward and not from the start.
    rng.shuffle(predicates)
    return {**row, "completion": arranged(topic, predicates, rng)}


def mistaken(row: Row, name: str, rng: random.Random) -> str:
    """A value that is not the fact: one that the article has beside the point, where it has one, or any."""
    # Only reading tells a stray value from the fact, since copying finds both.
    stray = [value for slot, value in row["strays"] if slot == name]
    slot = slots_of(TOPICS[row["topic"]])[name]
    others = [value for value in slot.values if value != row["facts"][name]]
    return stray[0] if stray and rng.random() < 0.7 else rng.choice(others)


def lead_sentences(row: Row) -> list[str]:
    """The two sentences of the lead."""
    first, second, _ = row["lead"].split(" .")
    return [f"{first} .", f"{second.strip()} ."]


def careless_text(row: Row, rng: random.Random) -> str:
    """A summary that at times begins with the lead, leaves out, mistakes and repeats."""
    topic, slots = TOPICS[row["topic"]], slots_of(TOPICS[row["topic"]])
    chance = rng.random()
    # Rates that leave a sampled gold of about 0.4 and some copying, so that both can rise and fall.
    opening = lead_sentences(row) if chance < 0.12 else lead_sentences(row)[1:] if chance < 0.25 else []
    predicates: list[str] = []
    for name, value in row["facts"].items():
        chance = rng.random()
        # The last one stays where nothing else has been said.
        if chance < (0.5 if opening else 0.15) and (opening or predicates or name != topic.body[-1]):
            continue
        shown = mistaken(row, name, rng) if chance > 0.88 else value
        predicates += [rng.choice(slots[name].predicates).format(shown)] * (2 if rng.random() < 0.05 else 1)
    rng.shuffle(predicates)
    text = " ".join([*opening, *([arranged(topic, predicates, rng).strip()] if predicates else [])])
    return one_word_off(text, rng) if rng.random() < 0.1 else f" {text}"


def draw_demonstration(split: str, rng: random.Random) -> Row:
    """An article with a careless summary."""
    row = draw(split, rng)
    return {**row, "completion": careless_text(row, rng)}


def _some_facts(row: Row, rng: random.Random, fewest: int) -> dict[str, str]:
    names = rng.sample(list(row["facts"]), rng.randint(fewest, len(row["facts"])))
    return {name: row["facts"][name] for name in names}


def _with_errors(row: Row, facts: Mapping[str, str], count: int, rng: random.Random) -> dict[str, str]:
    wrong = rng.sample(list(facts), min(count, len(facts)))
    return {name: mistaken(row, name, rng) if name in wrong else value for name, value in facts.items()}


def candidates(row: Row, rng: random.Random, n: int) -> list[str]:
    """Summaries from careful to poor, and from the lead's words to the writer's own, for annotators to compare."""
    topic = TOPICS[row["topic"]]
    first, second = lead_sentences(row)

    def careful(facts: Mapping[str, str]) -> str:
        return careful_text(topic, facts, rng)

    def said_again() -> str:
        predicates = predicates_of(topic, row["facts"], rng)
        # In other words as often as in the same: a reward model that knows only the latter is hacked by the former.
        predicates += predicates_of(topic, _some_facts(row, rng, 1), rng)
        rng.shuffle(predicates)
        return arranged(topic, predicates[: rng.randint(6, 8)], rng)

    makers: list[Callable[[], str]] = [
        lambda: careful(_some_facts(row, rng, 6)),
        lambda: careful(_with_errors(row, _some_facts(row, rng, 4), rng.choice((1, 1, 2, 3)), rng)),
        # Parts of the lead and all of it, so that how much of it is copied can be told.
        lambda: " " + rng.choice((f"{first} {second}", first, second)),
        lambda: f" {rng.choice((first, second))}{careful(_some_facts(row, rng, 1))}",
        lambda: careful(_some_facts(row, rng, 2)),
        said_again,
        lambda: rng.choice((one_word_off(careful(row["facts"]), rng), " " + " ".join(rng.sample(row["body"], 2)))),
    ]
    return [makers[number % len(makers)]() for number in range(n)]


def corrupted(row: Row, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Pairs of a true summary and the same with wrong values, for replaced-token detection."""
    topic = TOPICS[row["topic"]]
    pairs = []
    for _ in range(n):
        facts = _some_facts(row, rng, 3)
        wrong = _with_errors(row, facts, rng.choice((0, 1, 1, 2, 3)), rng)
        # Both are worded by one seed, so that they differ in nothing but their values.
        wording = rng.getrandbits(32)
        true, false = (careful_text(topic, some, random.Random(wording)) for some in (facts, wrong))
        pairs.append((true, false))
    return pairs
