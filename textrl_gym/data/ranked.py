"""Ranked completions: several completions of one prompt as token ids, and which of them were preferred to which."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from textrl_gym.data import encoding, labels, preferences, prompts
from textrl_gym.data.chat import ChatSettings
from textrl_gym.data.rows import Dropped, OnBadRows, RowReport, say_once, settle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.core import Row


class PromptEncoder(Protocol):
    """What encoding needs of a task (`textrl_gym.mdp.task.Task` is one): its token budgets and how it cuts a prompt."""

    max_prompt_tokens: int
    max_new_tokens: int
    keep_suffix: str

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[int]:
        """Token ids of a row's prompt, at most max_prompt_tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class RankedCompletions:
    """K completions of one prompt, and which of them were preferred to which."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    """With their EOS, unless they were cut off."""
    pairs: list[tuple[int, int]]
    """(chosen, rejected), as places in completion_ids."""
    gold: list[float] = dataclasses.field(default_factory=list)
    """The judge's scores of the completions, where there is a judge; for measuring only."""
    sampled: int = 0
    """The first so many completions are the model's own samples."""
    weights: list[float] = dataclasses.field(default_factory=list)
    """Of each pair, at least 0; empty: 1 each."""
    probabilities: list[float] = dataclasses.field(default_factory=list)
    """How likely each pair's chosen one is the better one (soft labels); empty: 1 each."""
    subset: str = ""
    """The part of the data set that the row names in its column `subset`, as RewardBench has them."""


def encode_prompt(row: Row, task: PromptEncoder, tokenizer: PreTrainedTokenizerBase, budget: int) -> list[int]:
    """Ids of a prompt from a user's data, which need not be of the task's form."""
    if isinstance(row["chat"], encoding.Chat):
        return prompts.encode_conversation(row["chat"], tokenizer, budget, task.keep_suffix)
    if row["dialogue"] or not row["prompt"].endswith(task.keep_suffix):
        ids = prompts.encode_prompt(row["prompt"], tokenizer, sys.maxsize)
        return encoding.cut_beginning(ids, tokenizer, budget)
    return task.encode(row, tokenizer, budget)


def read_preferences(
    dataset: str,
    split: str,
    task: PromptEncoder,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    *,
    end_ids: Sequence[int] = (),
    most: int | None = None,
    seed: int = 0,
    whole: bool = False,
    bad_rows: OnBadRows = "stop",
    chat_settings: ChatSettings | None = None,
    annotator_weights: labels.AnnotatorWeights = "none",
) -> list[RankedCompletions]:
    """A user's preferences, in any schema of `textrl_gym.data.preferences`, as token ids within the task's budgets.

    A prompt that is too long is cut as the task cuts it; a dialogue, or what does not end as the task's prompts do,
    loses its beginning. A completion that the budget cuts has no EOS; two that are equal within it are no pair.

    Args:
        end_ids: tokens that end a completion, the usual one first; none: the tokenizer's EOS.
        most, whole: so many rows at most, drawn with `seed`; the whole of what has no held-out split.
        bad_rows: what to do with rows that do not fit their schema, and prompts that cannot be cut: "stop" or "skip".
        chat_settings: what stands before conversations, and whether the chat template writes them.
        annotator_weights: how all labels of an item become one weighted comparison; see `data.labels.consensus`.

    Raises:
        ValueError: see `data.preferences.load_preferences`; no pair is left; or weights of rows without annotators.
    """
    # Budgets count tokens: two texts that differ only behind the budget are equal for the model.
    prompt_budget, budget = max_prompt_tokens or task.max_prompt_tokens, max_new_tokens or task.max_new_tokens
    how: dict[str, Any] = {"whole": whole, "bad_rows": bad_rows, "chat_settings": chat_settings}
    rows = preferences.load_preferences(dataset, split, tokenizer, **how).rows
    places, weighed = _weighed(rows, dataset, annotator_weights)
    drawn = places if most is None or most >= len(places) else random.Random(seed).sample(places, most)
    ranked, bad, equal = [], RowReport(len(drawn)), RowReport(len(drawn))
    for number in drawn:
        row = rows[number]
        # What the budget cuts has no EOS, as a rollout that is truncated has none.
        behind = (encoding.prompt_of(row), row["completions"], tokenizer, budget)
        ids = encoding.encode_completions(*behind, end_ids=end_ids)
        pairs, weights, chances = _differing(row, ids, weighed)
        if not pairs:
            equal.add(rows.where(number), Dropped(f"completions that are equal within max_new_tokens={budget}"))
            continue
        try:
            prompt_ids = encode_prompt(row, task, tokenizer, prompt_budget)
        except ValueError as error:
            bad.add(rows.where(number), prompts.unencodable(error))
            continue
        ranked.append(RankedCompletions(prompt_ids, ids, pairs, [], 0, weights, chances, str(row.get("subset") or "")))
    where = f"dataset {dataset!r}, split {split!r}"
    settle(bad, where, bad_rows)
    if not ranked:
        raise ValueError(f"{where}: within max_new_tokens={budget} no two completions of a prompt differ: {equal}")
    if equal.counts:
        say_once(f"{where}: of {equal.total:,} rows dropped {equal}")
    return ranked


Weighed = dict[str, dict[tuple[int, int], float]]
"""Item -> of two places a < b of its completions, how likely a is the better one."""


def _differing(
    row: Row, ids: list[list[int]], weighed: Weighed
) -> tuple[list[tuple[int, int]], list[float], list[float]]:
    """A row's pairs whose completions are not equal as tokens, and their weights and probabilities if they have any.

    Weights are made of what all annotators say of an item, so that one label's own probability has no part in them.
    """
    if weighed:
        (pairs, weights), chances = labels.weighted_pairs(weighed[row["item"]]), []
    else:
        pairs, weights, chances = row["pairs"], [], row["probabilities"]
    differing = [place for place, (a, b) in enumerate(pairs) if ids[a] != ids[b]]
    chosen = [[numbers[place] for place in differing if numbers] for numbers in (weights, chances)]
    return [pairs[place] for place in differing], chosen[0], chosen[1]


def _weighed(rows: Sequence[Row], dataset: str, method: labels.AnnotatorWeights) -> tuple[Sequence[int], Weighed]:
    """The place of each item's first row, and by item how likely each order of two of its completions is.

    Without weights every row's place, and nothing.
    """
    if method == "none":
        return range(len(rows)), {}
    first: dict[str, int] = {}
    cast = []
    for place, row in enumerate(rows):
        if not {"item", "annotator", "ranks"} <= row.keys():
            raise ValueError(
                f"annotator_weights={method!r} needs the labels of annotators, as `textrl-gym annotate` writes them; "
                f"dataset {dataset!r} names no annotators"
            )
        cast.append({name: row[name] for name in ("item", "annotator", "ranks")})
        first.setdefault(row["item"], place)
    return list(first.values()), labels.consensus(cast, method)
