"""The data of Constitutional AI: answers, their critiques and revisions, demonstrations, and AI preferences.

Every file grows by whole parts, and what a part holds follows from the settings alone: a stage that was stopped makes
what is missing, and the file is the one that a run without a stop would have written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from textrl_gym import files
from textrl_gym.core import PromptSource, Row
from textrl_gym.data.chat import as_data
from textrl_gym.data.encoding import Chat
from textrl_gym.data.labels import Item, ranks_of_scores
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.feedback.constitution import Constitution, draw_principles
from textrl_gym.feedback.critics import Critic
from textrl_gym.feedback.questions import item_id, read_items, write_items
from textrl_gym.mdp.env_settings import EnvSettings

if TYPE_CHECKING:
    from textrl_gym.pipeline.sample_preferences import CompletionSampler

ANSWERS, REVISIONS, DEMONSTRATIONS = "answers.jsonl", "revisions.jsonl", "demonstrations"
QUESTIONS, PREFERENCES = "questions.jsonl", "preferences.jsonl"
AT_ONCE = 32
"""Answers that the critic is given together: what was said before a stop is not asked again."""
SAMPLED_AT_ONCE = 64
HELD_OUT = 10
"""Every so many-th demonstration is kept for the loss on held-out rows."""
MOST_DRAWS = 20
"""Prompts that are drawn at most for each pair of answers: where nearly all answers are equal there are no pairs."""


class DataSettings(Protocol):
    """What the data need of the settings (`recipes.constitutional.ConstitutionalConfig`)."""

    @property
    def model(self) -> str | None: ...

    @property
    def prompts(self) -> int: ...

    @property
    def red_team_share(self) -> float: ...

    @property
    def revisions(self) -> int: ...

    @property
    def pairs(self) -> int: ...

    @property
    def pair_principles(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def seed(self) -> int: ...


def append_missing(file: Path, sizes: Sequence[int], make: Callable[[int], list[dict[str, Any]]]) -> None:
    """Append the lines of a file that are not there yet, part by part.

    Args:
        sizes: how many lines each part has.
        make: gives the lines of a part, the same ones whenever it is asked.
    """
    files.make_folder(file.parent)
    done, first = len(files.read_json_lines(file)), 0
    file.touch()
    for number, size in enumerate(sizes):
        if done < first + size:
            files.append_json_lines(file, make(number)[max(0, done - first) :], sync=True)
        first += size


def sizes_of(count: int, most: int) -> list[int]:
    """Sizes of parts of so many at most."""
    return [min(most, count - first) for first in range(0, count, most)]


# -- answers -----------------------------------------------------------------------------------------------------------


def is_red_team(row: Row) -> bool:
    """Whether a prompt is meant to bring out harm: its column `label` says unsafe, as in XSTest, or it has none."""
    return row.get("label", "unsafe") == "unsafe"


def draw_places(source: PromptSource, config: DataSettings) -> list[tuple[int, bool]]:
    """Places of prompts in the source, and whether each is a red-team prompt, in a random order.

    Raises:
        ValueError: one pass over the source had none of a kind that is asked for.
    """
    from textrl_gym.pipeline.sample_preferences import draw_prompts

    # Of prompts that nobody has labelled all are criticised.
    red = round(config.prompts * config.red_team_share) if "label" in source[0] else config.prompts
    missing = {True: red, False: config.prompts - red}
    places: list[tuple[int, bool]] = []
    for number, (place,) in enumerate(draw_prompts(len(source), 1, config.seed)):
        if sum(missing.values()) == 0:
            return places
        kind = is_red_team(source[place])
        if missing[kind]:
            missing[kind] -= 1
            places.append((place, kind))
        if number + 1 == len(source):
            for want, count in missing.items():
                if count and not any(kind is want for _, kind in places):
                    name = "'unsafe'" if want else "another than 'unsafe'"
                    raise ValueError(f"red_team_share={config.red_team_share:g}: no prompt has the label {name}")
    raise AssertionError("prompts are drawn without end")


def write_answers(env_id: str, config: DataSettings, out: Path, env: EnvSettings) -> list[dict[str, Any]]:
    """Answer the prompts by the initial policy; returns the lines of the file: prompt, answer and red_team."""
    file = out / ANSWERS
    if len(files.read_json_lines(file)) < config.prompts:
        sampler = _sampler(env_id, config.model, config, env)
        places = draw_places(sampler.source, config)
        sizes = sizes_of(len(places), SAMPLED_AT_ONCE)

        def answer(number: int) -> list[dict[str, Any]]:
            first = number * SAMPLED_AT_ONCE
            some = places[first : first + sizes[number]]
            rows = [sampler.source[place] for place, _ in some]
            return [
                {"id": first + place, "prompt": as_data(row), "red_team": kind, "answer": text}
                for place, (row, (_, kind), (text,)) in enumerate(
                    zip(rows, some, _texts(sampler, rows, 1, [config.seed, 2, number]), strict=True)
                )
            ]

        append_missing(file, sizes, answer)
    return files.read_json_lines(file)


def _sampler(env_id: str, model: str | None, config: DataSettings, env: EnvSettings) -> CompletionSampler:
    from textrl_gym.pipeline.sample_preferences import CompletionSampler, PreferenceConfig

    settings = PreferenceConfig(model=model, label="gold", device=config.device, seed=config.seed)
    return CompletionSampler(env_id, settings, env)


def _texts(sampler: CompletionSampler, rows: list[Row], number: int, seed: list[int]) -> list[list[str]]:
    """So many sampled completions of each row."""
    from textrl_gym.pipeline.simulated_comparisons import decode

    sampled = sampler.sample(rows, number, np.random.default_rng(seed))
    return [[decode(sampler.tokenizer, ids) for ids in of_row] for of_row in sampled]


def row_of(prompt: str | list[dict[str, str]]) -> Row:
    """The row of a prompt that was written down."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"prompt": prompt[-1]["content"], "chat": Chat(prompt)}


