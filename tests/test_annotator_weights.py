"""Weighted reward models: one careless annotator of three, simulated, in a world of letters that each have a value."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import textrl_gym
from textrl_gym.data.labels import Label
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.envs.copy_text import CopyText
from textrl_gym.models import tiny
from textrl_gym.pipeline import reward_model
from textrl_gym.pipeline.reward_data import RewardModelConfig, first_pairs
from textrl_gym.stats.estimates import difference_of_means

LETTERS = string.ascii_lowercase[:20]


class Letters(CopyText):
    """Prompts of two letters, completions of four."""

    max_prompt_tokens = 2
    max_new_tokens = 6

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        return tiny.symbol_tokenizer(LETTERS)

    def load_model(self, name: str | None = None, **settings: Any) -> torch.nn.Module:
        return tiny.gpt2(len(LETTERS) + 1, 8)


@pytest.fixture
def letters() -> Iterator[str]:
    textrl_gym.register("Letters-v0", "test_annotator_weights:Letters")
    yield "Letters-v0"
    del gymnasium.registry["Letters-v0"]


def comparisons(rng: np.random.Generator, count: int, value: np.ndarray) -> Iterator[tuple[str, list[str], int]]:
    """Prompt, two completions, and the place of the one whose letters are worth more."""
    for _ in range(count):
        drawn = [rng.choice(len(LETTERS), 4, replace=False) for _ in range(2)]
        prompt = " ".join(LETTERS[k] for k in rng.choice(len(LETTERS), 2))
        worth = [value[places].sum() for places in drawn]
        yield prompt, [" ".join(LETTERS[k] for k in places) for places in drawn], int(worth[1] > worth[0])


def accuracies(env_id: str, folder: Path, accuracy: list[float], items: int, seed: int) -> dict[str, float]:
    """Accuracy on clean held-out comparisons after as many updates of the same size, by annotator_weights."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=len(LETTERS))
    folder.mkdir()
    clean = [
        {"prompt": prompt, "chosen": texts[best], "rejected": texts[1 - best]}
        for prompt, texts, best in comparisons(rng, 500, value)
    ]
    rows: list[dict[str, Any]] = []
    for item, (prompt, texts, best) in enumerate(comparisons(rng, items, value)):
        for person, chance in enumerate(accuracy):
            wins = best if rng.random() < chance else 1 - best
            ranks = [1, 2] if wins == 0 else [2, 1]
            rows.append(dataclasses.asdict(Label(len(rows) + 1, str(item), "pair", f"{person}", prompt, texts, ranks)))
    for name, some in (("clean", clean), ("labels", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    measured = {}
    for weights in ("none", "dawid-skene"):
        config = RewardModelConfig(
            dataset=(str(folder / "labels.jsonl"),), eval_dataset=(str(folder / "clean.jsonl"),), eval_prompts=1000,
            annotator_weights=weights, seed=seed, epochs=1 if weights == "none" else len(accuracy), batch_size=24,
            learning_rate=3e-3, warmup_steps=5,
        )  # fmt: skip
        record = reward_model.train_reward_model(env_id, config, folder / weights)
        measured[weights] = next(row["accuracy"] for row in record["accuracy"] if row["data"].endswith("clean.jsonl"))
    return measured


@pytest.mark.slow
def test_weights_are_worth_it_where_one_annotator_is_careless(letters: str, tmp_path: Path) -> None:
    """Two of three are right in 90% of 800 comparisons, the third tosses a coin."""
    seeds = [accuracies(letters, tmp_path / f"{seed}", [0.9, 0.9, 0.5], 800, seed) for seed in range(8)]
    effect = difference_of_means([one["dawid-skene"] - one["none"] for one in seeds], 0.0)
    assert effect.low > 0, (effect, seeds)


def raw(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def test_a_pair_in_both_orders_is_a_soft_label() -> None:
    """-p log s(d) - (1 - p) log s(-d) with d = 1, p = 0.75: 0.75 * 0.3133 + 0.25 * 1.3133 = 0.5633."""
    pairs = torch.tensor([[0, 0, 1], [0, 1, 0]])
    loss = reward_model.bradley_terry_loss(raw([2.0, 1.0]), pairs, torch.tensor([0.75, 0.25]))
    assert float(loss) == pytest.approx(0.5632617, rel=0, abs=1e-6)
    equal = reward_model.bradley_terry_loss(raw([2.0, 1.0]), pairs, torch.tensor([1.0, 1.0]))
    assert float(equal) == pytest.approx(
        float(reward_model.bradley_terry_loss(raw([2.0, 1.0]), pairs)), rel=0, abs=1e-7
    )


def test_weights_of_a_batch() -> None:
    plain = RankedCompletions([1], [[2], [3]], [(0, 1)])
    soft = RankedCompletions([1], [[2], [3]], [(0, 1), (1, 0)], weights=[0.75, 0.25])
    assert reward_model.pair_weights([plain]) is None
    weights = reward_model.pair_weights([plain, soft])
    assert weights is not None and weights.tolist() == [1.0, 0.75, 0.25]
    assert reward_model.total_weight([plain, soft]) == 2.0
    assert first_pairs([soft], 1)[0].weights == [0.75]
    with pytest.raises(ValueError, match="annotator_weights='dawid-skene' is for labels"):
        RewardModelConfig(annotator_weights="dawid-skene")
