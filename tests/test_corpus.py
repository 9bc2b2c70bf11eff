"""The embedded corpus: its format, its splits, and that its posts say what their facts say."""

import math
import random
import re
import subprocess
import sys
import time
import zlib
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.rewards.tldr_gold import abstract, score_parts
from textrl_gym.worlds.tldr import (
    AMOUNTS,
    CORRUPTIONS,
    KINDS,
    RESIDUES,
    SIZES,
    SPLIT_RESIDUES,
    TLDRCorpus,
    corrupted_summaries,
    mediocre_summary,
    slots_of,
)
from textrl_gym.worlds.tldr_grammar import MAX_SUMMARY_WORDS, bank, compose

PROMPT = re.compile(r"SUBREDDIT: r/(\w+)\n\nTITLE: ([^\n]+)\n\nPOST: ([^\n]+)\n\nTL;DR:")
rows = st.builds(
    lambda split, seed, index: TLDRCorpus(split, seed)[index],
    st.sampled_from(sorted(SIZES)),
    st.integers(0, 2**40),
    st.integers(0, 9_999),
)
quick = settings(max_examples=120, derandomize=True, deadline=None)


def body(row: dict) -> str:
    found = PROMPT.fullmatch(row["prompt"])
    assert found
    return found[3]


@quick
@given(rows)
def test_format_is_that_of_trl_lib_tldr(row: dict) -> None:
    found = PROMPT.fullmatch(row["prompt"])
    assert found
    assert found[1] in bank()["subreddits"]
    assert re.fullmatch(r" \S.*[.?]", row["completion"])
    for text in (found[2], found[3], row["completion"]):
        assert not re.search(r"[{}\[\]]|\s\s|\s[,.?]|\.\.|\ba (?!union)[aeiou]", text), text


@quick
@given(rows)
def test_lengths(row: dict) -> None:
    assert 60 <= len(body(row).split()) <= 130
    # One in 2,000 posts has values so long that no wording is within 30 words.
    assert 10 <= len(row["completion"].split()) <= MAX_SUMMARY_WORDS + 3


def test_most_posts_and_references_are_short() -> None:
    drawn = [TLDRCorpus(seed=3)[index] for index in range(1000)]
    assert sum(len(body(row).split()) <= 115 for row in drawn) > 900
    assert sum(len(row["completion"].split()) <= MAX_SUMMARY_WORDS for row in drawn) > 990


@quick
@given(rows)
def test_facts_and_distractors_stand_in_the_post_and_differ(row: dict) -> None:
    assert set(row["facts"]) == set(row["distractors"]) == set(KINDS)
    told = body(row).lower()
    for kind in KINDS:
        value = row["facts"][kind]["value"]
        for part in (row["facts"]["who"]["relation"], row["facts"]["who"]["name"]) if kind == "who" else (value,):
            assert part.lower() in told
        assert row["distractors"][kind]
        for other in row["distractors"][kind]:
            assert other.lower() in told
            assert other != value
    assert row["facts"]["who"]["name"] not in {who.rsplit(" ", 1)[1] for who in row["distractors"]["who"]}


@quick
@given(rows)
def test_sentences_begin_with_capitals(row: dict) -> None:
    for text in (body(row), row["completion"].strip()):
        assert all(re.match(r"[A-Z]", sentence) for sentence in re.split(r"(?<=[.?]) ", text)), text


def test_splits_are_disjoint_by_construction() -> None:
    # A post belongs to the split of the residue of its facts; no residue belongs to two splits, and each has one.
    residues = [residue for part in SPLIT_RESIDUES.values() for residue in part]
    assert sorted(residues) == list(range(RESIDUES))
    assert len(AMOUNTS) % RESIDUES == 0
    assert len(set(AMOUNTS)) == len(AMOUNTS)


@quick
@given(st.sampled_from(sorted(SIZES)), st.integers(0, 2**40), st.integers(0, 9_999))
def test_each_post_lies_in_its_split_whatever_the_seed(split: str, seed: int, index: int) -> None:
    facts = TLDRCorpus(split, seed)[index]["facts"]
    values = {kind: fact["value"] for kind, fact in facts.items()}
    code = zlib.crc32("|".join(values[kind] for kind in KINDS if kind != "amount").encode())
    assert (code + AMOUNTS.index(int(values["amount"].removeprefix("$")))) % RESIDUES in SPLIT_RESIDUES[split]


def test_no_post_twice_in_a_sample_or_in_two_splits() -> None:
    prompts = [row["prompt"] for split in SIZES for row in TLDRCorpus(split, size=1500)]
    assert len(set(prompts)) == len(prompts)


def test_more_than_a_million_posts() -> None:
    # Facts alone: who * event * when * where * amount * feeling * ask, a subreddit; 1/20 of them in a small split.
    data = bank()
    for sub in data["subreddits"].values():
        who = sum(len(relations) for relations in sub["relations"].values()) * min(map(len, data["names"].values()))
        events = sum(len(family["did"]) * len(family["things"]) for family in sub["events"])
        sizes = (
            who,
            events,
            len(data["when"]),
            len(sub["where"]),
            len(AMOUNTS),
            len(data["feelings"]),
            len(sub["ask"]),
        )
        assert math.prod(sizes) / RESIDUES > 1e6
    assert len(data["subreddits"]) >= 8


