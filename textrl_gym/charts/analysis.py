"""What a comparison's page says in numbers and sentences; the statistics are those of stats.estimates and others.

Shape legend: S seeds, N prompts. Scores of runs are those of the last evaluation, on the same prompts for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from textrl_gym.experiments.results import Comparison, Group, Result
from textrl_gym.stats import estimates, overoptimization, pairwise
from textrl_gym.stats.estimates import Array, Estimate

Number = Estimate | float | None
"""A number with its interval, without one, or none."""

POINTS = 30
"""Of a learning curve."""
LINE_POINTS = 60
"""Of a curve of training rollouts: where there are more updates, neighbours are averaged."""
FIT_POINTS = 4
"""Evaluations at different KLs that a curve of two parameters is fitted to, at least."""


# -- the summary ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A line of the table."""

    group: Group
    gold: Number
    """Interquartile mean over seeds."""
    win_rate: Number
    """Against the initial policy, on the same prompts."""
    length_controlled: Number
    collapsed: tuple[int, int] | None
    """How many runs, of how many that were evaluated at their start and their end."""

    def mean(self, key: str) -> float | None:
        """Mean over seeds of a number of the last evaluation."""
        values = self.group.finals(key)
        return float(np.mean(values)) if values else None


def summarise(comparison: Comparison, group: Group) -> Summary:
    """One line; an interval is there where there is something to make it from."""
    rate, controlled = against_start(group, comparison.gold)
    return Summary(
        group, iqm_of_seeds(group.finals(comparison.gold)), rate, controlled, count_collapsed(group, comparison.gold)
    )


def iqm_of_seeds(scores: Sequence[float]) -> Number:
    """With its interval from two runs on."""
    return float(scores[0]) if len(scores) == 1 else estimates.iqm([scores])


def against_start(group: Group, gold: str) -> tuple[Number, Number]:
    """Win rate against the initial policy, and the same at equal lengths.

    The runs' outcomes are averaged for each prompt, so the intervals are about other prompts and not
    about other seeds.
    """
    pairs = [(run.column(gold), run.start(gold)) for run in group.runs if run.episodes]
    won = [estimates.outcomes(own_N, start_N) for own_N, start_N in pairs if start_N is not None]
    # Where completions were not kept, only the runs' own win rates are left, whose spread over prompts nobody knows.
    if not won or len(won) < len(group.runs) or len({len(won_N) for won_N in won}) > 1:
        rates = group.finals("win_rate")
        return (float(np.mean(rates)) if rates else None), None
    # Averaged over seeds first: counting a prompt once for each seed would take its seeds for other prompts.
    prompts = group.runs[0].prompts
    outcome_N = estimates.by_prompt(np.mean(won, axis=0), prompts)
    rate = pairwise.win_rate(outcome_N)
    longer = []
    for run in group.runs:
        start_N = run.start("tokens")
        if start_N is None:
            return rate, None
        longer.append(run.column("tokens") - start_N)
    difference_N = estimates.by_prompt(np.mean(longer, axis=0), prompts)
    if len(outcome_N) < 3 or (np.ptp(difference_N) == 0 and difference_N[0] != 0):
        return rate, None  # what length does cannot be told
    return rate, pairwise.length_controlled_win_rate(outcome_N, difference_N).win_rate


def count_collapsed(group: Group, gold: str) -> tuple[int, int] | None:
    """Runs that end below their start, by the evaluations of training: the same prompts at both times."""
    ends = [(rows[0][gold], rows[-1][gold]) for rows in trained(group, gold)]
    if not ends:
        return None
    start_R, final_R = np.array(ends).T
    # Not the last evaluation, which has more prompts than the first, so that a start would look poorer or better than
    # it was.
    return int(overoptimization.collapsed(start_R, final_R).sum()), len(ends)


def trained(group: Group, *keys: str) -> list[list[dict[str, float]]]:
    """Evaluations that have all the numbers, of each run that has at least two: those of runs that trained."""
    rows = [[row for row in run.evaluations if all(key in row for key in keys)] for run in group.runs]
    return [some for some in rows if len(some) > 1]


# -- sentences --------------------------------------------------------------------------------------------------------


