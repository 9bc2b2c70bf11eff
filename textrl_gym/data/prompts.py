"""Prompts in the published schemas, and their encoding within a token budget."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from textrl_gym.data import encoding, sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = re.compile(r"^POST:", re.MULTILINE)


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, keep_suffix: str = ""
) -> list[int]:
    """Token ids of a prompt, at most max_prompt_tokens.

    A prompt that fits has the tokens of its text, behind a BOS where the tokenizer puts one. A longer one loses tokens
    from the end of its body. What stands before the body (everything up to a line's "POST:", where there is one, and
    the BOS) and keep_suffix behind it stay whole.

    Raises:
        ValueError: the kept parts leave no room for one token of the body, the text does not end in keep_suffix, a word
            has no token, or the tokenizer puts an EOS behind the text.
    """
    text_codec = encoding.codec(tokenizer)
    text = _without_bos(text, text_codec)
    _say_special(text, text_codec)
    encoded = text_codec.places(text, begin=True)
    ids = text_codec.known(text, encoded)
    if not ids:
        raise ValueError(f"the prompt {text[:60]!r} encodes to no tokens: a policy needs at least one to start from")
    if encoded.added[-1] and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} puts EOS {tokenizer.eos_token!r} behind every text, so that a "
            "prompt would already be at its end: load it with add_eos_token=False"
        )
    if len(ids) <= max_prompt_tokens:
        return ids
    named = f"the prompt {text[:60]!r}... has {len(ids)} tokens, max_prompt_tokens is {max_prompt_tokens}"
    if not text.endswith(keep_suffix):
        raise ValueError(f"{named}, and it cannot be cut: it does not end in {keep_suffix!r}")
    # Head, body and suffix are encoded apart only here: a prompt that fits keeps the tokens of the whole text, since a
    # tokenizer may merge over the cuts.
    body = text[: len(text) - len(keep_suffix)]
    suffix_ids = text_codec.behind(keep_suffix) if keep_suffix else []
    head_ids, body_ids = _split_head(body, tokenizer)
    room = max_prompt_tokens - len(head_ids) - len(suffix_ids)
    if room < 1:
        raise ValueError(
            f"{named}, and it cannot be cut: {len(head_ids)} tokens before the body and {len(suffix_ids)} of "
            f"{keep_suffix!r} are kept, which leaves no room for the body; raise max_prompt_tokens"
        )
    return head_ids + _whole_characters(body_ids[:room], tokenizer) + suffix_ids


def _without_bos(text: str, text_codec: encoding.TextCodec) -> str:
    """The text without a BOS that is written in it, as chat templates do, where the tokenizer puts one before it."""
    bos = text_codec.tokenizer.bos_token
    if bos and text.startswith(bos) and text_codec.encode("", begin=True)[:1] == [text_codec.tokenizer.bos_token_id]:
        return text.removeprefix(bos)
    return text


_said_special: set[str] = set()
"""Special tokens whose names in a prompt this process has told of."""


def _say_special(text: str, text_codec: encoding.TextCodec) -> None:
    """Say once in a process that a special token's name in a prompt is text."""
    match = text_codec.name.search(text)
    if match is not None and match.group() not in _said_special:
        _said_special.add(match.group())
        print(
            f"the prompt {text[:60]!r} has the name of the special token {match.group()!r}, which is encoded as text: "
            "only the chat template makes special tokens, of prompts that are lists of messages",
            file=sys.stderr,
        )


def _split_head(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that cutting keeps before the body, and those of the body."""
    if not tokenizer.is_fast:
        raise ValueError(f"cutting a prompt needs the character offsets of a fast tokenizer, not {type(tokenizer)}")
    match = _HEAD.search(text)
    head_chars = match.end() if match else 0
    encoded = encoding.codec(tokenizer).places(text, begin=True)
    length = 0
    for place, (start, added) in enumerate(zip(encoded.begins, encoded.added, strict=True)):
        if start < head_chars or (added and place == length):  # a BOS stands at offset (0, 0) even without a head
            length = place + 1
    return encoded.ids[:length], encoded.ids[length:]


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
            or shards as train-00000-of-00002.parquet), or a Hub id. The prompts of a single file are parted by a hash
            of their texts (`part_by_prompt`). A folder's validation split is its test split where it has no other.
        split: train, validation or test.
        schemas: the forms that are understood; the first whose columns are all there is taken.

    Raises:
        ValueError: no such data or split, no rows, columns of no schema, or a row with something else than a text.
        ImportError: a Hub id or a parquet file without the extra "hub".
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        split = sources.held_out_split(path, split)
    rows = _to_rows(sources.read_rows(dataset, split), f"dataset {str(dataset)!r}, split {split!r}", schemas)
    if not path.is_file():
        return rows
    parts = part_by_prompt(rows)
    _say_parts(str(dataset), parts)
    return parts[split]


def part_by_prompt(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split: of the prompts, 80% to train on, 10% for validation and 10% for test, by their hashes.

    By the prompt and not by the row: what is said of a prompt in training must not be asked in an evaluation. A
    prompt's split depends on its text only, whatever stands beside it; except that a split without prompts gets one of
    the largest. With fewer than three prompts nothing can be held out: all are in every split.
    """
    shares = {prompt: _share(prompt) for prompt in dict.fromkeys(row["prompt"] for row in rows)}
    if len(shares) < len(sources.SPLITS):
        return {split: list(rows) for split in sources.SPLITS}
    split_of = {
        prompt: "train" if share < 0.8 else "validation" if share < 0.9 else "test" for prompt, share in shares.items()
    }
    for split in sources.SPLITS:
        if split not in split_of.values():
            donor = max(sources.SPLITS, key=list(split_of.values()).count)
            moved = max((prompt for prompt in shares if split_of[prompt] == donor), key=shares.__getitem__)
            split_of[moved] = split
    return {split: [row for row in rows if split_of[row["prompt"]] == split] for split in sources.SPLITS}


def _share(prompt: str) -> float:
    """A number in [0, 1) that is the same for a text on every machine, as Python's own hash is not."""
    digest = hashlib.blake2b(prompt.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


_announced: set[str] = set()
"""Files whose parts this process has printed."""


def _say_parts(dataset: str, parts: Mapping[str, list[dict[str, Any]]]) -> None:
    """Say once in a process how a file is parted."""
    if dataset in _announced:
        return
    _announced.add(dataset)
    if parts["train"] == parts["test"]:
        message = "has too few prompts to hold any out: evaluations are on the prompts that are trained on"
    else:
        counts = ", ".join(f"{len(rows):,} {split}" for split, rows in parts.items())
        message = f"is one file, parted by a hash of the prompts: {counts} rows; give a folder for other splits"
    print(f"dataset {dataset!r} {message}", file=sys.stderr)


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
