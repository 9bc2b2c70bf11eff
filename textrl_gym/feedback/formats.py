"""Labels as other tools write and read them.

trl            a line for each preference: prompt, chosen, rejected (TRL's form), and probability of soft labels
openai         a line for each comparison of two: info, summaries, choice, worker, extra.confidence, as
               openai/summarize_from_feedback has them; choice is null for a tie
alpaca-farm    a list of comparisons of two: instruction, input, output_1, output_2, preference (1, 2, 0 for a tie);
               and prompt_form, whether a prompt was a text, what a user says (as AlpacaFarm's are) or a conversation
argilla        a list of records, as Argilla 2 exports them: fields prompt and answer_1, ...; a ranking question
label-studio   a list of tasks with their annotations, for the template of pairwise comparison

What a tool has no place for stays behind: who answered, in trl; marks and comments, but in argilla and label-studio;
probabilities of soft labels, but in trl, whose own trainers do not read them.
Questions that were asked again, attention checks and qualification rows are exported by none: they are no data to
train on.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from textrl_gym import files
from textrl_gym.data import chat, labels, preferences, prompts
from textrl_gym.data.labels import CONFIDENCE, PAIR, Label
from textrl_gym.feedback.questions import item_id

Format = Literal["trl", "openai", "alpaca-farm", "argilla", "label-studio"]
FORMATS: tuple[Format, ...] = get_args(Format)
UNKNOWN = "unknown"
"""Who answered, where a format does not say."""
Prompt = str | list[dict[str, str]]
_TLDR = re.compile(
    r"SUBREDDIT: r/(?P<subreddit>.*?)\n\nTITLE: (?P<title>.*?)\n\nPOST: (?P<post>.*)\n\nTL;DR:", re.DOTALL
)
MIDDLE = 5
"""Of OpenAI's scale of confidence, 1 (the first is better for certain) to 9 (the second is)."""


# -- export -----------------------------------------------------------------------------------------------------------


def export_labels(file: Path, kind: Format, out: Path) -> int:
    """Write a file of labels in another tool's form.

    Args:
        kind: see the head of this file.
        out: the file to write: *.jsonl for trl and openai, *.json for the others.

    Returns:
        how many lines, comparisons, records or tasks it has.

    Raises:
        ValueError: an unknown form, a file that is there already, no labels, or rankings of three and more where the
            form has comparisons of two alone.
    """
    check_format(kind)
    suffix = ".jsonl" if kind in ("trl", "openai") else ".json"
    if out.suffix != suffix:
        raise ValueError(f"out must be a file *{suffix} for {kind}, got {str(out)!r}")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already: name another file")
    rows = [label for label in labels.read_labels(file) if label.kind == PAIR]
    if not rows:
        raise ValueError(f"{str(file)!r} has no labels to export")
    exported = list(WRITERS[kind](rows))
    if not exported:
        raise ValueError(f"{str(file)!r} has no label that prefers one completion to another")
    files.make_folder(out.parent)
    if suffix == ".jsonl":
        files.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in exported))
    else:
        files.write_text(out, json.dumps(exported, ensure_ascii=False, indent=1) + "\n")
    return len(exported)


def check_format(kind: str) -> None:
    """Raise ValueError for a form that is none of these."""
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")


def _trl(rows: Sequence[Label]) -> Iterator[dict[str, Any]]:
    for label in rows:
        # As they are read: a tie of two orders that disagree may still have a likelier side.
        chances: list[float] | None = None
        pairs = labels.ranked_pairs(label.ranks or [])
        if label.ranks is not None and label.probabilities is not None:
            pairs, chances = labels.likely_pairs(len(label.completions), label.probabilities)
        # Who wrote the pair's label is said by no column of TRL's, so that each stands for itself.
        for place, (chosen, rejected) in enumerate(pairs):
            texts = {"chosen": label.completions[chosen], "rejected": label.completions[rejected]}
            # TRL takes a text for a text, and for a conversation the turns that go on with it.
            spoken = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
            soft = {} if chances is None else {preferences.PROBABILITY: chances[place]}
            yield {"prompt": label.prompt} | (texts if isinstance(label.prompt, str) else spoken) | soft


def _check_two(rows: Sequence[Label], kind: Format) -> None:
    for label in rows:
        if (size := len(label.completions)) != 2:
            raise ValueError(f"{kind} has comparisons of two; item {label.item!r} ranks {size}: export trl or argilla")


def _of_two(rows: Sequence[Label], kind: Format) -> Iterator[tuple[Label, list[int], int | None]]:
    """Answered labels of two completions, places as they were shown, and the place there that was preferred."""
    _check_two(rows, kind)
    for label in rows:
        if label.ranks is not None:
            order = label.order or [0, 1]
            shown = [label.ranks[place] for place in order]
            yield label, order, None if shown[0] == shown[1] else int(shown[1] < shown[0])


