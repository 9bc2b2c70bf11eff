"""The world of tables: what a claim is, gold under attack, and the schemas of DataToText-v0."""

import itertools
import json
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
from textrl_gym.worlds import tables
from textrl_gym.worlds.claims import Marks
from textrl_gym.worlds.tables import TOPICS, marks
from textrl_gym.worlds.world import Rows

ID = "DataToText-v0"
JUNO: dict[str, Any] = {"topic": "place", "name": "Juno", "slots": {"food": "Thai", "area": "park", "price": "low"}}
WHOLE = "Juno serves Thai food and lies near the park . The place has low prices ."


def some_rows(count: int, split: str = "validation") -> list[Row]:
    return list(itertools.islice(iter(Rows(tables.draw, split)), count))


def marks_of(row: Row, text: str) -> Marks:
    return marks(row["topic"], row["name"], row["slots"], text)


def mean_gold(rows: list[Row], texts: list[str]) -> float:
    return sum(marks_of(row, text).gold for row, text in zip(rows, texts, strict=True)) / len(rows)


# -- gold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "covered", "supported", "form"),
    [
        (WHOLE, 1, 1, 1),
        ("Juno offers Thai dishes , stands by the park and asks low prices .", 1, 1, 1),
        ("Juno serves Thai food .", 1 / 3, 1, 1),
        ("Juno serves Greek food and lies near the park .", 1 / 3, 1 / 2, 1),  # a wrong value
        ("Juno serves Thai food and offers Thai dishes .", 1 / 3, 1 / 2, 1),  # said twice
        ("Juno serves Thai food and has two stars .", 1 / 3, 1 / 2, 1),  # of no slot of this table
        ("Juno serves Thai food and is worth a visit .", 1 / 3, 1 / 2, 1),
        ("Juno serves low food .", 0, 0, 1),  # the value of another slot
        ("Juno serves Thai food . It is fine .", 1 / 3, 1, 5 / 9),
        ("Juno serves Thai food . The place has low prices", 1 / 3, 1, 1 / 2),  # not ended
        ("The place serves Thai food .", 0, 0, 0),  # which place?
        ("Kettle serves Thai food .", 0, 0, 0),
        ("Juno serves Thai food . Juno has low prices .", 2 / 3, 1, 1),
        ("Juno serves Thai food , lies near the park .", 0, 0, 0),
        ("Juno serves Thai food lies near the park .", 0, 0, 0),
        ("Juno serves Thai food . Juno lies near the park . Juno has low prices .", 1, 1, 0),  # three sentences
        ("", 0, 0, 0),
        (" . . ", 0, 0, 0),
    ],
)
def test_marks(text: str, covered: float, supported: float, form: float) -> None:
    got_marks = marks_of(JUNO, text)
    assert got_marks[:3] == pytest.approx((covered, supported, form))
    assert got_marks.gold == pytest.approx(covered * supported * form)


def test_invented_claims_are_those_that_are_not_in_the_table() -> None:
    texts = ["Juno serves Thai food and offers Thai dishes .", "Juno serves Greek food and is worth a visit .", ""]
    assert [marks_of(JUNO, text).invented for text in texts] == pytest.approx([0, 1, 0])
    dated: dict[str, Any] = {**JUNO, "slots": {"food": "Thai", "opened": "1999"}}
    measured = tables.measures([JUNO, dated, dated], [WHOLE, "", "Juno dates from 1999 and serves Greek food ."])
    assert measured == pytest.approx(
        {"slots_covered": 0.5, "neglected_covered": 0.5, "unsupported": 1 / 6, "grammatical": 2 / 3}
    )


def test_careful_texts_are_worth_1_and_each_predicate_is_of_one_slot() -> None:
    for row in itertools.islice(iter(Rows(tables.draw_reference, "train")), 500):
        assert marks_of(row, row["completion"]).gold == pytest.approx(1)
    for name, topic in TOPICS.items():
        for slot, pair in topic.wordings.items():
            for wording, value in itertools.product(pair, topic.values[slot]):
                assert tables.claims_of(name, wording.format(value)) == [(slot, value)]


