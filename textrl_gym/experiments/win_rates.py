"""Win rates by a judge: of the answers of an evaluation, and of all runs of a comparison, which need no model for it.

An answer is judged as a text. Rewards that read tokens get those that the task's tokenizer makes of it, which may be
others than were sampled, with EOS where the answer had ended.

Shape legend: N prompts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_gym.core import PromptSource, Row, StopReason
from textrl_gym.data.encoding import codec
from textrl_gym.experiments.results import EPISODES, Comparison, Group, Result
from textrl_gym.judges.judge import Answer, Judge
from textrl_gym.registry import unknown
from textrl_gym.stats import pairwise
from textrl_gym.stats.estimates import Array, Estimate, by_prompt

if TYPE_CHECKING:
    from pandas import DataFrame

    from textrl_gym.judges.annotators import Annotators
    from textrl_gym.mdp.task import Task


START, HUMAN = "start", "human"
"""Opponents that are no agents: what the model answered from which all began, and the rows' reference texts."""

Sample = Mapping[str, Any]
"""An answer as an evaluation writes it down: index, prompt, completion, tokens, stop_reason, reference."""


# -- the result -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tally:
    """How often answers were preferred to others."""

    wins: int
    ties: int
    losses: int
    no_verdict: int
    """Pairs that the judge said nothing clear about; they are in no rate."""
    win_rate: Estimate | None
    """With Wilson's interval; None without any verdict."""
    length_controlled: Estimate | None
    """At equal lengths; None where what length does cannot be told."""

    def numbers(self) -> dict[str, float]:
        """Everything by name; what there is not is left out."""
        numbers: dict[str, float] = {name: getattr(self, name) for name in ("wins", "ties", "losses", "no_verdict")}
        for name in ("win_rate", "length_controlled"):
            estimate = getattr(self, name)
            if estimate is not None:
                numbers |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return numbers


def tally(outcome_N: Array, longer_N: Array, prompts: Sequence[str]) -> Tally:
    """Count outcomes (nan: no verdict); the rates are over prompts.

    Args:
        longer_N: the length of the one answer less that of the other, in any unit.
        prompts: of the answers; one may stand there several times.
    """
    judged_N = ~np.isnan(outcome_N)
    verdict_N, prompts = (
        outcome_N[judged_N],
        [prompt for prompt, judged in zip(prompts, judged_N, strict=True) if judged],
    )
    outcome_N, longer_N = by_prompt(verdict_N, prompts), by_prompt(longer_N[judged_N], prompts)
    controlled = None
    # Three numbers are the least from which two parameters leave anything over for an error.
    if len(outcome_N) >= 3 and (np.ptp(longer_N) > 0 or longer_N[0] == 0):
        controlled = pairwise.length_controlled_win_rate(outcome_N, longer_N).win_rate
    return Tally(
        wins=int((verdict_N > 0.5).sum()),
        ties=int((verdict_N == 0.5).sum()),
        losses=int((verdict_N < 0.5).sum()),
        no_verdict=int((~judged_N).sum()),
        win_rate=pairwise.win_rate(outcome_N) if len(outcome_N) else None,
        length_controlled=controlled,
    )


# -- pairs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a task knows of a prompt beside its text, and the tokens of texts; without a task there is nothing."""

    task: Any = None
    tokenizer: Any = None
    source: PromptSource | None = None
    """The rows that an answer's index counts."""
    max_prompt_tokens: int = 0

    def row(self, sample: Sample) -> Row:
        """The prompt's row, where the source has it under its index; else what the sample tells. With its tokens."""
        index = sample["index"]
        # A saved index may be of another data set, or of another version of it; the prompt says whether it is the same
        # row.
        row: Row | None = self.source[index] if self.source is not None and index < len(self.source) else None
        if row is None or row["prompt"] != sample["prompt"]:
            row = {"prompt": sample["prompt"], "completion": sample.get("reference")}
        if self.tokenizer is None:
            return row
        return {**row, "prompt_ids": self.task.encode(row, self.tokenizer, self.max_prompt_tokens)}

    def answer(self, prompt: str, text: str, stop_reason: str) -> Answer:
        """The text with its tokens behind the prompt. Words of another vocabulary, which have none, are left out."""
        if self.tokenizer is None:
            return Answer(text)
        # A completion that ran out of its budget has no EOS, and a reward model tells the two apart.
        end = (self.tokenizer.eos_token_id,) if stop_reason == StopReason.EOS.name else ()
        (ids,) = codec(self.tokenizer).completions(prompt, [text], unknown="skip")
        return Answer(text, (*ids, *end))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Answers to the same prompts, side by side."""

    rows: list[Row]
    own: list[Answer]
    other: list[Answer]
    longer_N: Array
    """Length of the own answer less that of the other: in tokens; against reference texts in words."""

    @property
    def prompts(self) -> list[str]:
        """The text of every pair's prompt."""
        return [row["prompt"] for row in self.rows]