def headline(comparison: Comparison) -> str:
    """The result in a sentence: who beats the initial policy, on how many prompts, and who of these is ahead."""
    rates = [(group, against_start(group, comparison.gold)[0]) for group in comparison.groups if not group.untrained]
    known = [(group, rate) for group, rate in rates if isinstance(rate, Estimate)]
    if not known:
        return ""
    # Plural and singular of what is said of agents whose interval is above one half, below it, or holds it.
    verbs = {1: ("beat", "beats"), -1: ("lose to", "loses to"), 0: ("cannot be told from", "cannot be told from")}
    win = {1: ("", ""), -1: (": they win", ": it wins"), 0: (": they win", ": it wins")}
    sentences = []
    for side, (plural, singular) in verbs.items():
        some = [pair for pair in known if (pair[1].low > 0.5) - (pair[1].high < 0.5) == side]
        if some:
            verb, but = (singular, win[side][1]) if len(some) == 1 else (plural, win[side][0])
            wins = _wins([rate for _, rate in some], counted(comparison.prompt_counts))
            who = _who([group.label for group, _ in some], len(known))
            sentences.append(f"{who} {verb} the initial policy{but} {wins}")
    return "; ".join([*sentences, *_who_is_ahead(comparison, [group for group, _ in known])]) + "."


def _who(names: Sequence[str], of: int) -> str:
    """The names of some of the trained agents; of all of them also how many they are."""
    if len(names) < of or of == 1:
        return listed(names)
    return f"{'Both' if of == 2 else f'All {of}'} trained agents ({listed(names)})"


def counted(numbers: Sequence[int]) -> str:
    """256, or 64 to 256."""
    low, high = f"{min(numbers):,}", f"{max(numbers):,}"
    return low if low == high else f"{low} to {high}"


def _wins(rates: Sequence[Estimate], episodes: str) -> str:
    """On 89 to 91% of 256 held-out prompts (95%: 85 to 93%)."""
    shares = [f"{100 * value:.0f}" for value in sorted(rate.value for rate in rates)]
    share = shares[0] if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]}"
    low, high = min(rate.low for rate in rates), max(rate.high for rate in rates)
    return f"on {share}% of {episodes} held-out prompts (95%: {100 * low:.0f} to {100 * high:.0f}%)"


def _who_is_ahead(comparison: Comparison, groups: Sequence[Group]) -> list[str]:
    """Whether one trained agent is ahead of all others, as `verdicts` has it."""
    if len(groups) < 2:
        return []
    ordered = sorted(groups, key=lambda group: -float(np.mean(group.finals(comparison.gold))))
    best, confidence = ordered[0], pair_confidence(len(comparison.groups))
    paired, _ = comparison.same_prompts()
    spread = seed_spread(comparison)
    seeds = {len(group.runs) for group in groups}
    number = f"{min(seeds)} seed{'s' * (min(seeds) != 1)}"
    if spread is None or any(group not in paired for group in groups):
        return [f"which of them is better, {number} cannot tell"]
    gaps = [paired_gap(comparison, best, other, spread, confidence) for other in ordered[1:]]
    if all(gap is not None and gap.low > 0 for gap in gaps):
        least = min((gap for gap in gaps if gap is not None), key=lambda gap: gap.low)
        level = f"{100 * confidence:g}%"
        others = "the other" if len(groups) == 2 else "every other one"
        return [
            f"{best.label} is ahead of {others}, by {least.value:.2f} ({level}: {least.low:.2f} to {least.high:.2f})"
        ]
    which = "which of the two" if len(groups) == 2 else "which of them"
    return [f"{which} is better, {number} cannot tell"]


def verdicts(comparison: Comparison) -> tuple[list[str], list[str]]:
    """Sentences on the group that is ahead against each other one, and on all other pairs.

    The confidence is raised until one in twenty pages, and not one in twenty sentences, says something wrong. Agents
    that met the same prompts are compared prompt by prompt, with a spread of seeds that all of them share.
    """
    # The one ahead first: what a reader asks is whether it really is ahead.
    groups = sorted(comparison.groups, key=lambda group: -float(np.mean(group.finals(comparison.gold))))
    confidence = pair_confidence(len(groups))
    paired, _ = comparison.same_prompts()
    spread = seed_spread(comparison)
    first: list[str] = []
    rest: list[str] = []
    for a, b in itertools.combinations(groups, 2):
        scores = [x.finals(comparison.gold) for x in (a, b)]
        # One number for all seeds: an untrained agent's seeds are no sample of anything.
        seeds = [x[0] if group.untrained else x for x, group in zip(scores, (a, b), strict=True)]
        gap = None
        if a in paired and b in paired and spread is not None:
            gap = paired_gap(comparison, a, b, spread, confidence)
        sentence = estimates.verdict(a.label, seeds[0], b.label, seeds[1], confidence=confidence, difference=gap)
        (first if a is groups[0] else rest).append(f"{a.label} and {b.label}: {sentence}")
    return first, rest


