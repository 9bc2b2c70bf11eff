"""Prompts in the published schemas, and their encoding within a token budget."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from textrl_gym.core import PROMPTS_KEEP_EOS, Row
from textrl_gym.data import chat, encoding, sources
from textrl_gym.data.encoding import Chat
from textrl_gym.data.rows import (
    BadRow,
    Mapped,
    RawRows,
    RowRules,
    Rows,
    Scan,
    current_rules,
    first_columns,
    look_through,
    remembered,
    say_once,
    settle,
    shown,
    text_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_HEAD = re.compile(r"^POST:", re.MULTILINE)


def encode_prompt(
    text: str, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, keep_suffix: str = ""
) -> list[int]:
    """Token ids of a prompt, at most max_prompt_tokens.

    A prompt that fits has the tokens of its text, behind a BOS where the tokenizer puts one. A longer one loses tokens
    from the end of its body. What stands before the body (everything up to a line's "POST:", where there is one, and
    the BOS) and keep_suffix behind it stay whole. Where the tokenizer keeps its EOS (`encoding.keeps_end`), a prompt
    ends in it.

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
    end_ids: list[int] = []
    if encoded.added[-1] and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        if not encoding.keeps_end(tokenizer):
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} puts EOS {tokenizer.eos_token!r} behind every text, so that "
                "a prompt would already be at its end: load it with add_eos_token=False, or, where it is an "
                f"encoder-decoder's, with {PROMPTS_KEEP_EOS}=True"
            )
        end_ids = [ids[-1]]
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
    room = max_prompt_tokens - len(head_ids) - len(suffix_ids) - len(end_ids)
    if room < 1:
        raise ValueError(
            f"{named}, and it cannot be cut: {len(head_ids)} tokens before the body and {len(suffix_ids)} of "
            f"{keep_suffix!r} are kept, which leaves no room for the body; raise max_prompt_tokens"
        )
    return head_ids + _whole_characters(body_ids[:room], tokenizer) + suffix_ids + end_ids


def uncuttable(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, keep_suffix: str = ""
) -> list[BadRow | None]:
    """Why each prompt can be none (None: it can), as encode_prompt would say.

    A million prompts take seconds, because few need to be encoded: no text has more tokens than bytes, and what is long
    can be cut if what stands before its body is short.
    """
    faults: list[BadRow | None] = [None] * len(texts)
    text_codec = encoding.codec(tokenizer)
    added = tokenizer.num_special_tokens_to_add() + MERGE_SLACK
    room = max_prompt_tokens - len(text_codec.behind(keep_suffix)) - 1 - added
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A normaliser may make several letters of one beyond ASCII.
    strict = getattr(backend, "normalizer", None) is not None
    sure = text_codec.unknown_id is not None or _knows_bytes(backend)
    unsure: list[int] = []
    heads: dict[int, str] = {}
    for place, text in enumerate(texts):
        if not sure or not text or text.isspace() or (strict and not text.isascii()):
            unsure.append(place)
        elif len(text.encode()) + added > max_prompt_tokens:
            match = _HEAD.search(text)
            head = text[: match.end()] if match else ""
            if not text.endswith(keep_suffix):
                unsure.append(place)
            elif len(head.encode()) > room:
                heads[place] = head
    counts = _count_tokens(list(heads.values()), backend, text_codec.name)
    unsure += [place for place, count in zip(heads, counts, strict=True) if count > room]
    for place in unsure:
        try:
            encode_prompt(texts[place], tokenizer, max_prompt_tokens, keep_suffix)
        except ValueError as error:
            faults[place] = BadRow(UNCUTTABLE, str(error))
    return faults


