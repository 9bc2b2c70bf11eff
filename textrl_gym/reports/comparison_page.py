"""comparison_report(): one self-contained HTML file about a comparison. Same folder, same bytes.

The page's own HTML, style and script are written by hand (assets/report); its charts are plotly's, whose script is
embedded once. It reads nothing from the network, and a policy in its head forbids it to.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from textrl_gym import files
from textrl_gym.charts import analysis as numbers
from textrl_gym.charts.comparison import charts
from textrl_gym.charts.plotting import LIGHT, Chart, Table, go, painted, palettes, short
from textrl_gym.charts.training_curves import quality
from textrl_gym.evaluation.metrics import METRICS
from textrl_gym.experiments.results import KEPT_STATE, Comparison, Group, read_comparison
from textrl_gym.reports.credit_section import credit, credit_data
from textrl_gym.reports.run_page import CHART_STYLE
from textrl_gym.stats.estimates import Estimate

ASSETS = Path(__file__).parents[1] / "assets" / "report"
PLOTLY = "plotly-basic.min.js"
"""plotly.js with lines, points and bars alone, a quarter of the whole (npm: plotly.js-basic-dist-min; MIT)."""
SAMPLES_SHOWN = 40
# The file is opened from a disk and may be sent on: texts of a model in it must be able to load and to send nothing.
PAGE_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)


def comparison_report(folder: str | Path) -> Path:
    """Write DIR/report.html about the comparison in DIR.

    Raises:
        ValueError: the folder holds no comparison, or no finished run of one.
        ImportError: plotly is not installed.
    """
    folder = Path(folder)
    comparison = read_comparison(folder)
    go()  # before any long work
    out = folder / "report.html"
    files.write_text(out, comparison_html(comparison))
    return out


def live_page(folder: Path, version: str) -> str:
    """The page as `textrl-gym watch` serves it: it asks its server whether there is a newer one.

    Raises:
        ValueError: no run is finished, or a file is broken.
    """
    return comparison_html(read_comparison(folder), version)


def comparison_html(comparison: Comparison, version: str = "") -> str:
    """The whole page; every text of a run is escaped.

    Args:
        version: of a page that is served; the empty string: a file of its own, which fetches nothing.
    """
    drawn, credit_json = charts(comparison), credit_data(comparison)
    text = text_quality(comparison, drawn)
    sections = {
        "summary": ("Summary", summary(comparison)),
        "learning": ("Learning curves", learning_section(drawn)),
        "frontier": ("KL and reward", figure_html(drawn["frontier"])),
        "pairs": ("Pairs of agents", beaten(comparison, drawn.get("matrix"))),
        "profile": ("Performance profile", figure_html(drawn["profile"])),
        "overoptimisation": ("Over-optimisation", exploited(comparison, drawn.get("overoptimisation"))),
        "length": ("Length", length_section(drawn)),
        **({"quality": ("Text quality", text)} if text else {}),
        "samples": ("Samples", sample_section(comparison)),
        "credit": ("Credit", credit(comparison, credit_json)),
        "cost": ("Cost", figure_html(drawn["cost"]) if "cost" in drawn else "<p>No run kept its seconds.</p>"),
        "settings": ("Settings", setting_section(comparison)),
    }
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in sections.items())
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{html}</section>' for key, (name, html) in sections.items())
    # Only the page that is served may connect, and only to its own server.
    policy, live, scripts, style = PAGE_SECURITY_POLICY, "", ["page.js", "credit.js"], asset("page.css")
    if version:
        policy, live = f"{PAGE_SECURITY_POLICY}; connect-src 'self'", f'<div id="live" data-version="{version}"></div>'
        scripts.append("live.js")
        style += CHART_STYLE
    title = escape(f"{comparison.environment}: {numbers.listed([g.label for g in comparison.groups])}")
    data = {key: painted(chart) for key, chart in drawn.items() if key != "matrix"}  # which is a table on the page
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>\n{style}</style></head>\n<body><header><h1>{escape(comparison.environment)}: agents "
        f"compared</h1>{live}{lead(comparison, bool(version))}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"\n<main>{body}</main>\n{embedded('chart-data', data)}{embedded('palettes', palettes())}"
        f"{embedded('credit-data', credit_json)}"
        # As text, which page.js runs when the first chart comes near the window.
        f'<script type="text/plain" id="plotly">{asset(PLOTLY)}</script>\n'
        f"{''.join(f'<script>{chr(10)}{asset(name)}</script>' for name in scripts)}</body></html>\n"
    )


def asset(name: str) -> str:
    """A file of the page's own."""
    return (ASSETS / name).read_text(encoding="utf-8")


