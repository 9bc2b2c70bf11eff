"""Iterated RLHF: which questions are asked, who answers, and rounds that go on where they were stopped."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from textrl_gym.cli.main import main
from textrl_gym.core import Row
from textrl_gym.data.labels import Item, read_labels
from textrl_gym.feedback import selection
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.feedback.judged import answer_by_judge
from textrl_gym.feedback.simulated import answer_all
from textrl_gym.judges.annotators import Annotators
from textrl_gym.judges.judge import Answer
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.recipes import rounds
from textrl_gym.recipes.rounds import Round, RoundsConfig, RoundsResult, run_rounds
from textrl_gym.reports import rounds_page

ENV = "CalibratedQA-v0"
SURE = Annotators(beta=1000.0, noise=0.0, length_preference=0.0)


def items(golds: Sequence[Sequence[float]]) -> list[Item]:
    return [
        Item(f"{number:04x}", f"q{number}?", [f"text {place}" for place in range(len(gold))], gold=list(gold))
        for number, gold in enumerate(golds)
    ]


# -- selection ---------------------------------------------------------------------------------------------------------


def test_the_most_useful_questions() -> None:
    # Means 2, 0.1, -1, 0; standard deviations (ddof 1) of two are |difference| / sqrt 2: 0, 1.41, 0, 2.83
    gap_MN = np.array([[2.0, 1.1, -1.0, 2.0], [2.0, -0.9, -1.0, -2.0]])
    assert selection.most_useful(gap_MN, "uncertainty", 2) == [3, 1]
    assert selection.most_useful(gap_MN, "disagreement", 3) == [3, 1, 0]
    random = selection.most_useful(gap_MN, "random", 4, seed=1)
    assert sorted(random) == [0, 1, 2, 3] and random == selection.most_useful(gap_MN, "random", 4, seed=1)
    with pytest.raises(ValueError, match="at most the 4 questions"):
        selection.most_useful(gap_MN, "random", 5)
    with pytest.raises(ValueError, match="needs an ensemble"):
        selection.most_useful(gap_MN[:1], "disagreement", 1)


def test_questions_to_choose_among_are_pairs() -> None:
    from textrl_gym.mdp.task import load_env_task

    with pytest.raises(ValueError, match="pairs with texts as prompts"):
        selection.gaps(items([[0.1, 0.2, 0.3]]), Path("nowhere"), load_env_task(ENV))


# -- who answers -------------------------------------------------------------------------------------------------------


def test_simulated_annotators_go_on_and_answer_alike(tmp_path: Path) -> None:
    asked = items([[0.9, 0.1], [0.2, 0.7, 0.5], [0.4, 0.6]])
    with LabelFile(tmp_path / "a.jsonl") as file:
        answer_all(asked[:1], file, SURE)
        answer_all(asked, file, SURE)
    labels = read_labels(tmp_path / "a.jsonl")
    assert [label.ranks for label in labels] == [[1, 2], [3, 1, 2], [2, 1]]
    noisy = dataclasses.replace(SURE, noise=1.0)
    for name, order in (("b", asked), ("c", asked[::-1])):
        with LabelFile(tmp_path / f"{name}.jsonl") as file:
            answer_all(order, file, noisy, seed=3)
    b, c = ({label.item: label.ranks for label in read_labels(tmp_path / f"{name}.jsonl")} for name in "bc")
    assert b == c
    with LabelFile(tmp_path / "d.jsonl") as file:
        # What they like is worth more to them than the gold score.
        answer_all(asked[:1], file, SURE, {asked[0].id: [0.0, 1.0]})
        with pytest.raises(ValueError, match="has none"):
            answer_all([dataclasses.replace(asked[1], gold=None)], file, SURE)
    assert read_labels(tmp_path / "d.jsonl")[0].ranks == [2, 1]


class Shorter:
    """Prefers the shorter text, and has no verdict on questions about 2."""

    name = "shorter"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def prefer(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> np.ndarray:
        self.asked += [str(row["prompt"]) for row in rows]
        outcomes = [np.sign(len(y.text) - len(x.text)) / 2 + 0.5 for x, y in zip(a, b, strict=True)]
        return np.array([np.nan if "2" in row["prompt"] else o for row, o in zip(rows, outcomes, strict=True)])


def test_a_judge_answers_once(tmp_path: Path) -> None:
    texts = [["aaa", "a"], ["aa", "aaa", "a"], ["x", "y"], ["b", "c"]]
    asked = [Item(f"{n:04x}", f"q{n}", some) for n, some in enumerate(texts)]
    judge = Shorter()
    with LabelFile(tmp_path / "labels.jsonl") as file:
        answer_by_judge(asked[:2], file, judge)
        answer_by_judge(asked, file, judge)
        with pytest.raises(ValueError, match="has a conversation"):
            answer_by_judge([Item("ffff", [{"role": "user", "content": "hi"}], ["a", "b"])], file, judge)
    labels = read_labels(tmp_path / "labels.jsonl")
    assert [label.ranks for label in labels] == [[2, 1], [2, 3, 1], None, [1, 1]]
    assert {label.annotator for label in labels} == {"shorter"}
    assert judge.asked == ["q0", "q1", "q1", "q1", "q2", "q3"]  # three pairs of three texts, and none twice


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rounds whose training is only noted down."""
    done: list[str] = []

    def train_rewards(env_id: str, config: RewardModelConfig, out: Path, env: Any) -> None:
        done.append(f"rewards of {len(config.dataset)}")

    def train_policy(env_id: str, config: RoundsConfig, folder: Path, env: Any, progress_bar: bool) -> dict[str, float]:
        done.append("policy")
        return {"gold": 0.5, "score": 1.0, "kl_sequence": 0.25, "completion_tokens": 7.0}

    monkeypatch.setattr(rounds, "train_rewards", train_rewards)
    monkeypatch.setattr(rounds, "train_policy", train_policy)
    monkeypatch.setattr(rounds, "policy_of", lambda out, number: None)
    monkeypatch.setattr(rounds, "reward_accuracy", lambda *given: 0.75)
    return done


