"""Token budgets against data: how long the prompts and completions of a split are, and how many a budget cuts."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_gym import files
from textrl_gym.core import PromptSource, Row
from textrl_gym.data import encoding, ranked
from textrl_gym.data.rows import RowReport, Rows
from textrl_gym.mdp.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.mdp.vector_env import TextVectorEnv

DATA_FILE = "data.json"
"""In the folder of a run: what is known of its data."""
COUNTED_ROWS = 1000
"""The rows whose tokens are counted: a second, and a share of 5% is known to 0.7%."""
MUCH = 0.05
"""A share that is cut above this is worth a warning."""
QUANTILES = (50, 95, 99)
FLAGS = {"prompts": "max_prompt_tokens", "completions": "max_new_tokens"}


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long the prompts or the completions of a split are, in tokens."""

    what: str
    """prompts or completions."""
    budget: int
    rows: int
    """Of the split."""
    counted: int
    """The texts that were counted, of rows drawn at random where these are many."""
    cut: int
    """Those of them that are longer than the budget."""
    quantiles: tuple[int, int, int]
    """50, 95 and 99% of the texts are no longer."""

    @property
    def much(self) -> bool:
        """Whether so many are cut that it should be known."""
        return self.cut > MUCH * self.counted

    def __str__(self) -> str:
        flag = FLAGS[self.what]
        share, most = self.cut / self.counted, ", ".join(f"{n:,}" for n in self.quantiles)
        sentence = f"{self.what}: 50, 95 and 99% have at most {most} tokens; {flag}={self.budget} cuts {share:.1%}"
        if not self.much:
            return sentence
        return f"{sentence}. WARNING: raise it by --env.{flag.replace('_', '-')}, or shorten the {self.what}"


def lengths(what: str, budget: int, rows: int, counts: Sequence[int]) -> Lengths | None:
    """The lengths of texts with these numbers of tokens; None where there are no texts."""
    if not counts:
        return None
    low, middle, high = (int(n) for n in np.percentile(counts, QUANTILES, method="higher"))
    return Lengths(what, budget, rows, len(counts), sum(n > budget for n in counts), (low, middle, high))


def measure_rows(
    source: PromptSource,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    budgets: tuple[int, int],
    ends: Sequence[int] = (),
) -> list[Lengths]:
    """The lengths of prompts, and of the completions that are there.

    Args:
        budgets: tokens of a prompt and of a completion.
        ends: tokens that end a completion, the usual one first; none: the tokenizer's EOS.
    """
    prompts: list[int] = []
    completions: list[int] = []
    for row in _drawn(source):
        prompts.append(len(task.encode(row, tokenizer, sys.maxsize)))
        texts = [text for text in row.get("completions") or [row.get("completion")] if text]
        ids = encoding.encode_completions(encoding.prompt_of(row), texts, tokenizer, end_ids=ends, unknown="skip")
        completions += map(len, ids)
    return _both(budgets, len(source), prompts, completions)


def measure_preferences(
    rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()
) -> list[Lengths]:
    """The lengths of the prompts and the completions of preferences."""
    prompts: list[int] = []
    completions: list[int] = []
    for row in _drawn(rows):
        prompts.append(len(ranked.encode_prompt(row, task, tokenizer, sys.maxsize)))
        behind = (encoding.prompt_of(row), row["completions"], tokenizer)
        completions += map(len, encoding.encode_completions(*behind, end_ids=ends))
    return _both((task.max_prompt_tokens, task.max_new_tokens), len(rows), prompts, completions)


def _drawn(source: PromptSource) -> Iterator[Row]:
    places: Sequence[int] = range(len(source))
    if len(places) > COUNTED_ROWS:
        places = random.Random(0).sample(places, COUNTED_ROWS)
    return (source[place] for place in places)


def _both(budgets: tuple[int, int], rows: int, prompts: list[int], completions: list[int]) -> list[Lengths]:
    measured = [lengths("prompts", budgets[0], rows, prompts), lengths("completions", budgets[1], rows, completions)]
    return [one for one in measured if one is not None]


# -- telling ----------------------------------------------------------------------------------------------------------


def from_data(source: PromptSource) -> bool:
    """Whether rows were read from data, and not computed or listed by their task, which knows its budgets."""
    return isinstance(_innermost(source), Rows)


def of_env(env: TextVectorEnv) -> list[Lengths]:
    """The lengths of an environment's data; none where its task makes them."""
    budgets = (env.max_prompt_tokens, env.max_new_tokens)
    return measure_rows(env.source, env.task, env.tokenizer, budgets, env.end_ids) if from_data(env.source) else []


def told_of_splits(
    sources: Mapping[str, PromptSource], task: Task, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """Print the lengths of each split that was read from data, and return them as JSON holds them."""
    budgets = (task.max_prompt_tokens, task.max_new_tokens)
    by_split = {
        split: measure_rows(source, task, tokenizer, budgets, ends)
        for split, source in sources.items()
        if from_data(source)
    }
    tell(by_split)
    return record(by_split)


def tell(by_split: Mapping[str, Sequence[Lengths]]) -> None:
    """Print a line for the prompts and one for the completions of each split."""
    for split, some in by_split.items():
        for one in some:
            print(f"{split} ({one.rows:,} rows), {one}", file=sys.stderr)


def record(by_split: Mapping[str, Sequence[Lengths]]) -> dict[str, Any]:
    """By split, as JSON holds it."""
    return {split: {one.what: dataclasses.asdict(one) for one in some} for split, some in by_split.items()}


def left_out(source: PromptSource) -> RowReport | None:
    """The rows of a data set that were left out."""
    inner = _innermost(source)
    return inner.report if isinstance(inner, Rows) else None


def _innermost(source: object) -> object:
    """The rows that views of rows (as a model reads them, some of them, ...) are made of: their `source`."""
    while not isinstance(source, Rows) and hasattr(source, "source"):
        source = source.source
    return source


def write(folder: Path, sources: Mapping[str, PromptSource], by_split: Mapping[str, Sequence[Lengths]]) -> None:
    """Write down what is known of a run's data, in the folder of the run."""
    reports = {split: left_out(source) for split, source in sources.items()}
    bad = {split: dict(report.counts) for split, report in reports.items() if report is not None}
    sizes = {split: len(source) for split, source in sources.items()}
    report = {"rows": sizes, "lengths": record(by_split), "left_out": bad}
    files.write_text(folder / DATA_FILE, json.dumps(report, indent=1) + "\n")