def _openai(rows: Sequence[Label]) -> Iterator[dict[str, Any]]:
    for label, order, choice in _of_two(rows, "openai"):
        policies: list[str | None] = [*label.models] or [None, None]
        yield {
            "info": {"id": label.item} | _post(_as_text(label.prompt)),
            "summaries": [{"text": label.completions[p], "policy": policies[p], "note": None} for p in order],
            "choice": choice,
            "worker": label.annotator,
            "batch": "textrl-gym",
            "split": "train",
            "extra": {"confidence": _on_nine(label.confidence, choice)},
        }


def _post(prompt: str) -> dict[str, Any]:
    """A TL;DR prompt in its parts; any other as the post alone."""
    none = dict.fromkeys(("title", "subreddit", "site", "article"))
    parts = _TLDR.fullmatch(prompt)
    if parts is None or prompts.tldr_prompt({**parts.groupdict(), "summary": ""})["prompt"] != prompt:
        return none | {"post": prompt}
    return none | parts.groupdict()


def _on_nine(confidence: int | None, choice: int | None) -> int | None:
    """1 to 4 for or against, on a scale of 1 to 9."""
    if confidence is None:
        return None
    return MIDDLE if choice is None else MIDDLE + (confidence if choice else -confidence)


def _alpaca_farm(rows: Sequence[Label]) -> Iterator[dict[str, Any]]:
    for label, order, choice in _of_two(rows, "alpaca-farm"):
        texts = {f"output_{n}": label.completions[place] for n, place in enumerate(order, 1)}
        preference = {"preference": 0 if choice is None else choice + 1, "annotator": label.annotator}
        form, instruction = _instruction(label.prompt)
        yield {"instruction": instruction, "input": "", **texts, **preference, "prompt_form": form}


PromptForm = Literal["text", "user", "conversation"]


def _instruction(prompt: Prompt) -> tuple[PromptForm, str]:
    """What a user said, where that is all; else the text, or the conversation as one."""
    if isinstance(prompt, str):
        return "text", prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return "user", prompt[0]["content"]
    return "conversation", _as_text(prompt)


def _instructed(text: str, form: object) -> Prompt:
    """The prompt that an instruction was."""
    if form not in (None, *get_args(PromptForm)):
        raise ValueError(f"prompt_form must be one of {', '.join(get_args(PromptForm))}, got {form!r}")
    turns = chat.dialogue(text) if form == "conversation" else None
    if turns is not None and _as_text(list(turns)) == text:
        return list(turns)
    # A conversation with a system message has no form as a text that can be told from its turns.
    return text if form in ("text", "conversation") else [{"role": "user", "content": text}]


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else chat.as_text(chat.messages(prompt))


def _by_item(rows: Sequence[Label]) -> Iterator[list[Label]]:
    items: dict[str, list[Label]] = {}
    for label in rows:
        items.setdefault(label.item, []).append(label)
    yield from items.values()


def _argilla(rows: Sequence[Label]) -> Iterator[dict[str, Any]]:
    for some in _by_item(rows):
        first = some[0]
        answers = {f"answer_{place}": text for place, text in enumerate(first.completions, 1)}
        ranked = [label for label in some if label.ranks is not None]
        users = {label.annotator: str(uuid.uuid5(uuid.NAMESPACE_URL, label.annotator)) for label in some}
        responses = {
            "ranking": [{"value": _ordered(label), "user_id": users[label.annotator]} for label in ranked],
            "comment": [
                {"value": label.comment, "user_id": users[label.annotator]} for label in ranked if label.comment
            ],
        }
        yield {
            "id": first.item,
            "fields": {"prompt": _as_text(first.prompt)} | answers,
            "metadata": {"annotators": [f"{name}={user}" for name, user in users.items()]},
            "suggestions": {},
            "responses": {name: given for name, given in responses.items() if given},
            "vectors": {},
            "status": "completed" if ranked else "pending",
        }


def _ordered(label: Label) -> list[dict[str, Any]]:
    """The answers' names with their ranks, best first."""
    assert label.ranks is not None
    ranked = sorted((rank, place) for place, rank in enumerate(label.ranks))
    return [{"value": f"answer_{place + 1}", "rank": rank} for rank, place in ranked]


SIDES = ("left", "right")


def _label_studio(rows: Sequence[Label]) -> Iterator[dict[str, Any]]:
    _check_two(rows, "label-studio")
    for number, some in enumerate(_by_item(rows), 1):
        first = some[0]
        data = {"item": first.item, "prompt": _as_text(first.prompt)}
        data |= {f"text{place}": text for place, text in enumerate(first.completions, 1)}
        yield {"id": number, "data": data, "annotations": [_annotation(label) for label in some]}


