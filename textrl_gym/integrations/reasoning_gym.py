"""ReasoningGym: any task of reasoning-gym, a library of procedural problems with answers that are checked by rule.

Which of its tasks, and how hard, is said by the environment's `dataset`: a name, or a name and settings as JSON,
`chain_sum:{"max_terms": 3}`.

    class ChainSum(ReasoningGym):
        problems = 'chain_sum:{"max_terms": 3}'

    textrl_gym.register("ChainSum-v0", "my_module:ChainSum")
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator
from typing import Any

from textrl_gym.core import PromptSource, Row
from textrl_gym.mdp.task import Task
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


class ReasoningGym(Task):
    """A task of reasoning-gym: a problem, and its answer as the whole completion.

    The reward is the library's own scorer where the task has one (several answers may be right, and some are partly
    right). It is exact match where the task has the library's default, which also pays a wrong answer that contains the
    right one, and where the scorer would run the completion as Python code. The gold score is exact match in all cases.
    """

    problems = "chain_sum"
    """Which of the library's tasks, where the environment's `dataset` names none."""
    max_prompt_tokens = 512
    max_new_tokens = 64
    model = "smollm2-135m"
    reward = "textrl_gym.integrations.reasoning_gym:score"
    gold = "textrl_gym.integrations.reasoning_gym:exact"
    suffix = "\nAnswer:"
    """Behind each problem."""
    keep_suffix = suffix

    def rows(self, split: str, dataset: str | None = None) -> PromptSource:
        """The problems of a split, made when they are asked for."""
        return Problems(dataset or self.problems, split, self.suffix)


class Problems:
    """The problems of a split as rows: `prompt`, `completion` (the answer, where there is one alone), `problems`, and
    `entry`, what the library made.

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
        self.problems, self.split, self.suffix = problems, split, suffix
        self[0]

    def __len__(self) -> int:
        return ROWS[self.split]

    def __getitem__(self, index: int, /) -> Row:
        """The row at a place."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        source, rng = open_problems(self.problems), random.Random(f"{self.split}/{index % len(self)}")
        for _ in range(TRIES):
            number = rng.randrange(source.size)
            # Most tasks have a generator of their own; list_functions draws from the global one.
            with GlobalRandom.seeded(number).installed():
                entry = source[number]
            if split_of(entry["question"]) == self.split:
                row = {"prompt": entry["question"] + self.suffix, "problems": self.problems, "entry": entry}
                return row if entry["answer"] is None else row | {"completion": str(entry["answer"])}
        raise ValueError(
            f"{TRIES} problems of {self.problems!r} have none for the split {self.split!r}: the task has too few "
            "different ones; other settings, as NAME:JSON, may have more"
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def split_of(question: str) -> str:
    """The split that a problem belongs to."""
    residue = zlib.crc32(question.encode()) % 5  # not hash(), which is salted in each process
    return next(split for split, share in SHARES.items() if residue in share)


@functools.lru_cache(maxsize=16)
def open_problems(problems: str) -> Any:
    """A data set of reasoning-gym, of NAME or NAME:JSON.

    Raises:
        ValueError: reasoning-gym is absent, or it has no such task or setting.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"{problems!r} needs reasoning-gym ({error}): pip install textrl-gym[reasoning-gym]"
        ) from error
    name, _, text = problems.partition(":")
    if name not in DATASETS:
        raise ValueError(f"unknown task of reasoning-gym {name!r}; allowed: {', '.join(sorted(DATASETS))}")
    try:
        settings = json.loads(text or "{}")
        # Two tasks make their whole plan from the size, and word_ladder refuses this one.
        with GlobalRandom.seeded(SEED).installed():
            return reasoning_gym.create_dataset(name, **({"seed": SEED, "size": SIZE} | settings))
    except (ValueError, TypeError, AssertionError) as error:  # the library checks its settings by assert
        raise ValueError(f"reasoning-gym refuses {problems!r}: {type(error).__name__}: {error}") from error


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
