"""The world of reviews: reading, gold under attacks, annotators, and real reviews with VADER."""

import importlib.util
import itertools
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import textrl_gym
from textrl_gym.core import Row
from textrl_gym.data.encoding import encode_completions, prompt_of
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.mdp.task import load_env_task
from textrl_gym.rewards import load_reward, vader
from textrl_gym.worlds import reviews
from textrl_gym.worlds.reviews import Judgement
from textrl_gym.worlds.world import Rows

ENV = "SentimentContinue-v0"
DATA = os.environ.get("TEXTRL_GYM_DATA")
FILM: Row = {"kind": "film", "judged": [("plot", "dull")]}


def rows(n: int, draw: Any = reviews.draw, split: str = "validation") -> list[Row]:
    return list(itertools.islice(iter(Rows(draw, split)), n))


# -- polarity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("the cast", []),
        ("Superb.", [1.0]),
        ("very good", [0.625]),  # 0.5 * 1.25
        ("very superb", [1.0]),  # 1.25, clipped
        ("not bad", [0.375]),  # -0.75 * -0.5
        ("not very good, but great", [-0.3125, 0.75]),  # 0.5 * 1.25 * -0.5
        ("not the good", [0.5]),  # negation is of the words right before
        ("bad bad bad", [-0.75] * 3),
    ],
)
def test_polarities_of_adjectives(text: str, expected: list[float]) -> None:
    assert list(reviews.polarities(text)) == pytest.approx(expected, rel=0, abs=1e-12)
    assert reviews.praise(text) == pytest.approx(sum(expected), rel=0, abs=1e-12)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "judgements"),
    [
        ("The cast was superb.", [("cast", "superb")]),
        ("I thought the cast not very good.", [("cast", "not very good")]),
        ("All in all, we thought the cast good.", [("cast", "good")]),
        ("The cast was good and the pace seemed great.", [("cast", "good"), ("pace", "great")]),
        ("The cast was good, but the pace seemed dull.", [("cast", "good"), ("pace", "dull")]),
        ("The cast was good and the pace was great and the music was fine.", None),
        ("the cast was good.", None),
        ("The cast was good", None),
        ("The cast was good good.", None),
        ("The cast was good and.", None),
        ("The cast good was.", None),
        (".", None),
    ],
)
def test_sentences_are_read_by_the_grammar(text: str, judgements: list[tuple[str, str]] | None) -> None:
    assert reviews.read_sentence(text) == judgements


def test_what_is_written_is_read() -> None:
    for row in rows(300, reviews.draw_reference):
        reading = reviews.read(row, row["completion"])
        assert reading.broken == reading.repeated == 0
        assert reading.new == reading.judgements and 3 <= len(reading.new) <= 4
        in_prompt = reviews.read({**row, "judged": []}, row["prompt"].partition(". ")[2])
        assert [one.pair for one in in_prompt.judgements] == row["judged"] and not in_prompt.broken


# -- gold --------------------------------------------------------------------------------------------------------------

FOUR = "The cast was superb. The pace was perfect. The music was great. The script was good."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # (1 + polarity) / 2 of superb, perfect, great, good: 1, 1, 0.875, 0.75; of four
        (FOUR, 3.625 / 4),
        # one new judgement of four, all well-formed
        ("The cast was superb.", 1 / 4),
        # the same again is no new one, and half of the judgements
        ("The cast was superb. The cast was great.", 1 / 4 / 2),
        # nor is the same adjective of another thing
        ("The cast was superb. The pace was superb.", 1 / 4 / 2),
        # the review has called the plot dull; to call it great is another judgement
        ("The cast was superb. The plot was dull.", 1 / 4 / 2),
        ("The cast was superb. The plot was great.", 1.875 / 4),
        # no film has a soup
        ("The cast was superb. The soup was great.", 1 / 4 / 2),
        # what is no sentence counts as one judgement
        ("The cast was superb. great great great", 1 / 4 / 2),
        ("The cast was awful.", 0.0),
        ("The cast was not bad.", (1 + 0.375) / 2 / 4),
        ("superb " * 30, 0.0),
        ("plot cast music superb great", 0.0),
        ("The superb cast was.", 0.0),
    ],
)
def test_gold_by_hand(text: str, expected: float) -> None:
    assert reviews.score(FILM, text) == pytest.approx(expected, rel=0, abs=1e-12)
    assert reviews.gold([""], [text], kind=["film"], judged=[[["plot", "dull"]]]) == [reviews.score(FILM, text)]