def annotate(asked: Sequence[Item], file: Path, appeals: dict[str, list[float]]) -> None:
    assert set(appeals) == {item.id for item in asked}
    with LabelFile(file) as labels:
        answer_all(asked, labels, SURE, appeals)


def test_rounds_add_up_and_go_on(tmp_path: Path, short: list[str]) -> None:
    config, reward = RoundsConfig(rounds=1, labels=4), RewardModelConfig()
    run_rounds(ENV, config, reward, annotate, tmp_path, progress_bar=False)
    questions = (tmp_path / "round-1" / rounds.QUESTIONS).read_text()
    result = run_rounds(ENV, dataclasses.replace(config, rounds=2), reward, annotate, tmp_path, progress_bar=False)
    assert [one.labels for one in result.rounds] == [4, 8]
    assert short == ["rewards of 1", "policy", "rewards of 1", "policy", "rewards of 2", "policy"]
    assert (tmp_path / "round-1" / rounds.QUESTIONS).read_text() == questions
    assert (tmp_path / "round-2" / rounds.QUESTIONS).read_text() != questions
    record = json.loads((tmp_path / rounds.RECORD).read_text())
    assert [one["reward_accuracy"] for one in record["rounds"]] == [0.75, 0.75]
    with pytest.raises(ValueError, match="begun with another labels"):
        run_rounds(ENV, dataclasses.replace(config, labels=5), reward, annotate, tmp_path, progress_bar=False)


def test_settings_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["rlhf", ENV, "--select", "disagreement", *out]) == 2
    assert "needs an ensemble of reward models" in capsys.readouterr().err
    assert main(["rlhf", ENV, "--labels", "1", *out]) == 2
    assert "labels must be at least 2, got 1" in capsys.readouterr().err
    assert main(["rlhf", ENV, "--by", "endpoint", *out]) == 2
    assert "needs the name of its model" in capsys.readouterr().err
    assert main(["rlhf", ENV, "--reward-model.dataset", "x.jsonl", *out]) == 2
    assert "leave dataset=('x.jsonl',) out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_shows_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = {"completion": "<i>old</i>", "score": 0.0, "gold": 0.1}
    for number in (1, 2):
        run = tmp_path / f"round-{number}" / "policy" / "runs" / "grpo-0"
        run.mkdir(parents=True)
        row = {"prompt": "a & b", "completion": f"new {number}", "score": 1.0, "gold": 0.5, "start": start}
        (run / "episodes.jsonl").write_text(json.dumps(row) + "\n")
        (run / "evaluation.json").write_text("{}")
    metrics = {"gold": 0.5, "score": 1.0, "kl_sequence": 0.25}
    done = [Round(1, 200, 0.61, metrics), Round(2, 400, 0.66, metrics)]
    html = rounds_page.rounds_report(RoundsResult("X-v0", tmp_path, done)).read_text()
    assert "0.610" in html and "0.660" in html and "new 2" in html and "a &amp; b" in html
    assert "&lt;i&gt;old&lt;/i&gt;" in html and "initial policy" in html and 'href="round-2/policy/report.html"' in html


@pytest.mark.slow
def test_a_small_run_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = ["rlhf", ENV, "--rounds", "2", "--labels", "24", "--total-timesteps", "600", "--eval-episodes", "8"]
    args += ["--heldout-pairs", "8", "--set", "rollout_episodes=16", "group_size=4", "--select", "uncertainty"]
    args += ["--pool", "2", "--annotators.bias", "0", "--device", "cpu", "--out", str(out)]
    assert main(args) == 0
    record = json.loads((out / rounds.RECORD).read_text())
    assert [one["labels"] for one in record["rounds"]] == [24, 48]
    assert (out / "report.html").is_file() and (out / "round-2/policy/report.html").is_file()
    assert main(args) == 0  # nothing is left to do
    assert json.loads((out / rounds.RECORD).read_text()) == record
