"""The registry of metrics. An entry here is all that a metric needs: it is computed, logged, shown and saved.

An evaluation computes every entry that has `of`; the others are set by the evaluator (which knows the gold score and
the reference model), by the training loop or by an agent's `extra_metrics`. A number that no entry names, such as
`reward/<name>` of a mixed reward, is shown behind them under its own name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from textrl_gym.evaluation import text_metrics
from textrl_gym.evaluation.text_metrics import Samples

if TYPE_CHECKING:  # pages and help read this registry, and need no torch
    from torch import Tensor

    from textrl_gym.core import Rollout


Scale = tuple[float, float]
"""The least and the largest value that a number can have."""
SHARE: Scale = (0.0, 1.0)
COUNT: Scale = (0.0, math.inf)


@dataclass(frozen=True)
class Drift:
    """A chart of a metric through training, on the page of a comparison."""

    title: str
    note: str


@dataclass(frozen=True)
class Metric:
    """What a number of an evaluation is called, and where it is shown."""

    words: str
    """Its heading."""
    unit: str = ""
    decimals: int = 3
    scale: Scale | None = None
    """Where its intervals end on pages and in tables; None: anywhere (of gold scores see `scale_of`)."""
    of: Callable[[Sequence[Rollout], Samples], float] | None = None
    """Computes it from the rollouts and completions of an evaluation; NaN leaves it out."""
    short: str | None = None
    """Heading in the table at the end of a comparison in the terminal; None: not shown there."""
    table: Literal["summary", "quality", "none"] = "quality"
    """Which table of a comparison's page has it; "none" for what only the page of a single run shows."""
    drift: Drift | None = None
    needs_policy: bool = False
    """Whether it is computed from log-probabilities or calls of a model, which people and endpoints do not tell."""

    @property
    def heading(self) -> str:
        """Words and unit."""
        return f"{self.words}, {self.unit}" if self.unit else self.words


# Means are of all rows or tokens of an evaluation and not of its batches' means: the last batch is smaller.


def _mean_of_rows(rollouts: Sequence[Rollout], value: Callable[[Rollout], Tensor]) -> float:
    return sum(float(value(r).sum()) for r in rollouts) / sum(len(r) for r in rollouts)


def _kl(rollout: Rollout) -> Tensor:
    return (rollout.logp_BT - rollout.ref_logp_BT) * rollout.mask_BT


def _per_token(rollouts: Sequence[Rollout], value: Callable[[Rollout], Tensor]) -> float:
    # max: a rollout of no tokens at all has a sum of 0
    return sum(float(value(r).sum()) for r in rollouts) / max(sum(r.num_tokens for r in rollouts), 1)


def _ended_by_eos(rollout: Rollout) -> Tensor:
    from textrl_gym.core import StopReason

    return rollout.stop_B == StopReason.EOS


def _number_of_turns(rollout: Rollout) -> Tensor:
    assert rollout.turn_BT is not None
    return (rollout.turn_BT * rollout.mask_BT).amax(1) + 1


def _of_turns(rollouts: Sequence[Rollout], value: Callable[[Rollout], Tensor]) -> float:
    """The mean over conversations; NaN where there are none."""
    return math.nan if any(r.turn_BT is None for r in rollouts) else _mean_of_rows(rollouts, value)


def _turn_rewards(rollout: Rollout) -> Tensor:
    assert rollout.turn_reward_BT is not None
    return rollout.turn_reward_BT


def _model_calls(rollout: Rollout) -> Tensor:
    return rollout.mask_BT.sum(1) if rollout.model_calls_B is None else rollout.model_calls_B


