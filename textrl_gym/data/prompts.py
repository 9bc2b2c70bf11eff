"""Prompts in the published schemas, and their encoding within a token budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from textrl_gym.data import sources

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_HEAD = re.compile(r"^POST:", re.MULTILINE)


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, keep_suffix: str = ""
) -> list[int]:
    """Token ids of a prompt, at most max_prompt_tokens.

    A prompt that fits is `tokenizer(text)`. A longer one loses tokens from the end of its body. What stands before the
    body (everything up to a line's "POST:", where there is one, and the BOS) and keep_suffix behind it stay whole.

    Raises:
        ValueError: the kept parts leave no room for one token of the body, the text does not end in keep_suffix, or
            the tokenizer puts an EOS behind the text.
    """
    ids = _encode(text, tokenizer)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt {text[:60]!r} encodes to no tokens: a policy needs at least one to start from")
    if len(ids) <= max_prompt_tokens:
        return ids
    named = f"the prompt {text[:60]!r}... has {len(ids)} tokens, max_prompt_tokens is {max_prompt_tokens}"
    if not text.endswith(keep_suffix):
        raise ValueError(f"{named}, and it cannot be cut: it does not end in {keep_suffix!r}")
    # Head, body and suffix are encoded apart only here: a prompt that fits keeps the tokens of the whole text, since a
    # tokenizer may merge over the cuts.
    body = text[: len(text) - len(keep_suffix)]
    suffix_ids = tokenizer(keep_suffix, add_special_tokens=False)["input_ids"] if keep_suffix else []
    head_ids, body_ids = _split_head(body, tokenizer)
    room = max_prompt_tokens - len(head_ids) - len(suffix_ids)
    if room < 1:
        raise ValueError(
            f"{named}, and it cannot be cut: {len(head_ids)} tokens before the body and {len(suffix_ids)} of "
            f"{keep_suffix!r} are kept, which leaves no room for the body; raise max_prompt_tokens"
        )
    return head_ids + _whole_characters(body_ids[:room], tokenizer) + suffix_ids


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, with_offsets: bool = False) -> BatchEncoding:
    """A text with the special tokens that the tokenizer puts before it, but never with a second BOS.

    Args:
        with_offsets: add `offset_mapping` and `special_tokens_mask`.
    """
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # as chat templates write it
    more = {"return_offsets_mapping": True, "return_special_tokens_mask": True} if with_offsets else {}
    encoded = tokenizer(text, add_special_tokens=not has_bos, **more)
    ids = encoded["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} puts EOS {tokenizer.eos_token!r} behind every text, so that a "
            "prompt would already be at its end: load it with add_eos_token=False"
        )
    return encoded


def _split_head(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that cutting keeps before the body, and those of the body."""
    if not tokenizer.is_fast:
        raise ValueError(f"cutting a prompt needs the character offsets of a fast tokenizer, not {type(tokenizer)}")
    match = _HEAD.search(text)
    head_chars = match.end() if match else 0
    encoded = _encode(text, tokenizer, with_offsets=True)
    length = 0
    for place, ((start, _), special) in enumerate(
        zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    ):
        if start < head_chars or (special and place == length):  # a BOS stands at offset (0, 0) even without a head
            length = place + 1
    return encoded["input_ids"][:length], encoded["input_ids"][length:]


def _whole_characters(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """ids without a last character that was cut inside its bytes (it would read U+FFFD), but with at least one id."""
    for cut in range(min(4, len(ids))):  # a character has at most 4 bytes, so at most 3 of its tokens can stand here
        length = len(ids) - cut
        text = cast(str, tokenizer.decode(ids[max(0, length - 4) : length]))  # a list only of a batch
        if not text.endswith("\ufffd"):
            return ids[:length]
    return ids


@dataclasses.dataclass(frozen=True)
class PromptSchema:
    """One published form of a data set, and how its rows become prompts."""

    name: str
    """Where it is published."""
    columns: tuple[str, ...]
    """The columns that must be there, each a text in every row."""
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    """From a row to {"prompt", "completion"}; the row's remaining columns are added by `load_rows`."""


def tldr_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """The TL;DR prompt of a post, letter for letter as trl-lib/tldr has it."""
    prompt = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"
    return {"prompt": prompt, "completion": " " + row["summary"]}


PROMPT_COMPLETION = PromptSchema(
    "trl-lib/tldr",
    ("prompt", "completion"),
    lambda row: {"prompt": row["prompt"], "completion": row["completion"]},
)
TLDR_FILTERED = PromptSchema(
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered", ("subreddit", "title", "post", "summary"), tldr_prompt
)
TLDR_SCHEMAS = (PROMPT_COMPLETION, TLDR_FILTERED)


def load_rows(dataset: str | Path, split: str, schemas: Sequence[PromptSchema] = TLDR_SCHEMAS) -> list[dict[str, Any]]:
    """The prompts of a split, in memory: rows with `prompt`, `completion` and every other column of the data.

    Args:
        dataset: a file (.jsonl, .jsonl.gz, .json, .csv, .parquet), a folder with a file for each split (train.jsonl,
            or shards as train-00000-of-00002.parquet), or a Hub id. A single file has no splits: it is every split,
            and who wants held-out rows gives a folder.
        split: train, validation or test.
        schemas: the forms that are understood; the first whose columns are all there is taken.

    Raises:
        ValueError: no such data or split, no rows, columns of no schema, or a row with something else than a text.
        ImportError: a Hub id or a parquet file without the extra "hub".
    """
    return _to_rows(sources.read_rows(dataset, split), f"dataset {str(dataset)!r}, split {split!r}", schemas)


def _to_rows(raw: list[Any], where: str, schemas: Sequence[PromptSchema]) -> list[dict[str, Any]]:
    if not raw:
        raise ValueError(f"{where} is empty: it has no rows")
    for number, row in enumerate(raw):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}, row {number} is no object with columns but {str(row)[:60]!r}")
    columns = list(dict.fromkeys(name for row in raw for name in row))
    schema = sources.match_schema(schemas, columns, where)
    rows = []
    for number, row in enumerate(raw):
        for name in schema.columns:
            if not isinstance(row.get(name), str):
                raise ValueError(f"{where}, row {number}: column {name!r} is {row.get(name)!r}, not a text")
        # Rewards get whole columns, so every row has every column.
        rows.append({name: row.get(name) for name in columns} | schema.convert(row))
    return rows
