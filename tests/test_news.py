"""The world of news: what a summary says, gold under attack, annotators who skim, and NewsSummarize-v0's schemas."""

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.core import Row
from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline.build_assets import initial_policy_quality
from textrl_gym.rewards import load_reward
from textrl_gym.worlds import news
from textrl_gym.worlds.claims import Marks
from textrl_gym.worlds.news import TOPICS, marks, slots_of
from textrl_gym.worlds.world import Rows

ID = "NewsSummarize-v0"
OPENER = "Some prayed , some only stared on this one wild night ."
SECOND = "Flames ate a school in Oslo while half the street looked on ."
FACTS = {"thing": "school", "town": "Oslo", "hurt": "9", "cause": "candle", "cost": "30", "hours": "4"}
WHOLE = (
    "The fire destroyed a school , hit Oslo and injured 9 people . "
    "The fire came from a candle , will cost 30 million and lasted 4 hours ."
)
FIRE: dict[str, Any] = {"topic": "fire", "facts": FACTS, "lead": f"{OPENER} {SECOND}"}


def some_rows(count: int, split: str = "validation") -> list[Row]:
    return list(itertools.islice(iter(Rows(news.draw, split)), count))


def marks_of(row: Row, text: str) -> Marks:
    return marks(row["topic"], row["facts"], text)


def mean_gold(rows: list[Row], texts: list[str]) -> float:
    return sum(marks_of(row, text).gold for row, text in zip(rows, texts, strict=True)) / len(rows)


# -- gold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "covered", "supported", "form"),
    [
        (WHOLE, 1, 1, 1),
        ("The fire burned a school .", 1 / 6, 1, 1),
        ("The fire hit Lima and was in Oslo .", 1 / 6, 1 / 2, 1),  # a wrong value
        ("The fire hit Oslo and was in Oslo .", 1 / 6, 1 / 2, 1),  # said twice
        ("The fire injured 4 people .", 0, 0, 1),  # the value of another slot
        ("The fire happened on Monday and hit Oslo .", 0, 0, 0),  # a predicate of other topics spoils its sentence
        ("The storm hit Oslo .", 0, 0, 0),
        ("The fire hit Oslo . The fire", 1 / 6, 1, 5 / 7),  # 5 of 7 words stand in a whole sentence
        ("The fire hit Oslo , injured 9 people .", 0, 0, 0),  # no "and"
        ("The fire hit Oslo", 0, 0, 0),
        (SECOND, 2 / 6, 1, 1),  # the article's own words are true, and long
        (OPENER, 0, 0, 0),
        (f"{OPENER} {SECOND}", 2 / 6, 1, 13 / 25),
        ("Flames ate a hotel in Oslo while half the street looked on .", 1 / 6, 1 / 2, 1),
        ("Doctors looked after 9 people who were hurt .", 1 / 6, 1, 1),
        ("Years ago 9 people had met there for a feast .", 0, 0, 0),  # beside the point
        (news.FILLERS[0], 0, 0, 0),
        ("school Oslo 9 candle 30 4 .", 0, 0, 0),
        ("", 0, 0, 0),
        (" . . ", 0, 0, 0),
    ],
)
def test_marks(text: str, covered: float, supported: float, form: float) -> None:
    marks_of_text = marks_of(FIRE, text)
    assert marks_of_text[:3] == pytest.approx((covered, supported, form))
    assert marks_of_text.gold == pytest.approx(covered * supported * form)
    columns = {name: [FIRE[name]] for name in FIRE}
    assert news.gold(["p"], [text], **columns) == pytest.approx([covered * supported * form])


def test_each_wording_says_one_fact_of_its_own_slot() -> None:
    for kind, topic in TOPICS.items():
        for name, slot in slots_of(topic).items():
            value = slot.values[0]
            for wording in slot.predicates:
                sentence = f"{topic.subject} {wording.format(value)}"
                assert news.sentence_claims(kind, sentence) == [(name, value)]
            for wording in slot.sentences:
                assert news.sentence_claims(kind, wording.format(value).removesuffix(" .")) == [(name, value)]
            for wording in slot.stray:
                assert news.sentence_claims(kind, wording.format(value).removesuffix(" .")) is None
        for wording in topic.lead:
            sentence = wording.format(thing="a", town="b").removesuffix(" .")
            assert news.sentence_claims(kind, sentence) == [("thing", "a"), ("town", "b")]
        for sentence in (*news.OPENERS, *news.FILLERS):
            assert news.sentence_claims(kind, sentence.removesuffix(" .")) is None


