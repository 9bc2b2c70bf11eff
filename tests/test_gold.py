"""The gold score: the reference is near 1, every way to fool it is clearly below, and the way up is smooth."""

import json
import random
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.rewards.tldr_gold import WEIGHTS, reward, score_parts
from textrl_gym.worlds.tldr import CORRUPTIONS, KINDS, TLDRCorpus, slots_of
from textrl_gym.worlds.tldr_grammar import compose

POSTS = list(TLDRCorpus("validation", seed=11, size=300))
PARTS = {"who": ("rel", "name"), "event": ("act", "thing")}
JUNK = ("Thanks for reading.", "please like and subscribe", "the the the", "lol wow ok", "xqz 77 ##")
quick = settings(max_examples=100, derandomize=True, deadline=None)
rows = st.builds(lambda seed, index: TLDRCorpus("train", seed)[index], st.integers(0, 2**40), st.integers(0, 999))


def gold(row: dict, text: str) -> float:
    return score_parts(row["facts"], text)["gold"]


def without(row: dict, kinds: set[str]) -> dict[str, str]:
    gone = {slot for kind in kinds for slot in (("rel", "name") if kind == "who" else (kind,))}
    return {slot: value for slot, value in slots_of(row["facts"]).items() if slot not in gone}


def post(row: dict) -> str:
    return row["prompt"].split("POST: ")[1].removesuffix("\n\nTL;DR:")


# ------------------------------------------------------------------------------------------------- what is rewarded


def test_references_score_one() -> None:
    scores = [gold(row, row["completion"]) for row in POSTS]
    assert min(scores) >= 0.95
    assert sum(scores) / len(scores) >= 0.98


@quick
@given(rows, st.integers(0, 2**32))
def test_any_recombination_of_clauses_scores_one(row: dict, seed: int) -> None:
    assert gold(row, compose(slots_of(row["facts"]), random.Random(seed))) >= 0.95


@quick
@given(rows, rows, st.sets(st.sampled_from(KINDS)), st.integers(0, 2**32))
def test_form_is_one_with_any_values_and_any_subset(row: dict, other: dict, gone: set[str], seed: int) -> None:
    assert score_parts(row["facts"], compose(without(other, gone), random.Random(seed)))["form"] == 1.0


@quick
@given(rows, st.sets(st.sampled_from(KINDS)), st.integers(0, 2**32))
def test_gold_of_some_facts_is_their_weight(row: dict, gone: set[str], seed: int) -> None:
    # Nothing wrong, well-formed, brief: precision = form = brevity = 1, and coverage is the sum of the weights told.
    told = sum(WEIGHTS[part] for kind in set(KINDS) - gone for part in PARTS.get(kind, (kind,)))
    text = compose(without(row, gone), random.Random(seed))
    assert gold(row, text) == pytest.approx(told * score_parts(row["facts"], text)["brevity"], abs=1e-9, rel=0)
    assert sum(WEIGHTS.values()) == pytest.approx(1, abs=1e-9, rel=0)


@quick
@given(rows, st.sampled_from(KINDS), st.integers(0, 2**32))
def test_a_distractor_costs_more_than_silence(row: dict, kind: str, seed: int) -> None:
    slots = slots_of(row["facts"])
    wrong = row["distractors"][kind][0]
    swapped = {"rel": wrong.rsplit(" ", 1)[0], "name": wrong.rsplit(" ", 1)[1]} if kind == "who" else {kind: wrong}
    silent = score_parts(row["facts"], compose(without(row, {kind}), random.Random(seed)))
    lured = score_parts(row["facts"], compose(slots | swapped, random.Random(seed)))
    assert lured["precision"] < 1.0
    # "broke my mirror" for "broke my radio" is half right, and worth more than silence.
    if kind != "event" or not any(wrong.startswith(did) for did in row["facts"]["event"]["act"]):
        assert lured["gold"] < silent["gold"]


def test_an_amount_in_the_wrong_role_is_worth_half() -> None:
    row = next(row for row in POSTS if row["facts"]["amount"]["role"] == "cost")
    amount, she = row["facts"]["amount"]["value"], row["facts"]["who"]["pronoun"].capitalize()
    assert score_parts(row["facts"], f" I lost {amount}.")["coverage"] == pytest.approx(
        WEIGHTS["amount"], abs=1e-9, rel=0
    )
    assert score_parts(row["facts"], f" {she} owes me {amount}.")["coverage"] == pytest.approx(
        WEIGHTS["amount"] / 2, abs=1e-9, rel=0
    )


def test_a_wrong_pronoun_costs() -> None:
    row = next(
        row for row in POSTS if row["facts"]["amount"]["role"] == "owe" and row["facts"]["who"]["pronoun"] == "she"
    )
    amount = row["facts"]["amount"]["value"]
    assert gold(row, f" He owes me {amount}.") < gold(row, f" She owes me {amount}.")


def test_a_value_outside_a_clause_states_nothing() -> None:
    for row in POSTS:
        assert score_parts(row["facts"], ATTACKS["bare values"](row, random.Random(0)))["coverage"] == 0
        # In a list some neighbours look like a clause by chance: ", broke my lamp, in May, and" may follow "my sister".
        assert score_parts(row["facts"], ATTACKS["keywords"](row, random.Random(0)))["coverage"] < 0.5