def seed_spread(comparison: Comparison) -> estimates.Spread | None:
    """How much runs differ from seed to seed, pooled over all trained agents; None: no agent has a second seed."""
    rows = [group.finals(comparison.gold) for group in comparison.groups if not group.untrained]
    return estimates.pooled_spread(rows) if rows else None


def paired_gap(
    comparison: Comparison, a: Group, b: Group, spread: estimates.Spread | None, confidence: float = 0.95
) -> Estimate | None:
    """Mean gold of a minus that of b on the same prompts, over prompts and seeds; None of a single prompt.

    Without a spread of seeds every agent has one run, and the interval is about these two runs and no others.
    """
    a_SN, b_SN = (group.scores_of_prompts(comparison.gold) for group in (a, b))
    if a_SN.shape[1] < 2:
        return None
    trained_runs = [len(group.runs) for group in (a, b) if not group.untrained]
    of_seeds = spread.of_difference(*trained_runs) if spread is not None and trained_runs else None
    mean = estimates.paired_difference(a_SN, b_SN, confidence=confidence, of_seeds=of_seeds).mean
    scale = comparison.scale(comparison.gold)
    return mean if scale is None else mean.within((scale[0] - scale[1], scale[1] - scale[0]))


def pair_confidence(groups: int) -> float:
    """95% for all pairs at once, by Bonferroni, rounded up to a thousandth or finer."""
    # Rounded up, so that the level that is printed is never more than what is kept.
    pairs = max(groups * (groups - 1) // 2, 1)
    digits = 2 if pairs == 1 else 3 + math.floor(math.log10(pairs))
    return round(math.ceil((1 - 0.05 / pairs) * 10**digits - 1e-9) / 10**digits, digits)


def cautions(comparison: Comparison) -> list[str]:
    """What cannot be said, in sentences."""
    sentences = []
    trained = [group for group in comparison.groups if not group.untrained]
    seeds = [len(group.runs) for group in trained]
    if 1 in seeds:
        single = [group.label for group in trained if len(group.runs) == 1]
        who = "Every agent" if len(single) == len(seeds) > 1 else listed(single)
        # With a second seed of any agent the spread is pooled (`seed_spread`).
        without = "there is no interval over seeds"
        borrowed = "intervals take the other agents' spread over seeds for theirs"
        sentences.append(
            f"{who} {'have' if 1 < len(single) < len(seeds) else 'has'} one seed: "
            f"{without if set(seeds) == {1} else borrowed}, and another seed may turn any order round."
        )
    several = [s for s in seeds if s > 1]
    if several and min(several) < 10:
        sentences.append(
            f"{min(several)} seeds: the interval of an interquartile mean is too short for so few. In simulations one "
            "that is called 95% held the truth in 76% of cases with 3 seeds, 90% with 5 and 94% with 10."
        )
    if comparison.gold == "score":
        sentences.append(
            "There is no gold score: the score that is compared is the reward that was trained on, and a policy that "
            "exploits it cannot be told from one that is good."
        )
    if comparison.failed:
        sentences.append(
            "Runs that failed are left out of every number. Where an agent's failures are its bad runs, its numbers "
            "flatter it."
        )
    return sentences


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- curves -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Mean, lowest and highest seed at some places."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def learning_curve(group: Group, x_key: str, gold: str) -> Curve | None:
    """Over the range that all seeds cover, straight between evaluations; None where nothing was trained."""
    runs = trained(group, x_key, gold)
    if not runs:
        return None
    lines = [([row[x_key] for row in rows], [row[gold] for row in rows]) for rows in runs]
    # Only where all seeds were evaluated: beyond, the mean would jump as a seed drops out.
    grid = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), POINTS)
    value_SN = np.array([np.interp(grid, x, y) for x, y in lines])
    return Curve(grid.tolist(), value_SN.mean(0).tolist(), value_SN.min(0).tolist(), value_SN.max(0).tolist())