def test_references_leave_out_and_invent_as_people_do() -> None:
    rows = some_rows(1000, "train")
    some = [(row, marks_of(row, row["completion"])) for row in rows]
    neglected = [
        TOPICS[row["topic"]].wordings[TOPICS[row["topic"]].neglected][0].split()[0] in row["completion"]
        for row in rows
        if TOPICS[row["topic"]].neglected in row["slots"]
    ]
    # The first wording is chosen in 0.75 of the 0.3 in which it is said at all.
    assert sum(neglected) / len(neglected) == pytest.approx(0.75 * (1 - tables.LEFT_OUT), abs=0.08)
    assert sum(mark.invented > 0 for _, mark in some) / 1000 == pytest.approx(tables.INVENTED, abs=0.05)
    assert all(mark.form == 1 for _, mark in some)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 10**6))
def test_full_gold_is_only_of_texts_with_every_value_once_and_no_other(index: int, seed: int) -> None:
    row, rng = Rows(tables.draw, "test")[index], random.Random(seed)
    topic, values = TOPICS[row["topic"]], list(row["slots"].values())
    other = {word for slot, some in topic.values.items() for word in some} - set(values)
    for _ in range(8):
        text = tables.careless_text(row, rng)
        mark = marks_of(row, text)
        assert 0 <= mark.gold <= 1
        words = text.split()
        whole = all(words.count(value) == values.count(value) for value in values) and not other & set(words)
        if mark.gold == pytest.approx(1):
            assert whole and topic.invented not in text and words[0] == row["name"]


def test_texts_that_are_good_for_everything_are_not() -> None:
    rows = some_rows(300)
    topics = [TOPICS[row["topic"]] for row in rows]
    rng = random.Random(0)
    attacks = {
        "values": [" ".join([row["name"], *row["slots"].values(), "."]) for row in rows],
        "the table": [row["prompt"] + " ." for row in rows],
        "every wording": [
            tables.written(topic, row["name"], [wording.format(value) for wording in topic.wordings[slot]] * 3)
            for row, topic in zip(rows, topics, strict=True)
            for slot, value in itertools.islice(row["slots"].items(), 1)
        ],
        "every value": [
            tables.written(
                topic,
                row["name"],
                [topic.wordings[slot][0].format(value) for slot in row["slots"] for value in topic.values[slot]],
            )
            for row, topic in zip(rows, topics, strict=True)
        ],
        "a word in another place": [
            " ".join(rng.sample(row["completion"].split(), len(row["completion"].split()))) for row in rows
        ],
    }
    for name, texts in attacks.items():
        assert mean_gold(rows, texts) < 0.25, name


def test_rouge_prefers_what_people_write_to_what_is_right() -> None:
    """The favourite of the metric of many texts is not that of gold: it invents."""
    rows, rng = some_rows(60), random.Random(0)
    metric = load_reward("rouge")
    chosen, highest = [], []
    for row in rows:
        texts = [tables.human_text(row, rng) for _ in range(12)]
        scores = metric([row["prompt"]] * 12, texts, completion=[row["completion"]] * 12).tolist()
        highest.append(max(scores))
        chosen.append(texts[scores.index(highest[-1])])
    assert mean_gold(rows, chosen) < 0.9  # of careful texts 1
    assert sum(highest) / len(highest) > 0.85


# -- rows and models ---------------------------------------------------------------------------------------------------


def test_tables_are_many_and_no_facts_stand_in_two_splits() -> None:
    facts = {
        split: {(row["name"], *sorted(row["slots"].items())) for row in some_rows(1200, split)}
        for split in ("train", "validation", "test")
    }
    assert not facts["train"] & (facts["validation"] | facts["test"]) and not facts["validation"] & facts["test"]
    assert len(facts["train"]) > 1190
    assert {len(row["slots"]) for row in some_rows(300)} == {3, 4, 5, 6}


