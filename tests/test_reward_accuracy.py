"""The accuracy of existing reward models: by data set and subset, ties, intervals, prompts that were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from textrl_gym.cli import main
from textrl_gym.evaluation import reward_accuracy
from textrl_gym.evaluation.reward_accuracy import RewardAccuracyConfig
from textrl_gym.models import loading, tiny
from textrl_gym.pipeline import reward_model
from textrl_gym.rewards.reward_model import RewardModel

SYMBOLS = ("a", "b", "c", "d")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def pair(prompt: str, chosen: str, rejected: str, **columns: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    """A reward model that scores a text by its last symbol but the EOS: a reward of its own for each."""
    model: Any = reward_model.new_reward_model(tiny.gpt2(len(SYMBOLS) + 1, 16), seed=0)
    folder = tmp_path / "reward"
    RewardModel(model, tiny.symbol_tokenizer(SYMBOLS), bias=0.5, scale=2.0).save(folder)
    return folder


@torch.no_grad()
def scores(folder: Path, prompt: str, *texts: str) -> list[float]:
    """Of each text, by the plain forward pass over prompt, text and EOS."""
    model: Any = loading.load_classifier(folder)
    tokenizer = loading.load_tokenizer(folder)
    found = []
    for text in texts:
        ids = tokenizer(f"{prompt} {text}")["input_ids"] + [tokenizer.eos_token_id]
        hidden = model.base_model(input_ids=torch.tensor([ids]))[0][0, -1]
        found.append(float(model.score(hidden)))
    return found


def test_accuracies_are_those_of_the_plain_forward(reward: Path, tmp_path: Path) -> None:
    texts = ["a", "b", "c d", "d", "b c"]
    rows = [
        pair("a b", chosen, rejected, subset="ab"[number % 2])
        for number, (chosen, rejected) in enumerate((x, y) for x in texts for y in texts if x < y)
    ]
    path = write(tmp_path / "bench.jsonl", rows)
    record = reward_accuracy.reward_accuracy(RewardAccuracyConfig(evaluate=str(reward), dataset=(path,)))
    of_text = dict(zip(texts, scores(reward, "a b", *texts), strict=True))
    right = [of_text[row["chosen"]] > of_text[row["rejected"]] for row in rows]
    assert 0 < sum(right) < len(right)
    by_name = {row["data"]: row for row in record["accuracy"]}
    assert list(by_name) == [f"{path} / a", f"{path} / b", "all"]
    assert by_name["all"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert by_name[f"{path} / a"]["accuracy"] == pytest.approx(sum(right[::2]) / len(right[::2]))
    assert by_name["all"]["pairs"] == 10
    assert by_name["all"]["low"] < by_name["all"]["accuracy"] < by_name["all"]["high"]
    assert record["measured"]["accuracy"] == by_name["all"]["accuracy"]
    assert "trained on" not in by_name["all"]


def test_ties_count_half_and_are_told() -> None:
    # 2 right, 1 wrong, 1 tie: (2 + 1/2) / 4
    row = reward_accuracy.accuracy_row("x", [(1.0, True), (2.0, False), (-1.0, False), (0.0, True)], knows=True)
    assert (row["accuracy"], row["ties"], row["trained on"]) == (0.625, 1, 0.5)


def test_prompts_that_it_was_trained_on(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = [pair(prompt, "a", "b") for prompt in ("a a", "b b", "c c", "d d", "a b", "a c", "a d", "b c")]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", trained)
    write(folder / "validation.jsonl", trained[:1])
    (reward / "reward_training.json").write_text(json.dumps({"config": {"dataset": [str(folder)]}}))
    path = write(tmp_path / "bench.jsonl", [pair("a  a", "a", "b"), pair("d a", "a", "b"), pair("d b", "a", "b")])
    out = tmp_path / "numbers.json"
    args = ["reward-model", "--evaluate", str(reward), "--dataset", path, "--device", "cpu", "--json", str(out)]
    assert main.main(args) == 0
    # Blanks are no difference: one of three prompts.
    assert json.loads(out.read_text())["measured"]["trained on"] == pytest.approx(1 / 3)
    assert "Accuracy of" in capsys.readouterr().out
    (reward / "reward_training.json").unlink()
    assert main.main(args) == 0
    assert "what it was trained on is not known" in capsys.readouterr().out
    assert main.main([*args, "--trained-on", str(folder)]) == 0
    assert json.loads(out.read_text())["measured"]["trained on"] == pytest.approx(1 / 3)


def test_an_encoder_of_another_project(tmp_path: Path) -> None:
    tokenizer = tiny.symbol_tokenizer(SYMBOLS)
    tokenizer.eos_token = None  # as BERT's has none
    make: Any = BertConfig
    config = make(
        vocab_size=len(SYMBOLS) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    path = write(tmp_path / "bench.jsonl", [pair("a b", x, y) for x in SYMBOLS for y in SYMBOLS if x < y])
    record = reward_accuracy.reward_accuracy(RewardAccuracyConfig(evaluate=str(tmp_path / "bert"), dataset=(path,)))
    assert record["measured"]["pairs"] == 6
    with pytest.raises(ValueError, match="dataset must name preferences"):
        RewardAccuracyConfig(evaluate=str(tmp_path))