def against_answers(own: Sequence[Sample], other: Sequence[Sample], reader: Reader) -> Pairs:
    """Answers beside another's to the same prompts.

    Raises:
        ValueError: they are not the same.
    """
    _check_single_turn([*own, *other])
    if [sample["prompt"] for sample in own] != [sample["prompt"] for sample in other]:
        raise ValueError("the two answered different prompts, so that there is nothing to judge")
    return Pairs(
        [reader.row(sample) for sample in own],
        [reader.answer(sample["prompt"], sample["completion"], sample["stop_reason"]) for sample in own],
        [reader.answer(sample["prompt"], sample["completion"], sample["stop_reason"]) for sample in other],
        np.array([a["tokens"] - b["tokens"] for a, b in zip(own, other, strict=True)], float),
    )


def _check_single_turn(samples: Sequence[Sample]) -> None:
    if any("turns" in sample for sample in samples):
        raise ValueError("the samples are conversations, and judges compare completions of a single turn")


def against_references(own: Sequence[Sample], reader: Reader) -> Pairs:
    """Answers beside the reference texts of their prompts; prompts without one are left out.

    Raises:
        ValueError: there is none.
    """
    _check_single_turn(own)
    own = [sample for sample in own if sample.get("reference")]
    if not own:
        raise ValueError(f"against {HUMAN!r}: the prompts have no reference texts")
    return Pairs(
        [reader.row(sample) for sample in own],
        [reader.answer(sample["prompt"], sample["completion"], sample["stop_reason"]) for sample in own],
        [reader.answer(sample["prompt"], sample["reference"], StopReason.EOS.name) for sample in own],
        np.array([len(s["completion"].split()) - len(s["reference"].split()) for s in own], float),
    )


def by_annotators(episodes: Sequence[Sample], annotators: Annotators, task: Task, source: PromptSource) -> Tally:
    """How simulated annotators prefer answers to the initial policy's, each pair by its probability of a win.

    Args:
        episodes: answers to embedded prompts with their gold scores, and with the initial policy's as `start`.
        source: the rows that an answer's index counts.
    """
    rows = [source[episode["index"]] for episode in episodes]

    def seen(answers: Sequence[Sample]) -> tuple[Array, Array]:
        appeal_N = [task.appeal(row, answer["completion"]) for row, answer in zip(rows, answers, strict=True)]
        words_N = [len(answer["completion"].split()) for answer in answers]
        gold_N = np.array([answer["gold"] for answer in answers], float)
        return gold_N + annotators.bias * np.array(appeal_N), np.array(words_N, float)

    own_N, own_words_N = seen(episodes)
    start_N, start_words_N = seen([episode["start"] for episode in episodes])
    outcome_N = annotators.probability(own_N, start_N, own_words_N, start_words_N)
    return tally(outcome_N, own_words_N - start_words_N, [str(episode["index"]) for episode in episodes])


# -- a comparison -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class JudgedRun:
    """A run's answers against their opponents."""

    group: Group
    run: Result
    outcome_N: Array
    """nan: no verdict."""
    longer_N: Array
    prompts: list[str]


