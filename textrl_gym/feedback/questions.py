"""Questions for annotators: completions of one prompt, sampled from policies or read from a file, to be ranked.

An environment's prompts are answered by its initial policy or the models that are named; a run's folder by what it
trained and, unless another is named, by the initial policy, so that the answers tell which of the two people prefer.
A file has comparisons in any schema of `data.preferences`, whose own labels become the known answers, or prompts with
`completions` that nobody has compared.

Completions are shuffled when a question is made: their places then say nothing of who wrote them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Le

from textrl_gym import files, registry
from textrl_gym.bounds import MOST_ROWS, Seed, check_settings
from textrl_gym.data import chat, preferences, sources
from textrl_gym.data.chat import as_data
from textrl_gym.data.labels import CHECK, QUALIFICATION, Item
from textrl_gym.data.rows import BadRow, RowReport, first_columns, settle, shown
from textrl_gym.mdp.env_settings import EnvSettings

if TYPE_CHECKING:
    from textrl_gym.core import Row
    from textrl_gym.pipeline.sample_preferences import CompletionSampler

MOST_COMPLETIONS = 9
"""Of a question: each has a key of its own."""
MADE_CHECKS = 50
"""Attention checks that are made where none are given."""
UNCOMPARED = ("prompt", "completions")
"""Columns of rows that nobody has compared."""


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """Settings of what annotators are asked."""

    n: Annotated[int, Ge(1), Le(MOST_ROWS)] = 200
    """Questions; of a file at most so many, drawn at random."""
    per_pair: Annotated[int, Ge(1)] = 1
    """Annotators that are asked each question."""
    annotators: tuple[str, ...] = ()
    """Names that may answer; none: whoever gives one."""
    completions: Annotated[int, Ge(2), Le(MOST_COMPLETIONS)] = 2
    """Completions that are sampled for each prompt; three and more are ranked."""
    model: str | None = None
    """Whose completions: the folder of a saved agent, or a causal LM (folder, Hub id); None: the environment's initial
    policy, or the run."""
    other_model: str | None = None
    """Whose completions they are compared to, of the same tokenizer; "start" is the initial policy; None: other
    completions of `model`, or, of a run, the initial policy's."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """Of sampling; 0 is greedy, for two different models."""
    repeats: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of an annotator's answers that is asked again later, to see whether they agree with themselves."""
    check_every: Annotated[int, Ge(0)] = 0
    """Every so many questions one has a known answer: an attention check. 0: none."""
    checks: str | None = None
    """A file of comparisons for the attention checks; None: one of two answers is then to another prompt."""
    qualification: str | None = None
    """A file of comparisons that every annotator answers first, and is told whether they were right."""
    pass_share: Annotated[float, Ge(0), Le(1)] = 0.8
    """Share of the qualification that must be answered as known before the other questions are asked."""
    instructions: Path | None = None
    """A text file that annotators read first; None: a few general sentences."""
    device: str = "auto"
    """Of the models: auto, cpu, cuda or cuda:N."""
    seed: Seed = 0
    """Seeds the prompts, the samples and the sides on which completions are shown."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.temperature == 0 and self.other_model is None:
            raise ValueError("at temperature 0 a model's completions of a prompt are equal: give other_model")
        if len(set(self.annotators)) < len(self.annotators):
            raise ValueError(f"annotators must be named once each, got {', '.join(self.annotators)}")
        if self.annotators and self.per_pair > len(self.annotators):
            raise ValueError(
                f"per_pair={self.per_pair} asks for more annotators than the {len(self.annotators)} that are named"
            )
        if self.checks is not None and not self.check_every:
            raise ValueError("checks are asked every check_every questions: give that too")


DECIDES = ("n", "completions", "model", "other_model", "temperature", "checks", "qualification", "seed")
"""Settings that the questions follow from."""


def questions(source: str, config: AnnotateConfig, env: EnvSettings | None = None) -> list[Item]:
    """All that annotators may be asked: qualification rows, attention checks and the questions themselves, in order.

    Args:
        source: an environment's id, the folder of a run, or comparisons: a file, a folder or a Hub id.
        env: the prompts (dataset and split) and the budgets, where they are not the task's own.

    Raises:
        ValueError: nothing of that name, comparisons in no known schema, or none that has two different completions.
    """
    qualification = _known(config.qualification, "qualification") if config.qualification else []
    checks = _known(config.checks, "checks") if config.checks else []
    items = _asked(source, config, env or EnvSettings())
    if config.check_every and not checks:
        checks = _made_checks(items, config.seed)
    kinds = {QUALIFICATION: qualification, CHECK: checks}
    return [*(dataclasses.replace(item, kind=kind) for kind, some in kinds.items() for item in some), *items]


def _asked(source: str, config: AnnotateConfig, env: EnvSettings) -> list[Item]:
    path = Path(source).expanduser()
    if (path / files.STATE_FILE).is_file():
        env_id, env = environment_of(path, env)
        other = config.other_model or "start"
        return list(sampled(env_id, dataclasses.replace(config, model=config.model or source, other_model=other), env))
    hub = not path.exists() and "/" in source and ":" not in source
    if (path.is_file() and path.suffix != ".py") or path.is_dir() or hub:
        return from_file(source, config.n, config.seed, env)
    return list(sampled(registry.find_env(source), config, env))


def environment_of(run: Path, env: EnvSettings) -> tuple[str, EnvSettings]:
    """The id of a run's environment, and its settings where `env` has none of its own.

    Raises:
        ValueError: the folder holds no run, or its task is not registered.
    """
    state = files.read_state(run)
    with registry.named_by(run / files.STATE_FILE, trust=False):
        env_id = next((name for name, task in registry.text_envs().items() if task == state["task"]), None)
        env_id = env_id or registry.find_env(state["task"])
    default = EnvSettings()
    names = ("dataset", "max_prompt_tokens", "max_new_tokens", "template", "system_prompt")
    saved = {name: state["env"][name] for name in names if state["env"].get(name) is not None}
    if "dataset" in saved:
        saved["dataset"] = sources.located(saved["dataset"], run)
    own = {name: value for name, value in saved.items() if getattr(env, name) == getattr(default, name)}
    return env_id, dataclasses.replace(env, **own)


def item_id(prompt: str | list[dict[str, str]], completions: Sequence[str]) -> str:
    """A name that is the same for the same question wherever it is made."""
    text = json.dumps([prompt, sorted(completions)])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _item(
    prompt: str | list[dict[str, str]],
    completions: Sequence[str],
    rng: random.Random,
    models: Sequence[str] = (),
    gold: Sequence[float] | None = None,
) -> Item:
    """A question, its completions shuffled."""
    order = rng.sample(range(len(completions)), len(completions))
    return Item(
        item_id(prompt, completions),
        prompt,
        [completions[place] for place in order],
        models=[models[place] for place in order] if models else [],
        gold=None if gold is None else [gold[place] for place in order],
    )


# -- from files -------------------------------------------------------------------------------------------------------


def from_file(dataset: str, most: int | None, seed: int, env: EnvSettings | None = None) -> list[Item]:
    """The questions that a file, a folder or a Hub id has, each once, in a random order.

    Raises:
        ValueError: columns of no schema, or no two completions that differ.
    """
    rng = random.Random(seed)
    items: dict[str, Item] = {}
    for prompt, completions, gold in _comparisons(dataset, env or EnvSettings()):
        # Equal answers cannot be told apart, and those that differ in blanks look equal.
        places = {text.strip(): place for place, text in reversed(list(enumerate(completions)))}
        if not 2 <= len(places) <= MOST_COMPLETIONS:
            continue
        different = sorted(places.values())
        scores = None if gold is None else [gold[place] for place in different]
        item = _item(prompt, [completions[place] for place in different], rng, gold=scores)
        items.setdefault(item.id, item)
    if not items:
        raise ValueError(f"dataset {dataset!r} has no prompt with 2 to {MOST_COMPLETIONS} different completions")
    drawn = rng.sample(list(items.values()), min(len(items), most or len(items)))
    return drawn


def _comparisons(
    dataset: str, env: EnvSettings
) -> Iterator[tuple[str | list[dict[str, str]], list[str], list[float] | None]]:
    """Prompt, completions and known scores, None where nobody has compared them."""
    source = sources.open_rows(dataset, "train", sources.PREFERENCE_SPLITS)
    columns = first_columns(source.open(), source.words)
    if set(UNCOMPARED) <= set(columns) and "ranks" not in columns:
        yield from _uncompared(source, env)
        return
    for preference in preferences.read_as_written(dataset, env.bad_rows):
        gold = [0.0] * len(preference.completions)
        for chosen, rejected in preference.pairs:
            gold[chosen] += 1
            gold[rejected] -= 1
        prompt = preference.prompt if isinstance(preference.prompt, str) else list(preference.prompt)
        yield prompt, preference.completions, gold


def _uncompared(source: sources.Source, env: EnvSettings) -> Iterator[tuple[Any, list[str], None]]:
    raw, bad = source.open(), RowReport()
    good = []
    for number, row in enumerate(raw.read()):
        bad.total += 1
        try:
            good.append(_prompt_and_completions(row))
        except BadRow as why:
            bad.add(raw.where(number), why)
    settle(bad, source.words, env.bad_rows)
    for prompt, completions in good:
        yield prompt, completions, None


def _prompt_and_completions(row: object) -> tuple[Any, list[str]]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, Mapping):
        raise BadRow("is no object with columns", shown(row))
    texts = row.get("completions")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadRow("column 'completions' is not a list of texts", shown(texts))
    prompt = row.get("prompt")
    return prompt if isinstance(prompt, str) else list(chat.messages(prompt)), texts


def _known(dataset: str, name: str) -> list[Item]:
    items = from_file(dataset, None, 0)
    if any(item.gold is None for item in items):
        raise ValueError(f"{name} {dataset!r} has rows without a known answer")
    return items


def _made_checks(items: Sequence[Item], seed: int) -> list[Item]:
    """Questions of which one answer is to another prompt, so that whoever reads the prompt knows which."""
    rng = random.Random(f"{seed} checks")
    checks = []
    for item in rng.sample(list(items), min(len(items), MADE_CHECKS)):
        others = [other for other in items if other.prompt != item.prompt]
        if others:
            best = int(np.argmax(item.gold)) if item.gold else rng.randrange(len(item.completions))
            own, foreign = item.completions[best], rng.choice(rng.choice(others).completions)
            if own.strip() != foreign.strip():
                checks.append(_item(item.prompt, [own, foreign], rng, gold=[1.0, 0.0]))
    if not checks:
        raise ValueError("check_every needs two prompts or more, to make attention checks of: give a file of checks")
    return checks


# -- from policies ----------------------------------------------------------------------------------------------------


def sampled(env_id: str, config: AnnotateConfig, env: EnvSettings) -> Iterator[Item]:
    """Questions of an environment's prompts, sampled until there are `n`; errors as of `sampled_with_rows`."""
    return (item for _, item in sampled_with_rows(env_id, config, env))