def encode_conversation(
    conversation: Chat, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, keep_suffix: str = ""
) -> list[int]:
    """Token ids of a conversation by the chat template, at most max_prompt_tokens.

    A longer one loses its first turns, but for the system prompt. If the last turn alone is too long, its text is cut:
    at the end of its body where it ends in keep_suffix, else at its beginning.

    Raises:
        BadRow: the template refuses the conversation.
        ValueError: the template and the system prompt leave no room for the last turn.
    """
    text_codec = encoding.codec(tokenizer)
    turns = Chat(conversation)
    first = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), 0)
    ids = text_codec.chat(turns)
    while len(ids) > max_prompt_tokens and len(turns) - first > 1:
        later = [n for n, turn in enumerate(turns) if n > first and turn["role"] == "user"]
        del turns[first : later[0] if later else len(turns) - 1]
        ids = text_codec.chat(turns)
    if len(ids) <= max_prompt_tokens:
        return ids
    text, whole = turns[-1]["content"], len(ids)
    suffix = keep_suffix if text.endswith(keep_suffix) else ""
    room = max_prompt_tokens - len(text_codec.chat(Chat([*turns[:-1], {**turns[-1], "content": ""}], turns.tools)))
    while len(ids) > max_prompt_tokens:
        if room < 1:
            raise ValueError(
                f"the conversation that ends in {text[-60:]!r} has {whole} tokens, max_prompt_tokens is "
                f"{max_prompt_tokens}, and the chat template and the system prompt leave no room for its last turn; "
                "raise max_prompt_tokens"
            )
        if suffix:
            added = len(text_codec.encode("", begin=True))
            try:
                cut_ids = encode_prompt(text, tokenizer, room + added, suffix)
            except ValueError as error:
                taken = max_prompt_tokens - room
                raise ValueError(f"{error} (the chat template takes {taken} of {max_prompt_tokens})") from error
        else:
            cut_ids = text_codec.encode(text)[-room:]
        turns[-1] = {**turns[-1], "content": text_codec.decode(cut_ids, begin=True)}
        ids = text_codec.chat(turns)
        room -= max(1, len(ids) - max_prompt_tokens)  # a cut text may have other tokens than those that were kept
    return ids


def unspeakable(
    conversations: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, keep_suffix: str = ""
) -> list[BadRow | None]:
    """Why each conversation can be no prompt (None: it can), as encode_conversation would say.

    Few are encoded: what stands before a last turn is the same in many, and that turn is a text as any.
    """
    text_codec = encoding.codec(tokenizer)
    sizes: dict[tuple[str, ...], int] = {}
    written: set[tuple[str, ...]] = set()
    unsure: list[int] = []
    alike: dict[tuple[int, str], list[int]] = {}
    faults: list[BadRow | None] = [None] * len(conversations)
    for place, turns in enumerate(conversations):
        before, last = [turn for turn in turns[:-1] if turn["role"] == "system"], turns[-1]
        tools = json.dumps(turns.tools)
        frame = (last["role"], tools, *(turn["content"] for turn in before))
        roles = (tools, *(turn["role"] for turn in turns))
        try:
            if roles not in written:  # some templates want users and assistants to take turns
                text_codec.chat(Chat([{**turn, "content": "a"} for turn in turns], turns.tools))
                written.add(roles)
            if frame not in sizes:
                empty = Chat([*before, {**last, "content": ""}], turns.tools)
                sizes[frame] = len(text_codec.chat(empty)) + MERGE_SLACK
        except BadRow:  # it may take the turns themselves: encoding them tells
            unsure.append(place)
            continue
        text, room = last["content"], max_prompt_tokens - sizes[frame]
        if text and room >= MERGE_SLACK:
            alike.setdefault((room, keep_suffix if text.endswith(keep_suffix) else ""), []).append(place)
        else:
            unsure.append(place)
    for (room, suffix), places in alike.items():
        uncut = uncuttable([conversations[place][-1]["content"] for place in places], tokenizer, room, suffix)
        unsure += [place for place, fault in zip(places, uncut, strict=True) if fault is not None]
    for place in unsure:
        try:
            encode_conversation(conversations[place], tokenizer, max_prompt_tokens, keep_suffix)
        except ValueError as error:
            faults[place] = unencodable(error)
    return faults