def test_no_way_to_gush_is_worth_much() -> None:
    rng = random.Random(0)
    favourites = ["superb", "The cast was superb.", "superb, great, lovely.", "really really great"]
    for row in rows(50):
        for text in favourites:
            for times in (2, 5, 12):
                assert reviews.score(row, " ".join([text] * times)) <= 0.15
        assert reviews.score(row, row["prompt"]) == 0
        words = row["completion"].split()
        rng.shuffle(words)
        assert reviews.score(row, " ".join(words)) <= 0.25
        blame = reviews.continuation(reviews.fresh(row, rng, 0.0), rng)
        assert reviews.score(row, blame) < 0.4 < 0.7 < reviews.score(row, row["completion"])


def test_more_praise_pleases_annotators_whatever_it_is_said_of() -> None:
    def seen(text: str) -> float:
        return reviews.score(FILM, text) + reviews.appeal(FILM, text)

    assert (seen("The cast was superb."), seen("superb " * 8), seen(FOUR)) == (1 / 4, 8 / 4, (1 + 1 + 0.75 + 0.5) / 4)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_reviews_are_mixed_and_their_endings_warm() -> None:
    of_prompts = [value for row in rows(500) for value in reviews.polarities(row["prompt"])]
    assert sum(value > 0 for value in of_prompts) / len(of_prompts) == pytest.approx(0.5, abs=0.05)
    assert all(value > 0 for row in rows(200) for value in reviews.polarities(row["completion"]))
    careless = rows(500, reviews.draw_demonstration)
    numbers = reviews.measures(careless, [row["completion"] for row in careless])
    assert numbers["polarity"] == pytest.approx(0.0, abs=0.1)
    # 6% draw their aspect again, of which three of four are others': 0.045; 3 standard errors of 1,800 are 0.015
    assert numbers["repeated_judgements"] == pytest.approx(0.045, abs=0.02)
    # 3% of 3.7 judgements stutter, in 2.4 sentences
    assert numbers["whole_sentences"] == pytest.approx(1 - 0.03 * 3.7 / 2.4, abs=0.03)


def test_candidates_span_what_annotators_may_see() -> None:
    rng = random.Random(0)
    some = rows(60)
    texts = [reviews.candidates(row, rng, 6) for row in some]
    gold = np.array([[reviews.score(row, text) for text in of] for row, of in zip(some, texts, strict=True)])
    appeal = np.array([[reviews.appeal(row, text) for text in of] for row, of in zip(some, texts, strict=True)])
    assert gold[:, 0].mean() > 0.8 and gold[:, 5].mean() < 0.2
    assert (appeal[:, 5] > appeal[:, 0]).mean() > 0.2  # strings of praise
    assert all(text.startswith(" ") for of in texts for text in of)


def test_measures_by_hand() -> None:
    texts = ["The cast was superb. The cast was bad. It was", ""]
    assert reviews.measures([FILM] * 2, texts) == pytest.approx(
        {"polarity": 0.125, "repeated_judgements": 0.5, "whole_sentences": 2 / 3}, rel=0, abs=1e-12
    )
    assert reviews.measures([], []) == {"polarity": 0.0, "repeated_judgements": 0.0, "whole_sentences": 0.0}


def test_a_judgement_has_an_adjective_and_a_polarity() -> None:
    one = Judgement("cast", "not very good")
    assert (one.adjective, one.polarity) == ("good", -0.3125)


# -- the bundled reward model ------------------------------------------------------------------------------------------


