"""Preferences: which of several completions of a prompt are better, by simulated annotators or from a user's file."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textrl_gym import prompts, sampler
from textrl_gym.core import Row
from textrl_gym.packing import pad
from textrl_gym.policy import Policy
from textrl_gym.rewards import load_reward
from textrl_gym.tasks import Task

PAIRS = prompts.Schema(
    "trl-lib preference data",
    ("prompt", "chosen", "rejected"),
    lambda row: {"prompt": row["prompt"], "completion": row["chosen"], "rejected": row["rejected"]},
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """K completions of one prompt, and which of them were preferred to which."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    """With their EOS, unless they were cut off."""
    pairs: list[tuple[int, int]]
    """(chosen, rejected), as places in completion_ids."""
    gold: list[float] = dataclasses.field(default_factory=list)
    """The judge's scores of the completions, where there is a judge; for measuring only."""
    sampled: int = 0
    """The first so many completions are the model's own samples."""


def sample_texts(
    policy: Policy, task: Task, tokenizer: Any, rows: Sequence[Row], temperatures: Sequence[float], seed: int
) -> list[list[list[int]]]:
    """Completions of each row's prompt, one at each temperature (0: greedy), as token ids with their EOS."""
    prompt_BP, prompt_mask_BP = pad([task.encode(row, tokenizer, task.max_prompt_tokens) for row in rows], "left")
    generator = torch.Generator().manual_seed(seed)
    found: list[list[list[int]]] = [[] for _ in rows]
    for temperature in temperatures:
        policy.temperature = temperature or 1.0
        uniform_BT = torch.rand(len(rows), task.max_new_tokens, generator=generator) if temperature else None
        done = sampler.generate(
            policy,
            prompt_BP.to(policy.device),
            prompt_mask_BP.to(policy.device),
            torch.arange(len(rows), device=policy.device),
            uniform_BT if uniform_BT is None else uniform_BT.to(policy.device),
            max_new_tokens=task.max_new_tokens,
            eos_id=tokenizer.eos_token_id,
        )
        for ids, token_T, mask_T in zip(found, done.token_BT, done.mask_BT, strict=True):
            ids.append(token_T[mask_T].tolist())
    return found


class Comparer:
    """Simulated comparisons of the task's rows: annotators judge samples of the policy and the task's candidates."""

    def __init__(self, task: Any, policy: Policy, tokenizer: Any, config: Any) -> None:
        """Raises ValueError where the task has no judge or no candidates to compare."""
        if task.judge is None or not hasattr(task, "candidates"):
            raise ValueError(
                f"{type(task).__name__} has no judge with candidates(row, rng, n), so there is nothing for simulated "
                "annotators to compare: give pairs with dataset= (columns prompt, chosen, rejected)"
            )
        self.task, self.policy, self.tokenizer, self.config = task, policy, tokenizer, config
        self.judge = load_reward(task.judge, task=task, tokenizer=tokenizer)

    def compare(self, rows: Sequence[Row], seed: int, temperatures: Sequence[float] | None = None) -> list[Comparison]:
        """All pairs among the completions of each row. Equal texts are compared once."""
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        if temperatures is None:
            warm = [rng.uniform(0.6, 1.2) for _ in range(self.config.samples - 1)]
            temperatures = [0.0, *warm][: self.config.samples]
        sampled = sample_texts(self.policy, self.task, self.tokenizer, rows, temperatures, seed)
        made = []
        for row, own in zip(rows, sampled, strict=True):
            prompt_ids = self.task.encode(row, self.tokenizer, self.task.max_prompt_tokens)
            texts = self.task.candidates(row, rng, self.config.candidates)
            given = [self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id] for text in texts]
            ids = [list(key) for key in dict.fromkeys(tuple(i[: self.task.max_new_tokens]) for i in own + given)]
            distinct = len({tuple(i) for i in own})
            made.append((row, prompt_ids, ids, distinct))
        texts_of = [[self.tokenizer.decode(i, skip_special_tokens=True) for i in ids] for _, _, ids, _ in made]
        gold = iter(self._gold([row for row, *_ in made], texts_of))
        found = []
        for (_, prompt_ids, ids, distinct), texts in zip(made, texts_of, strict=True):
            score = np.array([next(gold) for _ in texts])
            words = np.array([len(text.split()) for text in texts])
            first, second = np.array(list(itertools.combinations(range(len(ids)), 2)), dtype=int).reshape(-1, 2).T
            wins = self.config.annotators.prefer(score[first], score[second], words[first], words[second], draw)
            pairs = [(int(a), int(b)) if w else (int(b), int(a)) for a, b, w in zip(first, second, wins, strict=True)]
            found.append(Comparison(prompt_ids, ids, pairs, score.tolist(), distinct))
        return found

    def _gold(self, rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> list[float]:
        spread = [row for row, some in zip(rows, texts, strict=True) for _ in some]
        flat = [text for some in texts for text in some]
        columns = {name: [row[name] for row in spread] for name in rows[0] if name != "prompt"}
        return self.judge([row["prompt"] for row in spread], flat, **columns).tolist()

    def stream(self, split: str, count: int, seed: int, chunk: int = 64) -> Iterator[Comparison]:
        """Comparisons of `count` rows of a split."""
        source = self.task.rows(split)
        order = random.Random(seed).sample(range(len(source)), min(count, len(source)))
        for start in range(0, len(order), chunk):
            yield from self.compare([source[i] for i in order[start : start + chunk]], seed + start + 1)


def read_pairs(dataset: str, split: str, task: Task, tokenizer: Any) -> list[Comparison]:
    """A user's preferences. A single file has no splits: its last tenth is held out.

    Raises:
        ValueError: the columns are not prompt, chosen and rejected; it names those found.
    """
    rows = prompts.load_rows(dataset, split, (PAIRS,))
    if Path(dataset).expanduser().is_file():
        kept = max(1, len(rows) // 10)
        rows = rows[:-kept] if split == "train" else rows[-kept:]
    if not rows:
        raise ValueError(f"dataset {dataset!r} has too few pairs: at least 2 are needed, one of them held out")
    found = []
    for row in rows:
        texts = [row["chosen"], row["rejected"]]
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
        prompt_ids = task.encode(row, tokenizer, task.max_prompt_tokens)
        found.append(Comparison(prompt_ids, [i[: task.max_new_tokens] for i in ids], [(0, 1)]))
    return found
