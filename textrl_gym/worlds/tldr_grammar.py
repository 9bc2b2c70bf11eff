"""How summaries are worded: the phrase bank and the grammar that both the references and the gold score use.

A summary is clauses in any order (who did what; amount; feeling; question), joined into sentences. The templates
live in assets/tldr/phrases.toml. Slots: rel, name, she, event, when, where, amount, role, feeling, ask.
"""

import random
import re
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

Slots = dict[str, str]  # slot name in a template -> text

MAX_SUMMARY_WORDS = 30  # two below where the gold score begins to charge for length (tldr_gold.FREE_WORDS)


@cache
def bank() -> dict[str, Any]:
    """The phrase bank, read once."""
    return tomllib.loads(files("textrl_gym").joinpath("assets/tldr/phrases.toml").read_text(encoding="utf-8"))


@cache
def pronoun_of(name: str) -> str:
    """Returns "she" or "he" for a name of the bank."""
    return "she" if name in bank()["names"]["she"] else "he"


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def fill_slots(template: str, slots: Slots) -> str:
    """Put the values into a template; {Slot} takes the value of slot, capitalised."""
    return re.sub(
        r"\{(\w+)\}",
        lambda m: slots[m[1]] if m[1] in slots else capitalised(slots[m[1].lower()]),
        template,
    )


def expand_groups(template: str, has: Callable[[str], bool]) -> str:
    """Keep each [group] of a template whose slots all have values, drop the others."""

    def group(m: re.Match[str]) -> str:
        return m[1] if all(has(slot) for slot in re.findall(r"\{(\w+)\}", m[1])) else ""

    return re.sub(r"\[([^\]]*)\]", group, template)


def _person(slots: Slots, rng: random.Random) -> str:
    summary = bank()["summary"]
    if "rel" in slots and "name" in slots:
        return fill_slots(rng.choice(summary["who"]), slots)
    return fill_slots(summary["who_part"]["rel" not in slots if "rel" in slots or "name" in slots else 2], slots)


def _core(slots: Slots, rng: random.Random) -> tuple[str, set[str]]:
    """The clause that tells who did what, and the slots it has used."""
    summary = bank()["summary"]
    have = {"who", *slots}
    usable = summary["no_event"]
    if "event" in slots:
        usable = [t for t in summary["core"] if set(re.findall(r"\{(\w+)\}", re.sub(r"\[.*\]", "", t))) <= have]
    template = expand_groups(rng.choice(usable), have.__contains__)
    return fill_slots(template, slots | {"who": _person(slots, rng)}), set(re.findall(r"\{(\w+)\}", template))


def _clauses(slots: Slots, rng: random.Random) -> list[tuple[str, str]]:
    """The summary as (kind of clause, text) in order."""
    summary = bank()["summary"]
    core, used = _core(slots, rng)
    early: list[tuple[str, str]] = []
    late: list[tuple[str, str]] = []
    if "amount" in slots:
        late.append(("amount", fill_slots(rng.choice(summary["amount"][slots["role"]]), slots)))
    if "feeling" in slots and "feeling" not in used:
        late.append(("feeling", fill_slots(rng.choice(summary["feeling"]), slots)))
    rng.shuffle(late)  # any order is as good for the gold score, so that no fixed template can be learnt by heart
    if "ask" in slots:
        kind = rng.choice(("question", "wonder"))
        late.insert(
            rng.choice((0, len(late), len(late), len(late))), (kind, fill_slots(rng.choice(summary[kind]), slots))
        )
    # A clause may come before the person is named only where no pronoun or "it" would point ahead.
    if late and rng.random() < 0.35 and not re.search(r"\b(she|he|her|him|it|that|now)\b", late[-1][1]):
        early.append(late.pop())
    here = {s for s in ("when", "where") if s in slots} - used
    if here:
        late.insert(0, ("left", fill_slots(expand_groups(rng.choice(summary["left"]), here.__contains__), slots)))
    return [*early, ("core", core), *late]


def compose(slots: Slots, rng: random.Random) -> str:
    """A summary stating these slots: clauses in a drawn order, joined into sentences.

    Any subset of slots can be stated: without "rel" and "name" the person is "someone", and so on. "role" must come
    with "amount", and "she" ("she" or "he") always.
    """
    # No joint twice in a sentence, which the gold score's n-grams would not see; and none after a question, which its
    # grammar does not continue.
    joints = bank()["summary"]["joints"]
    shortest = ""
    for _ in range(60):  # a wordy draw is drawn again; one in 2,000 posts has no shorter one
        sentences: list[str] = []
        room, last = 0, "question"
        for kind, text in _clauses(slots, rng):
            free = [joint for joint in joints.get(kind, ()) if not sentences or joint not in sentences[-1]]
            if room > 0 and last != "question" and free and rng.random() < 0.6:
                sentences[-1] += rng.choice(free) + " " + text
                room -= 1
            else:
                sentences.append(capitalised(text))
                room = rng.choice((1, 1, 2))
            last = kind
            sentences[-1] += "?" if kind == "question" else ""
        summary = " ".join(s if s.endswith("?") else s + "." for s in sentences)
        if not shortest or len(summary.split()) < len(shortest.split()):
            shortest = summary
        if len(summary.split()) <= MAX_SUMMARY_WORDS:
            return summary
    return shortest
