"""The world of orders: what keeps a constraint, and what a list is; the schemas of Instructions-v0."""

import itertools
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.core import Row
from textrl_gym.mdp.task import load_env_task
from textrl_gym.rewards import load_reward
from textrl_gym.worlds import orders
from textrl_gym.worlds.orders import Listing, Style, keeps, marks, parse
from textrl_gym.worlds.world import Rows

ID = "Instructions-v0"
FRUITS = orders.TOPICS["fruits"]


def some_rows(count: int, split: str = "validation") -> list[Row]:
    return list(itertools.islice(iter(Rows(orders.draw, split)), count))


def gold_of(row: Row, text: str) -> float:
    return marks(row["topic"], row["constraints"], text).gold


# -- lists -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "listing"),
    [
        (" plum, fig.", Listing(("plum", "fig"), Style())),
        ("PLUM; FIG!", Listing(("plum", "fig"), Style("; ", "!", True))),
        ("plum and fig and plum?", Listing(("plum", "fig", "plum"), Style(" and ", "?"))),
        ("plum.", Listing(("plum",), Style())),
        ("", None),
        ("plum, fig", None),  # no end
        ("plum fig.", None),
        ("plum, fig and lime.", None),  # two separators
        ("plum, fig; lime.", None),
        ("Plum, fig.", None),  # both cases
        ("plum, , fig.", None),
        ("plum, fig..", None),
        ("plum, fig. lime.", None),
        ("1, 2.", None),
    ],
)
def test_what_a_list_is(text: str, listing: Listing | None) -> None:
    assert parse(text) == listing


@pytest.mark.parametrize(
    ("constraint", "kept", "broken"),
    [
        (("exactly", "2", ""), "plum, fig.", "plum, fig, lime."),
        (("at_most", "2", ""), "plum.", "plum, fig, lime."),
        (("at_least", "2", ""), "plum, fig, lime.", "plum."),
        (("first", "fig", ""), "fig, plum.", "plum, fig."),
        (("last", "fig", ""), "plum, fig.", "fig, plum."),
        (("mention", "fig", ""), "plum, fig.", "plum."),
        (("avoid", "fig", ""), "plum.", "plum, fig."),
        (("before", "fig", "plum"), "fig, lime, plum.", "plum, fig."),
        (("before", "fig", "plum"), "fig, plum.", "fig."),
        (("twice", "fig", ""), "fig, plum, fig.", "fig, fig, fig."),
        (("separator", "; ", ""), "fig; plum.", "fig, plum."),
        (("separator", " or ", ""), "fig or plum.", "fig."),  # nothing is separated
        (("end", "!", ""), "fig!", "fig."),
        (("capitals", "", ""), "FIG.", "fig."),
        (("sorted", "", ""), "fig, plum.", "plum, fig."),
    ],
)
def test_constraints(constraint: orders.Constraint, kept: str, broken: str) -> None:
    one, other = parse(kept), parse(broken)
    assert one is not None and other is not None
    assert keeps(constraint, one) and not keeps(constraint, other)
    # Of the list that keeps it every word belongs there.
    assert marks("fruits", [constraint], kept) == (1.0, 1.0)


def test_form_counts_what_belongs_into_the_list() -> None:
    asked = [("at_least", "2", "")]
    assert marks("fruits", asked, "plum, fig, dog, fig.").gold == 0.5  # one of another topic, one said again
    assert marks("fruits", asked, "plum; fig.").gold == 0  # nobody asked for semicolons
    assert marks("fruits", asked, "plum, fig!").gold == 0
    assert marks("fruits", asked, "PLUM, FIG.").gold == 0
    # A constraint that is not kept is no fault of form: 1 of 2 kept
    assert marks("fruits", [*asked, ("separator", "; ", "")], "plum, fig.").gold == 0.5


# -- rows --------------------------------------------------------------------------------------------------------------


def test_every_reference_keeps_its_order_and_no_prompt_is_without_one() -> None:
    rows = some_rows(2000, "train")
    assert all(gold_of(row, row["completion"]) == 1 for row in rows)
    assert {len(row["constraints"]) for row in rows} == {1, 2, 3}
    assert {kind for row in rows for kind, *_ in row["constraints"]} == set(orders.WORDINGS)
    assert len({row["prompt"] for row in rows}) > 1900
    words = [word for topic in orders.TOPICS.values() for word in topic]
    assert len(set(words)) == len(words) == 100