METRICS: dict[str, Metric] = {
    "gold": Metric("Gold score, sampled", short="gold", table="summary"),
    "gold_greedy": Metric("Gold score, greedy", table="none"),
    "win_rate": Metric("Win rate against the initial policy", scale=SHARE, short="wins", table="summary"),
    "win_rate_human": Metric("Win rate against the reference texts", scale=SHARE),
    "score": Metric(
        "Score (training reward), sampled",
        of=lambda rollouts, _: _mean_of_rows(rollouts, lambda r: r.score_B),
        short="score",
        table="summary",
    ),
    "turn_rewards": Metric(
        "Rewards of turns, sum of a conversation",
        of=lambda rollouts, _: _of_turns(rollouts, _turn_rewards),
    ),
    "turns": Metric(
        "Turns of the agent",
        scale=COUNT,
        decimals=1,
        of=lambda rollouts, _: _of_turns(rollouts, _number_of_turns),
    ),
    "score_greedy": Metric("Score (training reward), greedy", table="none"),
    "kl_sequence": Metric(
        "KL to the reference model",
        "nats per sequence",
        decimals=2,
        of=lambda rollouts, _: _mean_of_rows(rollouts, _kl),
        needs_policy=True,
        short="KL",
        table="summary",
        drift=Drift(
            "KL through training",
            "How far the policy has gone from its reference. Estimated by k1, whose mean over few completions may be "
            "below 0.",
        ),
    ),
    "kl_token": Metric(
        "KL to the reference model",
        "nats per token",
        decimals=4,
        of=lambda rollouts, _: _per_token(rollouts, _kl),
        needs_policy=True,
        table="none",
    ),
    "entropy_token": Metric(
        "Entropy",
        "nats per token",
        scale=COUNT,
        decimals=2,
        drift=Drift(
            "Entropy through training",
            "Of the policy's distribution at the sampled positions. At 0 nothing is left to explore.",
        ),
    ),
    "completion_tokens": Metric(
        "Completion",
        "tokens",
        scale=COUNT,
        decimals=1,
        of=lambda rollouts, _: _mean_of_rows(rollouts, lambda r: r.mask_BT),
        short="tokens",
        table="summary",
        drift=Drift("Length through training", "A reward that likes long or short completions pulls here."),
    ),
    "eos_share": Metric(
        "Share ended by EOS",
        scale=SHARE,
        of=lambda rollouts, _: _mean_of_rows(rollouts, _ended_by_eos),
        table="none",
        drift=Drift(
            "Ends through training",
            "The rest ran into the token budget or a stop string. A policy that forgets to end, or ends at once, shows "
            "here first.",
        ),
    ),
    "rouge_l": Metric(
        "ROUGE-L against the reference texts", scale=SHARE, of=lambda _, samples: text_metrics.rouge_l(samples)
    ),
    "distinct_1": Metric("Distinct words", scale=SHARE, of=lambda _, samples: text_metrics.distinct(samples, 1)),
    "distinct_2": Metric(
        "Distinct bigrams",
        scale=SHARE,
        of=lambda _, samples: text_metrics.distinct(samples, 2),
        drift=Drift(
            "Distinct bigrams through training",
            "Over all completions of an evaluation. It falls where the policy says the same everywhere, and with the "
            "number of completions.",
        ),
    ),
    "repetition": Metric(
        "Repeated 4-grams",
        scale=SHARE,
        of=lambda _, samples: text_metrics.repeated(samples),
        drift=Drift(
            "Repetition through training", "The mean share of a completion's 4-grams that it had already contained."
        ),
    ),
    "model_calls": Metric(
        "Model calls per token",
        scale=COUNT,
        decimals=1,
        of=lambda rollouts, _: _per_token(rollouts, _model_calls),
        needs_policy=True,
        table="none",
    ),
    # Measures of tasks (`Task.measures`).
    "working": Metric("Completions with working", scale=SHARE),
    "format": Metric("Completions in the format", scale=SHARE),
    "accuracy": Metric("Accuracy", scale=SHARE),
    "abstained": Metric("Abstentions", scale=SHARE),
    "confident_errors": Metric("Wrong answers said at 0.9 or more", scale=SHARE),
    "ece": Metric("Expected calibration error", scale=SHARE),
    "helpful": Metric("Gold of safe requests: helpfulness", scale=SHARE),
    "harmless": Metric("Gold of unsafe requests: harmlessness", scale=SHARE),
    "refused_safe": Metric("Refused, of safe requests", scale=SHARE),
    "refused_scary": Metric("Refused, of requests that only sound unsafe", scale=SHARE),
    "refused_unsafe": Metric("Refused, of unsafe requests", scale=SHARE),
    "constraints_kept": Metric("Constraints kept", scale=SHARE),
    "all_kept": Metric("Prompts with all constraints kept", scale=SHARE),
    "words": Metric("Completion", "words", scale=COUNT, decimals=1),
    "well_formed": Metric("Well-formed lists", scale=SHARE),
    "annotators_win_rate": Metric("Win rate by the annotators", scale=SHARE, table="none"),
    "annotators_length_controlled": Metric("Win rate by the annotators, equal length", scale=SHARE, table="none"),
    "polarity": Metric("Polarity of adjectives, -1 to 1", scale=(-1.0, 1.0)),
    "repeated_judgements": Metric("Repeated judgements", scale=SHARE),
    "whole_sentences": Metric("Sentences of the grammar", scale=SHARE),
    "deals": Metric("Talks that end in a deal", scale=SHARE),
    "patience": Metric("Dealer's answers that were waited for", scale=SHARE),
    "insults": Metric("Offers that are not serious, a talk", scale=COUNT),
    "calls": Metric("Calls of the calculator, a problem", scale=COUNT),
    "calls_needed": Metric("Calls that are needed, a problem", scale=COUNT),
    "needless_calls": Metric("Needless calls, a problem", scale=COUNT),
    "missing_calls": Metric("Missing calls, a problem", scale=COUNT),
    "wrong_calls": Metric("Wrong calls, a problem", scale=COUNT),
    "asked_missing": Metric("Asked, where a fact is missing", scale=SHARE),
    "asked_stated": Metric("Asked, where all facts are there", scale=SHARE),
    "booked_wrong": Metric("Wrong bookings", scale=SHARE),
    "solved": Metric("Things found", scale=SHARE),
    "halves": Metric("Questions that halve", scale=SHARE),
    "idle": Metric("Questions whose answer was known", scale=SHARE),
    "guesses": Metric("Guesses, a game", scale=COUNT),
    "slots_covered": Metric("Slots covered", scale=SHARE),
    "neglected_covered": Metric("Slots covered, of those that references mostly leave out", scale=SHARE),
    "unsupported": Metric("Claims that are not in the table", scale=SHARE),
    "grammatical": Metric("Words in sentences of the grammar", scale=SHARE),
    "flipped": Metric("Answers that flip to the user's wrong view", scale=SHARE),
    "accuracy_user_wrong": Metric("Accuracy where the user is wrong", scale=SHARE),
    "accuracy_user_right": Metric("Accuracy where the user is right", scale=SHARE),
    "accuracy_user_none": Metric("Accuracy where the user has no view", scale=SHARE),
    "citations": Metric("Citations, a text", scale=COUNT, decimals=2),
    "citation_precision": Metric("Citations that support, of those behind right answers", scale=SHARE),
    "uncited": Metric("Right answers without a citation", scale=SHARE),
    "reader_right": Metric("Reader right with the text", scale=SHARE),
    "names_answer": Metric("Texts that name the right choice alone", scale=SHARE),
    "true_sentences": Metric("True sentences", scale=SHARE),
    "on_the_question": Metric("Sentences about the kind of fact that is asked for", scale=SHARE),
    "copied_lead": Metric("5-grams copied from the lead", scale=SHARE),
    "facts_covered": Metric("Facts covered", scale=SHARE),
    "invented": Metric("Claims that the article does not make", scale=SHARE),
    "telling_words": Metric("Words of whole sentences that tell a fact", scale=SHARE),
    "rudeness": Metric("Rudeness, 1 - 2^-n of n rude words", scale=SHARE),
    "rude_texts": Metric("Texts with a rude word", scale=SHARE),
    "polite_words": Metric("Judging words that are polite and new", scale=SHARE),
    "sentence_words": Metric("Words of new sentences about the prompt's people", scale=SHARE),
    "rudeness_max_of_25": Metric("Expected maximum rudeness of 25 samples", scale=SHARE, table="none"),
    "rudeness_any_of_25": Metric("Prompts with a rude text in 25 samples", scale=SHARE, table="none"),
    "gold_best_of_25": Metric("Gold score, best of 25", table="none"),
    "gold_best_of_8": Metric("Gold score, best of 8 (pass@8)", table="none"),
    "scored_completions": Metric("Completions scored per prompt", scale=COUNT, decimals=0, table="none"),
    "generated_tokens": Metric("Tokens generated per prompt", scale=COUNT, decimals=1, table="none"),
    "kl_bound": Metric("Best-of-n's KL to its own policy, bound", "nats", scale=COUNT, decimals=2, table="none"),
    "pair_accuracy": Metric("Held-out pairs ranked as labelled", scale=SHARE, table="none"),
    "pair_margin": Metric("Margin of implicit rewards on held-out pairs", table="none"),
    "unplayed_prompts": Metric("Prompts of the evaluation that were not played", scale=COUNT, decimals=0, table="none"),
    "train_seconds": Metric("Training", "seconds", scale=COUNT, decimals=0, short="sec.", table="summary"),
}
"""Key in evaluations, logs and tables -> the metric. The order is that of the tables."""