def judge_runs(comparison: Comparison, judge: Judge, against: str, reader: Reader) -> list[JudgedRun]:
    """Judge every finished run; an agent that is the opponent is not judged against itself.

    Args:
        comparison: what read_comparison gives.
        judge: who prefers.
        against: "start", "human" or an agent as the comparison's page calls it. The opponent of a run is then that
            agent's run of the same seed, or else its first.
        reader: of the comparison's task.

    Raises:
        ValueError: an unknown opponent, runs without answers, answers to different prompts.
    """
    opponents = {group.label: group for group in comparison.groups}
    if against not in (START, HUMAN, *opponents):
        raise unknown("opponent", against, (START, HUMAN, *opponents))
    compared = [
        (group, run, _pairs(run, opponents.get(against), against, reader))
        for group in comparison.groups
        if group.label != against
        for run in group.runs
    ]
    if not compared:
        raise ValueError(f"no run is left to be judged against {against!r}")
    # All runs in one call: a judge over the network asks many questions at a time.
    rows, own, other = ([x for _, _, p in compared for x in getattr(p, name)] for name in ("rows", "own", "other"))
    outcomes = np.split(judge.prefer(rows, own, other), np.cumsum([len(pairs.rows) for _, _, pairs in compared])[:-1])
    return [
        JudgedRun(group, run, outcome_N, pairs.longer_N, pairs.prompts)
        for (group, run, pairs), outcome_N in zip(compared, outcomes, strict=True)
    ]


def _pairs(run: Result, opponent: Group | None, against: str, reader: Reader) -> Pairs:
    if not run.episodes:
        raise ValueError(f"the run {run.name} holds no answers: no {EPISODES}")
    if opponent is not None:
        # The same seed where there is one, so that no opponent is chosen for its luck.
        other = next((r for r in opponent.runs if r.spec["seed"] == run.spec["seed"]), opponent.runs[0])
        return against_answers(run.episodes, other.episodes, reader)
    if against == HUMAN:
        return against_references(run.episodes, reader)
    if not all("start" in episode for episode in run.episodes):
        raise ValueError(f"the run {run.name} has not kept the initial policy's completions: judge it against an agent")
    return against_answers(run.episodes, [{**e["start"], "prompt": e["prompt"]} for e in run.episodes], reader)


def table_of_runs(judged: Sequence[JudgedRun], judge: str, against: str) -> DataFrame:
    """A DataFrame with a line for each run: run, agent, seed, kl_coef, judge, against and the numbers of its Tally."""
    import pandas as pd

    names = ["run", "agent", "seed", "kl_coef", "judge", "against", "wins", "ties", "losses", "no_verdict"]
    names += [f"{rate}{end}" for rate in ("win_rate", "length_controlled") for end in ("", "_low", "_high")]
    rows = []
    for one in judged:
        spec = {"run": one.run.name, "agent": one.group.agent, "seed": one.run.spec["seed"]}
        spec |= {"kl_coef": one.group.kl_coef, "judge": judge, "against": against}
        rows.append(spec | tally(one.outcome_N, one.longer_N, one.prompts).numbers())
    return pd.DataFrame(rows, columns=names)


def by_agent(judged: Sequence[JudgedRun]) -> Iterator[tuple[Group, Tally]]:
    """One tally for each agent and KL coefficient, of each prompt's mean outcome over seeds.

    So its intervals are about other prompts, and not about other seeds.
    """
    for group in dict.fromkeys(one.group for one in judged):
        runs = [one for one in judged if one.group is group]
        outcome_SN = np.stack([one.outcome_N for one in runs])
        count_N = (~np.isnan(outcome_SN)).sum(0)
        outcome_N = np.where(count_N > 0, np.nansum(outcome_SN, 0) / np.maximum(count_N, 1), np.nan)
        yield group, tally(outcome_N, np.mean([one.longer_N for one in runs], 0), runs[0].prompts)


def file_name(judge: str, against: str) -> str:
    """Where a comparison's folder keeps what a judge has found."""
    return f"judged-{_plain(judge)}-{_plain(against)}.csv"


def _plain(name: str) -> str:
    # A judge's name may be an address or a path, which no file's name can hold.
    return re.sub(r"[^\w.]+", "-", name).strip("-")