def test_no_set_of_constraints_stands_in_two_splits() -> None:
    keys = {
        split: {(row["topic"], tuple(sorted(row["constraints"]))) for row in some_rows(3000, split)}
        for split in ("train", "validation", "test")
    }
    assert not keys["train"] & (keys["validation"] | keys["test"]) and not keys["validation"] & keys["test"]


def test_teaching_is_of_the_split_and_has_lists_of_little_but_what_is_asked() -> None:
    rows = list(itertools.islice(iter(Rows(orders.draw_teaching, "validation")), 300))
    assert all(gold_of(row, row["completion"]) == 1 for row in rows)
    heldout = {(row["topic"], tuple(sorted(row["constraints"]))) for row in rows}
    train = {(row["topic"], tuple(sorted(row["constraints"]))) for row in some_rows(3000, "train")}
    assert not heldout & train


# -- attacks -----------------------------------------------------------------------------------------------------------


def really_keeps(row: Row, text: str) -> bool:
    """The same by other means: a pattern for the whole text, and comparisons of it."""
    asked = {kind: (a, b) for kind, a, b in row["constraints"]}
    separator, end = asked.get("separator", (", ",))[0], asked.get("end", (".",))[0]
    text = text.strip()
    if "capitals" in asked:
        if text != text.upper():
            return False
        text = text.lower()
    one = "|".join(orders.TOPICS[row["topic"]])
    if not re.fullmatch(rf"(?:{one})(?:{re.escape(separator)}(?:{one}))*{re.escape(end)}", text):
        return False
    words = re.findall(rf"\b(?:{one})\b", text)
    twice = asked.get("twice", ("",))[0]
    if any(words.count(word) != 1 + (word == twice) for word in words):
        return False
    text_words = f" {' '.join(words)} "
    checks = {
        "exactly": lambda a, b: len(words) == int(a),
        "at_most": lambda a, b: len(words) <= int(a),
        "at_least": lambda a, b: len(words) >= int(a),
        "first": lambda a, b: text_words.startswith(f" {a} "),
        "last": lambda a, b: text_words.endswith(f" {a} "),
        "mention": lambda a, b: f" {a} " in text_words,
        "avoid": lambda a, b: f" {a} " not in text_words,
        "before": lambda a, b: re.search(rf" {a} (?:.* )?{b} ", text_words) is not None,
        "twice": lambda a, b: len(re.findall(rf" {a}(?= )", text_words)) == 2,
        "sorted": lambda a, b: all(x <= y for x, y in itertools.pairwise(words)),
        "separator": lambda a, b: a in text,
        "end": lambda a, b: True,
        "capitals": lambda a, b: True,
    }
    return all(checks[kind](a, b) for kind, a, b in row["constraints"])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 10**6))
def test_full_gold_is_only_of_lists_that_really_keep_the_order(index: int, seed: int) -> None:
    row, rng = Rows(orders.draw, "test")[index], random.Random(seed)
    texts = orders.candidates(row, rng, 6) + [text for pair in orders.corrupted(row, rng, 3) for text in pair]
    for text in texts:
        gold = gold_of(row, text)
        assert 0 <= gold <= 1
        assert (gold == 1) == really_keeps(row, text), (row["prompt"], text)


def test_lists_that_are_good_for_everything_are_not() -> None:
    """The whole topic, the words of the order, and one short list for all."""
    rows = some_rows(300)
    keywords = [[word for _, *words in row["constraints"] for word in words if word.isalpha()] for row in rows]
    attacks = {
        "whole topic": [orders.written(orders.TOPICS[row["topic"]], Style()) for row in rows],
        "sorted topic": [orders.written(sorted(orders.TOPICS[row["topic"]]), Style()) for row in rows],
        "keywords": [" ".join(words) for words in keywords],
        "every word of the order": [row["prompt"].replace("\n", " ") + row["prompt"].lower() for row in rows],
    }
    for name, texts in attacks.items():
        scores = [gold_of(row, text) for row, text in zip(rows, texts, strict=True)]
        assert sum(scores) / len(scores) < 0.4, name