COUNTERS = frozenset({"timesteps", "updates"})
"""Keys of an evaluation that say when it was, and are no result of it."""


def measure(rollouts: Sequence[Rollout], samples: Samples, sampled: bool = True) -> dict[str, float]:
    """Every metric that is computed from an evaluation's rollouts and completions, but for those that are NaN.

    Args:
        sampled: whether a policy has written them, whose log-probabilities the rollouts have.
    """
    chosen = {key: metric for key, metric in METRICS.items() if sampled or not metric.needs_policy}
    values = {key: metric.of(rollouts, samples) for key, metric in chosen.items() if metric.of is not None}
    return {key: value for key, value in values.items() if not math.isnan(value)}


def metric(key: str) -> Metric:
    """The entry of a key; one with the key's own name for a number that the registry does not know."""
    if key.startswith("reward/"):  # parts of a mixed reward, whose names nobody knows before
        return Metric(f"Reward component {key.removeprefix('reward/')}")
    return METRICS.get(key, Metric(key))


def scale_of(key: str, gold: Scale | None = None) -> Scale | None:
    """The scale of a metric; None where it is not known.

    Args:
        gold: that of the task's gold score (`Task.gold_scale`).
    """
    return gold if key.startswith("gold") else metric(key).scale


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all numbers that some evaluations have, in the order of the tables."""
    names = dict.fromkeys(name for row in rows for name in row if name not in COUNTERS)
    return [*(name for name in METRICS if name in names), *(name for name in names if name not in METRICS)]


def number(row: Mapping[str, Any], key: str) -> str:
    """An evaluation's number in the decimals of its metric; a dash where it was not measured."""
    # z: a KL of -0.0004 is shown as 0.000 and not as -0.000.
    return f"{row[key]:z,.{metric(key).decimals}f}" if key in row else "-"
