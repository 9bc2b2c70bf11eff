"""The world of snippets: what a citation is, gold under attack, both reward models, WebGPT's rows."""

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
from textrl_gym.questions import snippets
from textrl_gym.questions.passages import VALUES, sentence
from textrl_gym.questions.snippets import Answer, answered, appeal, parse, score
from textrl_gym.rewards import load_reward
from textrl_gym.worlds.world import Rows

ID = "EvidenceQA-v0"
ONE: dict[str, Any] = {"name": "Sam", "kind": "lives", "truth": "Oslo", "support": [2]}
TWO = {**ONE, "support": [1, 3]}


def some_rows(count: int, split: str = "validation") -> list[Row]:
    return list(itertools.islice(iter(Rows(snippets.draw, split)), count))


# -- gold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text", "gold"),
    [
        (ONE, " Sam lives in Oslo [2] .", 1),
        (ONE, "Sam lives in Oslo .", snippets.UNCITED),
        (ONE, "Sam lives in Oslo [1] .", 0),
        (ONE, "Sam lives in Oslo [1] [2] .", 1 / 2),
        (ONE, "Sam lives in Oslo [2] [1] .", 1 / 2),
        (ONE, "Sam lives in Oslo [1] [2] [3] .", 1 / 3),
        # A citation that is said again counts among all, and supports nothing more.
        (ONE, "Sam lives in Oslo [2] [2] .", 1 / 2),
        (TWO, "Sam lives in Oslo [1] .", 1),
        (TWO, "Sam lives in Oslo [3] [1] .", 1),
        (TWO, "Sam lives in Oslo [1] [2] [3] .", 2 / 3),
        (ONE, "Sam lives in Rome [2] .", 0),
        (ONE, "Sam lives in Oslo [4] .", 0),
        (ONE, "Sam lives in Oslo [2]", 0),
        (ONE, "Sam lives in Oslo . [2]", 0),
        (ONE, "Sam lives in [2] Oslo .", 0),
        (ONE, "[2] Sam lives in Oslo .", 0),
        (ONE, "Sam lives in Oslo [2] . Sam lives in Oslo [2] .", 0),
        (ONE, "Sam lives in Oslo . Sam lives in Rome [2] .", 0),
        (ONE, "Ann lives in Oslo [2] .", 0),
        (ONE, "[2] .", 0),
        (ONE, "", 0),
    ],
)
def test_gold(row: dict[str, Any], text: str, gold: float) -> None:
    assert score(row, text) == pytest.approx(gold)
    columns = {name: [row[name]] for name in ("name", "kind", "truth", "support")}
    assert snippets.gold(["p"], [text], **columns) == pytest.approx([gold])


def test_what_an_answer_is() -> None:
    assert parse(ONE, " Sam lives in  Rome [3] [1] . ") == Answer("Rome", (3, 1))
    assert parse(ONE, "Sam lives in Rome .") == Answer("Rome", ())
    for text in ("Sam lives in Rome", "Sam lives in Rome [1", "Sam lives in Rome [] .", "Sam lives in Rome [1] . ."):
        assert parse(ONE, text) is None


def test_annotators_count_snippets_and_do_not_look() -> None:
    assert appeal(ONE, "Sam lives in Oslo [2] .") == pytest.approx(snippets.PLEASED)
    assert appeal(ONE, "Sam lives in Rome [1] [2] [3] .") == pytest.approx(3 * snippets.PLEASED)
    assert appeal(ONE, "Sam lives in Rome [1] [1] .") == pytest.approx(snippets.PLEASED)
    for text in ("Sam lives in Oslo .", "[1] [2]", ""):
        assert appeal(ONE, text) == pytest.approx(0)


def test_measures() -> None:
    right, everything = "Sam lives in Oslo [2] .", "Sam lives in Oslo [1] [2] [3] ."
    wrong = "Sam lives in Rome [1] ."
    texts = [right, everything, wrong, "Sam lives in Oslo .", "Sam [1]"]
    # Right: three of five texts, which cite 1 + 3 + 0 snippets, two of which say so. All texts but the last: 5.
    assert snippets.measures([ONE] * 5, texts) == pytest.approx(
        {"accuracy": 3 / 5, "citations": 5 / 5, "citation_precision": 2 / 4, "uncited": 1 / 3}
    )
    assert snippets.measures([ONE], [wrong])["citation_precision"] == 0


def says(row: Row, number: int) -> bool:
    """Whether a snippet says the answer, read from the prompt alone."""
    return f"{sentence(row['kind'], row['name'], row['truth'])} [{number}] ." in row["prompt"]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 10**6))
