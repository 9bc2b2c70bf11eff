"""The page's section on credit: tokens of the same texts, coloured by what each agent says of them.

The script (assets/report/page.js) draws it from data: texts once, and of each agent the numbers of every token. A
quantity has one scale for all agents, texts and prompts, so that equal colours are equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from textrl_gym.charts.plotting import LIGHT
from textrl_gym.evaluation.token_credit import QUANTITIES, rounded
from textrl_gym.experiments.results import Comparison, Group

WORDS = {
    "advantage": ("Advantage", "what the agent's loss would weigh the token by; 0 in the middle"),
    "value": ("Value", "the critic's expected return before the token; the middle is the mean"),
    "kl": ("KL", "log pi - log pi_ref of the token, nats; 0 in the middle"),
    "entropy": ("Entropy", "of the distribution that the token was taken from, nats; from 0"),
    "ratio": ("Ratio", "pi / pi_ref of the token, by its logarithm; 1 in the middle"),
}
"""Quantity -> its name, and what it is."""
ABSENT = {
    "advantage": "No advantage: this algorithm does not weigh tokens by one.",
    "value": "No value: this agent has no critic.",
}
CENTRE = 0.98
"""The scale ends at this quantile of the distances from its middle: a few tokens beyond it get the end's colour."""


@dataclass(frozen=True)
class Scale:
    """The numbers of a colour scale's ends and middle. Of ratios they are logarithms."""

    low: float
    middle: float
    high: float


def scale(name: str, numbers: Iterable[float | None]) -> Scale:
    """The scale of a quantity over all its numbers that there are."""
    known = [x for x in numbers if x is not None]
    if name == "ratio":
        # By logarithm a ratio of 2 is as far from 1 as a half.
        known = [math.log(x) for x in known if x > 0]
    middle = sum(known) / len(known) if name == "value" and known else 0.0
    # A scale that reaches to the most extreme token would leave all others without colour.
    distances = sorted(abs(x - middle) for x in known)
    reach = distances[math.ceil(CENTRE * len(distances)) - 1] if distances else 0.0
    reach = reach or 1.0  # nothing differs from the middle
    return Scale(0.0 if name == "entropy" else middle - reach, middle, middle + reach)


def credit_data(comparison: Comparison) -> dict[str, Any] | None:
    """What the script draws: texts, agents with their numbers, and scales; None where no run kept any."""
    credit_by_group = {group: group.runs[0].credit for group in comparison.groups if group.runs[0].credit}
    if not credit_by_group:
        return None
    texts = next(iter(credit_by_group.values()))
    # Side by side only where the texts are the same, token by token; another tokenizer cuts other tokens.
    same = {
        group: lines for group, lines in credit_by_group.items() if list(map(_key, lines)) == list(map(_key, texts))
    }
    agents: list[dict[str, Any]] = [
        {
            "name": group.label,
            "color": group.color % len(LIGHT),
            "numbers": {name: [line[name] for line in lines] for name in QUANTITIES if name in lines[0]},
        }
        for group, lines in same.items()
    ]
    scales = {}
    for name in QUANTITIES:
        every = [x for agent in agents for line in agent["numbers"].get(name, ()) for x in line]
        if every:
            scales[name] = vars(scale(name, every))
    keys = ("index", "prompt", "tokens", "score", "group_scores", "stop_reason")
    shown = [{key: line[key] for key in keys} for line in texts]
    return {"texts": shown, "agents": agents, "scales": scales, "words": WORDS, "absent": ABSENT}


def _key(line: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    return line["prompt"], tuple(line["tokens"])


def without_credit(comparison: Comparison, data: dict[str, Any] | None) -> list[Group]:
    """The groups that are not in the data: their runs kept none, or of other texts."""
    shown = {agent["name"] for agent in data["agents"]} if data else set()
    return [group for group in comparison.groups if group.label not in shown]


def which(texts: Sequence[Mapping[str, Any]]) -> str:
    """Which completions of a group are there; before 0.2 they were the first two."""
    extremes = all(rounded(text["score"]) in (max(text["group_scores"]), min(text["group_scores"])) for text in texts)
    group = len(texts[0]["group_scores"])
    return f"the best and the worst of {group}, by the score that is trained on" if extremes else f"two of {group}"


def credit(comparison: Comparison, data: dict[str, Any] | None) -> str:
    """The section's HTML; the script fills in what is hidden here."""
    if data is None:
        return "<p>These runs kept no credit.jsonl: they were made before it was written, or had no reference.</p>"
    missing = without_credit(comparison, data)
    missing_note = ""
    if missing:
        names = ", ".join(group.label for group in missing)
        missing_note = f"<p>Not here, since their runs kept no credit.jsonl or one of other texts: {escape(names)}.</p>"
    prompts = list(dict.fromkeys(text["prompt"] for text in data["texts"]))
    options = "".join(f'<option value="{place}">{place + 1}</option>' for place in range(len(prompts)))
    radios = "".join(
        f'<label><input type="radio" name="quantity" value="{name}"{" checked" * (place == 0)}>{WORDS[name][0]}</label>'
        for place, name in enumerate(data["scales"])
    )
    note = (
        f"Completions of held-out prompts by the initial policy, {which(data['texts'])}. Each agent, as its first "
        "finished seed ended, reads the same texts as if it had written them. Advantages are what its loss would "
        "take: of PPO one for each token, of GRPO and its relatives one for a whole completion, against its group; "
        "where an algorithm scales them, over these texts. Of agents that only decode, the policy that "
        "they decode with. NLPO's numbers are of its masked distribution. KL and ratio are one number in two forms."
    )
    return (
        f'<p class="soft">{escape(note)}</p>{missing_note}<noscript><p>The tokens need JavaScript.</p></noscript>'
        '<form id="credit-form" class="card filters" aria-label="Choose the prompt and the quantity" hidden>'
        f'<label>Prompt <select name="prompt">{options}</select></label>'
        f"<fieldset><legend>Colour by</legend>{radios}</fieldset></form>"
        '<div id="credit-legend" class="scale" hidden><p id="credit-words" class="soft small"></p>'
        '<div class="ramp" aria-hidden="true"></div><div class="ends small"><span></span><span></span><span></span>'
        '</div></div><div id="credit-texts"></div>'
        '<p id="credit-readout" class="readout" role="status" hidden></p>'
    )