def embedded(name: str, data: object) -> str:
    """Data for the script, which no text in it can end."""
    # "<" alone is enough: </script> and <!-- both need it, and JSON reads \u003c as the same character.
    return f'<script type="application/json" id="{name}">{json.dumps(data).replace("<", chr(92) + "u003c")}</script>'


UNTRAINED = "<p>No agent was trained in this comparison.</p>"
NO_LENGTHS = "<p>No slope: the answers all have one length, or their lengths were not kept.</p>"


# -- pieces -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[object]], label: str, words: bool = False) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of each row is its heading.

    Cells are text, whatever they hold, and HTML only where they are Markup.
    """
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{escape(first)}</th>{cells(rest)}</tr>' for first, *rest in rows)
    # Columns of words are aligned on the left, those of numbers on the right.
    kind = ' class="words"' if words else ""
    return (
        # With a role and in the order of tabs, so that the keyboard can scroll it.
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}"><table{kind}><thead><tr>{top}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def cells(row: Iterable[object]) -> str:
    """Table cells: text, or HTML where one is Markup."""
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def figure_html(chart: Chart) -> str:
    """A chart with its words, and its numbers as a table."""
    return (
        f'<figure><h3>{escape(chart.title)}</h3><div class="chart" id="chart-{chart.key}" role="group" '
        f'aria-label="{escape(chart.title)}. The numbers are in the table below."></div><noscript><p>The chart needs '
        f"JavaScript; its numbers are below.</p></noscript><figcaption>{escape(chart.note)}</figcaption>"
        f"{folded(Table(f'The numbers of “{chart.title}”', chart.head, chart.rows), chart.title)}"
        f"{folded(chart.more) if chart.more else ''}</figure>"
    )


def heat_table(chart: Chart) -> str:
    """A heat map as a table whose cells have its colours, with its words and numbers."""
    heat = chart.figure.data[0]
    # What plotly is given is escaped for it, as HTML is.
    names = [Markup(name) for name in heat.x]
    rows = [[name, *map(_heat, line)] for name, line in zip(names, heat.z, strict=True)]
    cells_of = table(("agent", *names), rows, f"{chart.title}, as colours").replace(
        "<table>", '<table class="heat">', 1
    )
    return (
        f"<figure><h3>{escape(chart.title)}</h3>{cells_of}<figcaption>{escape(chart.note)}</figcaption>"
        f"{folded(Table(f'The numbers of “{chart.title}”', chart.head, chart.rows), chart.title)}</figure>"
    )


def _heat(rate: float | None) -> Markup:
    if rate is None:
        return Markup("")
    color, share = "plus" if rate > 0.5 else "minus", round(200 * abs(rate - 0.5))
    return Markup('<span style="background: color-mix(in srgb, var(--{}) {}%, var(--card))">{:.2f}</span>').format(
        color, share, rate
    )


def folded(more: Table, label: str = "") -> str:
    """A further table, folded away."""
    rows = table(more.head, more.rows, label or more.title)
    return f"<details><summary>{escape(more.title)}</summary>{rows}</details>"


def pair_of(drawn: dict[str, Chart], *keys: str) -> str:
    """Charts side by side where there is room."""
    there = [figure_html(drawn[key]) for key in keys if key in drawn]
    return f'<div class="two">{"".join(there)}</div>' if there else ""


def bullets(items: Iterable[str]) -> str:
    """Sentences as a list."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def with_interval(number: numbers.Number, digits: int = 3) -> str:
    """A number, and its interval below it."""
    if number is None:
        return "-"
    if not isinstance(number, Estimate):
        return f"{number:.{digits}f}"
    low, high = f"{number.low:.{digits}f}", f"{number.high:.{digits}f}"
    return Markup(f'{number.value:.{digits}f}<span class="interval">{low} to {high}</span>')


# -- sections ---------------------------------------------------------------------------------------------------------


