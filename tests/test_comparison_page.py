"""The page of a comparison: its numbers are those of statistics, its texts are escaped, and it works in a browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from chromium import Browser

from textrl_gym.charts import analysis as numbers
from textrl_gym.charts.comparison import charts
from textrl_gym.charts.export_figures import printed
from textrl_gym.charts.plotting import DARK, LIGHT, extent
from textrl_gym.charts.training_curves import level_of
from textrl_gym.cli import main
from textrl_gym.cli.compare import show_page
from textrl_gym.experiments.results import read_comparison, tidy
from textrl_gym.reports import run_page
from textrl_gym.reports.comparison_page import comparison_report, embedded
from textrl_gym.reports.credit_section import scale
from textrl_gym.reports.lesson_page import mean_and_interval
from textrl_gym.stats import estimates, pairwise
from textrl_gym.training.run_folder import alarms, read_run

EVIL = '<script>document.title = "owned"</script>&amp;<img src=x onerror=alert(1)>'
PROMPTS = ["first question", "second question", EVIL, "the fourth"]
START = [0.2, 0.4, 0.4, 0.3]
"""Gold of the start's answers, of 3 tokens each."""
ALPHA = {0: [0.3, 0.4, 0.5, 0.4], 1: [0.4, 0.5, 0.6, 0.5], 2: [0.5, 0.6, 0.7, 0.6]}
BETA = {0: [0.1, 0.4, 0.3, 0.2]}


