"""A language model as judge: it is shown a prompt and two answers, behind an endpoint or on this machine.

Every pair is asked in both orders; where the two verdicts name different answers, it is a tie. What is asked, and how
replies are read and kept, is of the wing `llm`. Where the probabilities of the verdicts are known, so is the pair's:

    P(a is better) = (P(first | a, b) + 1 - P(first | b, a)) / 2,     P(first) = P(A) + P(tie) / 2

the mean of both orders, which takes the preference for a place out (Lee et al. 2023, arXiv:2309.00267).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from textrl_gym.core import Row
from textrl_gym.judges.judge import Answer, Comparisons
from textrl_gym.llm.asking import (
    CACHE,
    ENDPOINT,
    LOCAL,
    Answered,
    Answerer,
    EndpointConfig,
    EndpointModel,
    parse_name,
    shaped,
)
from textrl_gym.llm.questions import NONE, PAIR
from textrl_gym.stats.estimates import Array

if TYPE_CHECKING:
    import torch


class LanguageJudge:
    """A judge; see the head of this file."""

    def __init__(self, model: Answerer) -> None:
        self.model = model
        self.name = model.name

    def prefer(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Array:
        """See textrl_gym.judges.judge.Judge. Equal texts are a tie that nobody is asked about.

        Raises:
            EndpointError: the endpoint fails for good. The verdicts that were given until then are kept.
        """
        return self.compare(rows, a, b).outcome_N

    def compare(self, rows: Sequence[Row], a: Sequence[Answer], b: Sequence[Answer]) -> Comparisons:
        """See textrl_gym.judges.judge.UncertainJudge. Errors as of `prefer`."""
        triples = [(str(row["prompt"]), one.text, other.text) for row, one, other in zip(rows, a, b, strict=True)]
        # Both orders: models prefer a place (Zheng et al. 2023, arXiv:2306.05685), and two orders that disagree
        # show it as a tie.
        orders = {
            (prompt, one, other): [(prompt, one, other), (prompt, other, one)]
            for prompt, one, other in triples
            if one != other
        }
        asked = list(dict.fromkeys(question for both in orders.values() for question in both))
        answered = dict(zip(asked, self.model.answers(asked), strict=True)) if asked else {}
        judged_N3 = [
            judged(*(answered[question] for question in orders[triple])) if triple in orders else (0.5, 0.5, math.nan)
            for triple in triples
        ]
        outcome_N, probability_N, flipped_N = np.array(judged_N3, np.float64).reshape(-1, 3).T
        return Comparisons(outcome_N, probability_N, flipped_N)


class Endpoint(LanguageJudge):
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, config: EndpointConfig, progress_bar: bool = True) -> None:
        """Raises ValueError without a model, for a bad template, key or cache; ImportError without httpx2."""
        super().__init__(EndpointModel(config, PAIR, f"judge {ENDPOINT!r}", progress_bar))


def load_language_judge(
    name: str,
    config: EndpointConfig,
    folder: Path = Path(),
    *,
    task: object = None,
    device: str | torch.device = "cpu",
) -> LanguageJudge:
    """A language model as judge.

    Args:
        name: endpoint, endpoint:MODEL, endpoint:MODEL@URL; local for the task's initial policy, or local:MODEL.
        config: how it is asked.
        folder: where an endpoint's verdicts are kept, if the settings do not say.
        task: whose initial policy it is.
        device: where a local model runs.

    Raises:
        ValueError: nothing is named so, or it cannot be asked.
        ImportError: an endpoint, without httpx2.
    """
    kind, spec, config = parse_name(name, config)
    if kind == LOCAL:
        from textrl_gym.llm.local import load_local

        most = config.max_answer_tokens if config.cot else 0
        return LanguageJudge(load_local(spec, shaped(PAIR, config), task=task, device=device, most_reasons=most))
    return Endpoint(dataclasses.replace(config, cache=config.cache or folder / CACHE))


# -- what is made of two verdicts -------------------------------------------------------------------------------------


def outcome_of(a_first: str, b_first: str) -> float:
    """1 where both orders prefer a, 0 where both prefer b, nan where one has no verdict; else 0.5.

    Args:
        a_first: the verdict where a stood as answer A.
        b_first: where b did.
    """
    if NONE in (a_first, b_first):
        return math.nan
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((a_first, b_first), 0.5)


def judged(a_first: Answered, b_first: Answered) -> tuple[float, float, float]:
    """Outcome, P(a is better) and whether the verdict flipped (1 or 0), of a pair's answers in both orders.

    Each is nan where it is not known: all where an order has no verdict, the second one without probabilities.
    """
    outcome = outcome_of(a_first.label, b_first.label)
    if math.isnan(outcome):
        return math.nan, math.nan, math.nan
    flipped = float((a_first.label, b_first.label) in (("A", "A"), ("B", "B")))
    if a_first.chances is None or b_first.chances is None:
        return outcome, math.nan, flipped
    first, second = (chances["A"] + chances["tie"] / 2 for chances in (a_first.chances, b_first.chances))
    return outcome, (first + 1 - second) / 2, flipped