def _annotation(label: Label) -> dict[str, Any]:
    result: list[dict[str, Any]] = []
    common = {"from_name": "pw", "to_name": "text1"}
    if label.ranks is not None and label.ranks[0] != label.ranks[1]:
        selected = SIDES[int(label.ranks[1] < label.ranks[0])]
        result.append(common | {"type": "pairwise", "value": {"selected": selected}})
    elif label.ranks is not None:  # the template has no tie: a choice beside it
        word = "both bad" if label.all_bad else "tie"
        result.append({"from_name": "neither", "to_name": "text1", "type": "choices", "value": {"choices": [word]}})
    if label.comment:
        result.append(
            {"from_name": "comment", "to_name": "text1", "type": "textarea", "value": {"text": [label.comment]}}
        )
    for span in label.spans:
        place = span["completion"]
        part = label.completions[place][span["start"] : span["end"]]
        value = {"start": span["start"], "end": span["end"], "text": part, "labels": [span["mark"]]}
        result.append({"from_name": "mark", "to_name": f"text{place + 1}", "type": "labels", "value": value})
    return {
        "id": label.id,
        "completed_by": label.annotator,
        "result": result,
        "was_cancelled": label.ranks is None,
        "lead_time": label.seconds,
        "created_at": label.time,
    }


Writer = Callable[[Sequence[Label]], Iterator[dict[str, Any]]]
WRITERS: dict[str, Writer] = {
    "trl": _trl,
    "openai": _openai,
    "alpaca-farm": _alpaca_farm,
    "argilla": _argilla,
    "label-studio": _label_studio,
}


# -- import -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    """One answer as another tool has it."""

    prompt: Prompt
    completions: list[str]
    ranks: list[int] | None
    annotator: str = UNKNOWN
    confidence: int | None = None
    comment: str = ""
    all_bad: bool = False
    seconds: float | None = None
    time: str = ""
    models: list[str] = dataclasses.field(default_factory=list)
    spans: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    as_shown: bool = True
    """Whether the completions stand as they were shown; else nothing says how they were."""


def import_labels(file: Path, kind: Format, out: Path) -> int:
    """Read another tool's file into a file of labels.

    The completions of an item stand in the order in which it is met first, and other answers to it are turned to that.

    Returns:
        how many labels it has.

    Raises:
        ValueError: an unknown form, a file that does not fit it, or `out` is there already.
    """
    check_format(kind)
    if out.suffix != ".jsonl":
        raise ValueError(f"out must be a file *.jsonl, got {str(out)!r}")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already: name another file")
    rows = _read_rows(file)
    given = []
    for number, row in enumerate(rows, 1):
        try:
            given += list(READERS[kind](row))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            detail = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{str(file)!r}, entry {number} does not fit {kind}: {detail}") from error
    if not given:
        raise ValueError(f"{str(file)!r} has no labels")
    files.make_folder(out.parent)
    lines = [json.dumps(dataclasses.asdict(label)) + "\n" for label in _as_labels(given)]
    files.write_text(out, "".join(lines))
    return len(lines)