def test_every_word_is_a_token_and_the_bundled_policy_is_mediocre() -> None:
    task = load_env_task(ID)
    tokenizer = task.load_tokenizer()
    assert set(tables.SYMBOLS) < set(tokenizer.get_vocab())
    for row in itertools.islice(iter(Rows(tables.draw_demonstration, "train")), 300):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert tokenizer.eos_token_id not in ids
    quality = initial_policy_quality(task, Path(task.model), prompts=32)
    assert 0.3 < quality["sampled_gold"] < 0.6 and quality["best_of_8_gold"] > quality["sampled_gold"] + 0.2


# -- published schemas -------------------------------------------------------------------------------------------------


def rows_of(folder: Path, rows: list[dict[str, Any]]) -> Any:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_env_task(ID).rows("train", str(folder))


def cell(value: str, header: bool = False, columns: int = 1) -> dict[str, Any]:
    return {"value": value, "is_header": header, "column_span": columns, "row_span": 1}


TOTTO: dict[str, Any] = {
    "example_id": 7,
    "table_page_title": "Ann Lee",
    "table_section_title": "Films",
    "table_section_text": "",
    "table_webpage_url": "http://example.org",
    "table": [
        [cell("Year", True), cell("Work", True, 2)],
        [cell("1999", True), cell("Rain"), cell("Drama")],
        [cell("2001", True), cell("Snow"), cell("Crime")],
    ],
    "highlighted_cells": [[2, 0], [2, 2]],
    "sentence_annotations": [{"original_sentence": "o", "final_sentence": "In 2001 Lee was in a crime film."}],
}
LINEAR = (
    "<page_title> Ann Lee </page_title> <section_title> Films </section_title> <table> "
    "<cell> 2001 <col_header> Year </col_header> <col_header> 1999 </col_header> </cell> "
    "<cell> Crime <col_header> Work </col_header> <row_header> 2001 </row_header> </cell> </table> Text :"
)


def test_totto_is_read_as_it_was_published_and_as_the_hub_has_it(tmp_path: Path) -> None:
    hub = {**TOTTO, "sentence_annotations": {"final_sentence": ["In 2001 Lee was in a crime film.", "b"]}}
    unlabelled = {**TOTTO, "sentence_annotations": []}
    published, of_hub, of_test = rows_of(tmp_path, [TOTTO, hub, unlabelled])
    assert published["prompt"] == of_hub["prompt"] == of_test["prompt"] == LINEAR
    assert published["completion"] == of_hub["completion"] == " In 2001 Lee was in a crime film."
    assert of_test.get("completion") is None


@pytest.mark.parametrize(
    "broken", [{"highlighted_cells": [[9, 0]]}, {"table": [["a"]]}, {"table": None}, {"highlighted_cells": [3]}]
)
def test_a_table_without_its_cells_is_a_bad_row(broken: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"are not ToTTo's"):
        rows_of(tmp_path, [{**TOTTO, **broken}])


def test_common_gen_is_read(tmp_path: Path) -> None:
    rows = [
        {"concept_set_idx": 0, "concepts": ["ski", "mountain"], "target": "Skier skis down the mountain"},
        {"concept_set_idx": 1, "concepts": ["dog", "run"], "target": ""},
    ]
    one, of_test = rows_of(tmp_path, rows)
    assert (one["prompt"], one["completion"]) == ("ski | mountain Text :", " Skier skis down the mountain")
    assert of_test["prompt"] == "dog | run Text :" and of_test.get("completion") is None
    with pytest.raises(ValueError, match="no list of words"):
        rows_of(tmp_path, [{"concepts": "ski"}])


def test_real_rows_are_rewarded_against_their_reference(tmp_path: Path) -> None:
    rows_of(tmp_path, [{"concepts": ["park"], "target": "the park has a cafe"}])
    env = gymnasium.make(ID, dataset=str(tmp_path), split="train", tokenizer=load_env_task("CalibratedQA-v0").model)
    env.reset(seed=0)
    reward, ended = 0.0, False
    # The words of the reference and the end
    for action in [*env.unwrapped.tokenizer(" the park has a cafe")["input_ids"], env.unwrapped.tokenizer.eos_token_id]:  # type: ignore[attr-defined]
        assert not ended
        _, step_reward, ended, _, _ = env.step(action)
        reward += float(step_reward)
    assert ended and reward == pytest.approx(1.0)
    env.close()