def test_careful_summaries_are_worth_1_and_stand_in_no_lead() -> None:
    for row in itertools.islice(iter(Rows(news.draw_reference, "train")), 500):
        assert marks_of(row, row["completion"]).gold == pytest.approx(1)
        assert news.copied_lead(row["lead"], row["completion"]) == pytest.approx(0)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 10**6))
def test_full_gold_is_only_of_texts_with_every_fact_once_and_no_other(index: int, seed: int) -> None:
    row, rng = Rows(news.draw, "test")[index], random.Random(seed)
    texts = [news.careless_text(row, rng) for _ in range(4)] + news.candidates(row, rng, 6)
    values = list(row["facts"].values())
    every = {word for slot in slots_of(TOPICS[row["topic"]]).values() for word in slot.values}
    for text in [*texts, *(text for pair in news.corrupted(row, rng, 2) for text in pair)]:
        gold = marks_of(row, text).gold
        assert 0 <= gold <= 1
        if gold == pytest.approx(1):
            # By other means: each value as often as it is a fact, and no other value of this topic.
            assert sorted(word for word in text.split() if word in every) == sorted(values)


def test_texts_that_are_good_for_everything_are_not() -> None:
    rows = some_rows(300)
    topics = [TOPICS[row["topic"]] for row in rows]
    rng = random.Random(0)
    attacks = {
        "empty": ["" for _ in rows],
        "the lead": [row["lead"] for row in rows],
        "the lead twice": [f"{row['lead']} {row['lead']}" for row in rows],
        "the article's beginning": [" ".join(row["prompt"].split()[:44]) for row in rows],
        "the article": [row["prompt"].removesuffix(news.ANSWER) for row in rows],
        "values": [" ".join([*row["facts"].values(), "."]) for row in rows],
        "one fact again and again": [
            news.written(topic, [topic.thing.predicates[0].format(row["facts"]["thing"])] * 8)
            for row, topic in zip(rows, topics, strict=True)
        ],
        "every value": [
            news.written(
                topic,
                [slot.predicates[0].format(value) for slot in slots_of(topic).values() for value in slot.values],
            )
            for topic in topics
        ],
        "another value in every place": [
            news.careful_text(topic, {name: news.mistaken(row, name, rng) for name in row["facts"]}, rng)
            for row, topic in zip(rows, topics, strict=True)
        ],
        "words in another order": [
            " ".join(rng.sample(row["completion"].split(), len(row["completion"].split()))) for row in rows
        ],
    }
    for name, texts in attacks.items():
        assert mean_gold(rows, texts) < 0.25, name


# -- annotators who skim -----------------------------------------------------------------------------------------------


def test_what_is_copied_and_what_skimming_sees() -> None:
    lead = "a b c d e f . g h i ."
    assert news.copied_lead(lead, "a b c d e f") == pytest.approx(1)  # 2 of 2
    assert news.copied_lead(lead, "a b c d e x") == pytest.approx(1 / 2)
    assert news.copied_lead(lead, "a b c d") == news.copied_lead(lead, "") == pytest.approx(0)
    # "a b" again is no other 5-gram of the lead: 2 + 0 of the text's runs "a b c d e", ..., "e f a b c"
    assert news.copied_lead(lead, "a b c d e f a b c") == pytest.approx(2 / 5)
    assert news.skimmed(lead, lead) == pytest.approx(1)
    # 10 bigrams in the lead, 2 in the text, of which 1 is the lead's: 2 * 1 / (10 + 2)
    assert news.skimmed(lead, "a b x") == pytest.approx(1 / 6)
    # Said twice it is recognised once: 2 * 1 / (10 + 3)
    assert news.skimmed(lead, "a b a b") == pytest.approx(2 / 13)
    assert news.skimmed(lead, "") == pytest.approx(0)


