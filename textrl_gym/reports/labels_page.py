"""The page of a file of labels: what annotators agree on, how each of them answers, and what they disagree on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from textrl_gym import files
from textrl_gym.data import labels
from textrl_gym.data.labels import PAIR, Label
from textrl_gym.feedback.agreement import Annotator, LabelReport, decided, label_agreement
from textrl_gym.reports.frame import page_html, prompt_html, table_html
from textrl_gym.stats.estimates import Estimate

SHOWN = 10
"""Items that annotators disagree on."""
NONE = "-"


def share(estimate: Estimate | None) -> str:
    """A number with its 95% interval, a dash where there is none."""
    return NONE if estimate is None else f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def number(value: float | None, decimals: int = 2) -> str:
    """A number, a dash where there is none."""
    return NONE if value is None else f"{value:.{decimals}f}"


def overall_rows(report: LabelReport) -> list[list[str]]:
    """Measure and value of all labels together."""
    rows = [["labels", f"{report.labels:,} on {report.items:,} items by {len(report.people)}"]]
    rows += [[f"labels: {name}", f"{count:,}"] for name, count in report.counts.items()]
    rows.append(["Krippendorff's alpha (95%)", share(report.alpha)])
    if report.fleiss_labels:
        rows.append([f"Fleiss' kappa of {report.fleiss_labels} labels each (95%)", share(report.fleiss)])
    return rows


PEOPLE = {
    "labels": lambda one: f"{one.labels:,}",
    "ties": lambda one: f"{one.ties:,}",
    "skipped": lambda one: f"{one.skipped:,}",
    "seconds, median": lambda one: number(one.seconds, 1),
    "as known": lambda one: share(one.gold),
    "checks as known": lambda one: share(one.checks),
    "alike when asked again": lambda one: share(one.myself),
    "Dawid-Skene accuracy": lambda one: number(one.accuracy),
    "Bradley-Terry reliability": lambda one: number(one.reliability),
    "first shown preferred": lambda one: share(one.first),
    "turned round with the order": lambda one: share(one.flipped),
    "longer preferred": lambda one: share(one.longer),
}
"""Heading -> what of an annotator stands there, in words."""


def people_table(people: Sequence[Annotator]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: an annotator in each; columns that nobody has a number in are left out."""
    columns = {name: [cell(one) for one in people] for name, cell in PEOPLE.items()}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {NONE}}
    return ["annotator", *columns], [
        [one.name, *(cells[row] for cells in columns.values())] for row, one in enumerate(people)
    ]


def pairs_table(report: LabelReport) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: two annotators in each."""
    rows = [
        [f"{pair.first}, {pair.second}", f"{pair.comparisons:,}", share(pair.agreement), number(pair.kappa)]
        for pair in report.pairs
    ]
    return ["annotators", "comparisons", "agreement (95%)", "Cohen's kappa"], rows


def models_table(report: LabelReport) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: two models in each."""
    rows = [[one.model, one.other, f"{one.comparisons:,}", share(one.preferred)] for one in report.models]
    return ["model", "other", "comparisons", "preferred (95%), a tie counts half"], rows


def disagreements(rows: Sequence[Label]) -> list[list[Label]]:
    """The labels of items that annotators decided differently, the most contested first."""
    by_item: dict[str, list[Label]] = defaultdict(list)
    votes: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    pairs = [label for label in rows if label.kind == PAIR]
    for label in pairs:
        by_item[label.item].append(label)
    for _, key, decision in decided(pairs):
        votes[key].append(decision)
    contested: dict[str, int] = defaultdict(int)
    for (item, *_), cast in votes.items():
        contested[item] += min(cast.count(0), cast.count(1))
    order = sorted((item for item, number in contested.items() if number), key=lambda item: -contested[item])
    return [by_item[item] for item in order]


def samples_html(rows: Sequence[Label]) -> Markup:
    """The items that annotators disagree on, with who preferred what."""
    lines: list[list[object]] = []
    for some in disagreements(rows)[:SHOWN]:
        first = some[0]
        texts = Markup("").join(
            Markup('<div class="text">{}: {}</div>').format(place + 1, text.strip())
            for place, text in enumerate(first.completions)
        )
        rankings = Markup("").join(Markup("<div>{}: {}</div>").format(one.annotator, ranking(one)) for one in some)
        prompt = (
            first.prompt if isinstance(first.prompt, str) else "\n\n".join(turn["content"] for turn in first.prompt)
        )
        lines.append([prompt_html(prompt), texts, rankings])
    if not lines:
        return Markup("<p>There is none.</p>")
    return table_html(["prompt", "completions", "who preferred what"], lines, "samples", "What they disagree on")


def ranking(label: Label) -> str:
    """A label in words: places from best to worst."""
    if label.ranks is None:
        return "skipped"
    if label.all_bad:
        return "all bad"
    groups: dict[int, list[str]] = defaultdict(list)
    for place, rank in enumerate(label.ranks):
        groups[rank].append(str(place + 1))
    words = " over ".join(" = ".join(groups[rank]) for rank in sorted(groups))
    return words + (f' ("{label.comment}")' if label.comment else "")


def labels_html(name: str, rows: Sequence[Label], report: LabelReport) -> str:
    """The whole page; every text is escaped."""
    warnings = Markup("").join(Markup('<div class="warning">{}</div>').format(words) for words in report.warnings)
    models = (
        Markup("<h2>Models</h2>{}").format(table_html(*models_table(report), "words", "Models"))
        if report.models
        else ""
    )
    pairs = (
        Markup("<h2>Two by two</h2>{}").format(table_html(*pairs_table(report), "words", "Two by two"))
        if report.pairs
        else ""
    )
    body = Markup(
        "<h1>Labels: {name}</h1><p class=muted>Agreement is of comparisons of two completions, "
        "chance taken off in alpha and kappa: 1 is full agreement, 0 what chance gives.</p>{warnings}{overall}"
        "<h2>Annotators</h2>{people}{pairs}{models}<h2>What they disagree on</h2><p class=muted>The most contested "
        "items, at most {shown}.</p>{samples}"
    ).format(
        name=name,
        warnings=warnings,
        overall=table_html(["measure", "value"], overall_rows(report), "words", "All labels"),
        people=table_html(*people_table(report.people), "words", "Annotators"),
        pairs=pairs,
        models=models,
        shown=SHOWN,
        samples=samples_html(rows),
    )
    return page_html(f"Labels: {name}", body)


def labels_report(file: Path, out: Path) -> LabelReport:
    """Write the page of a file of labels.

    Raises:
        ValueError: there is no such file, or it holds no labels.
    """
    rows = labels.read_labels(file)
    report = label_agreement(rows)
    files.make_folder(out.parent)
    files.write_text(out, labels_html(file.name, rows, report))
    return report
