"""Simulated comparisons: completions of a task's prompts, compared by simulated annotators."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from textrl_gym.core import PromptSource, Row
from textrl_gym.data.encoding import codec, encode_completions, end_ids, prompt_of
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.functional import pad
from textrl_gym.judges.annotators import Annotators
from textrl_gym.mdp.task import Task
from textrl_gym.models.loading import declared_ends
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import columns_of, load_reward
from textrl_gym.rollouts import sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_texts(
    policy: Policy,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    number: int,
    temperature: float,
    seed: int,
) -> list[list[list[int]]]:
    """`number` completions of each row's prompt as token ids with their EOS; temperature 0 is greedy decoding.

    Raises:
        ValueError: the task is a conversation.
    """
    if task.replies_to_turns:
        raise ValueError(f"{type(task).__name__} is a conversation: comparisons are of completions of a single turn")
    prompt_BP, prompt_mask_BP = pad([task.encode(row, tokenizer, task.max_prompt_tokens) for row in rows], "left")
    generator = torch.Generator().manual_seed(seed)
    uniform_BT = torch.rand(len(rows) * number, task.max_new_tokens, generator=generator).to(policy.device)
    # The sampler reads the policy's temperature, which belongs to its training: put back below.
    trained_at, policy.temperature = policy.temperature, temperature or 1.0
    done = sampler.generate(
        policy,
        prompt_BP.to(policy.device),
        prompt_mask_BP.to(policy.device),
        torch.arange(len(rows), device=policy.device).repeat_interleave(number),
        uniform_BT if temperature else None,
        max_new_tokens=task.max_new_tokens,
        end_ids=end_ids(tokenizer, declared_ends(policy.model)),
    )
    policy.temperature = trained_at
    ids = [token_T[mask_T].tolist() for token_T, mask_T in zip(done.token_BT, done.mask_BT, strict=True)]
    return [ids[start : start + number] for start in range(0, len(ids), number)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of a completion, without EOS."""
    return codec(tokenizer).decode(ids)


Candidates = Callable[[Row, random.Random, int], list[str]]
"""A task's `candidates(row, rng, n)`: n completions of a row's prompt, from perfect to poor."""


class ComparisonSettings(Protocol):
    """What comparing needs of the settings (`pipeline.reward_data.RewardModelConfig`)."""

    @property
    def samples(self) -> int: ...

    @property
    def candidates(self) -> int: ...

    @property
    def annotators(self) -> Annotators: ...

    @property
    def gold(self) -> str | None: ...


class Comparer:
    """Simulated comparisons of the task's rows: annotators compare samples of policies and the task's candidates."""

    def __init__(
        self,
        task: Task,
        policies: Sequence[Policy],
        tokenizer: PreTrainedTokenizerBase,
        config: ComparisonSettings,
    ) -> None:
        """Raises ValueError where the task has no gold score or no candidates to compare."""
        candidates: Candidates | None = getattr(task, "candidates", None)
        gold = config.gold or task.gold
        if gold is None or candidates is None:
            raise ValueError(
                f"{type(task).__name__} has no gold score with candidates(row, rng, n), so there is nothing for "
                "simulated annotators to compare: give pairs with dataset="
            )
        self.task, self.policies, self.tokenizer, self.config = task, policies, tokenizer, config
        self.candidates = candidates
        self.gold = load_reward(gold, task=task, tokenizer=tokenizer)

    def compare(
        self, policy: Policy, rows: Sequence[Row], seed: int, samples: int, temperature: float, candidates: int
    ) -> list[RankedCompletions]:
        """All pairs among so many samples and candidates of each row. Equal texts are compared once."""
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        sampled = sample_texts(policy, self.task, self.tokenizer, rows, samples, temperature, seed)
        completions = []
        for row, own in zip(rows, sampled, strict=True):
            prompt_ids = self.task.encode(row, self.tokenizer, self.task.max_prompt_tokens)
            texts = self.candidates(row, rng, candidates)
            given = encode_completions(prompt_of(row), texts, self.tokenizer, self.task.max_new_tokens)
            # Equal texts once: annotators would toss a coin between them, and the model can only give them one reward.
            ids = [list(key) for key in dict.fromkeys(tuple(i[: self.task.max_new_tokens]) for i in own + given)]
            distinct = len({tuple(i) for i in own})
            completions.append((row, prompt_ids, ids, distinct))
        # Decoded from the tokens that the model will read, so that texts cut at the budget are judged as they are.
        texts_of = [[decode(self.tokenizer, i) for i in ids] for _, _, ids, _ in completions]
        gold = iter(self._gold([row for row, *_ in completions], texts_of))
        ranked = []
        for (row, prompt_ids, ids, distinct), texts in zip(completions, texts_of, strict=True):
            score = np.array([next(gold) for _ in texts])
            seen = score + self.config.annotators.bias * np.array([self.task.appeal(row, text) for text in texts])
            words = np.array([len(text.split()) for text in texts])
            first, second = np.array(list(itertools.combinations(range(len(ids)), 2)), dtype=int).reshape(-1, 2).T
            wins = self.config.annotators.prefer(seen[first], seen[second], words[first], words[second], draw)
            pairs = [(int(a), int(b)) if w else (int(b), int(a)) for a, b, w in zip(first, second, wins, strict=True)]
            ranked.append(RankedCompletions(prompt_ids, ids, pairs, score.tolist(), distinct))
        return ranked

    def _gold(self, rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> list[float]:
        spread = [row for row, some in zip(rows, texts, strict=True) for _ in some]
        flat = [text for some in texts for text in some]
        return self.gold.score([row["prompt"] for row in spread], flat, columns_of(spread)).total_B.tolist()

    def stream(
        self, source: PromptSource, count: int, seed: int, chunk: int = 64, skip: int = 0
    ) -> Iterator[RankedCompletions]:
        """Comparisons of `count` rows; policies take turns, at temperatures between 0.5 and 1.2.

        Args:
            skip: leave out the first so many, most of which are not sampled.
        """
        rng = random.Random(seed)
        order = rng.sample(range(len(source)), min(count, len(source)))
        for turn, start in enumerate(range(0, len(order), chunk)):
            # In turn: with the initial policy's samples alone the reward model has never seen fluent texts, which RL
            # soon writes.
            policy = self.policies[turn % len(self.policies)]
            rows = [source[i] for i in order[start : start + chunk]]
            # Of several temperatures: cool samples are like those that RL ends with, hot ones have the errors to tell
            # apart.
            temperature = rng.uniform(0.5, 1.2)
            if start + len(rows) <= skip:
                continue
            key = (self.config.samples, temperature, self.config.candidates)
            yield from self.compare(policy, rows, seed + start + 1, *key)[max(0, skip - start) :]


@dataclasses.dataclass(frozen=True)
class ComparisonStream:
    """Comparisons that are sampled while they are read, from any place on."""

    comparer: Comparer
    source: PromptSource
    count: int
    seed: int

    def __iter__(self) -> Iterator[RankedCompletions]:
        return self.after(0)

    def after(self, skip: int) -> Iterator[RankedCompletions]:
        """Those behind the first so many."""
        return self.comparer.stream(self.source, self.count, self.seed, skip=skip)