def rollout_curve(group: Group, key: str) -> Curve | None:
    """Means over seeds of a number of each update's rollout, over tokens; None where no run has logged it."""
    x_key, lines = "time/total_timesteps", []
    for run in group.runs:
        point_N2 = np.array([(row[x_key], row[key]) for row in run.rollouts if x_key in row and key in row], float)
        if len(point_N2) > 1:
            blocks = np.array_split(point_N2[point_N2[:, 0].argsort()], min(LINE_POINTS, len(point_N2)))
            lines.append(np.array([block.mean(0) for block in blocks]))
    if not lines:
        return None
    grid = np.linspace(max(line[0, 0] for line in lines), min(line[-1, 0] for line in lines), len(lines[0]))
    value_SN = np.array([np.interp(grid, line[:, 0], line[:, 1]) for line in lines])
    return Curve(grid.tolist(), value_SN.mean(0).tolist(), value_SN.min(0).tolist(), value_SN.max(0).tolist())


def best_of_n_kls(comparison: Comparison) -> dict[int, float]:
    """n of every agent best_of_n -> the bound of its KL, in nats."""
    configs = [run.state.get("config", {}) for run in comparison.runs if run.state.get("agent") == "best_of_n"]
    sizes = {config["n"] for config in configs if isinstance(config.get("n"), int) and config["n"] > 0}
    return {n: overoptimization.best_of_n_kl_bound(n) for n in sorted(sizes)}


# -- pairs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two groups on the same prompts."""

    first: Group
    second: Group
    win_rate: Estimate
    """Of the first; the mean over all pairs of their runs. The interval is over prompts."""
    difference: Estimate | None
    """Mean gold of the first minus that of the second, over prompts and seeds (`paired_gap`)."""
    improvement: Estimate
    """Probability that a run of the first scores higher than one of the second."""


@dataclass(frozen=True)
class Rating:
    """A group's Bradley-Terry rating: the mean of its runs', in Elo points."""

    group: Group
    value: float
    low: float
    """Of several seeds the lowest; of one the lower end of its interval over prompts."""
    high: float


def pairs(comparison: Comparison, groups: Sequence[Group]) -> list[Pair]:
    """Every two groups, once."""
    gold = {group.label: np.stack([run.column(comparison.gold) for run in group.runs]) for group in groups}
    prompts = groups[0].runs[0].prompts if groups else []
    spread = seed_spread(comparison)
    compared = []
    for a, b in itertools.combinations(groups, 2):
        a_SN, b_SN = gold[a.label], gold[b.label]
        outcome_N = estimates.by_prompt(estimates.outcomes(a_SN[:, None], b_SN[None]).mean((0, 1)), prompts)
        difference = paired_gap(comparison, a, b, spread)
        scores = [a.finals(comparison.gold)], [b.finals(comparison.gold)]
        improvement = estimates.probability_of_improvement(*scores)
        # The win rate is over prompts, the chance to be better over runs: two questions that may have different
        # answers.
        compared.append(Pair(a, b, pairwise.win_rate(outcome_N), difference, improvement))
    return compared


def ratings(comparison: Comparison, groups: Sequence[Group]) -> list[Rating]:
    """Every run is a player that met every other on each prompt; the best group first."""
    score_AN: Array = np.concatenate([group.scores_of_prompts(comparison.gold) for group in groups])
    if score_AN.shape[0] < 2 or score_AN.shape[1] < 2:
        return []
    # 500 resamples: the ends of the intervals are shown as whole Elo points.
    rated = iter(pairwise.bradley_terry_on_prompts(score_AN, resamples=500))
    all_ratings = []
    for group in groups:
        own = [next(rated).scaled(pairwise.ELO_PER_NAT) for _ in group.runs]
        values = [estimate.value for estimate in own]
        # Seeds differ by more than prompts leave open, so the range over seeds is the honest one where there are
        # several.
        low, high = (own[0].low, own[0].high) if len(own) == 1 else (min(values), max(values))
        all_ratings.append(Rating(group, float(np.mean(values)), low, high))
    return sorted(all_ratings, key=lambda rating: -rating.value)


# -- profile, over-optimisation, length -------------------------------------------------------------------------------