def lead(comparison: Comparison, live: bool = False) -> str:
    """What was compared, and what is missing; a live page tells by itself what is not finished."""
    runs, config = len(comparison.runs), comparison.config
    trained = sum(len(group.runs) for group in comparison.groups if not group.untrained)
    tokens = f"{config['total_timesteps']:,} tokens"
    of = f" of {tokens} each" * (trained == runs) or f", {trained} of them trained for {tokens} each" * (trained > 0)
    same = "" if comparison.same_prompts()[1] else " that are the same for all"
    words = f"{runs} finished run{'s' * (runs > 1)}{of}, evaluated on {numbers.counted(comparison.prompt_counts)} "
    words += f"held-out prompts{same}{', some with several completions' * comparison.repeats}."
    if config.get("gold") not in (None, "gold"):
        words += f" Gold is here the reward that was named, {config['gold']}."
    given = comparison.env.keywords()
    if given:
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
        words += f" Settings of the environment that are not the task's own: {settings}."
    first = numbers.headline(comparison)
    result = f'<p class="result">{escape(first)}</p>' if first else ""
    html = f'{result}<p class="soft">{escape(words)}</p>'
    unfinished = {} if live else comparison.unfinished
    for what, names in (("failed", comparison.failed), ("are not finished", unfinished)):
        if names:
            reasons = bullets(f"{name}: {why}" for name, why in names.items())
            html += f'<div class="warning"><b>Runs that {what}</b> and are not in the numbers:{reasons}</div>'
    return html


def summary(comparison: Comparison) -> str:
    """The table, and what it says in sentences."""
    gold = comparison.gold
    has_gold = comparison.gold == "gold"
    head = ["agent", "KL coefficient", "seeds", f"{gold}, IQM (95%)", *(["score"] if has_gold else [])]
    head += ["win rate against the initial policy (95%)", "win rate at equal length (95%)", "KL, nats per sequence"]
    head += ["tokens", "ended by EOS", "seconds", "collapsed runs"]
    rows = [_summary_row(numbers.summarise(comparison, group), has_gold) for group in comparison.groups]
    first, rest = numbers.verdicts(comparison)
    sentences = bullets(first) if first else "<p>There is one agent, and nothing to compare it with.</p>"
    if rest:
        sentences += f"<details><summary>All other pairs ({len(rest)})</summary>{bullets(rest)}</details>"
    pairs = len(first) + len(rest)
    if pairs > 1 and sum(len(group.runs) > 1 for group in comparison.groups) > 1:
        # Bonferroni's level is told: readers would take any interval on a page for 95%.
        level = f"{100 * numbers.pair_confidence(len(comparison.groups)):g}%"
        sentences += (
            f'<p class="soft small">The intervals are of {level}, so that 95% hold for all {pairs} pairs at once.</p>'
        )
    if pairs and numbers.seed_spread(comparison) is not None:
        sentences += (
            '<p class="soft small">Differences are over prompts and seeds. Agents on the same prompts are compared '
            "prompt by prompt, and how much seeds differ is pooled over all trained agents.</p>"
        )
    cannot = numbers.cautions(comparison)
    if cannot:
        sentences += f"<h3>What cannot be said</h3>{bullets(cannot)}"
    note = (
        f"IQM is the interquartile mean of {gold} over seeds, with a bootstrap interval. Win rates are against the "
        "model that all start from; their intervals are over prompts, for these runs. A run has collapsed where its "
        f"last evaluation during training has less {gold} than its first."
    )
    return f'{table(head, rows, "Summary")}<p class="soft small">{escape(note)}</p><h3>What can be said</h3>{sentences}'


def _summary_row(line: numbers.Summary, has_gold: bool) -> list[str]:
    def mean(key: str) -> str:
        value = line.mean(key)
        return "-" if value is None else f"{value:z,.{METRICS[key].decimals}f}"

    group = line.group
    seeds = "-" if group.untrained else str(len(group.runs))
    row = [group.agent, group.coefficient, seeds, with_interval(line.gold)]
    row += [mean("score")] if has_gold else []
    row += [with_interval(line.win_rate), with_interval(line.length_controlled)]
    row += [mean(key) for key in ("kl_sequence", "completion_tokens", "eos_share")]
    seconds = line.mean("train_seconds")
    row.append("-" if seconds is None else short(seconds, 2) if seconds < 10 else f"{seconds:,.0f}")
    return [*row, "-" if line.collapsed is None else f"{line.collapsed[0]} of {line.collapsed[1]}"]