def sampled_with_rows(env_id: str, config: AnnotateConfig, env: EnvSettings) -> Iterator[tuple[Row, Item]]:
    """Questions of an environment's prompts, each with the row of its prompt, sampled until there are `n`.

    Raises:
        ValueError: a model that cannot be loaded, or policies that give equal completions nearly always.
    """
    from textrl_gym.pipeline.sample_preferences import MOST_PROMPTS, CompletionSampler, PreferenceConfig, draw_prompts

    own = {name: getattr(config, name) for name in ("n", "model", "other_model", "temperature", "device", "seed")}
    settings = PreferenceConfig(**own, label="gold", batch_size=min(config.n, 64))
    sampler = CompletionSampler(env_id, settings, env)
    seen: set[str] = set()
    drawn, rng = 0, random.Random(config.seed)
    for number, places in enumerate(draw_prompts(len(sampler.source), settings.batch_size, config.seed)):
        if drawn >= MOST_PROMPTS * max(config.n, settings.batch_size):
            raise ValueError(f"{drawn} prompts gave {len(seen)} different questions of n={config.n}")
        rows = [sampler.source[place] for place in places]
        drawn += len(rows)
        draw = np.random.default_rng([config.seed, 1, number])
        for row, texts, models, gold in _answered(sampler, rows, config.completions, draw):
            item = _item(as_data(row), texts, rng, models, gold)
            if item.id in seen:
                continue
            seen.add(item.id)
            yield row, item
            if len(seen) == config.n:
                return


