"""Accuracy of an existing reward model on published preferences: ours, an ensemble, or any classifier of transformers.

A table as RewardBench's (Lambert et al. 2024, arXiv:2403.13787): the share of pairs whose chosen text has the higher
reward, by data set and by the rows' column `subset`. Equal rewards are ties: they count half and are told. Wilson's
interval takes pairs for independent; those of one prompt are not.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from textrl_gym import files
from textrl_gym.bounds import Seed, check_settings
from textrl_gym.core import Row
from textrl_gym.data import encoding, ranked
from textrl_gym.data.chat import ChatSettings
from textrl_gym.data.preferences import load_preferences
from textrl_gym.data.prompts import encode_prompt
from textrl_gym.data.rows import OnBadRows, digest
from textrl_gym.models import loading
from textrl_gym.rewards import RewardFunction, load_reward
from textrl_gym.stats.estimates import outcomes
from textrl_gym.stats.pairwise import agreement, win_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING_RECORDS = ("reward_training.json", "ensemble_training.json")
"""Files of a folder that say what its reward model was trained on."""
ENSEMBLE = "ensemble.json"
TEXTS_AT_ONCE = 64
SHORTEST_PROMPT = 16
"""Tokens of a prompt that are left where a completion alone has more than the model takes, and loses its end."""


@dataclasses.dataclass(frozen=True)
class RewardAccuracyConfig:
    """What is measured on what."""

    evaluate: str
    """The reward model: a folder, or a Hub id of a sequence classifier with one label."""
    dataset: tuple[str, ...] = ()
    """Preferences, in any form that training reads; all of a single file, else the held-out split."""
    trained_on: tuple[str, ...] = ()
    """The preferences that it was trained on, where its folder does not say: how many of the prompts it has seen."""
    prompts: Annotated[int, Ge(0)] = 0
    """At most so many rows of each data set, drawn with the seed; 0: all of them."""
    seed: Seed = 0
    """Seeds which rows are drawn."""
    bad_rows: OnBadRows = "stop"
    """What to do with rows that do not fit their form: stop or skip."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.dataset:
            raise ValueError("dataset must name preferences to measure on, one or several")


class WholeTexts:
    """What encoding needs of a task, without budgets: the reward model's own positions are the limit."""

    max_prompt_tokens = max_new_tokens = sys.maxsize
    keep_suffix = ""

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[int]:
        """Token ids of a row's prompt."""
        return encode_prompt(row["prompt"], tokenizer, max_prompt_tokens)


def reward_accuracy(config: RewardAccuracyConfig) -> dict[str, Any]:
    """Measure a reward model; returns {"measured": numbers of all pairs, "accuracy": the rows of the table}.

    Raises:
        ValueError: no reward model, no preferences, or bad rows among them.
    """
    folder = Path(config.evaluate).expanduser()
    first = folder / _first_member(folder) if (folder / ENSEMBLE).is_file() else config.evaluate
    tokenizer = loading.load_tokenizer(first, ends=False)
    spec = config.evaluate if folder.is_dir() else f"reward_model:{config.evaluate}"
    reward = load_reward(spec, device=str(loading.resolve_device(config.device)), tokenizer=tokenizer)
    seen = trained_prompts(config, folder)
    parts: dict[str, list[tuple[float, bool]]] = {}
    for name in config.dataset:
        rows = load_preferences(
            name, "validation", tokenizer, whole=True, bad_rows=config.bad_rows, chat_settings=ChatSettings()
        ).rows
        chosen: Sequence[int] = range(len(rows))
        if 0 < config.prompts < len(rows):
            chosen = random.Random(config.seed).sample(chosen, config.prompts)
        for row, scores in _scored(reward, tokenizer, (rows[number] for number in chosen)):
            subset = row.get("subset")
            place = f"{name} / {subset}" if isinstance(subset, str) and subset else name
            known = seen is not None and _prompt(row) in seen
            parts.setdefault(place, []).extend((scores[a] - scores[b], known) for a, b in row["pairs"])
    table = [accuracy_row(place, pairs, seen is not None) for place, pairs in parts.items()]
    if len(table) > 1:
        table.append(accuracy_row("all", [pair for pairs in parts.values() for pair in pairs], seen is not None))
    measured = {name: value for name, value in table[-1].items() if name != "data"}
    record = {"reward": config.evaluate, "measured": measured, "accuracy": table}
    if config.json is not None:
        files.write_text(config.json, json.dumps(record, indent=2) + "\n")
    return record