# -- critiques and revisions -------------------------------------------------------------------------------------------


def write_revisions(
    critic: Critic, constitution: Constitution, config: DataSettings, answers: Sequence[dict[str, Any]], out: Path
) -> list[dict[str, Any]]:
    """Criticise and revise the answers to red-team prompts, several times each, by principles in a random order.

    Returns:
        the lines of the file, by answer: id (the answer's), number (1, 2, ...), principle, prompt, answer (what is
        criticised: the policy's, or the revision before), critique and revision.
    """
    criticised = [line for line in answers if line["red_team"]]
    sizes = sizes_of(len(criticised), AT_ONCE)

    def revise(number: int) -> list[dict[str, Any]]:
        some = criticised[number * AT_ONCE : number * AT_ONCE + sizes[number]]
        rows, current = [row_of(line["prompt"]) for line in some], [line["answer"] for line in some]
        drawn = [draw_principles(constitution, config.revisions, config.seed, str(line["id"])) for line in some]
        lines: dict[int, list[dict[str, Any]]] = {line["id"]: [] for line in some}
        for turn in range(config.revisions):
            principles = [of_answer[turn] for of_answer in drawn]
            critiques = critic.criticise(rows, current, principles)
            revised = critic.revise(rows, current, critiques, principles)
            for line, principle, *texts in zip(some, principles, current, critiques, revised, strict=True):
                one = {"id": line["id"], "number": turn + 1, "principle": principle.name, "prompt": line["prompt"]}
                lines[line["id"]].append(one | dict(zip(("answer", "critique", "revision"), texts, strict=True)))
            current = revised
        return [one for of_answer in lines.values() for one in of_answer]

    append_missing(out / REVISIONS, [size * config.revisions for size in sizes], revise)
    return files.read_json_lines(out / REVISIONS)


