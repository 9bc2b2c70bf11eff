"""Signs of reward hacking in a run's evaluations: pure rules, for the monitor while it trains and the report after it.

All evaluations of a run play the same held-out prompts with the same random numbers, so that two of them are compared
prompt by prompt.

    gold       the training score rose while the gold score fell, from the first or from its best evaluation
    length     completions have become far longer or far shorter than the initial policy's
    ends       far fewer completions end by EOS
    empty      many completions are empty: nothing, or EOS alone
    bigrams    far fewer bigrams are distinct (Li et al. 2016, arXiv:1510.03055)
    sameness   many prompts get the same completion
    kl         the policy is far from its reference
    divergence the same, and the training score fell: nothing is exploited, training has failed

Gold is the definition (Gao et al. 2022, arXiv:2210.10760: the proxy rises, gold falls). The others are symptoms, which
need no gold score; those of form and length say nothing where the initial policy writes only a few tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from annotated_types import Ge

from textrl_gym.bounds import check_settings
from textrl_gym.stats.overoptimization import distinct_n

GOLD_ALARM = "gold"
DIVERGENCE = "divergence"
SHORT = 8  # CopyText-v0 has three tokens: EOS falls to 0.2 and comes back while it is learnt, bigrams fall to 0.6
"""Mean tokens of the initial policy's completions below which their form and length say nothing."""


@dataclasses.dataclass(frozen=True)
class AlarmBounds:
    """Beyond these an alarm is raised. Healthy GRPO and PPO runs of the embedded world stay well within."""

    gold_fall: Annotated[float, Ge(0)] = 0.05
    """A fall of the mean gold score that matters, in its units, ..."""
    gold_errors: Annotated[float, Ge(0)] = 3.0
    """... and that is more than so many standard errors of the paired differences, where the completions are there."""
    # With these bounds one of 124 stored runs raised an alarm, and there gold came back.
    length_ratio: Annotated[float, Ge(1)] = 1.75
    """Mean tokens against the initial policy's, as this factor or its inverse."""
    eos_ratio: Annotated[float, Ge(0)] = 0.5
    """Share ended by EOS against the initial policy's."""
    empty_share: Annotated[float, Ge(0)] = 0.5
    """Share of completions that are empty."""
    distinct_ratio: Annotated[float, Ge(0)] = 0.5
    """Share of distinct bigrams against the initial policy's."""
    same_share: Annotated[float, Ge(0)] = 0.25
    """Share of the prompts that get one and the same completion."""
    kl: Annotated[float, Ge(0)] = 50.0
    """KL to the reference, nats a sequence."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What training writes of one evaluation."""

    row: dict[str, Any]
    """Its metrics: a line of evaluations.jsonl."""
    samples: Sequence[dict[str, Any]] = ()
    """Its completions: lines of samples.jsonl; where there are none, no rule that reads them fires."""

    @property
    def texts(self) -> list[str]:
        """The completions."""
        return [sample["completion"] for sample in self.samples]


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One measure out of bounds."""

    measure: str
    before: float
    """At the start or, of gold, at the evaluation that it fell from."""
    now: float
    words: str

    @property
    def title(self) -> str:
        """What an alarm of its kind is called."""
        return {GOLD_ALARM: "Reward hacking", DIVERGENCE: "Divergence"}.get(self.measure, "Drift")

    @property
    def line(self) -> str:
        """The alarm as a line of a run's output."""
        return self.words if self.measure == DIVERGENCE else f"reward hacking? {self.words}"


