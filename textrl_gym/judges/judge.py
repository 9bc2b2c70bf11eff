"""Judges: which of two answers to a prompt is the better one.

A judge is whatever has `prefer(rows, a, b)`. Any reward is one, the higher score being the better answer, and so is a
language model (judges.llm_judge), which may say besides how sure it is (`compare`). `Noisy` makes a judge of another
one that errs as often as people do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from textrl_gym.core import RewardSpec, Row
from textrl_gym.llm.asking import ENDPOINT, is_language_model
from textrl_gym.stats.estimates import Array, outcomes

if TYPE_CHECKING:  # the settings of a judge are read without torch
    import torch
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.rewards import RewardFunction

GOLD = "gold"
"""The name of a task's own gold score."""


@dataclass(frozen=True)
class Answer:
    """A text that is judged."""

    text: str
    ids: tuple[int, ...] | None = None
    """Its tokens, with EOS unless it was cut off; None: unknown, so that it is taken for finished."""


@runtime_checkable
class Judge(Protocol):
    """Pairwise preference."""

    name: str

    def prefer(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Array:
        """Outcomes in [0, 1], [N]: 1 where a is better, 0.5 for a tie, 0 where b is; nan where there is no verdict.

        Args:
            rows: the N prompts' rows, with the column `prompt_ids` where their tokens are known.
            a: N answers.
            b: N others.
        """
        ...


class Comparisons(NamedTuple):
    """What a judge says of N pairs; all [N]."""

    outcome_N: Array
    """As `Judge.prefer` gives them."""
    probability_N: Array
    """How likely a is better, 0 to 1; nan where the judge does not say, or gave no verdict."""
    flipped_N: Array
    """1 where the verdict names the other answer when the order is turned round, 0 where it does not, nan where the
    pair was not asked about in both orders."""


@runtime_checkable
class UncertainJudge(Judge, Protocol):
    """A judge that says how sure it is."""

    def compare(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Comparisons:
        """Outcomes and their probabilities; arguments as of `prefer`."""
        ...


def compare(judge: Judge, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Comparisons:
    """What any judge says of pairs; of one that only prefers, without probabilities."""
    if isinstance(judge, UncertainJudge):
        return judge.compare(rows, a, b)
    unknown_N = np.full(len(rows), np.nan)
    return Comparisons(judge.prefer(rows, a, b), unknown_N, unknown_N)


class Pointwise:
    """A reward as a judge: the higher score wins. No answer is scored twice while it lives."""

    def __init__(self, reward: RewardFunction, name: str | None = None) -> None:
        self.reward, self.name = reward, name or reward.name
        self._scores: dict[tuple[str, Answer], float] = {}

    def score(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Array:
        """The reward of each answer, with the columns of its row. [N]"""
        # repr: rows are mappings, which cannot be keys; equal rows of one source have equal reprs.
        keys = [(repr(row), answer) for row, answer in zip(rows, answers, strict=True)]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._scores}
        if new:
            scores = reward_of(self.reward, list(new.values()), [answer for _, answer in new])
            self._scores |= dict(zip(new, scores.tolist(), strict=True))
        return np.array([self._scores[key] for key in keys])

    def prefer(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Array:
        """See Judge."""
        # Both sides in one call: a reward model batches by length, and one call fills its batches better than two.
        score_2N = self.score([*rows, *rows], [*a, *b])
        return outcomes(score_2N[: len(rows)], score_2N[len(rows) :])


def reward_of(reward: RewardFunction, rows: Sequence[Row], answers: Sequence[Answer]) -> torch.Tensor:
    """A reward of given texts, with every column of their rows, and their tokens where all are known. [N]"""
    from textrl_gym.rewards import columns_of

    columns = columns_of(rows)
    if all(answer.ids is not None for answer in answers):
        columns["completion_ids"] = [list(answer.ids or ()) for answer in answers]
    return reward.score([row["prompt"] for row in rows], [answer.text for answer in answers], columns).total_B


class Noisy:
    """A judge whose verdict is turned round for a share of the pairs, as AlpacaFarm's annotators' are.

    AlpacaFarm (Dubois et al. 2023, arXiv:2305.14387) turns a quarter, which made simulated annotators as different from
    each other as people are. Which pairs is decided by the seed and their texts: the same pair is always judged alike,
    whichever answer comes first and whatever else is judged. A tie stays one. This is not judges.annotators, whose
    mistakes depend on how far two gold scores are apart: here only the verdict is known.
    """

    def __init__(self, judge: Judge, noise: float, seed: int = 0) -> None:
        if not 0 <= noise <= 0.5:
            raise ValueError(f"a judge's noise must lie between 0 and 0.5 (a coin), got {noise}")
        self.judge, self.noise, self.seed = judge, noise, seed
        self.name = f"{judge.name}, noise {noise:g}"

    def prefer(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Array:
        """See Judge."""
        outcome_N = self.judge.prefer(rows, a, b)  # a tie of 0.5 turned round is 0.5 again
        return np.where([self._errs(*pair) for pair in zip(rows, a, b, strict=True)], 1 - outcome_N, outcome_N)

    def _errs(self, row: Row, a: Answer, b: Answer) -> bool:
        # Sorted: a verdict is flipped or not whichever completion comes first.
        pair = sorted((a.text, b.text))
        return random.Random(repr((self.seed, row["prompt"], pair))).random() < self.noise


def load_scorer(
    spec: RewardSpec | RewardFunction,
    *,
    task: object = None,
    device: str | torch.device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardFunction:
    """A judge that gives scores: what `load_reward` takes, or "gold", the task's own judge.

    Raises:
        ValueError: nothing is named so, the task has no judge, or it is the one that only compares.
    """
    from textrl_gym.rewards import load_reward

    if isinstance(spec, str) and is_language_model(spec):
        raise ValueError(
            f"judge {spec!r} compares two answers and gives no scores: finish the comparison without it, and then "
            f"run `textrl-gym judge DIR --judge {ENDPOINT} --endpoint.model NAME`; for scores name judge:{spec}"
        )
    # The task's own name for it ("tldr_gold") would do too, but is another for each task.
    if spec == GOLD:
        own = getattr(task, "gold", None)
        if own is None:
            whose = "no task is known" if task is None else f"{type(task).__name__} has no gold score of its own"
            raise ValueError(f"judge {GOLD!r}: {whose}; name a reward, module:function or a folder with a reward model")
        spec = own
    try:
        return load_reward(spec, task=task, device=device, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(f"judge ({GOLD}, or a reward): {error}") from error


def load_judge(
    spec: Judge | RewardSpec | RewardFunction,
    *,
    task: object = None,
    device: str | torch.device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Judge:
    """A judge from what has `prefer` already, or from what `load_scorer` takes."""
    if isinstance(spec, Judge):
        return spec
    reward = load_scorer(spec, task=task, device=device, tokenizer=tokenizer)
    return Pointwise(reward, spec if isinstance(spec, str) else None)