def _answered(
    sampler: CompletionSampler, rows: list[Row], number: int, rng: np.random.Generator
) -> Iterator[tuple[Row, list[str], list[str], list[float] | None]]:
    """Rows with their different completions, who wrote each, and their gold scores where the task has some."""
    from textrl_gym.pipeline.sample_preferences import Labeller
    from textrl_gym.pipeline.simulated_comparisons import decode

    task, tokenizer, writers = sampler.task, sampler.tokenizer, sampler.writers(number)
    answers = []
    for row, sampled_ids in zip(rows, sampler.sample(rows, number, rng), strict=True):
        texts = [decode(tokenizer, ids) for ids in sampled_ids]
        places = sorted({text.strip(): place for place, text in reversed(list(enumerate(texts)))}.values())
        if len(places) >= 2:
            answers.append((row, places, sampled_ids, texts))
    scores: Iterator[float] | None = None
    if task.gold is not None and answers:
        spread = [row for row, places, *_ in answers for _ in places]
        prompt_ids = [task.encode(row, tokenizer, task.max_prompt_tokens) for row in spread]
        flat_ids = [ids[place] for _, places, ids, _ in answers for place in places]
        flat_texts = [texts[place] for _, places, _, texts in answers for place in places]
        labeller = Labeller(task, tokenizer, sampler.config)
        scores = iter(labeller.scores(spread, prompt_ids, flat_ids, flat_texts).tolist())
    for row, places, _, texts in answers:
        gold = None if scores is None else [next(scores) for _ in places]
        yield row, [texts[place] for place in places], [writers[place] for place in places], gold


