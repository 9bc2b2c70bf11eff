"""The TL;DR world: procedural forum posts with short summaries, in the format of trl-lib/tldr.

A post tells seven facts (KINDS) about one person, in any order and wording, among sentences beside the point that
mention another person, event, time, place, amount, feeling and plan. Its reference summary states the seven facts.
All wordings live in assets/tldr/phrases.toml; tldr_grammar.py words the summaries, this file the posts.
A row is a function of (split, seed, index).
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

from textrl_gym.worlds.tldr_grammar import Slots, bank, compose, fill_slots, pronoun_of

Post = dict[str, Any]  # prompt, completion: str; facts: {kind: {"value": str, ...}}; distractors: {kind: [str, ...]}

T = TypeVar("T")

KINDS = ("who", "event", "when", "where", "amount", "feeling", "ask")
SIZES = {"train": 1_000_000, "validation": 10_000, "test": 10_000}
# Posts are dealt to the splits by a residue of their facts (see `_draw_facts`), so no two splits can share a post.
RESIDUES = 20
SPLIT_RESIDUES = {"train": range(18), "validation": range(18, 19), "test": range(19, 20)}
# 80 amounts in dollars: a multiple of RESIDUES, so that all amounts are equally frequent in every split.
AMOUNTS = tuple(chain(range(20, 100, 5), range(100, 300, 10), range(300, 1000, 25), range(1000, 2600, 100)))


# ----------------------------------------------------------------------------------------------------------- posts


def slots_of(facts: dict[str, dict[str, Any]]) -> Slots:
    """The slots of the summary grammar that state these facts."""
    who, amount = facts["who"], facts["amount"]
    slots = {kind: facts[kind]["value"] for kind in KINDS if kind != "who"}
    return slots | {"rel": who["relation"], "name": who["name"], "she": who["pronoun"], "role": amount["role"]}


def _people(groups: dict[str, list[str]], rng: random.Random) -> tuple[str, str]:
    """A relation and a name that suits it."""
    names = bank()["names"]
    she = [(relation, "she") for relation in groups["she"]]
    he = [(relation, "he") for relation in groups["he"]]
    either = [(relation, "") for relation in groups["any"]]
    relation, pronoun = rng.choice(she + he + either)
    return relation, rng.choice(names[pronoun or rng.choice(("she", "he"))])


def _other(pool: list[T], taken: T | None, rng: random.Random) -> T:
    return rng.choice([item for item in pool if item != taken])


def _draw_facts(split: str, sub: dict[str, Any], rng: random.Random) -> dict[str, dict[str, Any]]:
    relation, name = _people(sub["relations"], rng)
    she = pronoun_of(name)
    family = rng.choice(sub["events"])
    thing = rng.choice(family["things"])
    facts: dict[str, dict[str, Any]] = {
        "who": {"value": f"{relation} {name}", "relation": relation, "name": name, "pronoun": she},
        "event": {"value": f"{rng.choice(family['did'])} {thing}", "act": family["did"], "thing": thing},
        "when": {"value": rng.choice(bank()["when"])},
        "where": {"value": rng.choice(sub["where"])},
        "feeling": {"value": rng.choice(bank()["feelings"])},
        "ask": {"value": rng.choice(sub["ask"]).replace("{him}", "her" if she == "she" else "him")},
    }
    residue = rng.choice(SPLIT_RESIDUES[split])
    step = (residue - _code(facts)) % RESIDUES + RESIDUES * rng.randrange(len(AMOUNTS) // RESIDUES)
    facts["amount"] = {"value": f"${AMOUNTS[step]}", "role": rng.choice(family["amount"])}
    return facts


def _code(facts: dict[str, dict[str, Any]]) -> int:
    # Not hash(), which is salted in each process.
    return zlib.crc32("|".join(facts[kind]["value"] for kind in KINDS if kind != "amount").encode())


def _draw_distractors(facts: dict[str, dict[str, Any]], sub: dict[str, Any], rng: random.Random) -> Slots:
    """One other value of every kind, and a second other person (e...)."""
    who = facts["who"]
    slots: Slots = {}
    taken_names, taken_relations = {who["name"]}, {who["relation"]}
    for letter in "de":
        while True:
            relation, name = _people(bank()["bystanders"], rng)
            if name not in taken_names and relation not in taken_relations:
                break
        taken_names.add(name)
        taken_relations.add(relation)
        slots |= {f"{letter}rel": relation, f"{letter}name": name, f"{letter}she": pronoun_of(name)}
    family = _other(sub["events"], None, rng)
    slots["devent"] = f"{rng.choice(family['did'])} {_other(family['things'], facts['event']['thing'], rng)}"
    him = "her" if who["pronoun"] == "she" else "him"
    slots["dask"] = _other([a.replace("{him}", him) for a in sub["ask"]], facts["ask"]["value"], rng)
    slots["dwhen"] = _other(bank()["when"], facts["when"]["value"], rng)
    slots["dwhere"] = _other(sub["where"], facts["where"]["value"], rng)
    slots["dfeeling"] = _other(bank()["feelings"], facts["feeling"]["value"], rng)
    slots["damount"] = f"${_other(list(AMOUNTS), int(facts['amount']['value'][1:]), rng)}"
    return slots


def _plan(slots: Slots, rng: random.Random) -> list[tuple[str, list[str]]]:
    """The sentences of a post as (whom they are about, templates) in order."""
    post, distractor = bank()["post"], bank()["distractor"]
    chunks = [("main", [rng.choice(post["amount"][slots["role"]])]), ("main", [rng.choice(post["feeling"])])]
    rng.shuffle(chunks)
    chunks.insert(0, ("main", rng.choice(post["main"])))
    question = ("ask", [rng.choice(post["ask"])])
    chunks.insert(len(chunks) if rng.random() < 0.75 else rng.randint(1, len(chunks)), question)
    for kinds in rng.choice(distractor["schemes"]):
        chunks.insert(rng.randint(0, len(chunks) - 1), ("other", [rng.choice(distractor[kinds])]))
    fillers = rng.sample(post["fillers"], 3)
    words = sum(len(sentence.split()) for _, sentences in chunks for sentence in sentences)
    num_words = rng.randint(55, 90)
    while fillers and words < num_words:
        filler = fillers.pop()
        words += len(filler.split())
        chunks.insert(rng.randint(1, len(chunks)), ("", [filler]))
    if rng.random() < 0.4:
        chunks.insert(0, ("", [rng.choice(post["openers"])]))
    if rng.random() < 0.3:
        chunks.append(("", [rng.choice(post["closers"])]))
    return chunks


def _tell(slots: Slots, rng: random.Random) -> str:
    """The body of a post. Keeps track of who was spoken of last, so that pronouns point at the right person."""
    sentences: list[str] = []
    last = ""
    for about, templates in _plan(slots, rng):
        for template in templates:
            near = last == "main" and (rng.random() < 0.75 or "{name}" in template)
            person = slots["she"] if near or "my {rel}" in template else slots["name"]
            sentence = fill_slots(template, slots | {"s": person})
            if about == "ask" and last == "other" and re.search(r" (her|him)\b", slots["ask"]):
                lowered = sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]
                sentence = f"When it comes to {slots['name']}, {lowered}"
            sentences.append(sentence)
            names_one = re.search(r"\{(s|S|name)\}", template) or about == "other"
            last = about if names_one else last
    return " ".join(sentences)


class TLDRCorpus:
    """Forum posts and reference summaries of one split: a sequence with random access, built on demand.

    Args:
        split: "train", "validation" or "test"; no post of one can occur in another, whatever the seeds.
        seed: Another seed gives other posts of the same split.
        size: How many rows; None for 1,000,000 (train) or 10,000 (validation, test).

    Raises:
        ValueError: for an unknown split or a negative size.
    """

    def __init__(self, split: str = "train", seed: int = 0, size: int | None = None) -> None:
        if split not in SIZES:
            raise ValueError(f"split must be one of {sorted(SIZES)}, got {split!r}")
        if size is not None and size < 0:
            raise ValueError(f"size must be None or at least 0, got {size}")
        self.split = split
        self.seed = seed
        self._size = SIZES[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Post]:
        return (self[index] for index in range(self._size))

    def __getitem__(self, index: int) -> Post:
        """Post `index`; IndexError outside 0 <= index < len(self)."""
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} is outside 0 <= index < {self._size}")
        # A generator for each row, seeded by a text, which random hashes by SHA-512 and not by the salted hash(): any
        # row can be had without those before it, and is the same in every process.
        rng = random.Random(f"{self.split}/{self.seed}/{int(index)}")
        topic = rng.choice(list(bank()["subreddits"]))
        sub = bank()["subreddits"][topic]
        facts = _draw_facts(self.split, sub, rng)
        other = _draw_distractors(facts, sub, rng)
        slots = slots_of(facts) | other
        slots["a_rel"] = ("an " if slots["rel"][0] in "aeiou" else "a ") + slots["rel"]
        title = fill_slots(rng.choice(bank()["post"]["titles"]), slots)
        summary = compose(slots_of(facts), rng)
        distractors = {kind: [other[f"d{kind}"]] for kind in KINDS if kind != "who"}
        distractors["who"] = [f"{other[f'{letter}rel']} {other[f'{letter}name']}" for letter in "de"]
        prompt = f"SUBREDDIT: r/{topic}\n\nTITLE: {title}\n\nPOST: {_tell(slots, rng)}\n\nTL;DR:"
        return {"prompt": prompt, "completion": " " + summary, "facts": facts, "distractors": distractors}


# ------------------------------------------------------------------------------------------------ flawed summaries


def _swap(slots: Slots, kind: str, value: str) -> None:
    """State `value` where the fact of this kind was."""
    if kind == "who":
        relation, name = value.rsplit(" ", 1)
        slots |= {"rel": relation, "name": name, "she": pronoun_of(name)}
    else:
        slots[kind] = value


def _drop(slots: Slots, kind: str) -> None:
    for slot in ("rel", "name") if kind == "who" else (kind,):
        slots.pop(slot, None)


def mediocre_summary(
    row: Post,
    rng: random.Random,
    *,
    swap: float = 0.2,
    generic: float = 0.45,
    ask: float = 0.2,
    detail: float = 0.45,
) -> str:
    """A well-formed but poor summary, to train the initial policy on; begins with a space.

    What happened is always told. The flaws are systematic, so that the most likely summary of a model that has learnt
    them is poor too, and not only its samples.

    Args:
        swap: Probability that a value told is that of a distractor.
        generic: Probability that the person is only "someone".
        ask: Probability that the question is told.
        detail: Probability, for each of when, where, amount and feeling, that it is told.
    """
    slots = slots_of(row["facts"])
    probabilities = {"who": 1 - generic, "event": 1.0, "ask": ask}
    for kind in KINDS:
        if rng.random() >= probabilities.get(kind, detail):
            _drop(slots, kind)
        elif rng.random() < swap:
            _swap(slots, kind, rng.choice(row["distractors"][kind]))
    return " " + compose(slots, rng)


def _values(row: Post) -> list[str]:
    return [row["facts"][kind]["value"] for kind in KINDS]


def _swapped(row: Post, rng: random.Random) -> str:
    slots = slots_of(row["facts"])
    for kind in rng.sample(KINDS, rng.randint(2, 4)):
        _swap(slots, kind, rng.choice(row["distractors"][kind]))
    return compose(slots, rng)


def _dropped(row: Post, rng: random.Random) -> str:
    slots = slots_of(row["facts"])
    for kind in rng.sample(KINDS, rng.randint(2, 4)):
        _drop(slots, kind)
    return compose(slots, rng)


def _invented(row: Post, rng: random.Random) -> str:
    slots, other = slots_of(row["facts"]), slots_of(_stranger(rng)["facts"])
    for kind in rng.sample(KINDS, rng.randint(2, 4)):
        slots |= {slot: other[slot] for slot in (("rel", "name", "she") if kind == "who" else (kind,))}
    return compose(slots, rng)


def _hollow(row: Post, rng: random.Random) -> str:
    """The template words of a summary with some of the values left out ("I am. It cost me.")."""
    gone = rng.sample(KINDS, rng.randint(3, 5))
    slots = slots_of(row["facts"])
    slots |= {slot: "" for kind in gone for slot in (("rel", "name") if kind == "who" else (kind,))}
    return re.sub(r"\s+([,.?])|\s+(?=\s)", r"\1", compose(slots, rng)).strip()


def _stranger(rng: random.Random) -> Post:
    return TLDRCorpus("train", seed=rng.getrandbits(32))[0]


def _shuffled(row: Post, rng: random.Random) -> str:
    words = row["completion"].split()
    rng.shuffle(words)
    return " ".join(words)


def _truncated(row: Post, rng: random.Random) -> str:
    words = row["completion"].split()
    return " ".join(words[: rng.randint(len(words) // 3, len(words) - 2)]).rstrip(".,?")


def _post_sentences(row: Post) -> list[str]:
    body = row["prompt"].split("\n\nPOST: ")[1].removesuffix("\n\nTL;DR:")
    return re.findall(r"[^.?]+[.?]", body)


def _copied(row: Post, rng: random.Random) -> str:
    sentences = _post_sentences(row)
    at = rng.randrange(len(sentences))
    return "".join(sentences[at : at + rng.choice((1, 2, 3))]).strip()


def _padded(row: Post, rng: random.Random) -> str:
    return row["completion"].strip() + "".join(" " + s.strip() for s in rng.sample(_post_sentences(row), 3))


def _repeated(row: Post, rng: random.Random) -> str:
    first = re.split(r"(?<=[.?]) ", row["completion"].strip())[0]
    return " ".join([first] * rng.randint(2, 4))


CORRUPTIONS: dict[str, Callable[[Post, random.Random], str]] = {
    "swapped": _swapped,  # values of distractors
    "dropped": _dropped,  # facts left out
    "invented": _invented,  # values from another post
    "keywords": lambda row, rng: ", ".join(rng.sample(_values(row), len(KINDS))),
    "repeated": _repeated,  # one sentence, again and again
    "truncated": _truncated,  # cut in mid-sentence
    "hollow": _hollow,  # template words without their values
    "shuffled": _shuffled,  # the words of the reference in any order
    "other": lambda row, rng: _stranger(rng)["completion"].strip(),  # another post's reference
    "copied": _copied,  # sentences of the post
    "padded": _padded,  # the reference, then sentences of the post
}


def corrupted_summaries(row: Post, rng: random.Random, n: int) -> list[str]:
    """`n` flawed summaries, each beginning with a space, of as many kinds of CORRUPTIONS as `n` allows."""
    kinds: list[str] = []
    while len(kinds) < n:
        kinds += rng.sample(list(CORRUPTIONS), len(CORRUPTIONS))
    return [" " + CORRUPTIONS[kind](row, rng) for kind in kinds[:n]]
