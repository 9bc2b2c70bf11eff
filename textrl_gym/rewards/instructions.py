"""instructions: share of a row's checkable instructions that a completion keeps, by the ids of IFEval.

The ids and their settings are those of google/IFEval (Zhou et al. 2023, arXiv:2311.07911), strict: the text is checked
as it is. "instructions:all" is 1 where every instruction is kept, else 0 (the paper's prompt-level accuracy). An empty
text keeps nothing. Departures: keywords are looked for as they are written and not as regular expressions, sentences
end in ".", "!" or "?" before a blank, and capitals may be of any language. Ids that need a model of language
(language:response_language, change_case:capital_word_frequency) and a few rare ones are refused.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from textrl_gym.rewards import json_valid

ALL = "all"
COLUMNS = ("instruction_id_list", "kwargs")
RELATIONS = ("less than", "at least")

Options = Mapping[str, Any]
"""The settings of one instruction: an entry of the column `kwargs`."""


def make(argument: str | None) -> Callable[..., list[float]]:
    """The reward of the columns `instruction_id_list` and `kwargs`; argument: "all" wants every instruction kept.

    Raises:
        ValueError: another argument.
    """
    if argument not in (None, ALL):
        raise ValueError(f"reward 'instructions' takes no argument or {ALL!r}, given {argument!r}")

    def reward(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        """In [0, 1] for each row.

        Raises:
            ValueError: the rows lack a column, name an unknown instruction, or give a setting that it cannot have.
        """
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise ValueError(
                f"reward 'instructions' needs the columns {', '.join(COLUMNS)}, as google/IFEval has them; "
                f"{', '.join(missing)} of them is not in the rows, whose columns are {', '.join(columns)}"
            )
        scores = []
        for text, ids, options in zip(completions, columns[COLUMNS[0]], columns[COLUMNS[1]], strict=True):
            follows = check(text, ids, options)
            scores.append(float(all(follows)) if argument == ALL else sum(follows) / len(follows))
        return scores

    return reward


def check(text: str, ids: list[str], options: list[Options]) -> list[bool]:
    """Whether a text keeps each instruction.

    Args:
        ids: at least one key of CHECKS.
        options: settings of each; those that are None are as if they were not there.

    Raises:
        ValueError: no or unknown instructions, not as many settings, or a setting that it cannot have.
    """
    if not ids or len(ids) != len(options):
        raise ValueError(
            f"instructions: a row needs at least one instruction and settings for each, got {len(ids)} "
            f"instruction_id_list and {len(options)} kwargs"
        )
    for name in ids:
        if name not in CHECKS:
            raise ValueError(f"instructions: unknown instruction {name!r}; known are {', '.join(CHECKS)}")
    follows = []
    for name, given in zip(ids, options, strict=True):
        try:
            # Checked where the text is empty too: a bad row must not hide until somebody writes.
            follows.append(CHECKS[name](text, given) and bool(text.strip()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"instructions: {name!r} cannot have the settings {dict(given or {})}: {error!r}"
            ) from error
    return follows


def _related(count: int, relation: str, number: int) -> bool:
    if relation not in RELATIONS:
        raise ValueError(f"instructions: relation must be one of {', '.join(map(repr, RELATIONS))}, got {relation!r}")
    return count < number if relation == RELATIONS[0] else count >= number


def _times(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _has_word(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?]+[\"')\u201d]*(?:\s+|$)", text.strip()) if part.strip()])


def _paragraphs(text: str) -> int:
    """Parts between lines of ***; -1 where one in the middle is empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return -1 if "" in parts[1:-1] else sum(part != "" for part in parts)


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE))


def _highlights(text: str) -> int:
    marked = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return sum(part.strip("*").strip() != "" for part in marked)


def _ends(text: str, phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(phrase.strip().lower())


CHECKS: Mapping[str, Callable[[str, Options], bool]] = {
    "keywords:existence": lambda text, o: all(_times(word, text) > 0 for word in o["keywords"]),
    "keywords:frequency": lambda text, o: _related(_times(o["keyword"], text), o["relation"], o["frequency"]),
    "keywords:forbidden_words": lambda text, o: not any(_has_word(word, text) for word in o["forbidden_words"]),
    "keywords:letter_frequency": lambda text, o: _related(
        text.lower().count(o["letter"].lower()), o["let_relation"], o["let_frequency"]
    ),
    "length_constraints:number_words": lambda text, o: _related(
        len(re.findall(r"\w+", text)), o["relation"], o["num_words"]
    ),
    "length_constraints:number_sentences": lambda text, o: _related(
        _sentences(text), o["relation"], o["num_sentences"]
    ),
    "length_constraints:number_paragraphs": lambda text, o: _paragraphs(text) == int(o["num_paragraphs"]),
    "detectable_content:number_placeholders": lambda text, o: (
        len(re.findall(r"\[.*?\]", text)) >= int(o["num_placeholders"])
    ),
    "detectable_format:number_bullet_lists": lambda text, o: _bullets(text) == int(o["num_bullets"]),
    "detectable_format:number_highlighted_sections": lambda text, o: _highlights(text) >= int(o["num_highlights"]),
    "detectable_format:json_format": lambda text, o: json_valid.reward([""], [text]) == [1.0],
    "detectable_format:title": lambda text, o: re.search(r"<<[^\n]*[^\s<>][^\n]*>>", text) is not None,
    "startend:end_checker": lambda text, o: _ends(text, o["end_phrase"]),
    "startend:quotation": lambda text, o: len(text.strip()) > 1 and text.strip()[0] == '"' == text.strip()[-1],
    "change_case:english_capital": lambda text, o: text.isupper(),
    "change_case:english_lowercase": lambda text, o: text.islower(),
    "punctuation:no_comma": lambda text, o: "," not in text,
}
"""IFEval's id -> whether a text keeps the instruction with these settings."""