def _read_rows(file: Path) -> list[Any]:
    """The entries of a JSON list or of JSON lines."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    return list(files.read_json_lines(file))


def _as_labels(given: Iterable[Given]) -> Iterator[Label]:
    first: dict[str, list[str]] = {}
    for number, one in enumerate(given, 1):
        item = item_id(one.prompt, one.completions)
        completions = first.setdefault(item, one.completions)
        # Where each completion stands among the item's.
        order = [completions.index(text) for text in one.completions]
        ranks = None if one.ranks is None else [one.ranks[order.index(place)] for place in range(len(order))]
        spans = [span | {"completion": order[span["completion"]]} for span in one.spans]
        models = [one.models[order.index(place)] for place in range(len(order))] if one.models else []
        label = Label(
            number, item, PAIR, one.annotator, one.prompt, completions, ranks, one.all_bad,
            order if one.as_shown else [], one.confidence, one.comment, spans, one.seconds, one.time, models,
        )  # fmt: skip
        labels.check_label(dataclasses.asdict(label))
        yield label


def _from_trl(row: Mapping[str, Any]) -> Iterator[Given]:
    schema = next(s for s in preferences.PREFERENCE_SCHEMAS if set(s.columns) <= row.keys())
    preference = schema.convert(dict(row))
    for chosen, rejected in preference.pairs:
        texts = [preference.completions[chosen], preference.completions[rejected]]
        annotator = str(row.get("annotator") or UNKNOWN)
        yield Given(_plain(preference.prompt), texts, [1, 2], annotator, as_shown=False)


def _plain(prompt: str | preferences.Talk) -> Prompt:
    return prompt if isinstance(prompt, str) else list(prompt)


def _from_openai(row: Mapping[str, Any]) -> Iterator[Given]:
    info, choice = row["info"], row["choice"]
    texts = [str(summary["text"]) for summary in row["summaries"]]
    if choice is None:
        prompt, ranks = preferences.post_prompt(info), [1, 1]
    else:
        if choice not in (0, 1):
            raise ValueError(f"choice must be 0, 1 or null, got {choice!r}")
        prompt, ranks = preferences.post_prompt(info), [1, 2] if choice == 0 else [2, 1]
    confidence = (row.get("extra") or {}).get("confidence")
    policies = [summary.get("policy") for summary in row["summaries"]]
    yield Given(
        prompt,
        texts,
        ranks,
        str(row.get("worker") or UNKNOWN),
        confidence=None if confidence in (None, MIDDLE) else min(abs(confidence - MIDDLE), CONFIDENCE[1]),
        models=[str(policy) for policy in policies] if all(policies) else [],
    )


def _from_alpaca_farm(row: Mapping[str, Any]) -> Iterator[Given]:
    preference = row["preference"]
    if preference not in (0, 1, 2, 1.5):
        raise ValueError(f"preference must be 1, 2, or 0 for a tie, got {preference!r}")
    ranks = {1: [1, 2], 2: [2, 1]}.get(preference, [1, 1])
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    texts = [str(row["output_1"]), str(row["output_2"])]
    yield Given(_instructed(prompt, row.get("prompt_form")), texts, ranks, str(row.get("annotator") or UNKNOWN))


def _from_argilla(row: Mapping[str, Any]) -> Iterator[Given]:
    fields, responses = row["fields"], row.get("responses") or {}
    names = sorted((name for name in fields if re.fullmatch(r"answer_\d+", name)), key=lambda name: int(name[7:]))
    people = dict(reversed(one.split("=", 1)) for one in (row.get("metadata") or {}).get("annotators", []))
    comments = {one["user_id"]: one["value"] for one in responses.get("comment", [])}
    for response in responses.get("ranking", []):
        value = response["value"]
        # A list of names, best first, or of names with ranks.
        ranks_of = {one["value"]: one["rank"] for one in value} if value and isinstance(value[0], dict) else {}
        ranks_of = ranks_of or {name: rank for rank, name in enumerate(value, 1)}
        user = response["user_id"]
        yield Given(
            fields["prompt"],
            [fields[name] for name in names],
            [ranks_of[name] for name in names],
            people.get(user, user),
            comment=comments.get(user, ""),
            as_shown=user not in people,  # who answered before the export was shown another order
        )


def _from_label_studio(row: Mapping[str, Any]) -> Iterator[Given]:
    data = row["data"]
    texts = [data["text1"], data["text2"]]
    for annotation in row["annotations"]:
        by_type: dict[str, list[Any]] = {}
        for part in annotation["result"]:
            by_type.setdefault(part["type"], []).append(part)
        ranks: list[int] | None = None
        words = [word for part in by_type.get("choices", []) for word in part["value"]["choices"]]
        if "pairwise" in by_type:
            ranks = [1, 2] if by_type["pairwise"][0]["value"]["selected"] == SIDES[0] else [2, 1]
        elif words:
            ranks = [1, 1]
        comments = [text for part in by_type.get("textarea", []) for text in part["value"]["text"]]
        spans = [
            {"completion": int(part["to_name"][-1]) - 1, "start": part["value"]["start"], "end": part["value"]["end"],
             "mark": part["value"]["labels"][0]}
            for part in by_type.get("labels", [])
        ]  # fmt: skip
        person = annotation.get("completed_by")
        yield Given(
            data.get("prompt", ""),
            texts,
            None if annotation.get("was_cancelled") else ranks,
            str(person.get("email", person.get("id")) if isinstance(person, dict) else person or UNKNOWN),
            comment="\n".join(comments),
            all_bad="both bad" in words,
            seconds=annotation.get("lead_time"),
            time=annotation.get("created_at") or "",
            spans=spans,
            as_shown=not isinstance(person, str),  # a name is the export's; Label Studio has numbers
        )


Reader = Callable[[Mapping[str, Any]], Iterator[Given]]
READERS: dict[str, Reader] = {
    "trl": _from_trl,
    "openai": _from_openai,
    "alpaca-farm": _from_alpaca_farm,
    "argilla": _from_argilla,
    "label-studio": _from_label_studio,
}
