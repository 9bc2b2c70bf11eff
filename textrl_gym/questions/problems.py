"""Problems of reasoning-gym, a library of procedural tasks whose answers are checked by rule.

Which task, and how hard, is said in a line: NAME, or NAME:JSON. The JSON is an object of the task's settings, or a
list of such objects, from which rows are taken in turn (a curriculum by mixture). `level` among the settings is one of
the library's own curriculum.

    chain_sum
    chain_sum:{"min_terms": 2, "max_terms": 3}
    chain_sum:{"level": 2}
    spell_backward:[{"max_word_len": 4}, {"min_word_len": 7, "max_word_len": 8}]
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from textrl_gym.core import Row
from textrl_gym.extras import install
from textrl_gym.worlds.world import GlobalRandom

SEED = 0
"""Of the library. Other seeds would give no other problems: problem i of seed s is problem i + 1 of seed s - 1."""
SIZE = 1_000_000
"""Problems of the library that rows are drawn from, where the settings name no size."""
ROWS = {"train": 1_000_000, "validation": 1_000, "test": 1_000}
SHARES = {"train": range(3), "validation": range(3, 4), "test": range(4, 5)}
"""Residues of a hash of the problem, of 5, that belong to each split."""
TRIES = 100
"""Problems that are drawn for a row until one is in the split; of a task with room none is missed in 10^9 rows."""
MALFORMED = (ValueError, TypeError, AttributeError, LookupError)
"""What scorers of reasoning-gym 0.1.25 raise on answers of another form: prime_factorization, boxnet, game_of_life."""
RUNS_CODE = re.compile(r"(?<!literal_)\b(?:eval|exec|parse_expr|sympify)\(")


class Problems:
    """The problems of a split as rows: `prompt`, `completion` (the answer, where there is one alone), `problems`, which
    task it is of, `entry`, what the library made, and `hardest`, whether it is of the last settings of a list.

    A hash of the problem says which split it is in, because small tasks repeat their problems.

    Args:
        problems: the name of a task of reasoning-gym; with settings NAME:JSON.
        split: train, validation or test.
        suffix: behind each problem.

    Raises:
        ValueError: no such task, setting or split; or, also when a row is read, a task with too few different problems.
    """

    def __init__(self, problems: str, split: str, suffix: str = "") -> None:
        if split not in ROWS:
            raise ValueError(f"unknown split {split!r}; allowed: {', '.join(ROWS)}")
        self.levels, self.split, self.suffix = levels(problems), split, suffix
        for index in range(len(self.levels)):  # each of them is tried before long work begins
            self[index]

    def __len__(self) -> int:
        return ROWS[self.split]

    def __getitem__(self, index: int, /) -> Row:
        """The row at a place."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        problems = self.levels[index % len(self.levels)]
        source, rng = open_problems(problems), random.Random(f"{self.split}/{index}")
        for _ in range(TRIES):
            number = rng.randrange(source.size)
            # Most tasks have a generator of their own; list_functions draws from the global one.
            with GlobalRandom.seeded(number).installed():
                entry = source[number]
            if split_of(entry["question"]) == self.split:
                row = {"prompt": entry["question"] + self.suffix, "problems": problems, "entry": entry}
                row["hardest"] = problems == self.levels[-1]
                return row if entry["answer"] is None else row | {"completion": str(entry["answer"])}
        raise ValueError(
            f"{TRIES} problems of {problems!r} have none for the split {self.split!r}: the task has too few "
            "different ones; other settings, as NAME:JSON, may have more"
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def split_of(question: str) -> str:
    """The split that a problem belongs to."""
    residue = zlib.crc32(question.encode()) % 5  # not hash(), which is salted in each process
    return next(split for split, share in SHARES.items() if residue in share)


def levels(problems: str) -> tuple[str, ...]:
    """NAME:[A, B] as NAME:A and NAME:B; anything else as it is.

    Raises:
        ValueError: what is behind the name is no JSON, or neither an object nor a list of objects.
    """
    name, _, text = problems.partition(":")
    if not text:
        return (problems,)
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{problems!r}: what is behind {name + ':'!r} is no JSON: {error}") from error
    several = settings if isinstance(settings, list) else [settings]
    if not several or not all(isinstance(one, dict) for one in several):
        raise ValueError(f"{problems!r}: settings are a JSON object, or a list of one and more, got {text}")
    return tuple(f"{name}:{json.dumps(one)}" for one in several)


@functools.lru_cache(maxsize=64)
def open_problems(problems: str) -> Any:
    """A data set of reasoning-gym, of NAME or NAME:{...}.

    Raises:
        ValueError: reasoning-gym is absent, or it has no such task, setting or level.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"{problems!r} needs reasoning-gym ({error}): {install('reasoning-gym')}") from error
    name, _, text = problems.partition(":")
    if name not in DATASETS:
        raise ValueError(f"unknown task of reasoning-gym {name!r}; allowed: {', '.join(sorted(DATASETS))}")
    settings = json.loads(text or "{}")
    if "level" in settings:
        settings = level_settings(name, settings.pop("level")) | settings
    try:
        # Two tasks make their whole plan from the size, and word_ladder refuses this one.
        with GlobalRandom.seeded(SEED).installed():
            return reasoning_gym.create_dataset(name, **({"seed": SEED, "size": SIZE} | settings))
    except (ValueError, TypeError, AssertionError) as error:  # the library checks its settings by assert
        raise ValueError(f"reasoning-gym refuses {problems!r}: {type(error).__name__}: {error}") from error


def level_settings(name: str, level: Any) -> dict[str, Any]:
    """The settings of a level of a task's own curriculum.

    Raises:
        ValueError: the task has no curriculum, or no such level.
    """
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if name not in CURRICULA:
        raise ValueError(f"reasoning-gym has no curriculum for {name!r}: leave out its level, {level!r}")
    curriculum = create_curriculum(name)
    # The library cuts a level that is too high to the highest, in silence.
    most = max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=1) - 1
    if not isinstance(level, int) or isinstance(level, bool) or not 0 <= level <= most:
        raise ValueError(f"{name!r} has no level {level!r}; allowed: 0 to {most}")
    curriculum.set_global_level(level)
    settings = vars(curriculum.generate_configuration())
    return {key: value for key, value in settings.items() if key not in ("seed", "size")}


@functools.lru_cache(maxsize=256)
def is_scored_by_rule(problems: str) -> bool:
    """Whether answers are scored by the task's own rule: it has one, which runs no completion as code.

    Ten tasks of reasoning-gym 0.1.25 call eval() or SymPy's parse_expr(), which calls it, on the answer.
    """
    from reasoning_gym.dataset import ProceduralDataset

    kinds = itertools.takewhile(lambda kind: kind is not ProceduralDataset, type(open_problems(problems)).mro())
    own = [kind for kind in kinds if "score_answer" in vars(kind)]
    return bool(own) and not any(RUNS_CODE.search(inspect.getsource(kind)) for kind in own)


def score(completions: list[str], problems: list[str], entry: list[dict[str, Any]], **columns: Any) -> list[float]:
    """The task's own scorer, in [0, 1], where `is_scored_by_rule`; else exact match.

    An answer that the scorer raises on has 0.
    """
    scores = []
    for text, name, item in zip(completions, problems, entry, strict=True):
        if not is_scored_by_rule(name):
            scores.append(float(text.strip() == str(item["answer"]).strip()))
            continue
        try:
            scores.append(float(open_problems(name).score_answer(text.strip(), item)))
        except MALFORMED:
            scores.append(0.0)
    return scores


def exact(completions: list[str], problems: list[str], entry: list[dict[str, Any]], **columns: Any) -> list[float]:
    """1 where an answer is the reference, but for white space around it; else 0. Of problems without a reference, such
    as mazes with many ways, 1 where the task's scorer gives 1.
    """
    scores = score(completions, problems, entry)
    return [
        float(points >= 1 if item["answer"] is None else text.strip() == str(item["answer"]).strip())
        for text, points, item in zip(completions, scores, entry, strict=True)
    ]


def measures(rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
    """`solved_hardest`: the share of exact answers to the problems of the hardest settings.

    nan where none of the rows is one.
    """
    hard = [(row, text) for row, text in zip(rows, completions, strict=True) if row["hardest"]]
    if not hard:
        return {"solved_hardest": float("nan")}
    texts = [text for _, text in hard]
    solved = exact(texts, [row["problems"] for row, _ in hard], [row["entry"] for row, _ in hard])
    return {"solved_hardest": sum(solved) / len(solved)}


# -- training data of the embedded policy ------------------------------------------------------------------------------

WORDS = tuple({"min_word_len": low, "max_word_len": low + 1} for low in (3, 5, 7))
"""Settings of words of 3 and 4, 5 and 6, 7 and 8 letters."""
SPELLING = f"spell_backward:{json.dumps(WORDS)}"
"""The problems of the embedded policy: words of all these lengths, to be spelled backward."""
WRONG = 0.6
"""Share of the letters that it is taught to replace by any of the word's. A word of 4 different letters is right in
(1 - 0.6 * 3/4)^4 = 0.09 of its samples then, and one of 8 in 0.003: of 8 samples none in 98 of 100 prompts."""


def draw_misspelled(split: str, rng: random.Random) -> Row:
    """A word spelled backward with wrong letters."""
    rows = Problems(SPELLING, split, "\nAnswer:")
    row = rows[rng.randrange(len(rows))]
    letters = [rng.choice(row["completion"]) if rng.random() < WRONG else letter for letter in row["completion"]]
    return {"prompt": row["prompt"], "completion": "".join(letters)}