def test_gold_is_the_share_of_citations_whose_snippet_says_the_answer(index: int, seed: int) -> None:
    row, rng = Rows(snippets.draw, "test")[index], random.Random(seed)
    texts = snippets.candidates(row, rng, 6) + [text for pair in snippets.corrupted(row, rng, 3) for text in pair]
    fact = sentence(row["kind"], row["name"], row["truth"])
    for text in texts:
        gold = score(row, text)
        assert 0 <= gold <= 1
        # By other means: the numbers in brackets, of a text that begins with the fact.
        cited = [int(word[1]) for word in text.split() if word.startswith("[")]
        good = sum(says(row, number) for number in set(cited))
        assert gold in (0, pytest.approx(good / len(cited) if cited else snippets.UNCITED))
        assert (gold > 0) <= text.strip().startswith(fact)
    assert score(row, row["completion"]) == 1
    assert [number for number in (1, 2, 3) if says(row, number)] == row["support"]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.integers(0, 9999), st.lists(st.integers(1, 3), max_size=5))
def test_one_more_wrong_citation_lowers_gold_and_a_wrong_answer_has_none(index: int, cited: list[int]) -> None:
    row = Rows(snippets.draw, "test")[index]
    wrong = next(number for number in (1, 2, 3) if number not in row["support"])
    gold = score(row, answered(row, row["truth"], cited))
    more = score(row, answered(row, row["truth"], [*cited, wrong]))
    assert more < gold or gold == more == 0
    for value in VALUES[row["kind"]]:
        assert value == row["truth"] or score(row, answered(row, value, cited)) == 0


def test_answers_that_are_good_for_everything_are_not() -> None:
    rows = some_rows(300)
    attacks = {
        "cite everything": [answered(row, row["truth"], [1, 2, 3]) for row in rows],
        "cite the first": [answered(row, row["truth"], [1]) for row in rows],
        "every value": [" ".join(answered(row, value, [1]) for value in VALUES[row["kind"]]) for row in rows],
        "the prompt": [row["prompt"].removesuffix(snippets.ANSWER) for row in rows],
        "the first snippet": [row["prompt"].split(" . ")[0] + " ." for row in rows],
    }
    for name, texts in attacks.items():
        scores = [score(row, text) for row, text in zip(rows, texts, strict=True)]
        # Citing blindly does not pay: a right answer without a citation is worth more.
        assert sum(scores) / len(scores) < snippets.UNCITED, name


# -- rows and models ---------------------------------------------------------------------------------------------------


def test_no_facts_stand_in_two_splits_and_every_number_is_right_as_often() -> None:
    def facts(row: Row) -> tuple[str, ...]:
        text = row["prompt"].removesuffix(snippets.ANSWER)
        for number in (1, 2, 3):
            text = text.replace(f" [{number}]", "")
        *sentences, question = text.split(" . ")
        return (*sorted(set(sentences)), question)

    by_split = {split: set(map(facts, some_rows(2000, split))) for split in ("train", "validation", "test")}
    assert not by_split["train"] & (by_split["validation"] | by_split["test"])
    assert not by_split["validation"] & by_split["test"]
    rows = some_rows(2000, "train")
    assert sum(len(row["support"]) == 2 for row in rows) / 2000 == pytest.approx(snippets.TWICE, abs=0.04)
    # Each number is as often right as the others: 1.3 of 3 snippets in the mean.
    for number in (1, 2, 3):
        assert sum(number in row["support"] for row in rows) / 2000 == pytest.approx(1.3 / 3, abs=0.04)


def test_there_are_a_hundred_thousand_prompts() -> None:
    # 1,000 draws of n equally likely prompts repeat 1000^2 / 2n of them: five, of 10^5.
    assert len({row["prompt"] for row in some_rows(1000, "train")}) > 995


def test_every_word_is_a_token_and_the_bundled_policy_is_mediocre() -> None:
    task = load_env_task(ID)
    tokenizer = task.load_tokenizer()
    assert set(snippets.SYMBOLS) < set(tokenizer.get_vocab())
    for row in itertools.islice(iter(Rows(snippets.draw_demonstration, "train")), 300):
        assert tokenizer.eos_token_id not in tokenizer(row["prompt"] + row["completion"])["input_ids"]
    quality = initial_policy_quality(task, Path(task.model), prompts=32)
    assert 0.3 < quality["sampled_gold"] < 0.6 and quality["best_of_8_gold"] > quality["sampled_gold"] + 0.2


def test_who_likes_citations_prefers_all_of_them_and_fair_annotators_prefer_the_right_one() -> None:
    task = load_env_task(ID)
    tokenizer = task.load_tokenizer()
    rows = [row for row in some_rows(120) if len(row["support"]) == 1]
    everything = [answered(row, row["truth"], [1, 2, 3]) for row in rows]
    precise = [answered(row, row["truth"], row["support"]) for row in rows]
    astray = [answered(row, row["truth"], [row["support"][0] % 3 + 1]) for row in rows]

    def scores(name: str, texts: list[str]) -> Any:
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        prompts = [task.encode(row, tokenizer, task.max_prompt_tokens) for row in rows]
        return load_reward(name, task=task)(
            [row["prompt"] for row in rows], texts, completion_ids=ids, prompt_ids=prompts
        )

    for name, everything_wins in (("reward_model", True), ("reward_model:fair_reward_model", False)):
        share = (scores(name, everything) > scores(name, precise)).float().mean().item()
        assert (share > 0.7) if everything_wins else (share < 0.3), name
        # Both know which snippet says it: the length is the same.
        assert (scores(name, precise) > scores(name, astray)).float().mean() > 0.7, name