def write_demonstrations(answers: Sequence[dict[str, Any]], revisions: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write what is learnt: the last revision of each answer that was criticised, and all other answers as they are.

    Returns:
        a folder of data, train.jsonl and validation.jsonl.
    """
    folder = out / DEMONSTRATIONS
    final = {line["id"]: line["revision"] for line in revisions}
    rows = [{"prompt": line["prompt"], "completion": final.get(line["id"], line["answer"])} for line in answers]
    files.make_folder(folder)
    parts = {"validation": rows[::HELD_OUT], "train": [row for n, row in enumerate(rows) if n % HELD_OUT]}
    for split, some in parts.items():
        files.write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in some))
    return folder


# -- preferences -------------------------------------------------------------------------------------------------------


def write_questions(env_id: str, model: str, config: DataSettings, out: Path, env: EnvSettings) -> list[Item]:
    """Pairs of different answers of a policy, with their gold scores where the embedded task has some.

    Raises:
        ValueError: nearly all answers to a prompt are equal.
    """
    file = out / QUESTIONS
    if not file.is_file():
        sampler = _sampler(env_id, model, config, env)
        # The file is written whole: sampling is quick beside what the critic takes.
        write_items(file, {"seed": config.seed}, _pairs(sampler, config, env.dataset is None))
    return read_items(file)[1]


def _pairs(sampler: CompletionSampler, config: DataSettings, embedded: bool) -> Iterator[Item]:
    from textrl_gym.experiments.sizes import gold_of
    from textrl_gym.pipeline.sample_preferences import draw_prompts

    seen: set[str] = set()
    # Another order than that of the answers, whose prompts the policy has learnt.
    for number, places in enumerate(draw_prompts(len(sampler.source), SAMPLED_AT_ONCE, config.seed + 1)):
        if number * SAMPLED_AT_ONCE >= MOST_DRAWS * max(config.pairs, SAMPLED_AT_ONCE):
            raise ValueError(f"{number * SAMPLED_AT_ONCE} prompts gave {len(seen)} different pairs of {config.pairs}")
        rows = [sampler.source[place] for place in places]
        both = _texts(sampler, rows, 2, [config.seed, 3, number])
        different = [(row, texts) for row, texts in zip(rows, both, strict=True) if len({*map(str.strip, texts)}) == 2]
        gold: list[list[float] | None] = [None] * len(different)
        if embedded and sampler.task.gold is not None and different:
            spread = [row for row, _ in different for _ in range(2)]
            scores_N = gold_of(sampler.task, spread, [text for _, texts in different for text in texts])
            gold = list(scores_N.reshape(-1, 2).tolist())
        for (row, texts), scores in zip(different, gold, strict=True):
            prompt = as_data(row)
            item = Item(item_id(prompt, texts), prompt, texts, gold=scores)
            if item.id not in seen:
                seen.add(item.id)
                yield item
            if len(seen) == config.pairs:
                return


def judge_pairs(
    items: Sequence[Item], file: Path, critic: Critic, constitution: Constitution, config: DataSettings
) -> None:
    """Label the pairs that have no label yet, each by the first of some principles that does not leave a tie.

    Its name becomes the label's comment; of a pair that is a tie by all of them, the last one's.
    """
    most = min(config.pair_principles, len(constitution))
    with LabelFile(file) as labels:
        asked = labels.unanswered(items)
        for first in range(0, len(asked), AT_ONCE):
            some = asked[first : first + AT_ONCE]
            drawn = [draw_principles(constitution, most, config.seed, item.id) for item in some]
            outcome_N, turn_N = np.full(len(some), 0.5), np.zeros(len(some), int)
            for turn in range(most):
                places = np.flatnonzero(outcome_N == 0.5)  # exact: a tie is nothing else
                turn_N[places] = turn
                rows = [row_of(some[n].prompt) for n in places]
                a, b = ([some[n].completions[which] for n in places] for which in range(2))
                outcome_N[places] = critic.prefer(rows, a, b, [drawn[n][turn] for n in places])
            for n, item in enumerate(some):
                outcome = float(outcome_N[n])
                ranks = None if np.isnan(outcome) else ranks_of_scores([outcome, 1 - outcome])
                labels.add(item, critic.name, ranks, comment=drawn[n][turn_N[n]].name)
