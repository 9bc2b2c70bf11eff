"""judge: a language model scores an answer from 1 to 10, as a direct reward (d-RLAIF).

    reward = (E[score] - 5.5) / 4.5,     E[score] = sum_s s P(s)

where the probabilities of the scores are known, else of the score that the model says; -1 is the worst and 1 the best
(Lee et al. 2023, arXiv:2309.00267). Where the model gives no score the reward is None, which TRL and this
library read as "does not apply": such a completion gets the mean of its prompt's others.

    judge:endpoint:MODEL[@URL]   a model behind an OpenAI-compatible endpoint, with the default settings
    judge:local:FOLDER           a causal LM of this machine (a folder, a Hub id); judge:local: the task's own
    judge:FILE.toml              either, with `judge` as above and the settings of llm.asking.EndpointConfig
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from textrl_gym.llm.asking import (
    LOCAL,
    Answered,
    Answerer,
    EndpointConfig,
    EndpointModel,
    is_language_model,
    parse_name,
    read_settings,
    shaped,
)
from textrl_gym.llm.questions import NONE, SCORE

if TYPE_CHECKING:
    import torch

MIDDLE, HALF = 5.5, 4.5
"""Of the scale from 1 to 10."""


class JudgeReward:
    """The scores of a language model; a callable of TRL's signature."""

    def __init__(self, model: Answerer) -> None:
        self.model = model

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Rewards of B completions, in [-1, 1]; None where the model gives no score.

        The share of those without a score is logged as `judge_no_score`.

        Raises:
            EndpointError: the endpoint fails for good.
        """
        answered = self.model.answers(list(zip(prompts, completions, strict=True)))
        scores = [reward_of(one) for one in answered]
        if log_metric is not None and scores:
            log_metric("judge_no_score", scores.count(None) / len(scores))
        return scores


def reward_of(answered: Answered) -> float | None:
    """The reward of an answer to the question for a score."""
    if answered.label == NONE:
        return None
    if answered.chances is None:
        return (int(answered.label) - MIDDLE) / HALF
    expected = math.fsum(int(score) * chance for score, chance in answered.chances.items())
    return (expected - MIDDLE) / HALF


def make(argument: str | None, *, task: object = None, device: str | torch.device = "cpu") -> JudgeReward:
    """The reward that the argument names; see the head of this file.

    Raises:
        ValueError: nothing is named so, or the model cannot be asked.
        ImportError: an endpoint, without httpx2.
    """
    name, config = argument or "", EndpointConfig()
    if name.endswith(".toml"):
        name, config = read_settings(Path(name).expanduser())
    if not is_language_model(name):
        raise ValueError(
            "reward 'judge' needs a language model: judge:endpoint:MODEL, judge:endpoint:MODEL@URL, judge:local, "
            f"judge:local:FOLDER or judge:FILE.toml, got {argument!r}"
        )
    kind, spec, config = parse_name(name, config)
    if kind == LOCAL:
        from textrl_gym.llm.local import load_local

        most = config.max_answer_tokens if config.cot else 0
        return JudgeReward(load_local(spec, shaped(SCORE, config), task=task, device=device, most_reasons=most))
    if not config.model:
        raise ValueError(
            f"reward 'judge:{argument}' needs the name of its model: judge:endpoint:MODEL, or model in the file"
        )
    return JudgeReward(EndpointModel(config, SCORE, "reward 'judge'", progress_bar=False))