def unencodable(error: ValueError) -> BadRow:
    """Why a row gives no prompt, of the error that encoding it raised."""
    # What says by itself what is wrong, as the chat template does, keeps its reason.
    return error if isinstance(error, BadRow) else BadRow(UNCUTTABLE, str(error))


UNCUTTABLE = "its prompt cannot be encoded within max_prompt_tokens"
MERGE_SLACK = 2
"""Tokens that a text may have more than its bytes, or than its parts: a blank that is put first, a merge undone."""


def _knows_bytes(backend: Tokenizer | None) -> bool:
    """Whether every text has tokens, byte by byte where need be."""
    state = b"" if backend is None or backend.decoder is None else backend.decoder.__getstate__()
    return b'"ByteLevel"' in state or b'"ByteFallback"' in state


def _count_tokens(texts: list[str], backend: Tokenizer | None, special: re.Pattern[str]) -> list[float]:
    """How many tokens each text has at most, without those around it; infinitely many where that is not known.

    Args:
        special: the names of special tokens, which are text here and would be counted as one token.
    """
    if backend is None or not texts:
        return [math.inf] * len(texts)
    words_of = [_WORD.findall(text) for text in texts]
    known = _known_words(backend)
    if len(known) > MOST_WORDS:
        known.clear()
    # The words of a language come again and again: a dictionary has them in a quarter of the time. A text's words have
    # as many tokens as the text where the tokenizer parts it at blanks, and about as many where it does not.
    fresh = list({word for words in words_of for word in words} - known.keys())
    encoded = backend.encode_batch_fast(fresh, add_special_tokens=False)
    known.update(zip(fresh, map(len, encoded), strict=True))
    counts = [sum(map(known.__getitem__, words)) for words in words_of]
    return [math.inf if special.search(text) else count + count // 8 for text, count in zip(texts, counts, strict=True)]


_WORD = re.compile(r" ?\S+|\s+")
MOST_WORDS = 200_000
"""Words whose numbers of tokens are kept."""


@functools.lru_cache(maxsize=2)
def _known_words(backend: Tokenizer) -> dict[str, int]:
    """How many tokens words have; filled as they come."""
    return {}


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
    encoded = encoding.codec(tokenizer).places(text, begin=True).open()
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
    """The columns that must be there."""
    convert: Callable[[Row], dict[str, Any]]
    """From a row to {"prompt"}, a text, with "completion" where there is one and "chat" (encoding.Chat) where the
    prompt is a conversation; or BadRow. The row's remaining columns are added by `load_rows`."""


def tldr_prompt(row: Row) -> dict[str, Any]:
    """The TL;DR prompt of a post, letter for letter as trl-lib/tldr has it."""
    prompt = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"
    return {"prompt": prompt, "completion": " " + row["summary"]}


def _tldr_texts(row: Row) -> dict[str, Any]:
    return tldr_prompt({name: text_of(row, name) for name in TLDR_COLUMNS})


def _spoken(conversation: Chat, answer: str | None = None, text: str | None = None) -> dict[str, Any]:
    """A row whose prompt is a conversation, and a text for models without a chat template."""
    row: dict[str, Any] = {"prompt": chat.as_text(conversation) if text is None else text, "chat": conversation}
    return row if answer is None else row | {"completion": answer}


def _prompt_only(row: Row) -> dict[str, Any]:
    if isinstance(row.get("prompt"), list | Mapping):
        conversation, answer = chat.asked(row["prompt"])
        if answer is not None:
            raise BadRow("column 'prompt' ends in the assistant's turn", shown(row["prompt"]))
        return _spoken(conversation)
    text = text_of(row, "prompt")
    spoken = chat.dialogue(text)
    return {"prompt": text} if spoken is None else _spoken(spoken, text=text)


def _chosen(row: Row) -> dict[str, Any]:
    """The prompt of a pair of whole conversations, with the chosen answer."""
    if not isinstance(row.get("chosen"), str):
        return _spoken(*chat.asked(row.get("chosen")))
    text = text_of(row, "chosen")
    cut = text.rfind(chat.ASSISTANT) + len(chat.ASSISTANT)
    spoken = chat.dialogue(text[:cut])
    if spoken is None:
        raise BadRow("column 'chosen' is no dialogue of Human and Assistant", shown(text))
    return _spoken(spoken, text[cut:].strip(), text[:cut])


def _prompt_completion(row: Row) -> dict[str, Any]:
    return _prompt_only(row) | {"completion": chat.answer_of(row.get("completion"))}


def _turns(name: str) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        return _spoken(*chat.asked(row.get(name)))

    return convert


def _instruction(row: Row) -> dict[str, Any]:
    text = text_of(row, "instruction") + (f"\n\n{text_of(row, 'input')}" if row.get("input") else "")
    return _spoken(chat.user(text), None if row.get("output") is None else text_of(row, "output"), text)


def _hhh(row: Row) -> dict[str, Any]:
    """The prompt, with the first choice that is labelled 1."""
    text, targets = text_of(row, "input"), row["targets"]
    choices, labels = (targets.get(name) if isinstance(targets, Mapping) else None for name in ("choices", "labels"))
    if not isinstance(choices, list) or not isinstance(labels, list) or len(choices) != len(labels):
        raise BadRow("column 'targets' has no choices with a label each", shown(targets))
    right = [choice for choice, label in zip(choices, labels, strict=True) if label == 1 and isinstance(choice, str)]
    if not right:
        raise BadRow("column 'targets' has no choice with the label 1", shown(targets))
    return _spoken(chat.user(text), right[0], text)


def _question(row: Row) -> dict[str, Any]:
    text = text_of(row, "question")
    return _spoken(chat.user(text), text_of(row, "answer"), text)


def webgpt_row(row: object) -> object:
    """The row itself, or of OpenAI's own file of WebGPT, where a row is a list of two answers, its published form."""
    if isinstance(row, list) and len(row) == 2 and all(isinstance(half, Mapping) for half in row):
        names = ("quotes", "answer", "score")
        halves = {f"{name}_{number}": half.get(name) for number, half in enumerate(row) for name in names}
        return {"question": row[0].get("question")} | halves
    return row


TLDR_COLUMNS = ("subreddit", "title", "post", "summary")
PROMPT_SCHEMAS = (
    PromptSchema("trl-lib/tldr", ("prompt", "completion"), _prompt_completion),
    PromptSchema("vwxyzjn/summarize_from_feedback_tldr_3_filtered", TLDR_COLUMNS, _tldr_texts),
    PromptSchema("HuggingFaceH4/ultrachat_200k, conversations of role and content", ("messages",), _turns("messages")),
    PromptSchema("ShareGPT", ("conversations",), _turns("conversations")),
    PromptSchema("tatsu-lab/alpaca, also with input and output", ("instruction",), _instruction),
    PromptSchema("openai/gsm8k", ("question", "answer"), _question),
    PromptSchema("HuggingFaceH4/hhh_alignment", ("input", "targets"), _hhh),
    PromptSchema("prompts alone, texts or conversations", ("prompt",), _prompt_only),
    PromptSchema("Anthropic/hh-rlhf", ("chosen", "rejected"), _chosen),
)
"""The first whose columns are all there is taken."""


def load_rows(dataset: str | Path, split: str, schemas: Sequence[PromptSchema] = PROMPT_SCHEMAS) -> Rows:
    """The prompts of a split: rows with `prompt`, and every other column of the data.

    `completion` is the reference text, where there is one; `chat` the conversation, where the prompt is one.

    Every row is looked at here, and read again when it is asked for. Bad ones are an error, or are left out where
    `rows.row_rules` says so.

    Args:
        dataset: a file (.jsonl, .json, .csv, each also as .gz, or .parquet), a folder with a file for each split
            (train.jsonl, or shards as train-00000-of-00002.parquet, also in data/), a folder that datasets'
            save_to_disk wrote, or a Hub id ("owner/name", "owner/name:folder"). The prompts of a single file, or of
            what has one split only, are parted by a hash of their texts (`part_by_prompt`). A validation split is the
            test split where there is no other.
        split: train, validation or test.
        schemas: the forms that are understood; the first whose columns are all there is taken.

    Raises:
        ValueError: no such data or split, no rows, columns of no schema, or bad rows.
        ImportError: a Hub id or a parquet file without the extra "hub".
    """
    source, rules = sources.open_rows(dataset, split), current_rules()
    key = ("prompts", source.key, source.whole, tuple(schemas), rules.check)
    opened = remembered(key, lambda: _open(source, schemas, rules))
    settle(opened.scan.bad, source.words, rules.bad_rows)
    places = opened.scan.places
    if source.whole:
        parts = part_by_prompt(opened.scan.digests)
        _say_parts(str(dataset), parts)
        places = places[parts[split]]
    return Rows(opened.raw, places, opened.convert, opened.scan.bad)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A data set whose rows were looked at."""

    raw: RawRows
    convert: Callable[[Row], dict[str, Any]]
    scan: Scan


def _open(source: sources.Source, schemas: Sequence[PromptSchema], rules: RowRules) -> _Opened:
    raw: RawRows = source.open()
    if not isinstance(raw, sources.ArrowRows):  # whose rows have columns
        # A list in the place of a row would have no columns to tell the schema by.
        raw = Mapped(raw, webgpt_row)
    columns = first_columns(raw, source.words)
    schema = sources.match_schema(schemas, columns, source.words)

    def looked_at(row: Row) -> dict[str, Any]:
        # The chat template writes a conversation's tools too.
        return schema.convert(row) | ({"tools": row["tools"]} if row.get("tools") else {})

    scan = look_through(raw, source.words, columns, looked_at, rules.check)

    def convert(row: Row) -> dict[str, Any]:
        # Rewards get whole columns, so every row has every column.
        return {name: row.get(name) for name in scan.columns} | schema.convert(row)

    return _Opened(raw, convert, scan)


def part_by_prompt(digests: NDArray[np.uint64]) -> dict[str, NDArray[np.int64]]:
    """The rows of each split: of the prompts, 80% to train on, 10% for validation and 10% for test, by their hashes.

    By the prompt and not by the row: what is said of a prompt in training must not be asked in an evaluation. A
    prompt's split depends on its text only, whatever stands beside it; except that a split without prompts gets one of
    the largest. With fewer than three prompts nothing can be held out: all are in every split.

    Args:
        digests: a hash of each row's prompt, as `rows.digest` gives it.
    """
    # Rounded to the floats that the first version of this compared, so that no prompt changes its split.
    shares = digests.astype(np.float64) / 2**64
    prompts = np.unique(shares)
    if len(prompts) < len(sources.SPLITS):
        return {split: np.arange(len(digests)) for split in sources.SPLITS}
    bounds = np.array([0.8, 0.9])
    number, of_prompts = (np.searchsorted(bounds, some, side="right") for some in (shares, prompts))
    for missing in range(len(sources.SPLITS)):
        if missing not in of_prompts:
            donor = np.bincount(of_prompts, minlength=len(sources.SPLITS)).argmax()
            moved = prompts[of_prompts == donor].max()
            number[shares == moved] = of_prompts[prompts == moved] = missing
    return {split: np.flatnonzero(number == place) for place, split in enumerate(sources.SPLITS)}


def _say_parts(dataset: str, parts: Mapping[str, NDArray[np.int64]]) -> None:
    """Say once in a process how a file is parted."""
    if len(parts["train"]) == len(parts["test"]) and np.array_equal(parts["train"], parts["test"]):
        message = "has too few prompts to hold any out: evaluations are on the prompts that are trained on"
    else:
        counts = ", ".join(f"{len(rows):,} {split}" for split, rows in parts.items())
        message = f"has one split, parted by a hash of the prompts: {counts} rows; give a folder for other splits"
    say_once(f"dataset {dataset!r} {message}")
