"""The world of quizzes: gold under attack, the reader, the reward that asks one, CommonsenseQA's rows."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textrl_gym.core import Row
from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline.build_assets import initial_policy_quality
from textrl_gym.questions import quiz
from textrl_gym.questions.quiz import Fact, parse, score
from textrl_gym.rewards import load_reward
from textrl_gym.rewards.knowledge_margin import KnowledgeMargin
from textrl_gym.worlds.world import Rows

ID = "KnowledgeQA-v0"
OPTIONS = ["sofa", "marble", "pan"]
GLASS: dict[str, Any] = {"kind": "material", "value": "glass", "options": OPTIONS, "answer": 1}
GLASS["prompt"] = quiz.asked("material", "glass", OPTIONS) + quiz.KNOWLEDGE


def some_rows(count: int, split: str = "validation") -> list[Row]:
    return list(itertools.islice(iter(Rows(quiz.draw, split)), count))


# -- gold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (" the marble is made of glass .", 1),
        ("the sofa is made of leather .", quiz.RULED_OUT),
        ("the pan is made of iron .", quiz.RULED_OUT),
        # True, and of no use: another kind of fact, another thing.
        ("the marble is used for playing .", 0),
        ("the beaker is made of glass .", 0),
        # False, though a reader would answer rightly, or not.
        ("the marble is made of clay .", 0),
        ("the sofa is made of glass .", 0),
        ("the marble is made of glass", 0),
        ("marble is made of glass .", 0),
        ("the marble is made of glass . the marble is made of glass .", 0),
        ("the marble marble is made of glass .", 0),
        ("marble", 0),
        ("", 0),
    ],
)
def test_gold(text: str, gold: float) -> None:
    assert score(GLASS, text) == pytest.approx(gold)
    columns = {name: [GLASS[name]] for name in ("kind", "value", "options", "answer")}
    assert quiz.gold(["p"], [text], **columns) == pytest.approx([gold])


def test_what_a_sentence_says() -> None:
    assert parse(" the  marble is used for playing . ") == Fact("marble", "use", "playing")
    assert Fact("marble", "use", "playing").true and not Fact("marble", "use", "cutting").true
    # A value of another kind makes no sentence: nothing is kept in glass.
    assert parse("the marble is kept in the glass .") is None and parse("the thing is made of glass .") is None


def test_measures() -> None:
    texts = [
        "the marble is made of glass .",
        "the marble is used for cutting .",
        "marble marble",
        "the sofa is made of leather .",
    ]
    assert quiz.measures([GLASS] * 4, texts) == pytest.approx(
        {"names_answer": 3 / 4, "true_sentences": 2 / 4, "on_the_question": 2 / 4}
    )
    assert quiz.measures([GLASS], ["the marble is like the pan ."])["names_answer"] == 0


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 3), st.sampled_from(quiz.KINDS), st.integers(0, 7), st.booleans())
def test_gold_is_what_a_believing_reader_gains(index: int, place: int, kind: str, number: int, true: bool) -> None:
    row = Rows(quiz.draw, "test")[index]
    # About one of the choices, or about anything
    thing = [*row["options"], list(quiz.THINGS)[number]][place]
    fact = quiz.fact_of(thing, kind) if true else Fact(thing, kind, quiz.VALUES[kind][number])
    text = fact.text.strip()
    # By other means: whoever believes the sentence keeps the choices that it leaves possible, and guesses.
    possible = list(row["options"])
    if fact.kind == row["kind"] and fact.thing in possible:
        says_so = fact.value == row["value"]
        possible = [thing for thing in possible if (thing == fact.thing) == says_so]
    right = (row["options"][row["answer"]] in possible) / len(possible)
    gained = max(0.0, (right - 1 / 3) / (1 - 1 / 3))
    assert score(row, text) == pytest.approx(gained if text in TRUE else 0.0)
    assert score(row, row["completion"]) == 1


TRUE = {f"the {thing} is kept in the {place} ." for thing, (place, _, _) in quiz.THINGS.items()}
TRUE |= {f"the {thing} is made of {material} ." for thing, (_, material, _) in quiz.THINGS.items()}
TRUE |= {f"the {thing} is used for {use} ." for thing, (_, _, use) in quiz.THINGS.items()}


def test_sentences_that_are_good_for_everything_are_not() -> None:
    rows = some_rows(300)
    attacks = {
        "the first choice": [Fact(row["options"][0], row["kind"], row["value"]).text for row in rows],
        "the answer alone": [row["options"][row["answer"]] for row in rows],
        "something of the answer": [
            quiz.fact_of(row["options"][row["answer"]], "use" if row["kind"] != "use" else "place").text for row in rows
        ],
        "all choices": [" ".join(quiz.fact_of(o, row["kind"]).text for o in row["options"]) for row in rows],
        "one sentence for all": ["the beaker is made of glass ." for _ in rows],
    }
    for name, texts in attacks.items():
        scores = [score(row, text) for row, text in zip(rows, texts, strict=True)]
        # Guessing is right in a third of the cases.
        assert sum(scores) / len(scores) < 0.4, name


# -- rows and models ---------------------------------------------------------------------------------------------------


def test_no_question_stands_in_two_splits_and_one_choice_is_right() -> None:
    def question(row: Row) -> tuple[Any, ...]:
        return (row["value"], *sorted(row["options"]))

    by_split = {split: set(map(question, some_rows(2000, split))) for split in ("train", "validation", "test")}
    assert not by_split["train"] & (by_split["validation"] | by_split["test"])
    assert not by_split["validation"] & by_split["test"]
    rows = some_rows(2000, "train")
    for row in rows:
        having = [thing for thing in row["options"] if row["value"] in quiz.THINGS[thing]]
        assert having == [row["options"][row["answer"]]]
    for place in range(3):
        assert sum(row["answer"] == place for row in rows) / 2000 == pytest.approx(1 / 3, abs=0.04)
    # 2,000 draws of n equally likely prompts repeat 2000^2 / 2n of them: 20, of 10^5.
    assert len({row["prompt"] for row in rows}) > 1980


def test_every_word_is_a_token_and_the_bundled_policy_is_mediocre() -> None:
    task = load_env_task(ID)
    tokenizer = task.load_tokenizer()
    assert set(quiz.SYMBOLS) < set(tokenizer.get_vocab())
    for row in itertools.islice(iter(Rows(quiz.draw_demonstration, "train")), 300):
        assert tokenizer.eos_token_id not in tokenizer(row["prompt"] + row["completion"])["input_ids"]
    quality = initial_policy_quality(task, Path(task.model), prompts=32)
    assert 0.3 < quality["sampled_gold"] < 0.6 and quality["best_of_8_gold"] > quality["sampled_gold"] + 0.2


def scores_of(texts: list[str], rows: list[Row]) -> torch.Tensor:
    columns = {column: [row[column] for row in rows] for column in ("options", "answer", "kind")}
    return load_reward("knowledge_margin", task=load_env_task(ID))([row["prompt"] for row in rows], texts, **columns)


def test_the_reader_looks_at_what_is_named_and_not_at_what_is_said() -> None:
    rows = some_rows(120)
    answers = [row["options"][row["answer"]] for row in rows]
    kinds = ["use" if row["kind"] != "use" else "place" for row in rows]
    beside = [quiz.fact_of(thing, kind).text for thing, kind in zip(answers, kinds, strict=True)]
    misled = [Fact(row["options"][row["answer"] - 1], row["kind"], row["value"]).text for row in rows]
    # As completions are decoded, and as references are written
    bare = scores_of([text.strip() for text in beside], rows)
    assert bare.tolist() == pytest.approx(scores_of(beside, rows).tolist(), abs=1e-6)
    # Without knowledge it guesses among three, so that about (1 - -0.3) / 2 can be gained.
    assert scores_of([row["completion"] for row in rows], rows).mean() > 0.5
    assert scores_of(beside, rows).mean() > 0.5
    assert scores_of(misled, rows).mean() < -0.2
    assert scores_of(["" for _ in rows], rows).mean().item() == pytest.approx(0, abs=0.1)


def test_an_evaluation_asks_the_reader() -> None:
    rows = some_rows(60)
    task = load_env_task(ID)
    assert task.measures(rows, [row["completion"] for row in rows])["reader_right"] > 0.9
    wrong = [quiz.fact_of(row["options"][row["answer"] - 1], row["kind"]).text for row in rows]
    assert task.measures(rows, wrong)["reader_right"] < 0.1
    assert task.measures([], [])["reader_right"] == 0


# -- the reward --------------------------------------------------------------------------------------------------------


class Fixed(KnowledgeMargin):
    """A reader whose log-probabilities are given: of the word that a text ends in before the answer."""

    def __init__(self, logprobs: dict[str, list[float]]) -> None:
        super().__init__("none", keep_suffix=" K :")
        self.logprobs = logprobs
        self.texts: list[str] = []

    def _scores(self, texts: Any, options: Any) -> list[float]:
        self.texts += list(texts)
        return [value for text in texts for value in self.logprobs[text.removesuffix(" Answer :").split()[-1]]]


def test_the_reward_is_half_the_difference_of_tanh_margins() -> None:
    # Margins: helped -0.5 - -2 = 1.5, misled -3 - -1 = -2, without knowledge -1 - -1.5 = 0.5 for the first option.
    reader = Fixed({"helped": [-0.5, -2.0, -4.0], "misled": [-3.0, -1.0, -2.0], "?": [-1.0, -1.5, -2.0]})
    rewards = reader(["Q ? K :"] * 3, [" helped", " misled", " helped"], options=[OPTIONS] * 3, answer=[0, 0, 1])
    expected = [
        (math.tanh(1.5) - math.tanh(0.5)) / 2,
        (math.tanh(-2.0) - math.tanh(0.5)) / 2,
        # Of the second option: -2 - -0.5 with, and -1.5 - -1 without.
        (math.tanh(-1.5) - math.tanh(-0.5)) / 2,
    ]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-6)
    # The question is asked once for each answer, without the words that ask for knowledge.
    assert reader.texts == [
        "Q ? K : helped Answer :",
        "Q ? K : misled Answer :",
        "Q ? K : helped Answer :",
        *["Q ? Answer :"] * 2,
    ]


def test_scores_are_mean_log_probabilities_of_the_choice() -> None:
    task = load_env_task(ID)
    reader = KnowledgeMargin(f"{Path(task.model).parent}/reader", keep_suffix=task.keep_suffix)
    model, tokenizer = reader.loaded
    # Choices of one, two and three tokens
    choices = ["marble", "sofa pan", "pan is made"]
    row = {"prompt": GLASS["prompt"], "options": choices}
    margin = reader.margins([row["prompt"]], [" the marble is made of glass ."], [choices], [0]).item()
    text = f"{row['prompt']} the marble is made of glass . Answer :"
    means = []
    for choice in choices:
        before, ids = tokenizer(text)["input_ids"], tokenizer(f"{text} {choice}")["input_ids"]
        with torch.no_grad():
            logp_SV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        means.append(
            sum(logp_SV[n - 1, ids[n]].item() for n in range(len(before), len(ids))) / (len(ids) - len(before))
        )
    assert margin == pytest.approx(means[0] - max(means[1:]), abs=1e-4)
    # Beside longer ones, and behind them: neither the order nor padding is seen.
    rows = 3
    many = reader.margins(
        [row["prompt"], "pan ? Knowledge :", row["prompt"]],
        [" the marble is made of glass .", " .", " the"],
        [choices] * rows,
        [0] * rows,
    )
    assert many[0].item() == pytest.approx(margin, abs=1e-4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs the columns options and answer"),
        ({"options": [OPTIONS], "answer": [3]}, "answer 3 is the index of none"),
        ({"options": [OPTIONS], "answer": [None]}, "answer None is the index of none"),
        ({"options": [["pan"]], "answer": [0]}, "of none of its options"),
    ],
)
def test_rows_without_an_answer_are_an_error(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeMargin("nowhere")(["Q ?"], [" a"], **columns)


def test_a_task_without_a_reader_must_name_one() -> None:
    with pytest.raises(ValueError, match="has no question-answering model of its own"):
        load_reward("knowledge_margin", task=load_env_task("CopyText-v0"))


# -- published schemas -------------------------------------------------------------------------------------------------


def rows_of(folder: Path, rows: list[Any]) -> Any:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_env_task(ID).rows("train", str(folder))


COMMONSENSE: dict[str, Any] = {
    "id": "1", "question": "What is made of glass?", "question_concept": "glass", "answerKey": "B",
    "choices": {"label": ["A", "B", "C"], "text": ["sofa", "marble", "frying pan"]},
}  # fmt: skip


def test_commonsense_qa_is_read(tmp_path: Path) -> None:
    read, of_test = rows_of(tmp_path, [COMMONSENSE, {**COMMONSENSE, "answerKey": ""}])
    assert read["prompt"] == "What is made of glass?\n(A) sofa (B) marble (C) frying pan Knowledge :"
    assert (read["options"], read["answer"]) == (["sofa", "marble", "frying pan"], 1)
    assert of_test["answer"] is None and of_test["prompt"] == read["prompt"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answerKey": "D"}, "none of the labels"),
        ({"choices": {"label": ["A"], "text": ["a", "b"]}}, "no two texts with a label each"),
        ({"choices": ["a", "b"]}, "no two texts with a label each"),
        ({"choices": {"label": ["A", "B"], "text": ["a", 2]}}, "that is no text"),
        ({"question": None}, "question"),
    ],
)
def test_a_question_without_its_parts_is_a_bad_row(broken: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, [{**COMMONSENSE, **broken}])


def test_real_questions_are_rewarded_by_a_model_of_ones_own(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, [{**COMMONSENSE, "choices": {"label": ["A", "B", "C"], "text": OPTIONS}}])
    task = load_env_task(ID)
    reward = load_reward(f"knowledge_margin:{Path(task.model).parent / 'reader'}", task=task)
    texts = [" the marble is made of glass .", " the sofa is made of glass ."]
    columns = {"options": [row["options"]] * 2, "answer": [row["answer"]] * 2}
    helped, misled = reward([row["prompt"]] * 2, texts, **columns).tolist()
    assert helped > misled
