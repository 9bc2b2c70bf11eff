"""Preferences in the published schemas, from local files or the Hub: which completions of a prompt were preferred.

Every row becomes a prompt, its completions and the pairs (chosen, rejected) among them. Ties, and dialogues that part
before their last turn, are dropped, and it is said how many.

A prompt may be a text, used letter for letter, or a conversation. A conversation is written by the tokenizer's chat
template where it has one; else as Anthropic wrote theirs ("\\n\\nHuman: ...\\n\\nAssistant:"), unless the row has the
prompt as a text too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_gym.core import Row
from textrl_gym.data import chat, labels, prompts, sources
from textrl_gym.data.chat import ASSISTANT, HUMAN, ChatSettings
from textrl_gym.data.encoding import Chat
from textrl_gym.data.rows import (
    BadRow,
    Dropped,
    Grouped,
    Mapped,
    OnBadRows,
    RawRows,
    Rows,
    Scan,
    check_characters,
    first_columns,
    look_through,
    remembered,
    say_once,
    settle,
    shown,
    text_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Talk = list[dict[str, str]]
"""A conversation: {"role": "user", "assistant" or "system", "content": text} for each turn."""
TIE = "ties"
UNLABELLED = "without a label"
ASTRAY = "dialogues that differ in more than the last turn"


@dataclasses.dataclass(frozen=True)
class Preference:
    """Completions of one prompt, and which of them were preferred to which."""

    prompt: str | Talk
    completions: list[str]
    pairs: list[tuple[int, int]]
    """(chosen, rejected), as places in completions."""
    plain: str | None = None
    """The prompt as a text too, where the prompt is a conversation and the row has both."""
    dialogue: bool = False
    """Whether a prompt that is a text is a whole dialogue."""
    probabilities: list[float] = dataclasses.field(default_factory=list)
    """How likely each pair's chosen one is the better one, where a judge says so (soft labels); empty: 1 each."""


@dataclasses.dataclass(frozen=True)
class Preferences:
    """What a data set holds."""

    rows: Rows
    """A row's own columns, with `prompt` (text), `completions`, `pairs`, `probabilities`, `dialogue`: whether the
    prompt is one, so that its end matters most, and `chat`: the conversation where the chat template wrote it, or
    None."""
    schema: str
    """Where its form is published."""
    dropped: dict[str, int]
    """Why rows were dropped, and how many."""


@dataclasses.dataclass(frozen=True)
class PreferenceSchema:
    """One published form of preference data, and how its rows become preferences."""

    name: str
    """Where it is published."""
    columns: tuple[str, ...]
    """The columns that must be there."""
    convert: Callable[[Row], Preference]
    """From a row; Dropped where it teaches nothing."""
    joined: tuple[str, ...] = ()
    """Columns that are lists of the values of all rows with one prompt, where a row alone is no comparison."""
    history: bool = False
    """Whether rows may take earlier ones back; see `data.labels`."""


# -- pieces -----------------------------------------------------------------------------------------------------------


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _pair(prompt: str | Talk, chosen: str, rejected: str, plain: str | None = None) -> Preference:
    if chosen == rejected:
        raise Dropped(TIE)
    return Preference(prompt, [chosen, rejected], [(0, 1)], plain)


def _ordered(prompt: str | Talk, texts: Sequence[str], score: float) -> Preference:
    """Two texts, the first chosen where score > 0, the second where it is < 0."""
    if score == 0:
        raise Dropped(TIE)
    return _pair(prompt, *(texts if score > 0 else reversed(texts)))


def _label(row: Row, name: str) -> float:
    """The number in a column by which annotators chose.

    Raises:
        Dropped: there is none.
        BadRow: it is no finite number.
    """
    value = row[name]
    if isinstance(value, str):  # as all values of a CSV file are
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            raise BadRow(f"column {name!r} is not a number", shown(value)) from None
    # In a column of floats, as pandas and Arrow have it, a missing number is NaN.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Dropped(UNLABELLED)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise BadRow(f"column {name!r} is not a finite number", shown(value))
    return float(value)


