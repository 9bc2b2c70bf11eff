"""Preferences: which of several completions of a prompt are better, by simulated annotators or from a user's file."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from textrl_gym.core import Row
from textrl_gym.data import preferences, prompts
from textrl_gym.functional import pad
from textrl_gym.mdp.task import Task
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import load_reward
from textrl_gym.rollouts import sampler


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
    policy: Policy, task: Task, tokenizer: Any, rows: Sequence[Row], number: int, temperature: float, seed: int
) -> list[list[list[int]]]:
    """`number` completions of each row's prompt as token ids with their EOS; temperature 0 is greedy decoding."""
    prompt_BP, prompt_mask_BP = pad([task.encode(row, tokenizer, task.max_prompt_tokens) for row in rows], "left")
    generator = torch.Generator().manual_seed(seed)
    uniform_BT = torch.rand(len(rows) * number, task.max_new_tokens, generator=generator).to(policy.device)
    trained_at, policy.temperature = policy.temperature, temperature or 1.0
    done = sampler.generate(
        policy,
        prompt_BP.to(policy.device),
        prompt_mask_BP.to(policy.device),
        torch.arange(len(rows), device=policy.device).repeat_interleave(number),
        uniform_BT if temperature else None,
        max_new_tokens=task.max_new_tokens,
        eos_id=tokenizer.eos_token_id,
    )
    policy.temperature = trained_at
    ids = [token_T[mask_T].tolist() for token_T, mask_T in zip(done.token_BT, done.mask_BT, strict=True)]
    return [ids[start : start + number] for start in range(0, len(ids), number)]


class Comparer:
    """Simulated comparisons of the task's rows: annotators judge samples of policies and the task's candidates."""

    def __init__(self, task: Any, policies: Sequence[Policy], tokenizer: Any, config: Any) -> None:
        """Raises ValueError where the task has no judge or no candidates to compare."""
        if task.judge is None or not hasattr(task, "candidates"):
            raise ValueError(
                f"{type(task).__name__} has no judge with candidates(row, rng, n), so there is nothing for simulated "
                "annotators to compare: give pairs with dataset="
            )
        self.task, self.policies, self.tokenizer, self.config = task, policies, tokenizer, config
        self.judge = load_reward(task.judge, task=task, tokenizer=tokenizer)

    def compare(
        self, policy: Policy, rows: Sequence[Row], seed: int, samples: int, temperature: float, candidates: int
    ) -> list[Comparison]:
        """All pairs among so many samples and candidates of each row. Equal texts are compared once."""
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        sampled = sample_texts(policy, self.task, self.tokenizer, rows, samples, temperature, seed)
        made = []
        for row, own in zip(rows, sampled, strict=True):
            prompt_ids = self.task.encode(row, self.tokenizer, self.task.max_prompt_tokens)
            texts = self.task.candidates(row, rng, candidates)
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
        """Comparisons of `count` rows of a split; policies take turns, at temperatures between 0.5 and 1.2."""
        source = self.task.rows(split)
        rng = random.Random(seed)
        order = rng.sample(range(len(source)), min(count, len(source)))
        for turn, start in enumerate(range(0, len(order), chunk)):
            policy = self.policies[turn % len(self.policies)]
            rows = [source[i] for i in order[start : start + chunk]]
            temperature = rng.uniform(0.5, 1.2)
            made = (self.config.samples, temperature, self.config.candidates)
            yield from self.compare(policy, rows, seed + start + 1, *made)


def _encode(row: Row, task: Task, tokenizer: Any, budget: int) -> list[int]:
    """Ids of a prompt from a user's data, which need not be of the task's form."""
    if row["dialogue"] or not row["prompt"].endswith(task.keep_suffix):
        ids = prompts.encode_prompt(row["prompt"], tokenizer, sys.maxsize)
        first = ids[: int(len(ids) > budget and ids[0] == tokenizer.bos_token_id)]
        return first + ids[len(first) :][-(budget - len(first)) :]
    return task.encode(row, tokenizer, budget)


def read_preferences(
    dataset: str,
    split: str,
    task: Task,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
    whole: bool = False,
) -> list[Comparison]:
    """A user's preferences, in any schema of `textrl_gym.data.preferences`, as token ids within the task's budgets.

    A prompt that is too long is cut as the task cuts it; a dialogue, or what does not end as the task's prompts do,
    loses its beginning. A completion that the budget cuts has no EOS; two that are equal within it are no pair.

    Args:
        most: so many rows at most, drawn with `seed`.
        whole: take the whole of what has no held-out split.

    Raises:
        ValueError: see `textrl_gym.data.preferences.load`; or no pair is left within the budget.
    """
    prompt_budget, budget = max_prompt_tokens or task.max_prompt_tokens, max_new_tokens or task.max_new_tokens
    found = []
    rows = preferences.load(dataset, split, tokenizer, whole=whole).rows
    if most is not None and most < len(rows):
        rows = random.Random(seed).sample(rows, most)
    for row in rows:
        ids = [
            tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for t in row["completions"]
        ]
        ids = [some[:budget] for some in ids]
        pairs = [(a, b) for a, b in row["pairs"] if ids[a] != ids[b]]
        if pairs:
            found.append(Comparison(_encode(row, task, tokenizer, prompt_budget), ids, pairs))
    if not found:
        raise ValueError(f"dataset {dataset!r}: within max_new_tokens={budget} no two completions of a prompt differ")
    return found
