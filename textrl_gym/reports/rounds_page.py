"""The page of iterated RLHF: its rounds in numbers, and what each round's policy writes."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from textrl_gym import files
from textrl_gym.evaluation.metrics import metric
from textrl_gym.experiments.results import EPISODES
from textrl_gym.recipes.rounds import RoundsResult, policy_of
from textrl_gym.reports.frame import PAGE, Rows, completion_html, page_html, prompt_html, table_html

METRICS = ("gold", "score", "win_rate", "kl_sequence", "completion_tokens")
"""Of the policies, where they have them."""
SHOWN = 6
"""Prompts whose completions are shown."""


def rounds_table(result: RoundsResult) -> tuple[list[str], Rows]:
    """Headings and rows: a round in each."""
    names = [name for name in METRICS if all(name in one.metrics for one in result.rounds)]
    head = ["round", "labels so far", "reward model, held-out pairs", *(metric(name).heading for name in names)]
    rows = []
    for one in result.rounds:
        accuracy = "-" if one.reward_accuracy is None else f"{one.reward_accuracy:.3f}"
        numbers = [f"{one.metrics[name]:.{metric(name).decimals}f}" for name in names]
        rows.append([str(one.number), f"{one.labels:,}", accuracy, *numbers])
    return head, rows


def samples_html(result: RoundsResult) -> Markup:
    """The first held-out prompts, not picked: the initial policy's completion and each round's."""
    by_round = []
    for one in result.rounds:
        folder = policy_of(result.folder, one.number)
        assert folder is not None, "a round that is over has a policy"
        by_round.append(files.read_json_lines(Path(folder) / EPISODES)[:SHOWN])
    rows: list[list[object]] = []
    for first, *others in zip(*by_round, strict=True):
        cells: list[object] = [prompt_html(first["prompt"])]
        cells += [completion_html(sample) for sample in ([first["start"]] if "start" in first else [])]
        cells += [completion_html(sample) for sample in (first, *others)]
        rows.append(cells)
    start = ["initial policy"] if by_round and by_round[0] and "start" in by_round[0][0] else []
    return table_html(["prompt", *start, *(f"round {one.number}" for one in result.rounds)], rows, "samples", "Samples")


def rounds_html(result: RoundsResult) -> str:
    """The whole page."""
    links = Markup("").join(
        Markup('<li><a href="round-{0}/policy/report.html">Round {0}</a></li>').format(one.number)
        for one in result.rounds
    )
    body = Markup(
        "<h1>{env}: iterated RLHF</h1><p>Each round asks for labels on what the policy writes, "
        "trains a reward model on all labels so far, and trains a policy on it from the initial one.</p>{rounds}"
        "<p class=muted>The reward models are measured on one set of held-out pairs of the initial policy, by their "
        "gold scores.</p><h2>Pages of the policies</h2><ul>{links}</ul><h2>Samples</h2>{samples}"
    ).format(
        env=result.env_id,
        rounds=table_html(*rounds_table(result), "words", "Rounds"),
        links=links,
        samples=samples_html(result),
    )
    return page_html(f"{result.env_id}: iterated RLHF", body)


def rounds_report(result: RoundsResult) -> Path:
    """Write the page into the folder of the rounds."""
    page = result.folder / PAGE
    files.write_text(page, rounds_html(result))
    return page