def accuracy_row(name: str, pairs: Sequence[tuple[float, bool]], knows: bool) -> dict[str, Any]:
    """A line of the table: of pairs' differences of rewards, and whether the model was trained on their prompts."""
    gaps = [gap for gap, _ in pairs]
    share = win_rate(outcomes(gaps, 0.0))
    row: dict[str, Any] = {"data": name, "pairs": len(gaps), "accuracy": agreement(gaps)}
    row |= {"low": share.low, "high": share.high, "ties": sum(gap == 0 for gap in gaps)}
    return row | ({"trained on": sum(known for _, known in pairs) / len(pairs)} if knows else {})


def trained_prompts(config: RewardAccuracyConfig, folder: Path) -> set[bytes] | None:
    """The prompts that the reward model was trained on; None where nobody says."""
    names = list(config.trained_on)
    for file in (folder / name for name in TRAINING_RECORDS):
        if not names and file.is_file():
            names = list(files.read_json(file).get("config", {}).get("dataset") or ())
    if not names:
        return None
    return {
        _prompt(row) for name in names for row in load_preferences(name, "train", whole=False, bad_rows="skip").rows
    }


def _prompt(row: Row) -> bytes:
    """A prompt as it is compared: by its words, whatever wrote the conversation around them."""
    spoken = row.get("chat")
    text = " ".join(turn["content"] for turn in spoken) if isinstance(spoken, encoding.Chat) else row["prompt"]
    words = text.replace("Human:", " ").replace("Assistant:", " ").split()
    return digest(" ".join(words))


def _first_member(folder: Path) -> str:
    members = files.read_json(folder / ENSEMBLE).get("members")
    if not isinstance(members, list) or not members:
        raise ValueError(f"{str(folder / ENSEMBLE)!r} names no members")
    return str(members[0])


def _scored(
    reward: RewardFunction, tokenizer: PreTrainedTokenizerBase, rows: Iterator[Row]
) -> Iterator[tuple[Row, list[float]]]:
    """Each row, and the rewards of its completions."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if sum(len(one["completions"]) for one in batch) >= TEXTS_AT_ONCE:
            yield from _score_batch(reward, tokenizer, batch)
            batch = []
    if batch:
        yield from _score_batch(reward, tokenizer, batch)


def _limit(reward: RewardFunction) -> int:
    """Tokens of the longest text that the reward's models take."""
    functions = [function for _, function in reward.parts.values()]
    models = [model for function in functions for model in getattr(function, "members", [function])]
    return min((getattr(model, "limit", sys.maxsize) for model in models), default=sys.maxsize)


def _score_batch(
    reward: RewardFunction, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> Iterator[tuple[Row, list[float]]]:
    prompts = [row["prompt"] for row in rows for _ in row["completions"]]
    completions = [text for row in rows for text in row["completions"]]
    columns: dict[str, list[Any]] = {}
    # As ids, so that what a chat template writes is special tokens and what users wrote is text. Without an EOS, as of
    # other projects' encoders, the model reads the text itself.
    if tokenizer.eos_token_id is not None:
        whole = WholeTexts()
        of_rows = [ranked.encode_prompt(row, whole, tokenizer, sys.maxsize) for row in rows]
        columns["prompt_ids"] = [ids for row, ids in zip(rows, of_rows, strict=True) for _ in row["completions"]]
        limit = _limit(reward)
        room = max(limit - SHORTEST_PROMPT, (limit + 1) // 2)
        columns["completion_ids"] = [
            ids[:room]
            for row in rows
            for ids in encoding.encode_completions(encoding.prompt_of(row), row["completions"], tokenizer, sys.maxsize)
        ]
    scores = iter(reward(prompts, completions, **columns).tolist())
    for row in rows:
        yield row, [next(scores) for _ in row["completions"]]