def score_profile(comparison: Comparison) -> tuple[list[float], dict[str, list[Estimate]]]:
    """Thresholds, and for each group the share of its runs above them; one seed has no interval.

    The thresholds are the scores of all runs, where alone a share can change, and one on either side.
    """
    scores = sorted({score for group in comparison.groups for score in group.finals(comparison.gold)})
    # All scores equal: the steps still need some room.
    margin = 0.05 * (scores[-1] - scores[0]) or 0.5
    threshold_K = np.array([scores[0] - margin, *scores, scores[-1] + margin])
    profiles = {}
    for group in comparison.groups:
        own = group.finals(comparison.gold)
        if len(own) > 1:
            profiles[group.label] = estimates.performance_profile([own], threshold_K)
        else:
            # nan and not a point: one seed says nothing of how much another would differ.
            share = (own[0] > threshold_K).astype(float).tolist()
            profiles[group.label] = [Estimate(s, math.nan, math.nan) for s in share]
    return threshold_K.tolist(), profiles


@dataclass(frozen=True)
class Training:
    """A group's way through training: its evaluations by KL, all seeds together."""

    group: Group
    kl: list[float]
    gold: list[float]
    proxy: list[float]
    start: float
    """Mean gold of the starts."""
    best: tuple[float, float]
    """Of the mean gold by evaluation: the KL where it is highest, and how high."""
    end: tuple[float, float]
    fit: overoptimization.GoldCurve | None


def training(group: Group) -> Training | None:
    """Gold, proxy and KL through training; None where there is no gold score, or nothing was trained.

    KLs are estimates and may fall below 0, where the curve is not defined: those count as 0.
    """
    runs = trained(group, "gold", "score", "kl_sequence")
    if not runs:
        return None
    rows = sorted((row for some in runs for row in some), key=lambda row: row["kl_sequence"])
    # Estimated by k1, whose mean over few prompts may be negative.
    kl_N = np.maximum([row["kl_sequence"] for row in rows], 0.0)
    start = float(np.mean([some[0]["gold"] for some in runs]))
    # Seeds stop after different numbers of updates, since the last rollout is whole.
    together = list(zip(*runs, strict=False))  # the seeds' evaluations by number; the last is added below
    means = [(mean_of_key(rows_S, "kl_sequence"), mean_of_key(rows_S, "gold")) for rows_S in together]
    end = (mean_of_key([some[-1] for some in runs], "kl_sequence"), mean_of_key([some[-1] for some in runs], "gold"))
    gain_N = np.array([row["gold"] for row in rows]) - start
    enough = len(set(kl_N[kl_N > 0].tolist())) >= FIT_POINTS
    fit = overoptimization.fit_gold_curve(kl_N, gain_N, "rl") if enough else None
    gold, proxy = [row["gold"] for row in rows], [row["score"] for row in rows]
    # Of the mean over seeds and not of each seed: the best of single seeds would be the luckiest.
    best = max([*means, end], key=lambda point: point[1])
    return Training(group, kl_N.tolist(), gold, proxy, start, best, end, fit)


def mean_of_key(rows: Sequence[dict[str, float]], key: str) -> float:
    """Mean of a number over rows."""
    return float(np.mean([row[key] for row in rows]))


def length_trend(group: Group, key: str) -> overoptimization.LengthTrend | None:
    """Score against tokens of all completions of the last evaluations; None where there is no slope."""
    runs = [run for run in group.runs if run.episodes and all(key in e and "tokens" in e for e in run.episodes)]
    if not runs or sum(len(run.episodes) for run in runs) < 3:
        return None
    score_N, length_N = (np.concatenate([run.column(name) for run in runs]) for name in (key, "tokens"))
    return overoptimization.reward_against_length(score_N, length_N, buckets=10)


# -- cost -------------------------------------------------------------------------------------------------------------


def texts(run: Result) -> float | None:
    """Completions of training: each rollout's tokens by its mean length; None where no log was kept."""
    known = [row for row in run.rollouts if "time/total_timesteps" in row and row.get("rollout/completion_tokens")]
    rows = sorted(known, key=lambda row: row["time/total_timesteps"])
    done_N = np.array([0, *(row["time/total_timesteps"] for row in rows)], float)
    length_N = np.array([row["rollout/completion_tokens"] for row in rows], float)
    return float((np.diff(done_N) / length_N).sum()) if rows else None


def flop(run: Result) -> float | None:
    """Floating-point operations of training: those of the first rollout and update, times tokens by their tokens."""
    if not run.flops:
        return None
    return run.flops["flop"] / run.flops["tokens"] * run.final["timesteps"]


def mean_known(group: Group, number: Callable[[Result], float | None]) -> float | None:
    """Mean over the runs that have the number; None where none has."""
    known = [x for run in group.runs if (x := number(run)) is not None]
    return float(np.mean(known)) if known else None