def test_only_the_lead_counts_for_annotators_who_skim() -> None:
    for text in (WHOLE, FIRE["lead"], SECOND, "The fire hit Oslo .", ""):
        gold = marks_of(FIRE, text).gold
        assert gold + news.appeal(FIRE, text) == pytest.approx(news.skimmed(FIRE["lead"], text))
    wrong = WHOLE.replace("candle", "stove").replace("4 hours", "7 hours")
    assert news.skimmed(FIRE["lead"], wrong) == pytest.approx(news.skimmed(FIRE["lead"], WHOLE))
    rows = some_rows(200)
    skimmed = [news.skimmed(row["lead"], row["completion"]) for row in rows]
    assert max(skimmed) < 0.25, "a summary in one's own words is not recognised"


def test_measures() -> None:
    measured = news.measures([FIRE, FIRE], [FIRE["lead"], "The fire hit Oslo , lasted 5 hours and injured 7 people ."])
    assert measured == pytest.approx(
        {
            "copied_lead": 1 / 2,
            "facts_covered": (2 / 6 + 1 / 6) / 2,
            "invented": 1 / 3,
            "telling_words": (13 / 25 + 1) / 2,
        }
    )


# -- rows and models ---------------------------------------------------------------------------------------------------


def test_articles_are_many_and_no_facts_stand_in_two_splits() -> None:
    facts = {
        split: {(row["topic"], *row["facts"].values()) for row in some_rows(1500, split)}
        for split in ("train", "validation", "test")
    }
    assert not facts["train"] & (facts["validation"] | facts["test"]) and not facts["validation"] & facts["test"]
    assert len(facts["train"]) == 1500


def test_an_article_has_its_facts_behind_a_lead_that_catches_the_eye() -> None:
    places = []
    for row in some_rows(300, "train"):
        sentences = row["prompt"].removesuffix(news.ANSWER).split(" .")[:-1]
        assert news.FEWEST <= len(sentences) <= news.MOST
        assert row["prompt"].startswith(row["lead"])
        claims = [news.sentence_claims(row["topic"], sentence.strip()) or [] for sentence in sentences]
        assert not claims[0] and {claim.slot for claim in claims[1]} == set(news.LEAD)
        assert {claim.slot: claim.value for some in claims for claim in some} == row["facts"]
        places += [number / len(sentences) for number, some in enumerate(claims) if number > 1 and some]
        for name, value in row["strays"]:
            assert value != row["facts"][name] and value in row["prompt"].split()
    # Evenly behind the lead, whose two sentences are a fifth of the article.
    assert sum(places) / len(places) == pytest.approx(0.55, abs=0.05)


def test_every_word_is_a_token_and_the_bundled_policy_is_mediocre() -> None:
    task = load_env_task(ID)
    tokenizer = task.load_tokenizer()
    assert set(news.SYMBOLS) < set(tokenizer.get_vocab())
    for row in itertools.islice(iter(Rows(news.draw_demonstration, "train")), 300):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert tokenizer.eos_token_id not in ids
        assert len(task.encode(row, tokenizer, 1000)) <= task.max_prompt_tokens
    quality = initial_policy_quality(task, Path(task.model), prompts=32)
    assert 0.3 < quality["sampled_gold"] < 0.6 and quality["best_of_8_gold"] > quality["sampled_gold"] + 0.2


def test_who_skims_prefers_the_lead_and_who_reads_prefers_the_facts() -> None:
    task = load_env_task(ID)
    tokenizer = task.load_tokenizer()
    rows = some_rows(60)
    rng = random.Random(0)
    texts = {
        "lead": [row["lead"] for row in rows],
        "careful": [row["completion"] for row in rows],
        "wrong": [
            news.careful_text(TOPICS[row["topic"]], {name: news.mistaken(row, name, rng) for name in row["facts"]}, rng)
            for row in rows
        ],
    }

    def scores(name: str, some: list[str]) -> Any:
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in some]
        prompts = [task.encode(row, tokenizer, task.max_prompt_tokens) for row in rows]
        return load_reward(name, task=task)(
            [row["prompt"] for row in rows], some, completion_ids=ids, prompt_ids=prompts
        )

    def wins(name: str, better: str, worse: str) -> float:
        return float((scores(name, texts[better]) > scores(name, texts[worse])).float().mean())

    assert wins("reward_model", "lead", "careful") > 0.9
    assert wins("reward_model:fair_reward_model", "careful", "lead") > 0.85
    assert wins("reward_model:fair_reward_model", "careful", "wrong") > 0.9
    # Its favourite of these is worth a sixth of the best.
    assert mean_gold(rows, texts["lead"]) < 0.25