def beaten(comparison: Comparison, chart: Chart | None) -> str:
    """The matrix of win rates and the ratings that follow from it."""
    groups, others = comparison.same_prompts()
    missed = f"<p>{escape(numbers.listed(others))}: evaluated on other prompts, so not here.</p>" if others else ""
    if chart is None:
        return f"{missed}<p>It takes two agents on the same prompts.</p>"
    rows = [
        [r.group.label, f"{r.value:+.0f}", f"{r.low:+.0f} to {r.high:+.0f}"]
        for r in numbers.ratings(comparison, groups)
    ]
    one, several = "95% interval over prompts", "lowest and highest seed"
    number = {len(group.runs) == 1 for group in groups}
    spread = f"{several}; of one seed the {one}" if len(number) == 2 else one if True in number else several
    note = (
        "Bradley-Terry ratings: every run is a player, every prompt a game between any two. 400 points are odds of 10 "
        "to 1; only differences mean anything."
    )
    rated = table(("agent", "Elo points", spread), rows, "Bradley-Terry ratings")
    return f'{missed}{heat_table(chart)}<h3>Ratings</h3>{rated}<p class="soft small">{note}</p>'


def exploited(comparison: Comparison, chart: Chart | None) -> str:
    """The alarms of all runs, and proxy against gold."""
    words_by_title: dict[str, list[str]] = {}
    for run in comparison.runs:
        for alarm in run.alarms:
            words_by_title.setdefault(alarm.title, []).append(f"{run.name}: {alarm.words}")
    warnings = "".join(
        f'<div class="warning"><b>{title}</b>{bullets(words)}</div>' for title, words in words_by_title.items()
    )
    if comparison.gold != "gold":
        words = "There is no gold score beside the reward that was trained on, so over-optimisation cannot be seen."
        return f"{warnings}<p>{words}</p>"
    return warnings + (figure_html(chart) if chart else UNTRAINED)


def learning_section(drawn: dict[str, Chart]) -> str:
    """The scores and the KL through training."""
    return pair_of(drawn, "curve-tokens", "curve-score", "curve-seconds", "drift-kl_sequence") or UNTRAINED


def length_section(drawn: dict[str, Chart]) -> str:
    """Score by length, and how length and ends drift."""
    by_length = figure_html(drawn["lengths"]) if "lengths" in drawn else NO_LENGTHS
    return by_length + pair_of(drawn, "drift-completion_tokens", "drift-eos_share")


def text_quality(comparison: Comparison, drawn: dict[str, Chart]) -> str:
    """The texts in numbers, and how these drift; nothing where none was measured."""
    quality_table, html = quality(comparison), ""
    if quality_table is not None:
        note = (
            "Means over seeds of the last evaluation. Distinct-n is the share of different n-grams among all of its "
            "completions: it is low where an agent says the same to every prompt, and falls with their number. "
            "Repetition is within a completion. Reference texts are the prompts' own, where they have them."
        )
        html = f'{table(quality_table.head, quality_table.rows, quality_table.title)}<p class="soft small">{note}</p>'
    return html + pair_of(drawn, "drift-entropy_token", "drift-distinct_2", "drift-repetition")