def test_rows_do_not_depend_on_the_process_and_need_no_torch() -> None:
    code = (
        "import sys; from textrl_gym.worlds.tldr import TLDRCorpus; row = TLDRCorpus('test', 5)[7];"
        "assert 'torch' not in sys.modules; print(repr(row))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "77"}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == repr(TLDRCorpus("test", 5)[7])


def test_seed_split_and_size() -> None:
    corpus = TLDRCorpus("validation", 1, size=3)
    assert len(corpus) == 3
    assert len(list(corpus)) == 3
    assert corpus[2] == TLDRCorpus("validation", 1)[2]
    assert corpus[2] != TLDRCorpus("validation", 2)[2]
    assert {split: len(TLDRCorpus(split)) for split in SIZES} == SIZES
    for index in (-1, 3):
        with pytest.raises(IndexError, match=str(index)):
            corpus[index]
    with pytest.raises(ValueError, match=r"'test', 'train', 'validation'.*'dev'"):
        TLDRCorpus("dev")
    with pytest.raises(ValueError, match="-1"):
        TLDRCorpus(size=-1)


def test_a_row_takes_less_than_a_millisecond() -> None:
    corpus = TLDRCorpus(seed=9)
    corpus[0]  # reads the phrase bank

    def cost() -> float:
        start = time.process_time()
        for index in range(100):
            corpus[index]
        return (time.process_time() - start) / 100

    assert min(cost() for _ in range(3)) < 1e-3


def test_references_vary() -> None:
    # The plan of a reference: its words with the values abstracted. 7 facts in 10 cores, joined in many ways.
    plans = [tuple(word for word, _ in abstract(row["completion"])) for row in TLDRCorpus("test", size=500)]
    assert len(set(plans)) > 450
    assert len({plan[:2] for plan in plans}) >= 12


@quick
@given(rows, st.sets(st.sampled_from(KINDS)), st.integers(0, 2**32))
def test_any_subset_of_facts_can_be_told(row: dict, kinds: set[str], seed: int) -> None:
    slots = slots_of(row["facts"])
    for kind in set(KINDS) - kinds:
        for slot in ("rel", "name") if kind == "who" else (kind,):
            del slots[slot]
    summary = compose(slots, random.Random(seed))
    for kind in set(KINDS) - {"who"}:
        assert (row["facts"][kind]["value"].lower() in summary.lower()) == (kind in kinds)
    assert (row["facts"]["who"]["name"] in summary) == ("who" in kinds)


# ------------------------------------------------------------------------------------------------ flawed summaries


@quick
@given(rows, st.integers(0, 2**32))
def test_mediocre_summaries_are_well_formed(row: dict, seed: int) -> None:
    summary = mediocre_summary(row, random.Random(seed))
    assert summary.startswith(" ")
    assert score_parts(row["facts"], summary)["form"] == 1.0
    assert summary == mediocre_summary(row, random.Random(seed))


def test_mediocre_summaries_are_mediocre() -> None:
    rng = random.Random(0)
    scores = [score_parts(row["facts"], mediocre_summary(row, rng))["gold"] for row in TLDRCorpus(size=1500)]
    assert 0.3 < sum(scores) / len(scores) < 0.5


def test_the_most_likely_mediocre_summary_is_mediocre_too() -> None:
    # A good imitator decodes greedily: it knows the last three words and the kinds told before, and takes the most
    # frequent next word of all mediocre summaries. Words are abstracted, each value taken to be right. If its summary
    # were good, the start of RL would already be its end.
    weights = {"{rel}": 0.10, "{name}": 0.12, "{event}": 0.26, "{ask}": 0.16, "{amount}": 0.12}  # those of tldr_gold
    weights |= {"{when}": 0.08, "{where}": 0.08, "{feeling}": 0.08}

    def state(words: list[str]) -> tuple[object, ...]:
        return (*words[-3:], frozenset(word.lower() for word in words if word.lower() in weights))

    rng = random.Random(0)
    following: dict[tuple[object, ...], Counter[str]] = defaultdict(Counter)
    for row in TLDRCorpus("train", seed=1, size=4000):
        words = [word for word, _ in abstract(mediocre_summary(row, rng))]
        for at, word in enumerate([*words, ""]):
            following[state(words[:at])][word] += 1
    greedy: list[str] = []
    while len(greedy) < 50 and (word := following[state(greedy)].most_common(1)[0][0]):
        greedy.append(word)
    assert 0.2 < sum(weights.get(word.lower(), 0) for word in set(greedy)) < 0.65, greedy


@quick
@given(rows, st.integers(0, 30), st.integers(0, 2**32))
def test_corrupted_summaries(row: dict, n: int, seed: int) -> None:
    flawed = corrupted_summaries(row, random.Random(seed), n)
    assert len(flawed) == n
    assert flawed == corrupted_summaries(row, random.Random(seed), n)
    assert all(re.match(r" \S", text) for text in flawed)
    assert len(set(flawed)) >= min(n, len(CORRUPTIONS)) - 1