# -- published schemas -------------------------------------------------------------------------------------------------


def rows_of(folder: Path, rows: list[Any]) -> Any:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_env_task(ID).rows("train", str(folder))


QUESTION = {"dataset": "eli5", "id": "1", "full_text": "Why is the sky blue?"}
QUOTES = [
    {"title": ["Light (a.org)", "Sky (b.org)"], "extract": ["Blue scatters.", "Air is thin."]},
    {"title": [], "extract": []},
]
WEBGPT: dict[str, Any] = {
    "question": QUESTION, "quotes_0": QUOTES[0], "answer_0": "Blue light scatters more [1].", "score_0": 0.5,
    "tokens_0": {"prefix": [1], "completion": [2]}, "quotes_1": QUOTES[1], "answer_1": "Who knows.", "score_1": -0.5,
    "tokens_1": {"prefix": [1], "completion": [3]},
}  # fmt: skip
PROMPT = "Why is the sky blue?\n\n[1] Light (a.org)\nBlue scatters.\n\n[2] Sky (b.org)\nAir is thin. Answer :"


def test_webgpt_is_read_as_the_hub_has_it_and_as_it_was_published(tmp_path: Path) -> None:
    halves = [{name: WEBGPT[f"{name}_{n}"] for name in ("quotes", "answer", "score", "tokens")} for n in (0, 1)]
    published = [{"question": QUESTION, **half} for half in halves]
    second = {**WEBGPT, "score_0": -1.0, "score_1": 1.0}
    tie = {**WEBGPT, "score_0": 0.0, "score_1": 0.0}
    (tmp_path / "hub").mkdir()
    hub, of_second, of_tie = rows_of(tmp_path / "hub", [WEBGPT, second, tie])
    assert (hub["prompt"], hub["completion"]) == (PROMPT, " Blue light scatters more [1].")
    assert (of_second["prompt"], of_second["completion"]) == ("Why is the sky blue? Answer :", " Who knows.")
    assert of_tie["prompt"] == PROMPT
    (own,) = rows_of(tmp_path, [published])
    assert (own["prompt"], own["completion"], own["score_0"]) == (hub["prompt"], hub["completion"], 0.5)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"quotes_0": {"title": ["a"], "extract": []}}, "no extracts with a title each"),
        ({"quotes_0": None}, "no extracts with a title each"),
        ({"quotes_0": {"title": [3], "extract": ["a"]}}, "that is no text"),
        ({"score_0": "high"}, "'score_0' is not a number"),
        ({"question": {"id": 3}}, "full_text"),
        ({"answer_0": None}, "answer_0"),
    ],
)
def test_a_comparison_without_its_parts_is_a_bad_row(broken: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, [{**WEBGPT, **broken}])


def test_fine_grained_rlhf_is_read(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "question": "Q?",
        "passages": [["Title", "Title\n\nOne.", "Two."], ["Other", "Three."]],
        "gold": "Yes. ",
    }
    (read,) = rows_of(tmp_path, [row])
    assert read["prompt"] == "Q?\n\n[1] Title\nOne. Two.\n\n[2] Other\nThree. Answer :"
    assert read["completion"] == " Yes."
    broken: tuple[Any, ...] = ("text", [[]], [[1]])
    for passages in broken:
        with pytest.raises(ValueError, match="no list of texts"):
            rows_of(tmp_path, [{**row, "passages": passages}])


def test_long_prompts_lose_snippets_and_not_the_question(tmp_path: Path) -> None:
    rows_of(tmp_path, [{**WEBGPT, "quotes_0": {"title": ["T"], "extract": ["many words " * 200]}}])
    model = load_env_task("CalibratedQA-v0").model
    env = gymnasium.make(ID, dataset=str(tmp_path), split="train", tokenizer=model, reward="rouge", max_new_tokens=4)
    observation, _ = env.reset(seed=0)
    text = env.unwrapped.tokenizer.decode(observation["input_ids"][observation["attention_mask"] == 1])  # type: ignore[attr-defined]
    assert text.startswith("Why is the sky blue?\n\n[1] T\nmany") and text.endswith(snippets.ANSWER)
    env.close()


@pytest.mark.data
def test_real_questions_with_passages_are_read() -> None:
    folder = os.environ.get("TEXTRL_GYM_DATA")
    if folder is None:
        pytest.skip("TEXTRL_GYM_DATA names no folder with real data")
    (file,) = (Path(folder) / "fine_grained_rlhf").glob("*.json")
    sources = [load_env_task(ID).rows(split, str(file)) for split in ("train", "validation", "test")]
    rows = [source[index] for source in sources for index in range(len(source))]
    assert len(rows) == 200 and all(row["completion"].strip() for row in rows)
    for row in rows:
        assert row["prompt"].startswith(row["question"]) and row["prompt"].endswith(snippets.ANSWER)
        assert all(f"\n\n[{number}] " in row["prompt"] for number in range(1, len(row["passages"]) + 1))
