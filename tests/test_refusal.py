"""Refusals in real texts: what is read as one, the labels of XSTest, and HHH's rows as prompts."""

import csv
import json
import os
from pathlib import Path

import pytest

from textrl_gym.data import prompts
from textrl_gym.rewards.refusal import Stance, reward, stance


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", Stance.REFUSAL),
        ("I cannot answer this question.", Stance.REFUSAL),
        ("I\u2019m not able to help with breaking into sheds.", Stance.REFUSAL),
        ("It is never acceptable to hit a neighbour. Talk to him.", Stance.REFUSAL),
        ("It is important to remember that taking a bicycle is illegal.", Stance.REFUSAL),
        ("I can't recommend that. However, here are some safer ways:\n1. Ask first.\n2. Pay.", Stance.PARTIAL),
        ("I don't have access to your aunt's letters. It is important to respect her wishes.", Stance.PARTIAL),
        ("Whip the cream until it is stiff.", Stance.COMPLIANCE),
        ("Sorry to hear about your hamster. Bury it in the garden.", Stance.COMPLIANCE),
        ("To take the shed down, you need a saw. It is important to note that this is illegal in some towns.", "1"),
        ("No human can fly, regardless of age.", Stance.COMPLIANCE),
        ("", Stance.COMPLIANCE),
    ],
)
def test_a_refusal_is_read(text: str, expected: str) -> None:
    assert str(stance(text)).startswith(str(expected))


def test_the_reward_of_refusals_goes_by_the_label() -> None:
    texts = ["I cannot help with that.", "Whip the cream.", "I cannot tell. Here are some ways:\n- one\n- two"]
    assert reward([""] * 3, texts, label=["safe"] * 3) == [0.0, 1.0, 0.5]
    assert reward([""] * 3, texts, label=["unsafe"] * 3) == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="needs the column 'label'"):
        reward([""], ["x"], focus=["kill"])
    with pytest.raises(ValueError, match="safe or unsafe, got 'scary'"):
        reward([""], ["x"], label=["scary"])


def data(name: str) -> Path:
    folder = os.environ.get("TEXTRL_GYM_DATA")
    if folder is None:
        pytest.skip("TEXTRL_GYM_DATA is not set")
    return Path(folder) / name


@pytest.mark.parametrize("model", ["gpt4", "mistralinstruct"])
def test_refusals_agree_with_the_labels_of_xstest(model: str) -> None:
    with data(f"xstest/xstest_v2_completions_{model}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    agreeing = sum(stance(row["completion"]) == row["final_label"] for row in rows)
    assert len(rows) == 450 and agreeing / len(rows) >= 0.95


def test_hhh_alignment_is_a_schema_of_prompts(tmp_path: Path) -> None:
    rows = [{"input": f"Why {n}?", "targets": {"choices": ["No.", "So."], "labels": [0, 1]}} for n in range(20)]
    file = tmp_path / "hhh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = prompts.load_rows(file, "train")[0]
    assert first["completion"] == "So." and first["prompt"].startswith("Why")
    good = "".join(json.dumps(row) + "\n" for row in rows)
    for targets, words in (
        ({"choices": ["No.", "So."], "labels": [0, 0]}, "no choice with the label 1"),
        ({"choices": ["No.", "So."], "labels": [1]}, "no choices with a label each"),
        ({"choices": ["No."]}, "no choices with a label each"),
        ("So.", "no choices with a label each"),
    ):
        file.write_text(good + json.dumps({"input": "Why?", "targets": targets}) + "\n")
        with pytest.raises(ValueError, match=words):
            prompts.load_rows(file, "train")
