"""The page of Constitutional AI: its stages in numbers, critiques and revisions, and what each stage writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from textrl_gym import files
from textrl_gym.data.chat import as_text
from textrl_gym.data.labels import read_labels
from textrl_gym.evaluation.metrics import metric, scale_of
from textrl_gym.experiments.results import gold_scale
from textrl_gym.recipes import critiques, stages
from textrl_gym.recipes.constitutional import RECORD, ConstitutionalResult, heldout_file
from textrl_gym.reports.frame import PAGE, Rows, page_html, prompt_html, table_html
from textrl_gym.stats.estimates import Estimate

NAMES = {stages.INITIAL: "initial policy", stages.SFT: "supervised", stages.POLICY: "after RL"}
SHOWN = 8
"""Critiques and held-out prompts that are shown."""
COUNTS = {
    "answers": "Answers of the initial policy",
    "criticised": "of these criticised: answers to red-team prompts",
    "changed": "of these changed by revision",
    "pairs": "Pairs of answers that were compared",
    "decided": "of these decided",
    "ties": "ties, which teach nothing",
    "no_verdict": "without a verdict",
    "gold_agreement": "Decided as the gold score would, where that differs",
}


def interval(estimate: Estimate) -> str:
    """A number with its interval."""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def stages_table(result: ConstitutionalResult) -> tuple[list[str], Rows]:
    """Headings and rows for a terminal: a metric in each, by its key, and what became of it."""
    head = ["95% intervals", *(f"{NAMES[one.name]}, {_models(one.seeds)}" for one in result.stages)]
    head += [f"{NAMES[one.name]}, less initial" for one in result.stages[1:]]
    return head, [[name, *map(interval, _estimates(result, name))] for name in result.stages[0].metrics]


def _estimates(result: ConstitutionalResult, name: str) -> list[Estimate]:
    """A metric of each stage, and its changes, within their scales."""
    scale = scale_of(name, gold_scale(result.env_id))
    of_change = None if scale is None else (scale[0] - scale[1], scale[1] - scale[0])
    levels = [one.metrics[name].within(scale) for one in result.stages]
    return [*levels, *(one.changes[name].within(of_change) for one in result.stages[1:])]


def stages_html(result: ConstitutionalResult) -> Markup:
    """The same for the page, by the metrics' headings."""
    cell = '{:.3f}<div class="marks">{:.3f} to {:.3f}</div>'
    rows: list[list[object]] = []
    for name in result.stages[0].metrics:
        numbers = [Markup(cell.format(one.value, one.low, one.high)) for one in _estimates(result, name)]
        rows.append([metric(name).heading, *numbers])
    head = ["mean, 95% interval", *stages_table(result)[0][1:]]
    return table_html(head, rows, "words", "Stages")


def _models(number: int) -> str:
    return f"{number} model{'s' * (number > 1)}"


def counts_table(result: ConstitutionalResult) -> tuple[list[str], Rows]:
    """What the data of the stages are."""
    rows = []
    for name, words in COUNTS.items():
        if name in result.counts:
            number = result.counts[name]
            rows.append([words, f"{number:.3f}" if name == "gold_agreement" else f"{number:,.0f}"])
    return ["data", "number"], rows


def principles_table(folder: Path) -> tuple[list[str], Rows]:
    """How often each principle was the reason for a revision, and how often it decided between two answers."""
    lines = files.read_json_lines(folder / critiques.REVISIONS)
    labels = read_labels(folder / critiques.PREFERENCES)
    asked, criticised = (Counter(line["principle"] for line in some) for some in (lines, _faults(lines)))
    compared = Counter(label.comment for label in labels)
    decided = Counter(label.comment for label in labels if label.ranks is not None and len(set(label.ranks)) > 1)
    names = [one["name"] for one in files.read_json(folder / RECORD)["principles"]]
    rows = [[name, *(f"{some[name]:,}" for some in (asked, criticised, compared, decided))] for name in names]
    return ["principle", "answers read", "faults", "pairs compared", "decided"], rows


def _faults(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["critique"]]


def _prompt(prompt: str | list[dict[str, str]]) -> Markup:
    return prompt_html(prompt if isinstance(prompt, str) else as_text(prompt))


def _text(text: str) -> Markup:
    return Markup('<div class="text">{}</div>').format(text.strip())


def critiques_html(folder: Path) -> Markup:
    """The first critiques that were about something, not picked: prompt, answer, critique and revision."""
    lines = _faults(files.read_json_lines(folder / critiques.REVISIONS))[:SHOWN]
    rows: list[list[object]] = []
    for line in lines:
        texts = [_text(line[name]) for name in ("critique", "revision")]
        rows.append([_prompt(line["prompt"]), _text(line["answer"]), line["principle"], *texts])
    return table_html(
        ["prompt", "answer", "principle", "critique", "revision"], rows, "critiques", "Critiques and revisions"
    )


def samples_html(result: ConstitutionalResult) -> Markup:
    """The first held-out prompts, not picked: what the first model of each stage writes."""
    names = [one.name for one in result.stages]
    by_stage = [files.read_json_lines(heldout_file(result.folder, name, 0))[:SHOWN] for name in names]
    rows = [
        [_prompt(lines[0]["prompt"]), *(_text(line["completion"]) for line in lines)]
        for lines in zip(*by_stage, strict=True)
    ]
    return table_html(["prompt", *(NAMES[name] for name in names)], rows, "samples", "Samples")


def constitutional_html(result: ConstitutionalResult) -> str:
    """The whole page."""
    seeds = result.stages[-1].seeds
    spread = (
        "and over seeds of supervised learning and of RL" if seeds > 1 else "alone: one seed says nothing of others"
    )
    link = f"policy/{PAGE}"  # that of a comparison, where somebody has written it
    body = Markup(
        "<h1>{env}: Constitutional AI</h1><p>The answers of the initial policy to red-team prompts are criticised and "
        "revised by principles, a model learns the revisions, a reward model learns which of its answers the critic "
        "prefers, and RL follows. The critic is <b>{critic}</b>.</p>{numbers}"
        "<p class=muted>Every model is sampled once on the same held-out prompts. Intervals are over prompts {spread}. "
        "There is one set of answers, preferences and reward model.</p>"
        "{link}<h2>Data</h2>{counts}{principles}"
        "<h2>Critiques and revisions</h2>{critiques}<h2>Samples</h2>{samples}"
    ).format(
        env=result.env_id,
        critic=result.critic,
        numbers=stages_html(result),
        spread=spread,
        link=Markup(f'<p><a href="{link}">The page of the RL runs</a></p>') if (result.folder / link).is_file() else "",
        counts=table_html(*counts_table(result), "words", "Data"),
        principles=table_html(*principles_table(result.folder), "words", "Principles"),
        critiques=critiques_html(result.folder),
        samples=samples_html(result),
    )
    return page_html(f"{result.env_id}: Constitutional AI", body)


def constitutional_report(result: ConstitutionalResult) -> Path:
    """Write the page into the folder of the work."""
    page = result.folder / PAGE
    files.write_text(page, constitutional_html(result))
    return page
