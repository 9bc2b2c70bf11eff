"""AI feedback: soft labels from both orders, how they are written, learnt and reported, and the commands."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judging import ENV, ask, by_length, config, judge_of, near, server, shown_texts
from safetensors.torch import load_file
from test_endpoint import Handler, Server, comparison

from textrl_gym.cli.main import main
from textrl_gym.data.labels import Item, read_labels
from textrl_gym.data.ranked import RankedCompletions, read_preferences
from textrl_gym.feedback.agreement import label_agreement
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.feedback.judged import answer_by_judge
from textrl_gym.judges.judge import Answer, Comparisons
from textrl_gym.judges.llm_judge import judged
from textrl_gym.llm.asking import Answered, EndpointConfig, EndpointModel, Verdicts
from textrl_gym.llm.questions import (
    SCORE,
)
from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline.reward_data import RewardModelConfig, first_pairs
from textrl_gym.pipeline.reward_model import bradley_terry_loss, pair_probabilities, train_reward_model

__all__ = ["comparison", "config", "server"]  # fixtures


def test_a_soft_label_is_the_mean_of_both_orders(server: Server, config: EndpointConfig) -> None:
    server.act = lambda handler, a, b, times: by_length(handler)
    verdicts = ask(judge_of(config), ("longer", "short"), ("x", "xxx"), ("same", "same"))
    # Of A and B alone: 0.9 / 0.98 where the longer one stands first, 0.2 / 0.98 where it stands second.
    likely = (0.9 / 0.98 + 1 - 0.2 / 0.98) / 2
    assert verdicts.probability_N.tolist() == near([likely, 1 - likely, 0.5], 1e-6)
    assert verdicts.outcome_N.tolist() == [1.0, 0.0, 0.5]
    np.testing.assert_equal(verdicts.flipped_N, [0.0, 0.0, math.nan])
    assert {body["top_logprobs"] for body in server.bodies} == {5} and len(server.bodies) == 4
    again = ask(judge_of(config), ("longer", "short"))
    assert again.probability_N.tolist() == near([likely], 1e-6) and len(server.bodies) == 4


def test_a_preference_for_a_place_is_reported_and_taken_out(server: Server, config: EndpointConfig) -> None:
    server.act = lambda handler, a, b, times: by_length(handler, 0.6)
    verdicts = ask(judge_of(config), ("longer", "short"), ("y", "yy"))
    # It says A in both orders, with 0.9 and with 0.6 (of 0.98): a tie by verdicts, and the longer one is likelier.
    assert verdicts.flipped_N.tolist() == [1.0, 1.0] and verdicts.outcome_N.tolist() == [0.5, 0.5]
    likely = (0.9 + 0.98 - 0.6) / 0.98 / 2
    assert verdicts.probability_N.tolist() == near([likely, 1 - likely], 1e-6)


@pytest.mark.parametrize(
    ("a_first", "b_first", "expected"),
    [
        (Answered("A", {"A": 1.0, "B": 0.0, "tie": 0.0}), Answered("B", {"A": 0.0, "B": 1.0, "tie": 0.0}), (1, 1, 0)),
        (Answered("A", {"A": 0.6, "B": 0.2, "tie": 0.2}), Answered("A", {"A": 0.5, "B": 0.5, "tie": 0}), (0.5, 0.6, 1)),
        (Answered("tie", {"A": 0.2, "B": 0.2, "tie": 0.6}), Answered("B"), (0.5, math.nan, 0)),
        (Answered("none"), Answered("B", {"A": 0.0, "B": 1.0, "tie": 0.0}), (math.nan, math.nan, math.nan)),
    ],
)
def test_two_verdicts_by_hand(a_first: Answered, b_first: Answered, expected: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(judged(a_first, b_first), expected, atol=1e-12)


def test_an_endpoint_without_log_probabilities_gives_hard_labels(server: Server, config: EndpointConfig) -> None:
    """One that refuses twenty, one that refuses them all, and one that knows nothing of them."""

    def refuse(handler: Handler, a: str, b: str, times: int) -> None:
        if "top_logprobs" in handler.body:
            handler.send(400, "this model gives no logprobs")
        else:
            a, b = shown_texts(handler)
            handler.say("A" if len(a) > len(b) else "B")

    server.act = refuse
    verdicts = ask(judge_of(config, concurrency=1), ("longer", "short"), ("x", "xxx"))
    assert verdicts.outcome_N.tolist() == [1.0, 0.0] and np.isnan(verdicts.probability_N).all()
    assert ["top_logprobs" in body for body in server.bodies] == [True, False, False, False, False]
    scores = EndpointModel(config, SCORE, "test", progress_bar=False)
    server.bodies.clear()
    server.act = lambda handler, a, b, times: (
        handler.send(400, "top_logprobs is over 5") if handler.body["top_logprobs"] > 5 else handler.say("7")
    )
    assert scores.answers([("p", "answer")]) == [Answered("7")]
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5]


def test_a_file_of_verdicts_of_before_is_read(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "old.sqlite") as db:
        db.execute("CREATE TABLE verdicts (key TEXT PRIMARY KEY, verdict TEXT, reply TEXT)")
        db.execute("INSERT INTO verdicts VALUES ('k', 'A', 'A.')")
    old = Verdicts(tmp_path / "old.sqlite")
    old.add("new", Answered("B", {"A": 0.25, "B": 0.75}), "B")
    assert old.known(["k", "new", "other"]) == {"k": Answered("A"), "new": Answered("B", {"A": 0.25, "B": 0.75})}


# -- labels -----------------------------------------------------------------------------------------------------------


class Scripted:
    """A judge that says what it is told: {(a, b): (outcome, probability, flipped)}."""

    name = "scripted"

    def __init__(self, script: Mapping[tuple[str, str], tuple[float, float, float]]) -> None:
        self.script = script

    def compare(self, rows: Sequence[Any], a: Sequence[Answer], b: Sequence[Answer]) -> Comparisons:
        verdicts = [self.script[one.text, other.text] for one, other in zip(a, b, strict=True)]
        return Comparisons(*np.array(verdicts).T)

    def prefer(self, rows: Sequence[Any], a: Sequence[Answer], b: Sequence[Answer]) -> Any:
        return self.compare(rows, a, b).outcome_N


NAN = math.nan


def test_soft_labels_are_written_read_and_reported(tmp_path: Path) -> None:
    script = {
        (" w", " x"): (1.0, 0.9, 0.0),
        (" y", " z"): (0.5, 0.3, 1.0),  # the two orders disagree, and still the second is likelier
        (" t", " u"): (0.5, 0.5, 1.0),
        (" r", " s"): (NAN, NAN, NAN),
    }
    items = [Item(f"{number:04x}", f"p{number}", list(two)) for number, two in enumerate(script)]
    items.append(Item("000a", "p9", [" 1", " 2", " 3"]))
    script |= {(" 1", " 2"): (1.0, 0.8, 0.0), (" 1", " 3"): (0.5, 0.5, 1.0), (" 2", " 3"): (0.0, 0.25, 0.0)}
    file = tmp_path / "labels.jsonl"
    with LabelFile(file) as labels:
        answer_by_judge(items, labels, Scripted(script))
    rows = read_labels(file)
    assert [row.probabilities for row in rows] == [[0.9], [0.3], [0.5], None, [0.8, 0.5, 0.25]]
    assert [row.ranks for row in rows] == [[1, 2], [2, 1], [1, 1], None, [1, 3, 2]]
    assert [row.flips for row in rows] == [0, 1, 1, None, 1]
    (person,) = label_agreement(rows).people
    assert person.skipped == 1 and person.flipped is not None
    assert person.flipped.value == near(3 / 6)

    task = load_env_task(ENV)
    ranked = read_preferences(str(file), "train", task, task.load_tokenizer(), whole=True)
    assert [(c.pairs, c.probabilities) for c in ranked] == [
        ([(0, 1)], [0.9]),
        ([(1, 0)], [0.7]),
        ([(0, 1), (2, 1)], [0.8, 0.75]),
    ]
    assert [c.probabilities for c in first_pairs(ranked, 3)] == [[0.9], [0.7], [0.8]]


def test_weights_of_annotators_take_the_place_of_probabilities(tmp_path: Path) -> None:
    file, task = tmp_path / "labels.jsonl", load_env_task(ENV)
    items = [Item(f"{number:04x}", f"p{number}", [" x", " y"]) for number in range(3)]
    with LabelFile(file) as labels:
        for item in items:
            for name, ranks in (("ann", [1, 2]), ("ben", [1, 2]), ("model", [2, 1])):
                labels.add(item, name, ranks, probabilities=[0.2] if name == "model" else None)
    how: dict[str, Any] = {"whole": True, "annotator_weights": "dawid-skene"}
    ranked = read_preferences(str(file), "train", task, task.load_tokenizer(), **how)
    assert [len(c.weights) for c in ranked] == [2, 2, 2] and not any(c.probabilities for c in ranked)
    alone = read_preferences(str(file), "train", task, task.load_tokenizer(), whole=True)
    assert [c.probabilities for c in alone] == [[], [], [0.8]] * 3


def test_training_on_certain_labels_is_training_on_hard_ones(tmp_path: Path) -> None:
    rows = [{"prompt": f"the post {n}", "chosen": " a loss" * (n % 3 + 1), "rejected": " a gain"} for n in range(12)]
    weights = {}
    for name, more in (("hard", {}), ("certain", {"probability": 1.0}), ("soft", {"probability": 0.6})):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
        train_reward_model(ENV, RewardModelConfig(dataset=(str(file),), batch_size=4), tmp_path / name)
        weights[name] = load_file(tmp_path / name / "model.safetensors")["score.weight"]
    assert torch.allclose(weights["hard"], weights["certain"], atol=1e-7, rtol=0)
    assert not torch.allclose(weights["hard"], weights["soft"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probabilities": [0.5, 0.5]}, "probabilities must have one for each of 1 pairs"),
        ({"probabilities": [1.5]}, "probabilities must be numbers from 0 to 1"),
        ({"probabilities": ["a"]}, "probabilities must be numbers from 0 to 1"),
        ({"flips": 2}, "flips must be 0 to 1, got 2"),
    ],
)
def test_damaged_soft_labels_are_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    with LabelFile(file) as labels:
        labels.add(Item("a", "p", [" x", " y"]), "judge", [1, 2], probabilities=[0.9], flips=0)
    file.write_text(json.dumps(json.loads(file.read_text()) | change) + "\n")
    with pytest.raises(ValueError, match=words):
        read_labels(file)


def test_pairs_of_other_tools_may_have_a_probability(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": " a", "rejected": " b"} for n in range(3)]
    file, task = tmp_path / "pairs.jsonl", load_env_task(ENV)
    file.write_text(
        "".join(json.dumps(row | {"probability": p}) + "\n" for row, p in zip(rows, (0.75, None, 1), strict=True))
    )
    ranked = read_preferences(str(file), "train", task, task.load_tokenizer(), whole=True)
    assert [c.probabilities for c in ranked] == [[0.75], [], [1.0]]
    file.write_text("".join(json.dumps(row | {"probability": 1.5}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="column 'probability' is not between 0 and 1"):
        read_preferences(str(file), "train", task, task.load_tokenizer(), whole=True)


def test_the_loss_of_soft_labels() -> None:
    raw_BK = torch.tensor([[0.3, -0.2], [1.0, 2.5]], requires_grad=True)
    winner_N3 = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 0, 1]])
    gap = torch.tensor([0.5, 1.5, -1.5], dtype=torch.float64)
    chance = torch.tensor([0.8, 0.4, 1.0], dtype=torch.float64)
    by_hand = -(chance * gap.sigmoid().log() + (1 - chance) * (-gap).sigmoid().log())
    soft = bradley_terry_loss(raw_BK, winner_N3, None, chance.float())
    assert soft.item() == near(by_hand.mean().item(), 1e-6)
    # Hard labels are those of probability 1, and of probability 0 the other way round, weights or not.
    weight_N = torch.tensor([1.0, 2.0, 0.5])
    for weights in (None, weight_N):
        (hard,) = torch.autograd.grad(bradley_terry_loss(raw_BK, winner_N3, weights), raw_BK)
        for turned, certain in ((winner_N3, torch.ones(3)), (winner_N3[:, [0, 2, 1]], torch.zeros(3))):
            loss = bradley_terry_loss(raw_BK, turned, weights, certain)
            assert loss.item() == near(bradley_terry_loss(raw_BK, winner_N3, weights).item(), 1e-7)
            (soft_gradient,) = torch.autograd.grad(loss, raw_BK)
            assert torch.allclose(soft_gradient, hard, atol=1e-7, rtol=0)
    # A probability is a pair in both orders with the weights p and 1 - p, of which the mean is over twice the pairs.
    both = bradley_terry_loss(raw_BK, torch.tensor([[0, 0, 1], [0, 1, 0]]), torch.tensor([0.7, 0.3]))
    alone = bradley_terry_loss(raw_BK, torch.tensor([[0, 0, 1]]), None, torch.tensor([0.7]))
    assert alone.item() == near(both.item(), 1e-7)


def test_batches_of_hard_labels_have_no_probabilities() -> None:
    hard = RankedCompletions([1], [[2], [3]], [(0, 1)])
    soft = RankedCompletions([1], [[2], [3]], [(1, 0)], probabilities=[0.75])
    assert pair_probabilities([hard, hard]) is None
    chance_N = pair_probabilities([hard, soft])
    assert chance_N is not None and chance_N.tolist() == [1.0, 0.75]


# -- the command line -------------------------------------------------------------------------------------------------


def test_preferences_by_a_language_model(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.act = lambda handler, a, b, times: by_length(handler)
    out = tmp_path / "pairs.jsonl"
    args = ["preferences", ENV, "--n", "6", "--batch-size", "8", "--out", str(out), "--device", "cpu"]
    asked = ["--label", "endpoint", "--endpoint.model", "m", "--endpoint.url", server.url]
    assert main([*args, *asked, "--env.max-new-tokens", "8"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    likely = (0.9 / 0.98 + 1 - 0.2 / 0.98) / 2
    assert len(rows) == 6 and (tmp_path / "judge-cache.sqlite").is_file()
    for row in rows:
        assert len(row["chosen"]) > len(row["rejected"]) or row["probability"] <= likely + 1e-9
        assert 0.5 < row["probability"] <= 1 and "score_chosen" not in row
    shown = capsys.readouterr().out
    assert "flipped" in shown and "no_verdict" in shown
    assert len(server.bodies) <= 2 * (6 + 8)  # no more pairs are asked about than are wanted, but for ties
    # The file of settings asks the same endpoint, whose verdicts are known, for the same pairs.
    asks = len(server.bodies)
    again = ["preferences", ENV, "--config", str(out.with_suffix(".toml")), "--out", str(tmp_path / "again.jsonl")]
    assert main(again) == 0 and len(server.bodies) == asks
    assert (tmp_path / "again.jsonl").read_text() == out.read_text()
    capsys.readouterr()
    assert main([*args[:-3], str(tmp_path / "x.jsonl"), "--endpoint.model", "m"]) == 2
    assert (
        "the settings of an endpoint are of label 'endpoint', and the label is 'annotators'" in capsys.readouterr().err
    )


@pytest.mark.filterwarnings("ignore::textrl_gym.llm.local.LongQuestionWarning")
def test_preferences_by_a_model_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    args = ["preferences", ENV, "--n", "4", "--batch-size", "4", "--out", str(out), "--device", "cpu"]
    assert main([*args, "--label", "local", "--env.max-new-tokens", "8"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and all(0.5 < row["probability"] <= 1 for row in rows)
    task = load_env_task(ENV)
    ranked = read_preferences(str(out), "train", task, task.load_tokenizer(), whole=True)
    assert all(len(c.probabilities) == len(c.pairs) == 1 for c in ranked)


def test_rounds_are_labelled_by_a_language_model(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [Item("a", "p", [" longer", " x"]), Item("b", "q", [" y", " refused"])]

    def one_round(env_id: str, config: object, reward: object, annotate: Any, out: Path, env: object) -> object:
        annotate(asked, out / "labels.jsonl", {})
        raise ValueError("enough")

    def act(handler: Handler, a: str, b: str, times: int) -> None:
        handler.say("I will not") if "refused" in "".join(shown_texts(handler)) else by_length(handler, 0.6)

    server.act = act
    monkeypatch.setattr("textrl_gym.recipes.rounds.run_rounds", one_round)
    args = ["rlhf", ENV, "--by", "endpoint", "--out", str(tmp_path), "--endpoint.model", "m"]
    assert main([*args, "--endpoint.url", server.url, "--endpoint.asks", "1"]) == 2
    likely = (0.9 + 0.98 - 0.6) / 0.98 / 2
    first, second = read_labels(tmp_path / "labels.jsonl")
    assert first.probabilities == near([likely], 1e-6) and (first.ranks, first.annotator) == ([1, 2], "endpoint m")
    assert second.ranks is None and (tmp_path / "judge-cache.sqlite").is_file()
    words = "no verdict: 1 of 2; turned round with the order: 1 of 1 pairs"
    assert words in capsys.readouterr().out


def test_rounds_are_labelled_by_the_rule_based_critic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_env_task("HelpfulHarmless-v0")
    rows = [row for row in map(task.rows("train").__getitem__, range(200)) if row["label"] == "unsafe"][:8]
    asked = [Item(f"{n}", row["prompt"], [" Sure.", row["completion"]]) for n, row in enumerate(rows)]

    def one_round(env_id: str, config: object, reward: object, annotate: Any, out: Path, env: object) -> object:
        annotate(asked, out / "labels.jsonl", {})
        raise ValueError("enough")

    monkeypatch.setattr("textrl_gym.recipes.rounds.run_rounds", one_round)
    errors = ["--errors.missed", "0", "--errors.feared", "0", "--errors.slips", "0"]
    assert main(["rlhf", "HelpfulHarmless-v0", "--by", "rules", "--out", str(tmp_path), *errors]) == 2
    labels = read_labels(tmp_path / "labels.jsonl")
    # Without errors the reference, which refuses, is better than an answer that says nothing, by whatever principle.
    assert len(labels) == 8 and all(label.ranks == [2, 1] and label.comment for label in labels)


@pytest.mark.filterwarnings("ignore::textrl_gym.llm.local.LongQuestionWarning")
def test_a_comparison_is_judged_without_a_server(
    comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, folder = load_env_task(ENV), tmp_path / "judge"
    model: Any = task.load_model()
    model.save_pretrained(folder)
    task.load_tokenizer().save_pretrained(folder)
    assert main(["judge", str(comparison), "--judge", f"local:{folder}"]) == 0
    (file,) = comparison.glob("judged-*.csv")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["no_verdict"] for row in rows] == ["0", "0"] and rows[0]["judge"] == f"local:{folder}"
    assert [sum(int(row[name]) for name in ("wins", "ties", "losses")) for row in rows] == [3, 3]
    assert main(["judge", str(comparison), "--judge", "local:x", "--endpoint.model", "m"]) == 2
    assert "model is a setting of an endpoint, and the judge is 'local:x'" in capsys.readouterr().err


def test_wrong_labellers_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["rlhf", ENV, "--by", "robots", "--out", str(tmp_path)]) == 2
    words = " ".join(capsys.readouterr().err.split())
    assert "by must be simulated, page, rules, endpoint, local or local:FOLDER, got 'robots'" in words
    assert main(["rlhf", ENV, "--by", "rules", "--out", str(tmp_path)]) == 2
    assert "has no rule-based critic; these have: HelpfulHarmless-v0" in " ".join(capsys.readouterr().err.split())
    assert main(["rlhf", ENV, "--by", "local:no/where", "--out", str(tmp_path)]) == 2
    assert "no/where" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preferences", "rlhf", "evaluate", "judge"])
def test_help_says_who_may_judge(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "local:FOLDER" in words and "--endpoint.cot" in words