def write_run(
    folder: Path,
    agent: str,
    seed: int,
    gold: list[float],
    has_gold: bool = True,
    coef: float | None = None,
    **state: Any,
) -> None:
    """A finished run with gold for each prompt; its evaluations rise from 0.3 to its mean gold, and its KL to 2."""
    folder.mkdir(parents=True)
    spec = {"environment": "CopyText-v0", "agent": agent, "seed": seed, "kl_coef": coef, "total_timesteps": 400}
    mean, key = float(np.mean(gold)), "gold" if has_gold else "score"
    common = {"score": 2 * mean, "kl_token": 0.1, "completion_tokens": 4.0, "eos_share": 0.5, "win_rate": 0.75}
    common |= {"distinct_2": 0.25 + 0.125 * seed, "repetition": 0.0625} if has_gold else {}
    final = {"timesteps": 410, "updates": 5, **common, "kl_sequence": 2.0, key: mean, "train_seconds": 3.0 + seed}
    rows = [
        {"timesteps": 100 * i, **common, "kl_sequence": 0.5 * i, "train_seconds": i * (1.0 + seed)}
        | {key: 0.3 + (mean - 0.3) * i / 4}
        for i in range(5)
    ]
    episodes = [
        {"index": i, "prompt": prompt, "completion": f"{agent} says {i} {EVIL}", "tokens": 2 + i, "score": 2 * value}
        | {"stop_reason": "EOS", "reference": None, key: value}
        | {"start": {"completion": "a start", "tokens": 3, "score": 0.1, key: START[i]}}
        for i, (prompt, value) in enumerate(zip(PROMPTS, gold, strict=True))
    ]
    known = {"agent": agent, "seed": seed, "kl_coef": 0.02, "config": {"learning_rate": 1e-3}, "num_updates": 5}
    known |= {"seconds": {"collect": 1.0, "update": 2.0, "evaluate": 0.5}, "streams": {"secret": "never shown"}} | state
    for name, data in (("cell.json", spec), ("evaluation.json", final), ("agent.json", known)):
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
    for name, lines in (("evaluations.jsonl", rows), ("episodes.jsonl", episodes)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if has_gold and agent != "old":
        write_cost_and_credit(folder, critic=agent != "alpha")


TOKENS = [[" the", EVIL, "\n", "", "é", ""], ["no", ""]]
ADVANTAGE = [0.5, -0.5, 0.25, 0.0, 2.0, -4.0]
"""Of the tokens of a first text, without a critic; with one each half of it. A second text has 0."""


def write_cost_and_credit(folder: Path, critic: bool) -> None:
    """200 tokens in texts of 4, 200 in texts of 5; 1000 operations for the first 200. Two texts of each of two."""
    rows = [{"time/total_timesteps": 200, "rollout/completion_tokens": 4.0}]
    rows.append({"time/total_timesteps": 400, "rollout/completion_tokens": 5.0})
    (folder / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "flops.json").write_text('{"flop": 1000, "tokens": 200}')
    lines = []
    for prompt in PROMPTS[:3:2]:
        for number, tokens in enumerate(TOKENS):
            zeros = [0.0] * len(tokens)
            advantage = [x / (1 + critic) for x in ADVANTAGE] if number == 0 else zeros
            lines.append(
                {"index": 0, "prompt": prompt, "completion": "".join(tokens), "tokens": tokens, "score": 0.75}
                | {"group_scores": [0.75, 0.25], "stop_reason": "LENGTH" if number else "EOS", "kl": zeros}
                | {"ratio": [1.0] * len(tokens), "entropy": [None] * len(tokens), "advantage": advantage}
                | ({"value": [0.5] * len(tokens)} if critic else {})
            )
    (folder / "credit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_plan(folder: Path, *agents: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"agents": agents, "seeds": 3, "total_timesteps": 400, "kl_coef": [], "set": [], "eval_episodes": 4}
    plan = {"environment": "CopyText-v0", "config": config, "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    (folder / "compare.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def write_unfinished(folder: Path, agent: str, error: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps({"agent": agent, "seed": 0, "kl_coef": None, "total_timesteps": 400}))
    if error:
        (folder / "error.txt").write_text(error + "\n")
    else:
        (folder / "progress.json").write_text('{"time/total_timesteps": 120}\n')


def write_comparison(folder: Path, has_gold: bool = True) -> Path:
    """alpha with three seeds, beta with one, a run that failed and one that is not finished."""
    write_plan(folder, "alpha", "my:Beta", "gamma")
    for seed, gold in ALPHA.items():
        write_run(folder / "runs" / f"alpha-{seed}", "alpha", seed, gold, has_gold)
    write_run(folder / "runs" / "my.Beta-0", "my:Beta", 0, BETA[0], has_gold)
    write_unfinished(folder / "runs" / "gamma-0", "gamma", f"RuntimeError: the loss is NaN {EVIL}")
    write_unfinished(folder / "runs" / "gamma-1", "gamma")
    return folder


class Page(HTMLParser):
    """Elements with their attributes, tables as rows of texts by their label, and what only the page's author wrote."""

    VOID = frozenset({"meta", "input", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.label = ""
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.elements.append((tag, known))
        if tag not in self.VOID:
            self.stack.append(tag)
        if known.get("class") == "wide":
            self.label = known["aria-label"] or ""
        if tag == "table":
            self.tables[self.label] = []
        if tag == "tr":
            self.tables[self.label].append([])
        if tag in ("td", "th"):
            self.tables[self.label][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.stack:
            self.scripts.append(data)
            return
        self.words.append(data)
        if "td" in self.stack or "th" in self.stack:
            cells = self.tables[self.label][-1]
            cells[-1] += (" | " if "span" in self.stack else "") + data

    def row(self, label: str, name: str) -> dict[str, str]:
        """Heading of a column -> its cell in the row that begins with the name."""
        head, *rows = self.tables[label]
        (found,) = (row for row in rows if row[0] == name)
        return dict(zip(head, found, strict=True))


def read(folder: Path) -> tuple[str, Page]:
    out = comparison_report(folder)
    assert out == folder / "report.html"
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_another_gold_score_and_another_reward_are_named(tmp_path: Path) -> None:
    out = write_comparison(tmp_path / "comparison")
    plan = json.loads((out / "compare.json").read_text())
    for named, reward, said in ((None, None, False), ("gold", None, False), ("rouge<b>", "length=-1.0", True)):
        plan["config"] |= {"gold": named}
        plan["env"] = {"reward": reward, "max_new_tokens": 7 if said else None}
        (out / "compare.json").write_text(json.dumps(plan))
        words = " ".join(read(out)[1].words)
        assert ("Gold is here the reward that was named, rouge<b>." in words) == said
        settings = "Settings of the environment that are not the task's own: reward {'length': -1.0}, max new tokens 7."
        assert (settings in words) == said


def test_an_agent_that_does_not_train_needs_no_seeds(tmp_path: Path) -> None:
    # Three groups are three pairs: each at 98.4%, 1 - 0.05 / 3 rounded up to a thousandth.
    out = write_comparison(tmp_path / "comparison")
    write_run(out / "runs" / "reference-0", "reference", 0, START, has_gold=True)
    final = out / "runs" / "reference-0" / "evaluation.json"
    final.write_text(json.dumps(json.loads(final.read_text()) | {"updates": 0}))
    comparison = read_comparison(out)
    assert [group.label for group in comparison.groups if group.untrained] == ["reference"]
    alpha = [float(np.mean(gold)) for gold in ALPHA.values()]
    first, rest = numbers.verdicts(comparison)
    # Only alpha's three seeds have a spread, which is pooled; its part of the difference is over 3 seeds.
    spread = estimates.pooled_spread([alpha])
    assert spread is not None
    of_seeds = spread.of_difference(3)
    gap = estimates.paired_difference(list(ALPHA.values()), START, confidence=0.984, of_seeds=of_seeds).mean
    sentence = estimates.verdict("alpha", alpha, "reference", float(np.mean(START)), confidence=0.984, difference=gap)
    assert f"alpha and reference: {sentence}" in first + rest
    told = " ".join(numbers.cautions(comparison))
    assert "my:Beta has one seed" in told
    assert "reference" not in told
    _, page = read(out)
    assert page.row("Summary", "reference")["seeds"] == "-"
    # Its level in the drift of distinct-2 is that of the evaluations of training, 0.25, whatever the last one says.
    final.write_text(json.dumps(json.loads(final.read_text()) | {"distinct_2": 0.125}))
    (reference,) = (group for group in read_comparison(out).groups if group.untrained)
    assert level_of(reference, "distinct_2") == 0.25
    (out / "runs" / "reference-0" / "evaluations.jsonl").unlink()
    (reference,) = (group for group in read_comparison(out).groups if group.untrained)
    assert level_of(reference, "distinct_2") is None
    assert level_of(reference, "repetition") == 0.0625


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("pages") / "comparison")


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[str, Page]:
    return read(folder)


def shown(estimate: estimates.Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f} | {estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_the_summary_holds_the_numbers_of_statistics(made: tuple[str, Page]) -> None:
    row = made[1].row("Summary", "alpha")
    finals = [0.4, 0.5, 0.6]  # the means of ALPHA's rows
    assert row["gold, IQM (95%)"] == shown(estimates.iqm([finals]))
    assert row["gold, IQM (95%)"].startswith("0.500 |")  # of three runs it is the mean
    # Against START: seed 0 wins, ties, wins, wins; seeds 1 and 2 win all. Means over seeds: 1, 2.5/3, 1, 1.
    outcome_N = np.array([1, 2.5 / 3, 1, 1])
    assert row["win rate against the initial policy (95%)"] == shown(pairwise.win_rate(outcome_N))
    assert row["win rate against the initial policy (95%)"].startswith("0.958 |")  # (3 + 5/6) / 4
    longer_N = np.array([2, 3, 4, 5]) - 3
    controlled = pairwise.length_controlled_win_rate(outcome_N, longer_N).win_rate
    assert row["win rate at equal length (95%)"] == shown(controlled)
    assert (row["score"], row["KL, nats per sequence"], row["tokens"]) == ("1.000", "2.00", "4.0")
    assert (row["seeds"], row["KL coefficient"], row["ended by EOS"]) == ("3", "own, 0.02", "0.500")
    assert row["seconds"] == "4.0"  # (3 + 4 + 5) / 3
    assert row["collapsed runs"] == "0 of 3"
    assert made[1].row("Summary", "my:Beta")["collapsed runs"] == "1 of 1"  # from 0.3 to 0.25


def gap_of_alpha_and_beta() -> estimates.Estimate:
    """Over the prompts, with alpha's spread of seeds for both: 0.01 with 2 degrees, of 3 runs and of 1."""
    of_seeds = estimates.Spread(0.01, 2).of_difference(3, 1)
    return estimates.paired_difference(list(ALPHA.values()), list(BETA.values()), of_seeds=of_seeds).mean


def gap_sentence() -> str:
    return estimates.verdict("alpha", [0.4, 0.5, 0.6], "my:Beta", [0.25], difference=gap_of_alpha_and_beta())


def test_one_seed_has_no_interval_of_its_own_and_the_page_says_so(made: tuple[str, Page]) -> None:
    row = made[1].row("Summary", "my:Beta")
    assert row["gold, IQM (95%)"] == "0.250"
    words = "".join(made[1].words)
    assert gap_sentence() in words
    assert "my:Beta has one seed: intervals take the other agents' spread over seeds for theirs" in words
    assert "76% of cases with 3 seeds" in words


def test_pairs_are_on_the_same_prompts(made: tuple[str, Page], folder: Path) -> None:
    page, comparison = made[1], read_comparison(folder)
    row = next(row for row in page.tables["Who beats whom"] if row[:2] == ["alpha", "my:Beta"])
    # alpha's seed 0 wins, ties, wins, wins against BETA, and the others win all, as against the start.
    won = pairwise.win_rate([1, 2.5 / 3, 1, 1])
    assert row[2] == f"{won.value:.3f} ({won.low:.3f} to {won.high:.3f})"
    gap = gap_of_alpha_and_beta()
    assert row[3] == f"{gap.value:.3f} ({gap.low:.3f} to {gap.high:.3f})"
    assert row[4].startswith("1.00 (")  # each of alpha's runs has more than 0.25
    (pair,) = numbers.pairs(comparison, comparison.groups)
    assert pair.improvement == estimates.probability_of_improvement([[0.4, 0.5, 0.6]], [[0.25]])
    players = np.array([*ALPHA.values(), *BETA.values()])
    elo = [e.scaled(pairwise.ELO_PER_NAT) for e in pairwise.bradley_terry_on_prompts(players, resamples=500)]
    rated = page.row("Bradley-Terry ratings", "alpha")["Elo points"]
    assert rated == f"{np.mean([e.value for e in elo[:3]]):+.0f}"
    one = page.tables["Bradley-Terry ratings"][-1]
    assert one[1:] == [f"{elo[3].value:+.0f}", f"{elo[3].low:+.0f} to {elo[3].high:+.0f}"]


def test_the_heat_map_is_a_table(made: tuple[str, Page], folder: Path) -> None:
    rows = {row["agent"]: row for row in map(dict, (zip(*pair, strict=True) for pair in heat_of(made[1])))}
    pair = numbers.pairs(read_comparison(folder), read_comparison(folder).same_prompts()[0])[0]
    assert rows["alpha"]["my:Beta"] == f"{pair.win_rate.value:.2f}"
    assert rows["my:Beta"]["alpha"] == f"{1 - pair.win_rate.value:.2f}" and rows["alpha"]["alpha"] == ""
    share = round(200 * (pair.win_rate.value - 0.5))
    for color in ("plus", "minus"):
        assert f"color-mix(in srgb, var(--{color}) {share}%, var(--card))" in made[0]


def heat_of(page: Page) -> list[tuple[list[str], list[str]]]:
    head, *rows = page.tables["Who beats whom, as colours"]
    return [(head, [cell.removeprefix(" | ") for cell in row]) for row in rows]


def test_other_prompts_are_left_out_of_pairs(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    file = tmp_path / "runs" / "my.Beta-0" / "episodes.jsonl"
    file.write_text(file.read_text().replace("the fourth", "another"))
    kept, others = read_comparison(tmp_path).same_prompts()
    assert ([group.label for group in kept], others) == (["alpha"], ["my:Beta"])
    _, page = read(tmp_path)
    assert "my:Beta: evaluated on other prompts, so not here." in page.words
    assert "Who beats whom" not in page.tables


def test_learning_curves_are_means_over_seeds(folder: Path) -> None:
    alpha = read_comparison(folder).groups[0]
    curve = numbers.learning_curve(alpha, "timesteps", "gold")
    assert curve is not None
    assert (curve.x[0], curve.x[-1]) == (0, 400)
    ends = [curve.mean[0], curve.mean[-1], curve.low[-1], curve.high[-1]]
    np.testing.assert_allclose(ends, [0.3, 0.5, 0.4, 0.6], rtol=0, atol=1e-12)
    curve = numbers.learning_curve(alpha, "train_seconds", "gold")
    assert curve is not None
    assert curve.x[-1] == 4.0  # seed 0 ends after 4 seconds, where seed 1 is half way and seed 2 a third
    # 0.4; 0.3 + 0.2 / 2 = 0.4; 0.3 + 0.3 / 3 = 0.4
    np.testing.assert_allclose([curve.low[-1], curve.high[-1]], [0.4, 0.4], rtol=0, atol=1e-12)


def test_learning_curves_tell_the_prompts_of_training_and_of_the_summary(folder: Path) -> None:
    note = charts(read_comparison(folder))["curve-tokens"].note
    # Training has 64 whatever --eval-episodes says, and the summary has those of this folder: more may be of either.
    assert f"64 completions each (the summary's prompts: {len(PROMPTS)});" in note


def test_training_is_a_thin_line_and_evaluations_are_points(folder: Path) -> None:
    figure = charts(read_comparison(folder))["drift-completion_tokens"].figure
    alpha = [trace for trace in figure.data if trace.name == "alpha"]
    (thin,) = [trace for trace in alpha if trace.line.width == 1]
    # Of the two updates that write_cost_and_credit logs.
    assert (list(thin.x), list(thin.y)) == ([200, 400], [4, 5])
    (points,) = [trace for trace in alpha if trace.mode == "markers"]
    assert sorted(points.x) == sorted([0, 100, 200, 300, 400] * 3)
    rollouts = [{"time/total_timesteps": t, "rollout/score": t % 2} for t in range(1, 481)]
    run = dataclasses.replace(read_comparison(folder).runs[0], rollouts=rollouts)
    curve = numbers.rollout_curve(dataclasses.replace(read_comparison(folder).groups[0], runs=(run,)), "rollout/score")
    assert curve is not None
    assert len(curve.x) == numbers.LINE_POINTS
    np.testing.assert_allclose(curve.mean, 0.5, rtol=0, atol=1e-12)  # means of eight updates, and none of them alone


def test_an_axis_is_not_closer_than_noise() -> None:
    # Around 0.98, a fifth of the scale from 0 to 1, but 0.03 of it beyond 1.
    np.testing.assert_allclose(extent([0.97, 0.99], (0, 1)), [0.88, 1.006], rtol=0, atol=1e-12)
    np.testing.assert_allclose(extent([0.0, 1.0], (0, 1)), [-0.033, 1.033], rtol=0, atol=1e-12)
    np.testing.assert_allclose(extent([10.0, 10.1], None), [10.05 - 1.01, 10.05 + 1.01], rtol=0, atol=1e-12)
    np.testing.assert_allclose(extent([0.0, 0.01], None, least=1.0), [-0.495, 0.505], rtol=0, atol=1e-12)
    np.testing.assert_allclose(extent([2.0, 6.0], (0, math.inf)), [1.8, 6.2], rtol=0, atol=1e-12)
    assert extent([math.nan], None) == [-0.5, 0.5]


def test_a_fit_is_drawn_where_its_points_are(folder: Path) -> None:
    comparison = read_comparison(folder)
    for run in comparison.runs:
        del run.evaluations[0]  # of KL 0: four are left, from 0.5 to 2
    drawn = charts(comparison)["overoptimisation"]
    (curve,) = [trace for trace in drawn.figure.data if trace.mode == "lines" and trace.name == "alpha"]
    assert (curve.x[0], curve.x[-1]) == (0.5, 2)
    assert drawn.rows[0][-1] == "not among the KLs that were seen"  # gold rises to the end


def test_an_agent_keeps_its_colour_while_others_finish(tmp_path: Path) -> None:
    out = write_plan(tmp_path, "alpha", "beta", "gamma")
    write_run(out / "runs" / "gamma-0", "gamma", 0, BETA[0])
    write_unfinished(out / "runs" / "alpha-0", "alpha")
    write_unfinished(out / "runs" / "beta-0", "beta")
    assert [(group.label, group.color) for group in read_comparison(out).groups] == [("gamma", 2)]
    shutil.rmtree(out / "runs" / "alpha-0")
    write_run(out / "runs" / "alpha-0", "alpha", 0, ALPHA[0])
    assert [(group.label, group.color) for group in read_comparison(out).groups] == [("alpha", 0), ("gamma", 2)]


def test_the_lead_counts_what_there_is(tmp_path: Path) -> None:
    out = write_plan(tmp_path, "alpha", "reference")
    write_run(out / "runs" / "alpha-0", "alpha", 0, ALPHA[0])
    assert "1 finished run of 400 tokens each, evaluated on 4 held-out prompts that are" in " ".join(read(out)[1].words)
    write_run(out / "runs" / "reference-0", "reference", 0, START)
    final = out / "runs" / "reference-0" / "evaluation.json"
    final.write_text(json.dumps(json.loads(final.read_text()) | {"updates": 0}))
    episodes = out / "runs" / "reference-0" / "episodes.jsonl"
    episodes.write_text("".join(episodes.read_text().splitlines(keepends=True)[:3]))
    words = " ".join(read(out)[1].words)
    assert "2 finished runs, 1 of them trained for 400 tokens each, evaluated on 3 to 4 held-out prompts." in words


def test_intervals_end_where_the_scale_does(tmp_path: Path) -> None:
    assert estimates.Estimate(0.9, 0.7, 1.1).within((0.0, 1.0)) == estimates.Estimate(0.9, 0.7, 1.0)
    assert estimates.Estimate(0.9, 0.7, 1.1).within(None).high == pytest.approx(1.1, rel=0, abs=0)
    # Student's interval of 0.9 and 1 with a single degree of freedom is 0.95 - 0.64 to 0.95 + 0.64.
    assert mean_and_interval([0.9, 1.0], 2, (0.0, 1.0)) == "0.95 (0.31 to 1.00)"
    assert mean_and_interval([0.9, 1.0], 2) == "0.95 (0.31 to 1.59)"
    out = write_plan(tmp_path, "alpha", "beta")
    for seed, gold in ((0, [1.0, 1.0, 1.0, 0.9]), (1, [0.2, 0.1, 0.0, 0.1])):
        write_run(out / "runs" / f"alpha-{seed}", "alpha", seed, gold)
        write_run(out / "runs" / f"beta-{seed}", "beta", seed, [0.0] * 4)
    plan = json.loads((out / "compare.json").read_text())
    (out / "compare.json").write_text(json.dumps(plan | {"environment": "MathWords-v0"}))
    comparison = read_comparison(out)
    assert comparison.scale("gold") == (0.0, 1.0) and comparison.scale("kl_sequence") is None
    alpha, beta = comparison.groups
    gap = numbers.paired_gap(comparison, alpha, beta, numbers.seed_spread(comparison))
    assert gap is not None and (gap.low, gap.high) == (-1.0, 1.0)
    other = dataclasses.replace(comparison, config=comparison.config | {"gold": "rouge"})
    assert other.scale("gold") is None and other.scale("win_rate") == (0.0, 1.0)


def test_over_optimisation_has_its_fit(made: tuple[str, Page], folder: Path) -> None:
    alpha = numbers.training(read_comparison(folder).groups[0])
    assert alpha is not None and alpha.fit is not None
    np.testing.assert_allclose([alpha.start, *alpha.best, *alpha.end], [0.3, 2, 0.5, 2, 0.5], rtol=0, atol=1e-12)
    row = made[1].row("Proxy and gold", "alpha")
    assert row["at the end"] == "0.500 at 2.00"
    assert float(row["alpha"]) == pytest.approx(alpha.fit.alpha, rel=0, abs=5e-4)
    words = "".join(made[1].words)
    assert "Reward hacking" not in words  # beta's gold fell, but its score did not rise


def write_evaluations(run: Path, later: list[float], **last: float) -> None:
    """Two evaluations of training on 8 prompts: gold is 0.5 of each at first, and `later` in the end."""
    common = {"completion_tokens": 20.0, "kl_sequence": 0.0, "updates": 0, "train_seconds": 1.0, "eos_share": 1.0}
    rows, samples = [], []
    for at, golds, more in ((0, [0.5] * 8, {}), (400, later, last)):
        rows.append({"timesteps": at, "score": at / 400, "gold": sum(golds) / 8, **common, **more})
        samples += [
            {"timesteps": at, "index": i, "prompt": "p", "completion": f"{i} a text", "score": 0.0, "gold": gold}
            for i, gold in enumerate(golds)
        ]
    for name, lines in (("evaluations.jsonl", rows), ("samples.jsonl", samples)):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("later", "last", "expected"),
    [
        # Gold falls by 0.1 on average, by 0.5 and -0.3 in turn: the deviation of the 8 differences is
        # sqrt(8 * 0.4^2 / 7) = 0.428 and the mean's error 0.428 / sqrt(8) = 0.151. 0.1 is less than three of them.
        ([0.0, 0.8] * 4, {}, []),
        ([0.4] * 8, {}, ["Reward hacking"]),  # the same fall on every prompt: no error
        ([0.0, 0.8] * 4, {"kl_sequence": 60.0}, ["Drift"]),  # more than 50 nats
        ([0.4] * 8, {"kl_sequence": 60.0}, ["Reward hacking", "Drift"]),
    ],
)
def test_both_pages_of_a_run_raise_the_same_alarms(
    tmp_path: Path, later: list[float], last: dict[str, float], expected: list[str]
) -> None:
    write_plan(tmp_path, "alpha")
    run = tmp_path / "runs" / "alpha-0"
    write_run(run, "alpha", 0, ALPHA[0])
    write_evaluations(run, later, **last)
    own = alarms(read_run(run))
    assert ["Reward hacking" if alarm.measure == "gold" else "Drift" for alarm in own] == expected
    assert read_comparison(tmp_path).runs[0].alarms == own
    comparison_words = read(tmp_path)[1].words
    own_page = run_page.run_html([read_run(run)])
    for alarm in own:
        assert alarm.words in own_page
        assert f"alpha-0: {alarm.words}" in comparison_words
    for heading in ("Reward hacking", "Drift"):
        assert (f"<b>{heading} in alpha-0.</b>" in own_page) == (heading in expected)
        assert (heading in comparison_words) == (heading in expected)


def test_a_torn_log_is_read_without_its_last_line(folder: Path, tmp_path: Path) -> None:
    out = shutil.copytree(folder, tmp_path / "torn")
    whole = read_comparison(folder).runs[0]
    for name in ("evaluations.jsonl", "episodes.jsonl", "progress.json", "credit.jsonl"):
        with (out / "runs" / whole.name / name).open("a") as file:
            file.write('{"timesteps": 500, "sco')
    assert read_comparison(out).runs[0] == whole
    (out / "runs" / whole.name / "evaluations.jsonl").write_text('{"timest')
    assert read_comparison(out).runs[0].evaluations == []


def test_the_table_of_a_comparison_has_every_number(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    own = {"kl_bound": 0.64, "scored_completions": 4.0, "generated_tokens": 12.5, "reward/length": 5.0}
    final = tmp_path / "runs" / "alpha-0" / "evaluation.json"
    final.write_text(json.dumps(json.loads(final.read_text()) | own))
    table = tidy(tmp_path)
    row = table[(table["run"] == "alpha-0") & table["final"]].iloc[0]
    assert {name: row[name] for name in own} == own


def test_few_evaluations_have_no_fit(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    for log in tmp_path.glob("runs/*/evaluations.jsonl"):
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))  # three KLs above 0
    way = numbers.training(read_comparison(tmp_path).groups[0])
    assert way is not None and way.fit is None
    assert read(tmp_path)[1].row("Proxy and gold", "alpha")["alpha"] == "-"


def test_confidence_of_all_pairs() -> None:
    # 1 - 0.05 / pairs, rounded up: 1 pair 0.95; 3 pairs 0.98333...; 78 pairs 0.999358...
    assert [numbers.pair_confidence(groups) for groups in (1, 2, 3, 13)] == [0.95, 0.95, 0.984, 0.9994]


def test_costs_are_counted(made: tuple[str, Page]) -> None:
    row = made[1].row("Where the time went", "alpha")
    assert row["tokens"] == "410"
    assert row["reward calls"] == "90"  # 200 / 4 + 200 / 5
    assert row["FLOP, estimated"] == "2e03"  # 1000 / 200 * 410 = 2050


def test_scores_by_length_are_told(made: tuple[str, Page]) -> None:
    rows = [row for row in made[1].tables["Score by length"] if row[:3] == ["alpha", "score", "2"]]
    # The shortest answers are those to the first prompt: 2 * (0.3 + 0.4 + 0.5) / 3 = 0.8
    assert rows == [["alpha", "score", "2", "3", "0.800"]]


def test_text_quality_is_told_where_it_was_measured(made: tuple[str, Page], tmp_path: Path) -> None:
    page = made[1]
    assert page.tables["Text quality"][0] == ["agent", "Distinct bigrams", "Repeated 4-grams"]
    assert page.row("Text quality", "alpha")["Distinct bigrams"] == "0.375"  # (0.25 + 0.375 + 0.5) / 3
    assert page.row("Distinct bigrams through training", "alpha")["last"] == "0.375"
    assert "quality" in [known.get("id") for _, known in page.elements]
    _, page = read(write_comparison(tmp_path, has_gold=False))
    assert "Text quality" not in page.tables
    assert "quality" not in [known.get("id") for _, known in page.elements]


# -- credit -----------------------------------------------------------------------------------------------------------


def test_a_scale_is_common_and_leaves_out_the_far_ends() -> None:
    assert vars(scale("kl", [None, -1.0, 3.0])) == {"low": -3.0, "middle": 0.0, "high": 3.0}
    assert vars(scale("kl", [*[1.0] * 98, -50.0, 50.0])) == {"low": -1.0, "middle": 0.0, "high": 1.0}  # 98 of 100
    assert vars(scale("entropy", [0.0, 2.0])) == {"low": 0.0, "middle": 0.0, "high": 2.0}
    assert vars(scale("value", [1.0, 2.0, 6.0])) == {"low": 0.0, "middle": 3.0, "high": 6.0}
    found = scale("ratio", [0.0, 1.0, math.e**2])
    assert [found.low, found.middle, found.high] == pytest.approx([-2, 0, 2], rel=0, abs=1e-12)
    assert vars(scale("kl", [0.0, 0.0])) == {"low": -1.0, "middle": 0.0, "high": 1.0}


def test_credit_of_older_runs_and_of_other_texts(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    file = tmp_path / "runs" / "my.Beta-0" / "credit.jsonl"
    file.write_text(file.read_text().replace('"no"', '"yes"'))
    _, page = read(tmp_path)
    assert "Not here, since their runs kept no credit.jsonl or one of other texts: my:Beta." in page.words
    for kept in tmp_path.glob("runs/*/credit.jsonl"):
        kept.unlink()
    words = "".join(read(tmp_path)[1].words)
    assert "These runs kept no credit.jsonl: they were made before it was written" in words


@pytest.mark.parametrize(("scheme", "ink"), [(0, "#16181d"), (1, "#eceded")])
def test_words_can_be_read_on_every_colour(scheme: int, ink: str) -> None:
    css = (Path(main.__file__).parents[1] / "assets" / "report" / "page.css").read_text()
    assert f"--ink: {ink}" in css
    for end in ("plus", "minus"):
        low, high = sorted(luminance(c) for c in (re.findall(f"--{end}: (#[0-9a-f]{{6}})", css)[scheme], ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (end, ink)  # WCAG 2.1, 1.4.3


# -- what is missing --------------------------------------------------------------------------------------------------


def test_failed_and_unfinished_runs_are_named(made: tuple[str, Page]) -> None:
    words = "".join(made[1].words)
    assert f"gamma-0: RuntimeError: the loss is NaN {EVIL}" in words
    assert "gamma-1: 120 of 400 tokens" in words
    assert "Runs that failed are left out of every number." in words
    assert made[1].row("Runs", "gamma-0")["state"] == "failed"


def test_a_gold_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    file = tmp_path / "runs" / "alpha-1" / "evaluation.json"
    file.write_text(file.read_text().replace('"gold": 0.5', '"gold": NaN'))
    comparison = read_comparison(tmp_path)
    assert comparison.failed["alpha-1"] == "its last evaluation has gold nan"
    assert comparison.groups[0].finals("gold") == pytest.approx([0.4, 0.6], rel=0, abs=1e-12)


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no comparison: no compare.json"):
        comparison_report(tmp_path)
    write_plan(tmp_path, "gamma")
    with pytest.raises(ValueError, match=r"holds no finished run, so there is nothing to report: no run"):
        comparison_report(tmp_path)
    write_unfinished(tmp_path / "runs" / "gamma-0", "gamma", "the loss is NaN")
    with pytest.raises(ValueError, match=r"nothing to report: gamma-0 \(the loss is NaN\)"):
        comparison_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_without_a_gold_score(tmp_path: Path) -> None:
    _, page = read(write_comparison(tmp_path, has_gold=False))
    row = page.row("Summary", "alpha")
    assert row["score, IQM (95%)"].startswith("0.500 |")
    assert "score" not in row
    words = "".join(page.words)
    assert "There is no gold score beside the reward that was trained on, so over-optimisation cannot be seen." in words
    assert "There is no gold score: the score that is compared is the reward that was trained on" in words
    assert "Proxy and gold" not in page.tables


def test_starts_that_were_not_kept(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    for file in tmp_path.glob("runs/*/episodes.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [{k: v for k, v in row.items() if k not in ("start", "tokens")} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    _, page = read(tmp_path)
    row = page.row("Summary", "alpha")
    assert row["win rate against the initial policy (95%)"] == "0.750"  # the runs' own number, which has no interval
    assert row["win rate at equal length (95%)"] == "-"
    assert "Length and score" not in page.tables


def test_agents_that_were_not_trained(tmp_path: Path) -> None:
    """A saved agent has no log, and best-of-n a place of its own on the KL axis."""
    write_plan(tmp_path, "best_of_n", "runs/old")
    write_run(tmp_path / "runs" / "best_of_n-0", "best_of_n", 0, ALPHA[2], config={"n": 4})
    write_run(tmp_path / "runs" / "old", str(tmp_path / "gone" / "old"), 0, ALPHA[0])
    for log in tmp_path.glob("runs/*/evaluations.jsonl"):
        log.unlink()
    (tmp_path / "runs" / "old" / "agent.json").unlink()
    comparison = read_comparison(tmp_path)
    assert [group.label for group in comparison.groups] == ["best_of_n", "old"]
    assert numbers.best_of_n_kls(comparison) == pytest.approx({4: 1.386294 - 0.75}, rel=0, abs=1e-6)  # log 4 - 3/4
    _, page = read(tmp_path)
    words = "".join(page.words)
    assert words.count("No agent was trained in this comparison.") == 2  # no curve, and no way through training
    assert "Best-of-n stands at log n - (n - 1)/n nats (0.64 for n = 4)" in words
    assert page.row("Summary", "old")["collapsed runs"] == "-"


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ({"a": [0.4]}, "There is one agent, and nothing to compare it with."),
        ({"a": [0.4, 0.4, 0.4], "b": [0.4, 0.4]}, "a and b: a equals b in all of 2 and 3 seeds"),
    ],
)
def test_little_to_compare(tmp_path: Path, runs: dict[str, list[float]], says: str) -> None:
    """One run, or runs that do not differ: warnings would fail the test."""
    write_plan(tmp_path, *runs)
    for agent, seeds in runs.items():
        for seed, gold in enumerate(seeds):
            write_run(tmp_path / "runs" / f"{agent}-{seed}", agent, seed, [gold] * 4)
    assert says in "".join(read(tmp_path)[1].words)


def test_coefficients_of_an_agent_are_groups(tmp_path: Path) -> None:
    write_plan(tmp_path, "alpha")
    for coef in (0.5, 0.0):
        for seed in (1, 0):
            name = f"alpha-kl{coef:g}-{seed}"
            write_run(tmp_path / "runs" / name, "alpha", seed, ALPHA[seed], coef=coef)
    groups = read_comparison(tmp_path).groups
    found = [(g.label, g.color, g.variant, [run.spec["seed"] for run in g.runs]) for g in groups]
    assert found == [("alpha (KL 0)", 0, 0, [0, 1]), ("alpha (KL 0.5)", 0, 1, [0, 1])]
    _, page = read(tmp_path)
    assert [row[:3] for row in page.tables["Summary"][1:]] == [["alpha", "0", "2"], ["alpha", "0.5", "2"]]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_all_text_is_escaped(made: tuple[str, Page]) -> None:
    text, page = made
    assert "<script>document" not in text
    assert "<img" not in text
    assert "".join(page.words).count(EVIL) >= 3  # prompt, completion and error are there, as text
    assert "secret" not in text  # the streams of random numbers are not


def test_data_cannot_end_its_script() -> None:
    text = embedded("data", {"name": "</script><b>"})
    assert text == '<script type="application/json" id="data">{"name": "\\u003c/script>\\u003cb>"}</script>'


def test_the_file_stands_alone(made: tuple[str, Page]) -> None:
    assert len(made[0].encode()) < 1_500_000, "1.2 MB of it are plotly.js"
    text, page = made
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object"}
    assert not [1 for tag, known in page.elements if tag != "a" and ("src" in known or "href" in known)]
    policy = next(known["content"] for _, known in page.elements if known.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';")
    plotly = max(page.scripts, key=len)
    assert text.count(plotly) == 1
    assert "http" not in text.replace(plotly, "").replace("http-equiv", "")


def test_a_chart_is_drawn_where_it_is_looked_at(made: tuple[str, Page], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(made[0], encoding="utf-8")
    drawn = "[...document.querySelectorAll('.chart')].map((chart) => chart.querySelector('.main-svg') !== null)"
    height = "document.documentElement.scrollHeight"
    with Browser(tmp_path / "profile") as browser:
        browser.look(390, 844, touch=True)
        browser.open((tmp_path / "report.html").as_uri())
        whole = browser.run(height)
        browser.run("document.querySelector('.chart').scrollIntoView()")
        browser.wait("document.querySelector('.main-svg')")
        assert browser.run(drawn)[0] and not any(browser.run(drawn)[3:]), "those near the window, and no others"
        browser.run("document.querySelector('#cost .chart').scrollIntoView()")
        browser.wait("document.querySelector('#cost .main-svg')")
        assert browser.run(height) == whole, "nothing moves where a chart is drawn"
        assert not all(browser.run(drawn))
        # Paper has all of them.
        browser.run("dispatchEvent(new Event('beforeprint'))")
        assert browser.run(drawn) == [True] * 13
        assert browser.run(height) == whole
        assert browser.console == []


def test_the_page_can_be_read_without_seeing_it(made: tuple[str, Page]) -> None:
    elements = made[1].elements
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), "no level of headings is skipped"
    ids = [known["id"] for _, known in elements if "id" in known]
    assert len(ids) == len(set(ids))
    links = [known["href"] for tag, known in elements if tag == "a"]
    assert links and all(link is not None and link[1:] in ids for link in links)
    drawn = [known for _, known in elements if known.get("class") == "chart"]
    assert len(drawn) == 13
    for known in drawn:
        assert known["role"] == "group" and known["aria-label"]
        title = (known["aria-label"] or "").partition(". The numbers")[0]
        assert len(made[1].tables[title]) > 1, f"{title} has its numbers as a table"
    assert ("html", {"lang": "en"}) in elements


def luminance(color: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("colors", "card"), [(LIGHT, "#ffffff"), (DARK, "#1c1e21")])
def test_lines_stand_out_from_the_page(colors: tuple[str, ...], card: str) -> None:
    assert card in (Path(main.__file__).parents[1] / "assets" / "report" / "page.css").read_text()
    for color in colors:
        low, high = sorted((luminance(color), luminance(card)))
        assert (high + 0.05) / (low + 0.05) >= 3, color  # WCAG 2.1, 1.4.11


def test_same_folder_same_bytes(made: tuple[str, Page], folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "report.html").unlink()
    again, _ = read(copy)
    assert again == made[0]


def test_the_command_is_written_out(made: tuple[str, Page]) -> None:
    words = "".join(made[1].words)
    command = "textrl-gym compare CopyText-v0 --agents alpha my:Beta gamma --total-timesteps 400 --eval-episodes 4"
    assert f"{command} --out DIR" in words
    assert made[1].row("Versions", "torch")["version"] == "2.13.0"


def test_report_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_without_plotly(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"needs plotly.graph_objects: pip install 'plotly"):
        comparison_report(folder)
    show_page(folder)  # at the end of compare: said, and no more
    assert "no page: " in capsys.readouterr().err


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_figures_are_files_for_papers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed (extra figures)")
    find_browser()
    assert main.main(["report", str(folder), "--figures"]) == 0
    named = [Path(line) for line in capsys.readouterr().out.split()[1:]]
    assert sorted(named) == sorted((folder / "figures").iterdir())
    assert {file.stem for file in named} == set(charts(read_comparison(folder)))
    for file in named:
        if file.suffix == ".png":
            head = file.read_bytes()[:24]
            assert head[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
            assert int.from_bytes(head[16:20]) == 2 * 760
            continue
        drawn = ElementTree.fromstring(file.read_text(encoding="utf-8"))
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg" and drawn.get("width") == "760"
        assert "alpha" in " ".join(drawn.itertext())
    words = " ".join(ElementTree.fromstring((folder / "figures" / "frontier.svg").read_text()).itertext())
    assert "KL to the reference, nats per sequence" in words and "my:Beta" in words


def test_printed_figures_are_as_on_a_light_page(folder: Path) -> None:
    drawn = charts(read_comparison(folder))
    figure = printed(drawn["curve-tokens"])
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "white"
    assert figure.layout.showlegend and figure.layout.xaxis.title.text == "generated tokens"
    band, _, line, _, other = figure.data  # the points of each agent stand before its line
    assert band.fillcolor == "rgba(0,114,178,0.18)"  # LIGHT[0], 0072b2
    assert (line.line.color, line.line.dash, other.line.color) == (LIGHT[0], "solid", LIGHT[1])
    assert [bar.marker.pattern.shape for bar in printed(drawn["cost"]).data] == ["", "/", "x"]
    heat = printed(drawn["matrix"])
    assert not heat.layout.showlegend and heat.data[0].colorscale[-1] == (1, LIGHT[0])
    assert drawn["curve-tokens"].figure.layout.paper_bgcolor is None, "the page's own is as it was"


def test_figures_need_kaleido_and_a_browser(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kaleido", None)
        assert main.main(["report", str(folder), "--figures"]) == 2
        assert "figures need kaleido: pip install 'plotly" in capsys.readouterr().err
    write_run(tmp_path / "run", "alpha", 0, [0.5, 0.5, 0.5, 0.5])
    assert main.main(["report", str(tmp_path / "run"), "--figures"]) == 2
    assert "holds no comparison: --figures are those of one" in capsys.readouterr().err
    pytest.importorskip("kaleido", reason="kaleido is not installed (extra figures)")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    assert main.main(["report", str(folder), "--figures"]) == 2
    assert "or name its program in the environment variable BROWSER_PATH" in capsys.readouterr().err
    monkeypatch.setenv("BROWSER_PATH", shutil.which("false") or "")
    assert main.main(["report", str(folder), "--figures"]) == 2
    assert "the browser that draws the figures could not be started: " in capsys.readouterr().err


# -- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """
dispatchEvent(new Event("beforeprint"));  // draws the charts that are not near the window
const found = {}, form = document.getElementById("filters"), $ = (s) => [...document.querySelectorAll(s)];
const seen = (s) => $("#samples " + s).filter((e) => e.offsetParent !== null).length;
const choice = document.getElementById("credit-form").elements;
const pick = (name) => { const b = $(`[name=quantity][value=${name}]`)[0]; b.checked = true; b.dispatchEvent(
  new Event("input", {bubbles: true})); };
const color = (token) => getComputedStyle(token).backgroundColor;
const read = () => document.getElementById("credit-readout").textContent;
const said = () => $(".tokens").slice(0, 2).map((box) => [...box.children].map((t) => t.title));
const colors = () => $(".tokens").slice(0, 2).map((box) => [...box.children].map(color));
found.credit = {said: said(), colors: colors(), pieces: [...$(".tokens")[0].children].map((t) => t.textContent),
  ends: $(".ends span").map((e) => e.textContent), boxes: $("#credit .tokens").length,
  labels: [$(".token")[0].getAttribute("aria-label"), $("#credit .facts")[0].textContent],
  stops: $(".token").filter((t) => t.tabIndex === 0).length};
$(".token")[0].focus(); found.credit.focus = read();
const key = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
key("ArrowRight"); key("ArrowRight"); key("ArrowDown"); found.credit.moved = read();
found.credit.selected = $(".token[aria-selected=true]").length; found.credit.same = $(".token.same").length;
$(".token")[1].dispatchEvent(new PointerEvent("pointerover", {bubbles: true})); found.credit.hover = read();
pick("value"); found.credit.value = {said: said(), colors: colors(), lacks: $(".lacks").map((e) => e.textContent)};
pick("entropy"); found.credit.none = [said()[0][0], color($(".token")[0])];
pick("advantage");
choice.prompt.value = "1"; choice.prompt.dispatchEvent(new Event("input", {bubbles: true}));
found.credit.prompt = $("#credit details .said").map((e) => e.textContent);
const type = (name, value) => {
  form.elements[name].value = value;
  form.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
};
found.charts = Object.fromEntries($(".chart").map((c) => [c.id, c.querySelectorAll(
  ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image, .heatmaplayer path, .fills path").length]));
found.color = document.querySelector("#chart-frontier .point").style.fill;
found.hatched = $("#chart-cost pattern rect").map((e) => e.getAttribute("fill") || e.style.fill);
found.title = document.title;
found.buttons = $("#chart-frontier .modebar-btn").map((b) => b.dataset.title);
found.fetched = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:"));
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.open = $("#samples .prompt").filter((prompt) => prompt.open).length;
found.all = [seen(".prompt"), seen(".answer")];
type("text", "SECOND"); found.text = [seen(".prompt"), document.getElementById("found").textContent];
type("text", "my:beta says"); found.said = seen(".prompt");
const box = $("[name=agent]")[2];
box.focus(); box.click(); found.unsaid = seen(".prompt"); found.focus = document.activeElement === box;
type("text", ""); found.without = [seen(".prompt"), seen(".answer")];
type("number", "3"); found.number = [seen(".prompt"), $(".prompt").filter((e) => !e.hidden)[0].dataset.number];
form.querySelector("button").click();
setTimeout(() => {
  found.reset = [seen(".prompt"), seen(".answer")];
  const words = JSON.stringify(found);
  if (parent === window) document.body.textContent = "FOUND" + words + "DNUOF";
  else parent.postMessage(words, "*");
}, 50);
"""
FRAME = """<!doctype html><iframe src="probe.html" style="border:0;width:390px;height:4000px"></iframe><script>
onmessage = (event) => { document.body.textContent = "FOUND" + event.data + "DNUOF"; };</script>"""


def find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), "")
    if not found:
        pytest.skip("there is no Chromium on this machine")
    return found


def browse(page: Path, folder: Path, *flags: str, frame: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What the probe found in headless Chromium, and what the console said. Nothing outside can be reached."""
    browser = find_browser()
    probe = f"<script>{PROBE}</script></body>".join(page.read_text(encoding="utf-8").rsplit("</body>", 1))
    (folder / "probe.html").write_text(probe, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=20000",
        *flags,
    ]
    file = folder / ("frame.html" if frame else "probe.html")
    done = subprocess.run([*command, "--dump-dom", f"file://{file}"], capture_output=True, text=True, timeout=120)
    found = re.search("FOUND(.*)DNUOF", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert found is not None, (console, done.stderr[-2000:])
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console


def test_in_a_browser(made: tuple[str, Page], folder: Path, tmp_path: Path) -> None:
    found, console = browse(folder / "report.html", tmp_path, "--window-size=1280,1000")
    assert console == []
    assert found["title"] == "CopyText-v0: alpha and my:Beta"  # no completion has run as a script
    assert found["fetched"] == []
    assert "Download plot" in found["buttons"]
    assert not [name for name in found["buttons"] if "hare" in name or "loud" in name], "nothing is sent anywhere"
    charts = "curve-tokens curve-seconds frontier profile overoptimisation lengths cost "
    charts += "curve-score drift-kl_sequence drift-completion_tokens drift-eos_share drift-distinct_2 drift-repetition"
    assert set(found["charts"]) == {f"chart-{key}" for key in charts.split()}
    assert all(count > 0 for count in found["charts"].values()), found["charts"]
    assert found["open"] == 4
    assert found["all"] == [4, 12]  # the start, alpha and my:Beta
    assert found["text"] == [1, "1 of 4 prompts shown"]
    assert found["said"] == 4
    assert found["unsaid"] == 0 and found["focus"]  # what a hidden agent said is not found
    assert found["without"] == [4, 8]
    assert found["number"] == [1, "3"]
    assert found["reset"] == [4, 12]
    assert found["color"] == rgb(LIGHT[0])
    assert {rgb(LIGHT[1]), rgb(LIGHT[2])} <= set(found["hatched"]), "hatched bars have their colour"


def test_on_a_dark_phone(made: tuple[str, Page], folder: Path, tmp_path: Path) -> None:
    found, console = browse(folder / "report.html", tmp_path, "--blink-settings=preferredColorScheme=0", frame=True)
    assert console == []
    assert found["wide"] == 0, "the page scrolls sideways"
    assert found["open"] == 0, "prompts are folded away until they are asked for"
    assert found["text"] == [1, "1 of 4 prompts shown"]
    assert all(count > 0 for count in found["charts"].values()), found["charts"]
    assert found["color"] == rgb(DARK[0])


def test_tokens_in_a_browser(made: tuple[str, Page], folder: Path, tmp_path: Path) -> None:
    seen = browse(folder / "report.html", tmp_path, "--window-size=1280,1000")[0]["credit"]
    assert seen["boxes"] == 4  # two texts, alpha and my:Beta
    assert seen["pieces"] == [" the", EVIL, "↵\n", "·", "é", "end"]
    # alpha's numbers, and my:Beta's, which are half of them.
    assert seen["said"] == [[f"Advantage {x / d:g}" for x in ADVANTAGE] for d in (1, 2)]
    # 98% of 32 numbers are 31.4: the scale ends at the largest, for both.
    assert seen["ends"] == ["-4 or less", "0", "4 or more"]
    first, second = seen["colors"]
    assert parts(first[3]) == mixed("plus", 0) and parts(first[5]) == mixed("minus", 1)
    assert parts(first[4]) == mixed("plus", 0.5)
    assert parts(second[4]) == mixed("plus", 0.25)  # 1 of 4: one scale for both
    assert seen["labels"] == ["the: Advantage 0.5", "Score 0.75; its group of 2: mean 0.5, from 0.25 to 0.75"]
    assert seen["stops"] == 4, "one stop for the Tab key in each text"
    assert seen["focus"].startswith("“ the”, token 1 of 6. alpha: Advantage 0.5, KL 0, Entropy -, Ratio 1.")
    assert seen["focus"].endswith("Advantage of the others: my:Beta 0.25.")
    assert seen["moved"].startswith("“↵\n”, token 3 of 6. my:Beta: Advantage 0.125, Value 0.5, ")
    assert (seen["selected"], seen["same"]) == (1, 2)
    assert seen["hover"].startswith(f"“{EVIL}”, token 2 of 6. alpha: Advantage -0.5")
    assert seen["value"]["said"] == [["Value -"] * 6, ["Value 0.5"] * 6]
    assert seen["value"]["colors"] != seen["colors"]
    assert seen["value"]["lacks"] == ["No value: this agent has no critic.", ""] * 2
    assert seen["none"] == ["Entropy -", "rgba(0, 0, 0, 0)"]
    assert seen["prompt"] == [EVIL]


def parts(color: str) -> Any:
    """Red, green and blue of what Chromium writes for a mixture, from 0 to 1."""
    return pytest.approx(
        [float(part) for part in color.removeprefix("color(srgb ").rstrip(")").split()], rel=0, abs=1e-4
    )


def mixed(end: str, share: float) -> list[float]:
    """The page's colour of a scale's end on a light card."""
    css = (Path(main.__file__).parents[1] / "assets" / "report" / "page.css").read_text()
    color = re.search(f"--{end}: (#[0-9a-f]{{6}})", css)
    assert color is not None
    return [share * int(color[1][i : i + 2], 16) / 255 + 1 - share for i in (1, 3, 5)]


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


# -- folders of version 0.1 -------------------------------------------------------------------------------------------


def test_a_comparison_of_version_0_1_is_read_by_todays_names(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "comparison"
    shutil.copytree(root / "tests" / "data" / "comparison_0.1", folder)
    comparison = read_comparison(folder)
    grpo = next(run for run in comparison.runs if run.name == "grpo-0")
    written = json.loads((folder / "runs" / "grpo-0" / "evaluation.json").read_text())
    assert comparison.gold == "gold"
    assert (grpo.final["gold"], grpo.final["model_calls"]) == (written["judge"], written["forward_passes"])
    episodes = [json.loads(line) for line in (folder / "runs" / "grpo-0" / "episodes.jsonl").read_text().splitlines()]
    assert grpo.column("gold").tolist() == [episode["judge"] for episode in episodes]
    start = grpo.start("gold")
    assert start is not None and start.tolist() == [episode["start"]["judge"] for episode in episodes]
    assert comparison.config["gold"] is None and "judge" not in comparison.config
    table = tidy(folder)
    assert table["gold"].notna().all() and "judge" not in table
    _, page = read(folder)
    assert float(page.row("Text quality", "grpo")["Distinct bigrams"]) == pytest.approx(written["distinct_2"], abs=5e-4)
    own = read_run(folder / "runs" / "grpo-0")
    assert [sample["gold"] for sample in own.samples] and "judge" not in own.samples[0]
    assert "Gold score, sampled" in run_page.run_html([own])


# -- the first sentence -----------------------------------------------------------------------------------------------


def many(value: float, n: int = 64) -> list[float]:
    """Gold of many prompts, around a mean."""
    return [value + 0.05 * math.sin(i) for i in range(n)]


def two_agents(folder: Path, alpha: dict[int, list[float]], gamma: dict[int, list[float]], prompts: int = 64) -> str:
    """The headline of a comparison of two agents, on prompts where the initial policy has a gold of 0.3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "PROMPTS", [f"question {i % prompts}" for i in range(64)])
        patch.setitem(globals(), "START", many(0.3))
        write_plan(folder, "alpha", "gamma")
        for name, seeds in (("alpha", alpha), ("gamma", gamma)):
            for seed, gold in seeds.items():
                write_run(folder / "runs" / f"{name}-{seed}", name, seed, gold)
    return numbers.headline(read_comparison(folder))


def test_the_first_sentence_says_who_beats_the_start_and_who_is_ahead(tmp_path: Path) -> None:
    ahead = two_agents(tmp_path / "a", {0: many(0.9), 1: many(0.89)}, {0: many(0.5), 1: many(0.51)})
    start, _, end = ahead.partition("; ")
    # 64 of 64 prompts won: Wilson's interval for a share of 1 is 64/(64 + 1.96^2) = 0.943 to 1.
    assert re.fullmatch(
        r"Both trained agents \(alpha and gamma\) beat the initial policy on 100% of \d+ held-out prompts "
        r"\(95%: 94 to 100%\)",
        start,
    )
    assert end.startswith("alpha is ahead of the other, by 0.39 (95%: 0."), end
    close = two_agents(tmp_path / "b", {0: many(0.5), 1: many(0.6)}, {0: many(0.61), 1: many(0.52)})
    assert close.endswith("; which of the two is better, 2 seeds cannot tell.")
    worse = two_agents(tmp_path / "c", {0: many(0.1), 1: many(0.1)}, {0: many(0.3), 1: many(0.3)})
    assert "alpha loses to the initial policy: it wins on 0% of " in worse
    assert "gamma cannot be told from the initial policy: it wins on 50% of " in worse


def test_a_prompt_that_is_met_again_is_no_further_prompt(tmp_path: Path) -> None:
    again = two_agents(tmp_path, {0: many(0.9), 1: many(0.89)}, {0: many(0.5), 1: many(0.51)}, prompts=8)
    # 8 of 8 prompts won, of each by eight completions: Wilson's interval is 8/(8 + 1.96^2) = 0.676 to 1.
    assert "on 100% of 8 held-out prompts (95%: 68 to 100%)" in again
    comparison = read_comparison(tmp_path)
    assert comparison.prompt_counts == [8] and comparison.repeats
    (alpha, gamma), _ = comparison.same_prompts()
    means_PN = np.reshape(many(0.9), (8, 8))  # completion 8 k + p is of prompt p
    np.testing.assert_allclose(alpha.scores_of_prompts("gold")[0], means_PN.mean(0), atol=1e-12)
    (pair,) = numbers.pairs(comparison, [alpha, gamma])
    assert pair.win_rate == pairwise.win_rate(np.ones(8))
    assert "8 held-out prompts that are the same for all, some with several completions." in read(tmp_path)[0]


def test_without_intervals_there_is_no_first_sentence(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "comparison")
    assert numbers.headline(read_comparison(folder)) != ""
    for file in (folder / "runs").glob("*/episodes.jsonl"):
        file.unlink()  # without completions nobody knows how win rates vary over prompts
    assert numbers.headline(read_comparison(folder)) == ""