# -- beside the labels ------------------------------------------------------------------------------------------------


def items_file(out: Path) -> Path:
    """Where the questions of a file of labels are."""
    return out.with_suffix(".items.jsonl")


def write_items(file: Path, settings: Mapping[str, Any], items: Iterable[Item]) -> None:
    """Write the settings that questions follow from, and the questions, whole or not at all."""
    with files.atomic_writer(file) as stream:
        stream.write(json.dumps({"settings": settings}) + "\n")
        for item in items:
            stream.write(json.dumps(dataclasses.asdict(item)) + "\n")


def read_items(file: Path) -> tuple[dict[str, Any], list[Item]]:
    """What `write_items` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    rows = files.read_json_lines(file)
    if not rows or not isinstance(rows[0].get("settings"), dict):
        raise ValueError(f"{str(file)!r} is damaged: its first line must hold the settings")
    items = []
    fields: files.Kinds = {"id": (str,), "prompt": (str, list), "completions": (list,)}
    more: files.Kinds = {"kind": (str,), "models": (list,), "gold": (list, type(None))}
    for number, row in enumerate(rows[1:], 2):
        where = f"{file}, line {number}"
        files.check_fields(row, where, fields, more)
        try:
            items.append(Item(**row))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where!r} is damaged: {error}") from error
    return rows[0]["settings"], items


def deciding_settings(source: str, config: AnnotateConfig, env: EnvSettings) -> dict[str, Any]:
    """What the questions follow from, as it is written down."""
    own = {name: getattr(config, name) for name in DECIDES} | {"made_checks": config.check_every > 0}
    return json.loads(json.dumps({"source": source, **own, "env": env.keywords()}))


def questions_for(out: Path, source: str, config: AnnotateConfig, env: EnvSettings | None = None) -> list[Item]:
    """The questions of a file of labels: as they were made when it was begun, or made now and written down.

    Raises:
        ValueError: as `questions`; or they were made by other settings.
    """
    env, file = env or EnvSettings(), items_file(out)
    settings = deciding_settings(source, config, env)
    if file.is_file():
        before, items = read_items(file)
        other = [name for name in settings if before.get(name) != settings[name]]
        if other:
            words = "; ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in other)
            raise ValueError(f"{str(out)!r} was begun with other questions: {words}. Name another file (out)")
        return items
    items = questions(source, config, env)
    files.make_folder(out.parent)
    write_items(file, settings, items)
    return items