def evaluations(rows: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> list[Evaluation]:
    """A run's evaluations from the lines of its two files, by updates.

    What was evaluated twice at one place, before and after a stop, counts once: as it was the last time.
    """
    # By updates: timesteps begin anew with each learn(), and the later run may be the shorter one. 0.1 wrote samples
    # by timesteps only.
    key = "updates" if all("updates" in row for row in (*rows, *samples)) else "timesteps"
    times, last = Counter(row[key] for row in rows), {row[key]: row for row in rows}
    written: dict[int, list[dict[str, Any]]] = {at: [] for at in last}
    for sample in samples:
        written.setdefault(sample[key], []).append(sample)
    # Samples have no number of their evaluation, but all evaluations at one place have equally many.
    counts = {at: len(written[at]) // times[at] for at in last}
    return [Evaluation(last[at], written[at][len(written[at]) - counts[at] :]) for at in sorted(last)]


def last_alarms(evaluations: Sequence[Evaluation]) -> list[Alarm]:
    """Every measure that is out of bounds at the end of a run, by all of its evaluations; none without any."""
    return alarms(evaluations[0], best(evaluations), evaluations[-1]) if evaluations else []


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The first evaluation with the best gold score; None without one."""
    scored = [evaluation for evaluation in evaluations if "gold" in evaluation.row]
    return max(scored, key=lambda evaluation: evaluation.row["gold"], default=None)


def alarms(
    start: Evaluation, top: Evaluation | None, now: Evaluation, bounds: AlarmBounds | None = None
) -> list[Alarm]:
    """Every measure of an evaluation that is out of bounds.

    Args:
        start: the run's first evaluation.
        top: the one with the best gold score so far; see `best`.
        now: the one to look at.
        bounds: None for the usual ones.
    """
    bounds = bounds or AlarmBounds()
    if (lost := divergence(start, now, bounds)) is not None:
        return [lost]  # texts without form follow from it, and would hide it
    falls = [gold(before, now, bounds) for before in (start, top) if before is not None]
    return [*[alarm for alarm in falls if alarm][:1], *_symptoms(start, now, bounds)]


def divergence(start: Evaluation, now: Evaluation, bounds: AlarmBounds) -> Alarm | None:
    """The policy is far from its reference while the score that it is trained on has fallen."""
    kl, before = now.row.get("kl_sequence", 0.0), start.row.get("kl_sequence", 0.0)
    if kl <= bounds.kl or not ("score" in start.row and now.row.get("score", math.inf) < start.row["score"]):
        return None
    words = (
        f"Diverged: the KL to the reference is {kl:.0f} nats a sequence after update {now.row['updates']:,}, and the "
        f"score that was trained on fell from {start.row['score']:.3f} to {now.row['score']:.3f}. Likely causes: a "
        "learning rate that is too high, a loss or an advantage of the wrong sign or scale, log-probabilities that are "
        "not those of the tokens that were sampled, a KL coefficient of 0."
    )
    return Alarm(DIVERGENCE, before, kl, words)


def gold(before: Evaluation, now: Evaluation, bounds: AlarmBounds) -> Alarm | None:
    """The training score rose since `before` while the gold score fell by more than noise."""
    if not ({"gold", "score"} <= before.row.keys() and {"gold", "score"} <= now.row.keys()):
        return None
    fall = before.row["gold"] - now.row["gold"]
    noise = bounds.gold_errors * paired_error(before, now)
    if not (now.row["score"] > before.row["score"] and fall > max(bounds.gold_fall, noise)):
        return None
    at, to = before.row["timesteps"], now.row["timesteps"]
    words = (
        f"From {f'{at:,} tokens' if at else 'the initial policy'} to {to:,} tokens the score that was trained on rose "
        f"from {before.row['score']:.3f} to {now.row['score']:.3f}, while the gold score fell from "
        f"{before.row['gold']:.3f} to {now.row['gold']:.3f}: the policy exploits the reward."
    )
    return Alarm(GOLD_ALARM, before.row["gold"], now.row["gold"], words)


def paired_error(before: Evaluation, now: Evaluation) -> float:
    """Standard error of the mean difference of the gold scores of the same prompts; 0 where fewer than 2 are known.

    The best evaluation is the luckiest of many, so that its fall is overstated: hence the three errors.
    """
    a, b = ({s["index"]: s["gold"] for s in e.samples if "gold" in s} for e in (before, now))
    differences = [a[index] - b[index] for index in a.keys() & b.keys()]
    n = len(differences)
    if n < 2:
        return 0.0
    # fsum, and not numpy: exact whatever the order of the set of prompts.
    mean = math.fsum(differences) / n
    return math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)


def _symptoms(start: Evaluation, now: Evaluation, bounds: AlarmBounds) -> Iterator[Alarm]:
    long_enough = start.row.get("completion_tokens", 0.0) >= SHORT
    if long_enough and "completion_tokens" in now.row:
        yield from _length(start, now, bounds)
    if long_enough and now.samples:
        yield from _form(start, now, bounds)
    kl = now.row.get("kl_sequence", 0.0)
    if kl > bounds.kl:
        words = f"The KL to the reference is {kl:.1f} nats a sequence, more than {bounds.kl:g}."
        yield Alarm("kl", start.row.get("kl_sequence", 0.0), kl, words)


def _length(start: Evaluation, now: Evaluation, bounds: AlarmBounds) -> Iterator[Alarm]:
    before, tokens = start.row["completion_tokens"], now.row["completion_tokens"]
    ratio = tokens / before
    if not 1 / bounds.length_ratio <= ratio <= bounds.length_ratio:
        words = f"Completions have {tokens:.1f} tokens, {ratio:.2f} times the initial policy's {before:.1f}."
        yield Alarm("length", before, tokens, words)
    if "eos_share" in start.row and "eos_share" in now.row:
        before, share = start.row["eos_share"], now.row["eos_share"]
        if share < bounds.eos_ratio * before:
            yield Alarm("ends", before, share, f"EOS ends {share:.0%} of the completions; at the start {before:.0%}.")


def _form(start: Evaluation, now: Evaluation, bounds: AlarmBounds) -> Iterator[Alarm]:
    before, empty = _empty_share(start.texts), _empty_share(now.texts)
    # At least as bad as at the start: a start that writes nothing half of the time is no sign of hacking.
    if empty > max(bounds.empty_share, before):
        yield Alarm("empty", before, empty, f"{empty:.0%} of the completions are empty.")
    if start.samples:
        before, distinct = distinct_n(start.texts, 2), distinct_n(now.texts, 2)
        if distinct < bounds.distinct_ratio * before:
            words = f"{distinct:.0%} of the completions' bigrams are distinct; at the start {before:.0%}."
            yield Alarm("bigrams", before, distinct, words)
    (text, times), n = _most_common(now.texts), len(now.texts)
    before = _most_common(start.texts)[1] / len(start.texts) if start.samples else 0.0
    # Twice may be chance, where two prompts have one right answer.
    if times > 2 and times / n > max(bounds.same_share, before):
        words = f"{times / n:.0%} of the prompts get the same completion: {text[:60]!r}."
        yield Alarm("sameness", before, times / n, words)


def _empty_share(texts: Sequence[str]) -> float:
    return sum(not text.strip() for text in texts) / len(texts) if texts else 0.0


def _most_common(texts: Sequence[str]) -> tuple[str, int]:
    return Counter(texts).most_common(1)[0]