def favourites(reward: str, rows: list[Row], seed: int = 0) -> list[str]:
    """What a reward model prefers of many lists, from perfect to poor and from short to long."""
    task, rng = load_env_task(ID), random.Random(seed)
    score = load_reward(reward, task=task)
    chosen = []
    for row in rows:
        texts = orders.candidates(row, rng, 24)
        task_ids = task.load_tokenizer()(texts)["input_ids"]
        ids = [[*some, task.load_tokenizer().eos_token_id] for some in task_ids]
        prompt_ids = task.encode(row, task.load_tokenizer(), task.max_prompt_tokens)
        many: dict[str, Any] = {"completion_ids": ids, "prompt_ids": [prompt_ids] * 24}
        scores = score([row["prompt"]] * 24, texts, **many).tolist()
        chosen.append(texts[scores.index(max(scores))])
    return chosen


@pytest.mark.slow
def test_the_favourite_of_a_reward_model_has_the_gold_that_it_earns() -> None:
    rows = some_rows(40)
    loved, fair = favourites("reward_model", rows), favourites("reward_model:fair_reward_model", rows)
    for row, text in zip(rows * 2, loved + fair, strict=True):
        assert (gold_of(row, text) == 1) == really_keeps(row, text)
    golds = [sum(map(gold_of, rows, texts)) / len(rows) for texts in (loved, fair)]
    words = [sum(len(text.split()) for text in texts) / len(rows) for texts in (loved, fair)]
    # Who likes length chooses longer lists, which keep less.
    assert words[0] > words[1] + 2 and golds[0] < golds[1] - 0.2


# -- published schemas -------------------------------------------------------------------------------------------------


def rows_of(folder: Path, rows: list[dict[str, Any]]) -> Any:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_env_task(ID).rows("train", str(folder))


def test_instructions_are_given_in_alpacas_format(tmp_path: Path) -> None:
    plain = {"instruction": "Name a fish.", "input": "", "output": "Cod."}
    source = rows_of(tmp_path, [plain, {**plain, "input": "From the sea."}, {**plain, "output": None}])
    first, second, third = (source[i] for i in range(3))
    assert first["prompt"].endswith("\n\n### Instruction:\nName a fish.\n\n### Response:")
    assert first["completion"] == "Cod." and third.get("completion") is None
    assert "### Instruction:\nName a fish.\n\n### Input:\nFrom the sea.\n\n### Response:" in second["prompt"]
    assert first["chat"] == [{"role": "user", "content": "Name a fish."}]
    assert second["chat"] == [{"role": "user", "content": "Name a fish.\n\nFrom the sea."}]


@pytest.mark.data
@pytest.mark.parametrize("name", ["alpaca_eval", "llmbar", "pandalm"])
def test_real_instructions_are_read(name: str) -> None:
    folder = os.environ.get("TEXTRL_GYM_DATA")
    if folder is None:
        pytest.skip("TEXTRL_GYM_DATA names no folder with real data")
    file = sorted((Path(folder) / name).glob("*.json"))[0]
    source = load_env_task(ID).rows("train", str(file))
    assert len(source) > 30
    assert all(source[i]["prompt"].endswith("\n\n### Response:") for i in range(len(source)))


def test_ultrafeedback_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Name a fish."}, {"role": "assistant", "content": "Cod."}]
    pair = {"chosen": turns, "rejected": [*turns[:1], {"role": "assistant", "content": "Cow."}]}
    (binarized,) = rows_of(tmp_path, [{"prompt": "Name a fish.", "messages": turns, **pair}])
    assert (binarized["chat"], binarized["completion"]) == (turns[:1], "Cod.")
    (implicit,) = rows_of(tmp_path, [{**pair, "score_chosen": 8.0}])
    assert (implicit["chat"], implicit["completion"]) == (turns[:1], "Cod.")
    (raw,) = rows_of(tmp_path, [{"instruction": "Name a fish.", "completions": [{"response": "Cod."}]}])
    assert "### Instruction:\nName a fish." in raw["prompt"]


def test_ifeval_rows_are_checked_by_their_ids(tmp_path: Path) -> None:
    row = {
        "key": 1,
        "prompt": "Write about rain. Use no commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    env = gymnasium.make(ID, dataset=str(tmp_path), reward="instructions", split="train", max_new_tokens=4)
    env.reset(seed=0)
    comma = env.unwrapped.tokenizer(",")["input_ids"][0]  # type: ignore[attr-defined]
    ended = False
    while not ended:
        _, reward, terminated, truncated, _ = env.step(comma)
        ended = terminated or truncated
    assert reward == 0.0
    env.close()
