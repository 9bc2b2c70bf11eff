"""Rebuild the bundled files of TLDRSummarize-v0: `python -m textrl_gym.build_assets` (about 20 minutes on one core).

They are made in four steps, each with the function that the command line has for users: the start policy and its
tokenizer (`textrl-gym sft`), what it can do (gold of its samples, greedy, best of 8), the reward model (`textrl-gym
reward-model`), and the weights as float16, which halves the package. The same seed gives the same files on the same
machine with the same number of threads; elsewhere sums are rounded differently and the measurements differ a little.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from textrl_gym import models
from textrl_gym.comparisons import sample_texts
from textrl_gym.envs import tldr_summarize
from textrl_gym.policy import Policy
from textrl_gym.reward_training import RewardModelConfig, train_reward_model
from textrl_gym.rewards import load_reward
from textrl_gym.sft import SFTConfig, sft


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Settings of the rebuild."""

    out: Path = Path(tldr_summarize.ASSETS)
    """The folder to write policy/ and reward_model/ to."""
    seed: int = 0
    """Seeds everything."""


def start_quality(folder: Path, posts: int = 128, seed: int = 0) -> dict[str, float]:
    """Gold of the start policy on held-out posts: of samples at temperature 1, greedy, and the best of 8 samples."""
    task = tldr_summarize.TLDRSummarize()
    tokenizer = task.load_tokenizer(str(folder))
    source = task.rows("validation")
    rows = [source[i] for i in range(posts)]
    ids = sample_texts(Policy(task.load_model(str(folder))), task, tokenizer, rows, [0.0] + [1.0] * 8, seed)
    judge = load_reward(task.judge, task=task, tokenizer=tokenizer)
    gold_9: list[list[float]] = []
    for place in range(9):
        texts = [tokenizer.decode(some[place], skip_special_tokens=True) for some in ids]
        gold_9.append(judge([row["prompt"] for row in rows], texts, facts=[row["facts"] for row in rows]).tolist())
    best = [max(eight) for eight in zip(*gold_9[1:], strict=True)]
    return {
        "greedy_gold": sum(gold_9[0]) / posts,
        "sampled_gold": sum(map(sum, gold_9[1:])) / (8 * posts),
        "best_of_8_gold": sum(best) / posts,
    }


def halve(folder: Path) -> None:
    """Store a model's weights as float16; `textrl_gym.models` loads them as float32."""
    load: Any = models.load_classifier if (folder / "reward_model.json").is_file() else models.load_model
    load(folder).half().save_pretrained(folder)


def build(config: BuildConfig) -> dict[str, Any]:
    """Make both folders; what was measured."""
    policy, reward_model = config.out / "policy", config.out / "reward_model"
    started = sft(tldr_summarize.ID, SFTConfig(seed=config.seed), policy)
    halve(policy)
    quality = start_quality(policy)
    record = {**started, "measured": started["measured"] | quality}
    (policy / "sft.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["measured"], indent=2))
    trained = train_reward_model(
        tldr_summarize.ID, RewardModelConfig(model=str(policy), seed=config.seed), reward_model
    )
    halve(reward_model)
    print(json.dumps(trained["measured"], indent=2))
    return {"policy": record, "reward_model": trained}


if __name__ == "__main__":
    build(tyro.cli(BuildConfig))