def sample_section(comparison: Comparison) -> str:
    """Answers to the same prompts side by side: of each agent's first seed, and of the initial policy."""
    groups, _ = comparison.same_prompts()
    if not groups or not groups[0].runs[0].episodes:
        return "<p>No completions were kept.</p>"
    first = groups[0].runs[0]
    with_start = all("start" in episode for episode in first.episodes)
    names = [*(["initial policy"] if with_start else []), *(group.label for group in groups)]
    boxes = "".join(
        f'<label><input type="checkbox" name="agent" value="{place}" checked>{escape(name)}</label>'
        for place, name in enumerate(names)
    )
    count = min(SAMPLES_SHOWN, len(first.episodes))
    prompts = []
    for number, asked in enumerate(first.episodes[:count]):
        answers: list[tuple[str, Group | None, Any]] = [("initial policy", None, asked["start"])] if with_start else []
        answers += [(g.label, g, g.runs[0].episodes[number]) for g in groups]
        cards = "".join(_answer(place, *answer) for place, answer in enumerate(answers))
        prompts.append(
            f'<details class="prompt" data-number="{number + 1}" open><summary><h3>Prompt {number + 1}</h3></summary>'
            f'<div class="said asked" tabindex="0" role="region" aria-label="Prompt {number + 1}">'
            f'{escape(asked["prompt"].strip())}</div>{_wanted(asked)}<div class="answers">{cards}</div></details>'
        )
    seeds = "seed 0" if all(g.runs[0].spec["seed"] == 0 for g in groups) else "each agent's first finished seed"
    note = f"The first {count} held-out prompts, not picked; answers of {seeds}, sampled with the same random numbers."
    return (
        f'<p class="soft">{note}</p><form id="filters" class="card filters" aria-label="Filter the samples" hidden>'
        '<label class="text">Text in prompt or answers<input type="search" name="text" autocomplete="off"></label>'
        f'<label class="number">Prompt number<input type="number" name="number" min="1" max="{count}"></label>'
        f'<button type="reset">Show all</button><fieldset><legend>Agents</legend>{boxes}</fieldset></form>'
        f'<p id="found" class="soft small" role="status"></p>{"".join(prompts)}'
    )


def _wanted(asked: dict[str, Any]) -> str:
    reference = asked.get("reference")
    return f'<p class="facts">Reference: {escape(str(reference).strip())}</p>' if reference else ""


def _answer(place: int, name: str, group: Group | None, sample: dict[str, Any]) -> str:
    facts = [f"score {sample['score']:.2f}"]
    if "gold" in sample:
        facts.insert(0, f"gold {sample['gold']:.2f}")
    if "tokens" in sample:
        facts.append(f"{sample['tokens']} token{'s' * (sample['tokens'] != 1)}")
    if sample.get("stop_reason", "EOS") != "EOS":
        facts.append(str(sample["stop_reason"]).lower().replace("_", " "))
    completion = escape(sample["completion"].strip()) or '<i class="soft">(empty)</i>'
    color = "" if group is None else f' style="border-left-color: var(--agent-{group.color % len(LIGHT)})"'
    return (
        f'<div class="answer" data-agent="{place}"{color}><h4>{escape(name)}</h4><div class="said">{completion}</div>'
        f'<p class="facts">{escape(" · ".join(facts))}</p></div>'
    )


# -- settings ---------------------------------------------------------------------------------------------------------


def command(comparison: Comparison) -> str:
    """What was typed, or could have been."""
    from textrl_gym.experiments.compare import CompareConfig

    words = ["textrl-gym", "compare", comparison.environment]
    defaults = CompareConfig(("",))
    for name, value in comparison.config.items():
        # What was left at its default need not be typed again. JSON has lists where the config has tuples.
        if name == "agents" or value != _plain(getattr(defaults, name, None)):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return f"{shlex.join(words)} --out DIR"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def setting_section(comparison: Comparison) -> str:
    """The command, every run, every version, every setting; folded away."""
    listed = [
        [run.name, group.agent, group.coefficient, run.spec["seed"], "finished"]
        for group in comparison.groups
        for run in group.runs
    ]
    for what, names in (("failed", comparison.failed), ("not finished", comparison.unfinished)):
        listed += [[name, "", "", "", what] for name in names]
    runs = table(("run", "agent", "KL coefficient", "seed", "state"), listed, "Runs", words=True)
    parts = [
        ("Runs and seeds", runs),
        ("The comparison", _dump(comparison.config)),
        ("Versions", table(("of", "version"), comparison.versions.items(), "Versions", words=True)),
        *((f"Settings of {group.label}", _dump(_of(group))) for group in comparison.groups),
    ]
    folded = "".join(f"<details><summary>{escape(name)}</summary>{html}</details>" for name, html in parts)
    return f'<p>The command:</p><pre tabindex="0">{escape(command(comparison))}</pre>{folded}'


def _of(group: Group) -> dict[str, Any]:
    run = group.runs[0]
    state = {key: run.state[key] for key in KEPT_STATE if key in run.state and key not in ("seed", "agent")}
    return {"seeds": [r.spec["seed"] for r in group.runs], "asked for": run.spec, "as it ended": state}


def _dump(data: object) -> str:
    return f'<pre tabindex="0">{escape(json.dumps(data, indent=1, ensure_ascii=False))}</pre>'