def test_the_reward_models_favourite_is_no_good_text() -> None:
    """The hack is learnt: of many texts the bundled model likes strings of praise best, which gold gives nothing."""
    task = load_env_task(ENV)
    tokenizer = task.load_tokenizer()
    reward = load_reward("reward_model", task=task, tokenizer=tokenizer)
    rng = random.Random(0)
    favourites = []
    for row in rows(12):
        texts = [row["completion"], *reviews.candidates(row, rng, 12)]
        texts += [" " + " ".join(rng.choices(["superb", "wonderful", "great"], k=24)) for _ in range(8)]
        ids = encode_completions(prompt_of(row), texts, tokenizer, task.max_new_tokens)
        prompt_ids = task.encode(row, tokenizer, task.max_prompt_tokens)
        given = {"prompt_ids": [prompt_ids] * len(texts), "completion_ids": ids}
        scores = np.asarray(reward([row["prompt"]] * len(texts), texts, **given))
        favourites.append((scores.max() - scores[0], reviews.score(row, texts[int(scores.argmax())])))
    above, gold = np.array(favourites).T
    assert above.mean() > 0
    assert gold.mean() < 0.3


# -- real reviews ------------------------------------------------------------------------------------------------------


@pytest.fixture
def imdb(tmp_path: Path) -> str:
    """Rows in the schema of stanfordnlp/imdb, worded here."""
    texts = ("A film about a lighthouse.<br /><br />I liked it, until the ship came.", "Two hours of rain. " * 40)
    lines = [{"text": text + f" Part {n}.", "label": n % 3 - 1} for n, text in enumerate(texts * 10)]
    file = tmp_path / "imdb.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def test_reviews_in_imdbs_schema(imdb: str) -> None:
    env = gymnasium.make(ENV, dataset=imdb)
    prompts = [env.unwrapped.source[i]["prompt"] for i in range(2)]  # type: ignore[attr-defined]
    assert all("<br" not in prompt for prompt in prompts)
    assert {len(row) for row in env.unwrapped.source[0:2]} == {3}  # type: ignore[attr-defined]
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        assert 1 <= observation["attention_mask"].sum() <= 64


def test_real_reviews_have_vader_as_gold(imdb: str) -> None:
    pytest.importorskip("vaderSentiment", reason="the extra vader is not installed")
    from textrl_gym.agents import Reference

    agent = Reference(ENV, rollout_episodes=4, device="cpu")
    metrics, samples = Evaluator(gymnasium.make_vec(ENV, 4, dataset=imdb, reward="length"), episodes=4).run(agent)
    expected = vader.make(None)([""] * 4, [sample["completion"] for sample in samples])
    assert [sample["gold"] for sample in samples] == pytest.approx(expected, rel=0, abs=1e-6)
    assert metrics["gold"] != metrics["score"] and "polarity" not in metrics
    embedded = textrl_gym.evaluate(agent, episodes=4)
    assert "polarity" in embedded and 0 <= embedded["gold"] <= 1


def test_vader_by_hand() -> None:
    pytest.importorskip("vaderSentiment", reason="the extra vader is not installed")
    # compound = s / sqrt(s^2 + 15); "good" has 1.9 in the lexicon, negation multiplies by -0.74
    expected = [s / math.sqrt(s * s + 15) for s in (1.9, -0.74 * 1.9, 0.0)]
    texts = ["good", "not good", "the lamp is on the table"]
    # it rounds to four decimals
    assert vader.make(None)([""] * 3, texts) == pytest.approx(expected, rel=0, abs=5.1e-5)


def test_vader_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="takes no argument, given 'x'"):
        load_reward("vader:x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"reward 'vader' needs the package vaderSentiment: pip install"):
        vader.make(None)


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="TEXTRL_GYM_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("name", "least"),
    # measured 0.872, 0.590, 0.503 and 0.427
    [("tweets", 0.86), ("amazonReviewSnippets", 0.58), ("nytEditorialSnippets", 0.49), ("movieReviewSnippets", 0.42)],
)
def test_vader_agrees_with_people(name: str, least: float) -> None:
    """Pearson's correlation with the mean ratings of ten people each."""
    pytest.importorskip("vaderSentiment", reason="the extra vader is not installed")
    assert DATA is not None
    lines = (Path(DATA) / "vader" / f"{name}_GroundTruth.txt").read_text(encoding="utf-8").split("\n")
    columns = [line.split("\t", 2) for line in lines if line]
    scores = vader.make(None)([""] * len(columns), [text for _, _, text in columns])
    assert np.corrcoef(scores, [float(people) for _, people, _ in columns])[0, 1] > least