# --------------------------------------------------------------------------------------------- what must not fool it

ATTACKS: dict[str, Callable[[dict, random.Random], str]] = {
    **CORRUPTIONS,
    "empty": lambda row, rng: rng.choice(("", " ", "\n", ".")),
    "the whole post": lambda row, rng: post(row),
    "the title": lambda row, rng: row["prompt"].split("TITLE: ")[1].split("\n")[0],
    "reference twice": lambda row, rng: row["completion"] * 2,
    "reference and junk": lambda row, rng: row["completion"] + " " + rng.choice(JUNK),
    "junk and reference": lambda row, rng: rng.choice(JUNK) + row["completion"],
    "keyword sentence": lambda row, rng: "I am " + " ".join(row["facts"][kind]["value"] for kind in KINDS) + ".",
    "bare values": lambda row, rng: " ".join(row["facts"][kind]["value"].capitalize() + "." for kind in KINDS),
    "both people": lambda row, rng: row["completion"].replace(
        row["facts"]["who"]["name"], f"{row['facts']['who']['name']} and {row['distractors']['who'][0].split()[-1]}"
    ),
    "every amount": lambda row, rng: re.sub(
        r"\$\d+", lambda m: f"{m[0]} {row['distractors']['amount'][0]} $50", row["completion"]
    ),
    "no spaces": lambda row, rng: row["completion"].replace(" ", ""),
    "lower case": lambda row, rng: row["completion"].lower(),
    "since was": lambda row, rng: "It cost me. I am after my. At, last, should I? She owes me.",
}
# The mean that an attack may reach at most. Half-true texts are worth the half that is true.
CEILINGS = {"dropped": 0.65, "truncated": 0.5, "swapped": 0.5, "invented": 0.5, "lower case": 0.6}
CEILINGS |= {"reference and junk": 0.6, "junk and reference": 0.6, "both people": 0.7, "every amount": 0.6}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_stay_below_the_reference(name: str) -> None:
    rng = random.Random(1)
    scores = [gold(row, ATTACKS[name](row, rng)) for row in POSTS]
    assert all(score <= gold(row, row["completion"]) - 0.1 for row, score in zip(POSTS, scores, strict=True))
    assert sum(scores) / len(scores) <= CEILINGS.get(name, 0.3)


@quick
@given(rows, st.integers(0, 2**32))
def test_taking_any_one_word_out_costs(row: dict, seed: int) -> None:
    words = row["completion"].split()
    at = random.Random(seed).randrange(len(words))
    less = " ".join(words[:at] + words[at + 1 :])
    # Some words are free ("still", "really", "just", "now"): what remains is then as good a summary.
    assert gold(row, less) < 0.95 or words[at].lower() in {"still", "really", "just", "now", "has"}


def test_half_a_point_is_lost_where_a_fifth_of_the_words_is_bad() -> None:
    scores = []
    for row in POSTS:
        words = row["completion"].split()
        for at in range(2, len(words), 5):
            words[at] = "was"
        scores.append(score_parts(row["facts"], " ".join(words))["form"])
    assert sum(scores) / len(scores) < 0.25


def test_a_sentence_without_a_verb_is_no_sentence() -> None:
    # Every trigram of it occurs in good summaries.
    who, feeling = POSTS[0]["facts"]["who"], POSTS[0]["facts"]["feeling"]["value"]
    assert score_parts(POSTS[0]["facts"], f" {who['name']}, my {who['relation']}, and I am {feeling}.")["form"] < 0.75


@settings(max_examples=200, derandomize=True, deadline=None)
@given(rows, st.text(max_size=200))
def test_any_text_has_a_score(row: dict, text: str) -> None:
    parts = score_parts(row["facts"], text)
    assert all(0 <= value <= 1 for value in parts.values())
    assert parts["gold"] == pytest.approx(
        parts["coverage"] * parts["precision"] * parts["form"] * parts["brevity"], abs=1e-12, rel=0
    )


# ------------------------------------------------------------------------------------------------------ the signature


def test_reward_signature() -> None:
    prompts, texts = [row["prompt"] for row in POSTS], [row["completion"] for row in POSTS]
    facts = [json.loads(json.dumps(row["facts"])) for row in POSTS]
    distractors = [row["distractors"] for row in POSTS]
    scores = reward(prompts, texts, facts=facts, distractors=distractors, completion_ids=[[1]] * len(POSTS))
    assert scores == [gold(row, row["completion"]) for row in POSTS]
    with pytest.raises(ValueError, match="embedded corpus"):
        reward(prompts, texts)
    with pytest.raises(ValueError, match="embedded corpus"):
        reward(prompts[:1], texts[:1], facts=[None])


def test_scoring_takes_less_than_a_third_of_a_millisecond() -> None:
    facts, texts = [row["facts"] for row in POSTS], [row["completion"] for row in POSTS]

    def cost() -> float:
        start = time.process_time()
        reward([""] * len(POSTS), texts, facts=facts)
        return (time.process_time() - start) / len(POSTS)

    assert min(cost() for _ in range(3)) < 3e-4