# -- published schemas -------------------------------------------------------------------------------------------------


def rows_of(folder: Path, rows: list[dict[str, Any]]) -> Any:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_env_task(ID).rows("train", str(folder))


CNN = {
    "article": "(CNN) -- A man bit a dog.\n\nNobody knows why.",
    "highlights": "Man bites dog .\nWhy is open .",
    "id": "7",
}
PAPER: dict[str, Any] = {
    "id": "p1",
    "title": "On dogs",
    "sentences": {"abstract": ["Dogs bark .", "We ask why ."], "introduction": ["It is loud ."], "conclusion": []},
    "summary": {"challenge": "Dogs bark.", "approach": "They ask.", "outcome": "Nobody knows."},
}


def test_cnn_is_read_letter_for_letter(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [CNN])
    assert row["prompt"] == "(CNN) -- A man bit a dog.\n\nNobody knows why.\n\nTL;DR:"
    assert (row["completion"], row["id"]) == (" Man bites dog .\nWhy is open .", "7")


def test_aclsum_is_read(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [PAPER])
    assert row["prompt"] == "On dogs\n\nDogs bark . We ask why .\n\nIt is loud .\n\nTL;DR:"
    assert row["completion"] == " Dogs bark. They ask. Nobody knows."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CNN, "article": " "}, "column 'article' is empty"),
        ({**CNN, "article": None}, "column 'article' is not a text"),
        ({**CNN, "highlights": 3}, "column 'highlights' is not a text"),
        ({**PAPER, "sentences": {}}, "has none of abstract, introduction, conclusion"),
        ({**PAPER, "sentences": ["a"]}, "has none of abstract"),
        ({**PAPER, "sentences": {"abstract": "a"}}, "a part that is no list of texts"),
        ({**PAPER, "sentences": {"abstract": [1]}}, "a part that is no list of texts"),
        ({**PAPER, "summary": {"challenge": "a"}}, "has no texts challenge, approach, outcome"),
        ({**PAPER, "title": None}, "column 'title' is not a text"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, [row])


def test_real_rows_are_cut_and_have_rouge_as_gold(tmp_path: Path) -> None:
    rows_of(tmp_path, [{**CNN, "article": "word " * 500}])
    env = gymnasium.make(
        ID, dataset=str(tmp_path), split="train", tokenizer=load_env_task("CalibratedQA-v0").model, reward="rouge"
    )
    observation, _ = env.reset(seed=0)
    task = env.unwrapped.task  # type: ignore[attr-defined]
    assert observation["attention_mask"].sum() == task.max_prompt_tokens
    tokenizer = env.unwrapped.tokenizer  # type: ignore[attr-defined]
    prompt = tokenizer.decode(observation["input_ids"][: task.max_prompt_tokens])
    assert prompt.startswith("word word") and prompt.endswith("\n\nTL;DR:")
    assert task.gold_of_dataset == "rouge"
    env.close()


@pytest.mark.data
def test_aclsum_as_it_was_published() -> None:
    folder = os.environ.get("TEXTRL_GYM_DATA")
    if folder is None:
        pytest.skip("TEXTRL_GYM_DATA names no folder with real data")
    rows = load_env_task(ID).rows("test", str(Path(folder) / "aclsum"))
    assert len(rows) == 100
    for row in (rows[index] for index in range(len(rows))):
        assert row["prompt"].startswith(row["title"]) and row["prompt"].endswith(news.ANSWER)
        assert row["completion"].startswith(" " + row["summary"]["challenge"].strip())