def _one_of(row: Row, name: str, allowed: Sequence[int]) -> int:
    """A label that must be one of some."""
    label = _label(row, name)
    if label not in allowed:
        raise BadRow(f"column {name!r} is not {' or '.join(map(str, allowed))}", shown(row[name]))
    return int(label)


# -- schemas ----------------------------------------------------------------------------------------------------------


def _of_two_talks(before: Talk, row: Row, plain: str | None) -> Preference:
    """What two conversations share is the prompt, the turns after it are the completions."""
    chosen, rejected = before + chat.messages(row["chosen"]), before + chat.messages(row["rejected"])
    if chosen == rejected:
        raise Dropped(TIE)
    shared = _common(chosen, rejected)
    # A policy writes one turn: completions that go on over several are none of its actions.
    for talk in (chosen, rejected):
        if shared == 0 or len(talk) != shared + 1 or talk[-1]["role"] != "assistant":
            raise Dropped(ASTRAY)
    return _pair(chosen[:shared], chosen[-1]["content"], rejected[-1]["content"], plain)


def _implicit(row: Row) -> Preference:
    """No column for the prompt: it is what chosen and rejected begin with alike."""
    if not isinstance(row["chosen"], str):
        return _of_two_talks([], row, None)
    chosen, rejected = (text_of(row, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Dropped(TIE)
    shared = _common(chosen, rejected)
    if ASSISTANT in chosen:  # a whole dialogue; texts that begin alike share more than the prompt
        cut = chosen[:shared].rfind(ASSISTANT) + len(ASSISTANT)
        if cut < len(ASSISTANT) or HUMAN in chosen[cut:] + rejected[cut:]:
            raise Dropped(ASTRAY)
        return dataclasses.replace(_pair(chosen[:cut], chosen[cut:], rejected[cut:]), dialogue=True)
    # At a blank: two completions may begin with the same letters of different words.
    cut = chosen[:shared].rfind(" ")
    if cut < 1:
        raise ValueError("chosen and rejected begin with no words in common, so there is no prompt")
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _explicit(row: Row) -> Preference:
    preference = _of_columns(row)
    if row.get(PROBABILITY) is None:
        return preference
    with contextlib.suppress(Dropped):  # none, in a column of floats
        chance = _label(row, PROBABILITY)
        if not 0 <= chance <= 1:
            raise BadRow(f"column {PROBABILITY!r} is not between 0 and 1", shown(row[PROBABILITY]))
        return dataclasses.replace(preference, probabilities=[chance])
    return preference


def _of_columns(row: Row) -> Preference:
    prompt, chosen = row["prompt"], row["chosen"]
    if isinstance(chosen, str):
        return _pair(prompt if isinstance(prompt, str) else chat.messages(prompt), chosen, text_of(row, "rejected"))
    if not isinstance(prompt, str):
        return _of_two_talks(chat.messages(prompt), row, None)
    alone = len(chat.messages(chosen)) == 1  # else the conversation holds the prompt again
    return _of_two_talks(chat.user(prompt) if alone else [], row, prompt)


def _summaries(row: Row) -> Preference:
    info, choice = row["info"], _one_of(row, "choice", (0, 1))
    texts = [text_of(summary, "text") for summary in row["summaries"]]
    if len(texts) != 2:
        raise BadRow("column 'summaries' does not hold two", shown(texts))
    return _pair(post_prompt(info), texts[choice], texts[1 - choice])


def post_prompt(info: Row) -> str:
    """The prompt of a row of openai/summarize_from_feedback, from its column `info`."""
    # Its rows come from two sources, Reddit and the news of CNN/DM, of which only the second has an article.
    if info.get("article"):
        title, article = (text_of(info, name) for name in ("title", "article"))
        return f"TITLE: {title}\n\n{article}\n\nTL;DR:"
    # What `labels export` writes of a prompt that is no post of Reddit.
    if info.get("title") is None and info.get("subreddit") is None and info.get("post") is not None:
        return text_of(info, "post")
    texts_of_post = {name: text_of(info, name) for name in ("subreddit", "title", "post")}
    return prompts.tldr_prompt({**texts_of_post, "summary": ""})["prompt"]


def _webgpt(row: Row) -> Preference:
    question = row["question"]
    text = text_of(question, "full_text") if isinstance(question, Mapping) else text_of(row, "question")
    scores = [_label(row, name) for name in ("score_0", "score_1")]
    return _ordered(chat.user(text), [row["answer_0"], row["answer_1"]], scores[0] - scores[1])


def _shp(row: Row) -> Preference:
    score = 1 if _one_of(row, "labels", (0, 1)) else -1
    return _ordered(chat.user(text_of(row, "history")), [row["human_ref_A"], row["human_ref_B"]], score)


def _two_outputs(row: Row) -> Preference:
    """alpaca_farm and alpaca_eval: preference 1 or 2, or between them; 0 or 1.5 for a tie."""
    preference = _label(row, "preference")
    if preference != 0 and not 1 <= preference <= 2:
        raise BadRow("column 'preference' is not 0, 1, 2 or between 1 and 2", shown(row["preference"]))
    return _ordered(_instruction(row), [row["output_1"], row["output_2"]], 1.5 - preference if preference else 0.0)


def rating(completion: Row) -> float | None:
    """The mean of a completion's ratings in UltraFeedback's aspects, which are texts; None where all are "N/A"."""
    ratings = [aspect.get("Rating") for aspect in (completion.get("annotations") or {}).values()]
    given = [float(text) for text in ratings if text is not None and re.fullmatch(r"\d+(\.\d+)?", str(text))]
    return sum(given) / len(given) if given else None


def _ultrafeedback(row: Row) -> Preference:
    rated = [(c["response"], score) for c in row["completions"] if (score := rating(c)) is not None]
    texts, scores = [text for text, _ in rated], [score for _, score in rated]
    places = range(len(texts))
    # Every pair of different ratings, as in InstructGPT: K ratings give up to K (K - 1) / 2 of them, from one prompt.
    pairs = [(a, b) for a in places for b in places if scores[a] > scores[b] and texts[a] != texts[b]]
    if not pairs:
        raise Dropped(TIE)
    return Preference(chat.user(text_of(row, "instruction")), texts, pairs)


def _conversations(row: Row) -> Preference:
    return _of_two_talks(chat.messages(row["conversations"]), row, None)


def _instruction(row: Row) -> Talk:
    """An instruction with its input, as what a user says."""
    return chat.user(text_of(row, "instruction") + (f"\n\n{text_of(row, 'input')}" if row.get("input") else ""))


def _pandalm(row: Row) -> Preference:
    """The label of most annotators: 1, 2, or 0 for a tie."""
    labels = [_one_of(row, name, (0, 1, 2)) for name in row if re.fullmatch(r"annotator\d+", name)]
    first, second = labels.count(1), labels.count(2)
    most = max(first, second) if max(first, second) > labels.count(0) else 0
    return _ordered(_instruction(row), [row["response1"], row["response2"]], (first - second) if most else 0)


def _llmbar(row: Row) -> Preference:
    label = _one_of(row, "label", (1, 2))
    return _ordered(chat.user(text_of(row, "input")), [row["output_1"], row["output_2"]], 1.5 - label)


def _hhh(row: Row) -> Preference:
    targets = row["targets"]
    labels = [_one_of({"labels": label}, "labels", (0, 1)) for label in targets["labels"]]
    pairs = [(a, b) for a, right in enumerate(labels) for b, wrong in enumerate(labels) if right > wrong]
    return _of_pairs(chat.user(text_of(row, "input")), list(targets["choices"]), pairs)


def _of_pairs(prompt: str | Talk, texts: list[str], pairs: list[tuple[int, int]], reason: str = TIE) -> Preference:
    differing = [(a, b) for a, b in pairs if texts[a] != texts[b]]
    if not differing:
        raise Dropped(reason)
    return Preference(prompt, texts, differing)


PREDICTIONS = tuple(f"prediction {number}" for number in (1, 2, 3, 4))


def _fine_grained(row: Row) -> Preference:
    """Answers to a question by passages, compared two by two: 1, 2, or 0 for a tie."""
    labels = [_one_of({"preference": label}, "preference", (0, 1, 2)) for label in row["preference"]]
    places = list(itertools.combinations(range(len(PREDICTIONS)), 2))
    if len(labels) != len(places):
        raise BadRow(f"column 'preference' does not hold {len(places)} labels", shown(row["preference"]))
    # A passage is its title and its sentences, of which the first has the title once more.
    passages = ["\n".join(passage[1:]) for passage in row["passages"]]
    prompt = chat.user("\n\n".join([*passages, text_of(row, "question")]))
    pairs = [(a, b) if label == 1 else (b, a) for (a, b), label in zip(places, labels, strict=True) if label]
    return _of_pairs(prompt, [text_of(row, name) for name in PREDICTIONS], pairs)


ONE_LABEL = "prompts whose completions all have one label"


def _labelled(row: Row) -> Preference:
    """Completions of one prompt, each liked or not: all pairs of one that was and one that was not."""
    labels = []
    for label in row["label"]:
        if not isinstance(label, bool) and label not in (0, 1, "True", "False", "true", "false", "0", "1"):
            raise BadRow("column 'label' is not true or false", shown(label))
        labels.append(label in (True, 1, "True", "true", "1"))
    texts = [text_of({"completion": text}, "completion") for text in row["completion"]]
    places = range(len(texts))
    pairs = [(a, b) for a in places for b in places if labels[a] and not labels[b]]
    prompt = row["prompt"] if isinstance(row["prompt"], str) else chat.messages(row["prompt"])
    return _of_pairs(prompt, texts, pairs, ONE_LABEL)


NOT_PAIRS = "questions that were asked again, checks and qualification rows"


def _ranked(row: Row) -> Preference:
    """An annotator's ranking of completions."""
    try:
        labels.check_label(row)
    except ValueError as error:
        raise BadRow("no label of an annotator", str(error)) from error
    if row.get("kind", labels.PAIR) != labels.PAIR:
        raise Dropped(NOT_PAIRS)
    if row["ranks"] is None:
        raise Dropped(UNLABELLED)
    prompt = row["prompt"]
    texts = list(row["completions"])
    chances: list[float] = []
    if row.get("probabilities") is None:
        pairs = labels.ranked_pairs(row["ranks"])
    else:
        pairs, chances = labels.likely_pairs(len(texts), row["probabilities"])
    spoken_prompt = prompt if isinstance(prompt, str) else chat.messages(prompt)
    preference = dataclasses.replace(
        _of_pairs(spoken_prompt, texts, pairs),
        probabilities=[chances[n] for n, (a, b) in enumerate(pairs) if chances and texts[a] != texts[b]],
    )
    # As `_implicit` says of the same text, so that labels of a dialogue are read as the dialogue was.
    spoken = isinstance(prompt, str) and HUMAN in prompt and prompt.endswith(ASSISTANT)
    return dataclasses.replace(preference, dialogue=spoken)


PROBABILITY = "probability"
"""A column beside prompt, chosen and rejected: how likely the chosen one is the better one (a soft label)."""
PAIR = ("prompt", "chosen", "rejected")
PREFERENCE_SCHEMAS = (
    PreferenceSchema(
        "trl-lib/tldr-preference, HuggingFaceH4/ultrafeedback_binarized", ("prompt", "chosen", "rejected"), _explicit
    ),
    PreferenceSchema("ShareGPT's form, as LLaMA-Factory has it", ("conversations", *PAIR[1:]), _conversations),
    PreferenceSchema("Anthropic/hh-rlhf, trl-lib/ultrafeedback_binarized (no prompt column)", PAIR[1:], _implicit),
    PreferenceSchema("openai/summarize_from_feedback", ("info", "summaries", "choice"), _summaries),
    PreferenceSchema("openai/webgpt_comparisons", ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
    PreferenceSchema("stanfordnlp/SHP", ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    PreferenceSchema("openbmb/UltraFeedback", ("instruction", "completions"), _ultrafeedback),
    PreferenceSchema("tatsu-lab/alpaca_farm", ("instruction", "output_1", "output_2", "preference"), _two_outputs),
    PreferenceSchema("PandaLM", ("instruction", "response1", "response2", "annotator1"), _pandalm),
    PreferenceSchema("LLMBar", ("input", "output_1", "output_2", "label"), _llmbar),
    PreferenceSchema("HuggingFaceH4/hhh_alignment", ("input", "targets"), _hhh),
    PreferenceSchema("Fine-grained RLHF", ("question", "passages", *PREDICTIONS, "preference"), _fine_grained),
    PreferenceSchema(
        "trl-lib/kto-mix-14k", ("prompt", "completion", "label"), _labelled, joined=("completion", "label")
    ),
    PreferenceSchema(
        "textrl-gym annotate", ("item", "annotator", "prompt", "completions", "ranks"), _ranked, history=True
    ),
)
"""The first whose columns are all there is taken."""


# -- loading ----------------------------------------------------------------------------------------------------------


def read_as_written(dataset: str, bad_rows: OnBadRows = "stop") -> list[Preference]:
    """The preferences of a file, folder (split "train") or Hub id with prompts and completions letter for letter.

    Raises:
        ValueError: no such data, columns of no schema, a row that does not fit, or no row that prefers anything.
    """
    source = sources.open_rows(dataset, "train", sources.PREFERENCE_SPLITS)
    raw, schema = _matched(source)
    preferences: list[Preference] = []

    def convert(row: Row) -> Row:
        with _fitting(schema):
            preference = _converted(schema, row)
            texts = _texts(preference, None, ChatSettings())
        preferences.append(preference)
        return texts

    scan = look_through(raw, source.words, [], convert)
    settle(scan.bad, source.words, bad_rows)
    if scan.dropped.counts:
        say_once(f"{source.words}: of {scan.dropped.total:,} rows dropped {scan.dropped}")
    if not preferences:
        raise ValueError(f"{source.words} has no row that prefers one completion to another")
    return preferences


def load_preferences(
    dataset: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    whole: bool = False,
    bad_rows: OnBadRows = "stop",
    chat_settings: ChatSettings | None = None,
) -> Preferences:
    """The preferences of a split: "train", or "validation" for those held out. They are read when they are asked for.

    Args:
        dataset: a file or folder as `prompts.load_rows` reads it, or a Hub id, "owner/name" or "owner/name:folder" for
            a part of it ("Anthropic/hh-rlhf:helpful-base"). Of what has no held-out split, a single file for one, the
            last tenth of the prompts is held out.
        tokenizer: whose chat template writes conversations, where it has one.
        whole: nothing is held out of what has no held-out split: all of it is either split.
        bad_rows: what to do with rows that do not fit their schema: "stop" or "skip".
        chat_settings: what stands before conversations, and whether the chat template writes them.

    Raises:
        ValueError: no such data, columns of no schema, a row that does not fit, or too few rows to hold any out.
        ImportError: a Hub id or a parquet file without the extra "hub".
    """
    source = sources.open_rows(dataset, split, sources.PREFERENCE_SPLITS)
    settings = chat_settings or ChatSettings()
    key = ("preferences", source.key, tokenizer, settings.key)
    raw, schema, convert, scan = remembered(key, lambda: _open(source, tokenizer, settings))
    settle(scan.bad, source.words, bad_rows)
    places = scan.places
    if source.whole and not whole:
        # By prompt, not by row: pairs of one prompt on both sides would leak what was learnt into what is measured.
        _, first, prompt_of_row = np.unique(scan.digests, return_index=True, return_inverse=True)
        order_of_prompt = np.argsort(np.argsort(first))
        held_out = order_of_prompt[prompt_of_row] >= len(first) - max(1, len(first) // 10)
        places = places[held_out if split == "validation" else ~held_out]
    if not len(places):
        because = "; ".join(str(report) for report in (scan.bad, scan.dropped) if report.counts)
        raise ValueError(
            f"dataset {dataset!r} has too few pairs: at least 2 prompts are needed, one of them held out"
            + (f"; of its {scan.bad.total:,} rows could not be used {because}" if because else "")
        )
    for reason, number in scan.dropped.counts.items():
        examples = "; ".join(scan.dropped.examples[reason])
        say_once(f"{source.words}: of {scan.dropped.total:,} rows dropped {number:,} {reason} ({examples})")
    return Preferences(Rows(raw, places, convert, scan.bad), schema.name, dict(scan.dropped.counts))


Opened = tuple[RawRows, PreferenceSchema, Callable[[Row], dict[str, Any]], Scan]
"""The rows as they are written, what they are read by, and what was found in them."""


def _open(source: sources.Source, tokenizer: PreTrainedTokenizerBase | None, settings: ChatSettings) -> Opened:
    raw, schema = _matched(source)

    def convert(row: Row) -> dict[str, Any]:
        with _fitting(schema):
            return {**row, **_texts(_converted(schema, row), tokenizer, settings, row.get("tools"))}

    return raw, schema, convert, look_through(raw, source.words, [], convert)


def _matched(source: sources.Source) -> tuple[RawRows, PreferenceSchema]:
    """A source's rows, put together as their schema says, and the schema."""
    raw: RawRows = Mapped(source.open(), prompts.webgpt_row)
    schema = sources.match_schema(PREFERENCE_SCHEMAS, first_columns(raw, source.words), source.words)
    if schema.joined:
        raw = Grouped(raw, "prompt", schema.joined)
    return labels.Standing(raw) if schema.history else raw, schema


def _converted(schema: PreferenceSchema, row: Row) -> Preference:
    for name in SCORES:
        if row.get(name) is not None:
            check_score(row, name)
    return schema.convert(row)


@contextlib.contextmanager
def _fitting(schema: PreferenceSchema) -> Iterator[None]:
    """What converting a row of another form raises is a BadRow."""
    try:
        yield
    except BadRow:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        detail = str(error) if type(error) is ValueError else repr(error)
        raise BadRow(f"does not fit the schema of {schema.name}", detail) from error


SCORES = ("score_chosen", "score_rejected", "margin")
"""Columns that stand beside pairs, for those who use them."""


def check_score(row: Row, name: str) -> None:
    """Raise BadRow for a score that is no finite number; one that is missing is none."""
    with contextlib.suppress(Dropped):
        _label(row, name)


def _texts(
    preference: Preference, tokenizer: PreTrainedTokenizerBase | None, settings: ChatSettings, tools: object = None
) -> dict[str, Any]:
    """A preference with every part a text, as a policy reads and writes it.

    Args:
        tools: the column of its row.
    """
    prompt, texts, dialogue = preference.prompt, preference.completions, preference.dialogue
    for text in [*texts, *([prompt] if isinstance(prompt, str) else [])]:
        if not isinstance(text, str):
            raise ValueError(f"{shown(text)} is not a text")
        check_characters(text, "a text")
    row: Row = {"prompt": prompt, "chat": None}
    if not isinstance(prompt, str):
        row = {"prompt": preference.plain or chat.as_text(prompt), "chat": Chat(prompt)}
        dialogue = not preference.plain
    elif dialogue:
        row = {"prompt": prompt, "chat": chat.dialogue(prompt)}
    if tokenizer is not None:
        row = chat.written({**row, "tools": tools}, tokenizer, settings)
    by_template = tokenizer is not None and tokenizer.chat_template and settings.template != "none"
    spoken = row["chat"] if by_template else None
    if spoken is not None:
        # Anthropic's answers begin with a blank, those of chat templates do not.
        texts, dialogue = [text.strip() for text in texts] if preference.dialogue else texts, True
    elif not isinstance(prompt, str):
        # Completions begin with a blank, as Anthropic's do: with most tokenizers "Yes" and " Yes" are other tokens.
        blank = row["prompt"][-1:].isspace()
        texts = [text if text[:1].isspace() or blank else f" {text}" for text in texts]
    texts_and_pairs = {"completions": texts, "pairs": preference.pairs, "probabilities": preference.probabilities}
    return {"prompt": row["prompt"], "chat": spoken, "dialogue": dialogue} | texts_and_pairs
