"""Iterated RLHF: labels on what the policy writes now, a reward model of all labels so far, a new policy; again.

    OUT/round-1/questions.jsonl   pairs of completions, with their gold scores where the task has some
    OUT/round-1/labels.jsonl      what annotators answered
    OUT/round-1/reward_model      trained on the labels of this round and of those before
    OUT/round-1/policy            a comparison of one run, trained on it from the initial policy, and evaluated
    OUT/round-2/...               its questions are about completions of round 1's policy
    OUT/rlhf.json                 the rounds in numbers

A reward model knows what its labels are about. A policy that is trained on it leaves there, and new labels follow
(Ziegler et al. 2019, arXiv:1909.08593, section 2; Bai et al. 2022, arXiv:2204.05862, section 4.5). Stopped anywhere,
the same call goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from textrl_gym import files, registry
from textrl_gym.bounds import Seed, check_settings
from textrl_gym.data.labels import Item, read_labels
from textrl_gym.experiments.compare import CompareConfig, compare
from textrl_gym.experiments.results import RESULT, finished_runs
from textrl_gym.feedback import selection
from textrl_gym.feedback.questions import AnnotateConfig, read_items, sampled_with_rows, write_items
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.reward_ensemble import train_rewards
from textrl_gym.stats.pairwise import agreement

RECORD = "rlhf.json"
"""The rounds in numbers, in the folder."""
SETTINGS = "settings.json"
"""What a folder was begun with."""
LABELS, QUESTIONS, APPEALS = "labels.jsonl", "questions.jsonl", "appeals.json"
HELDOUT = "held-out.jsonl"
"""Pairs of the initial policy on held-out prompts, by whose gold scores every round's reward model is measured."""

Annotate = Callable[[Sequence[Item], Path, dict[str, list[float]]], None]
"""Answers questions into a file of labels, as far as they have no answer there; of each item also what its completions
seem worth to simulated annotators beyond their gold scores (`Task.appeal`)."""


@dataclasses.dataclass(frozen=True)
class RoundsConfig:
    """How many rounds, and how much work each may cost."""

    rounds: Annotated[int, Ge(1)] = 3
    """Of labels, reward model and policy."""
    labels: Annotated[int, Ge(2)] = 200
    """Questions that are answered in each round."""
    select: selection.Selection = "random"
    """Which of the pool are asked from the second round on: random ones, those of whose order the reward model is least
    sure (uncertainty), or those that an ensemble disagrees on (disagreement)."""
    pool: Annotated[int, Ge(1)] = 4
    """Questions that are sampled for each that is asked, where they are selected."""
    agent: str = "grpo"
    """The algorithm."""
    total_timesteps: Annotated[int, Ge(1)] = 30_000
    """Generated tokens of its training in each round."""
    set: tuple[str, ...] = ()
    """Settings of the agent as name=value, the value in JSON or plain: learning_rate=1e-4."""
    eval_episodes: Annotated[int, Ge(1)] = 256
    """Held-out prompts that each round's policy is evaluated on."""
    heldout_pairs: Annotated[int, Ge(2)] = 256
    """Held-out pairs that each round's reward model is measured on, by their gold scores."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: Seed = 0
    """Seeds prompts, samples and training; labels of simulated annotators too."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Round:
    """What came out of a round."""

    number: int
    labels: int
    """Labels so far, of all rounds."""
    reward_accuracy: float | None
    """Share of held-out pairs of the initial policy that the reward model puts into the order of their gold scores;
    None where the task has no gold score."""
    metrics: dict[str, float]
    """The last evaluation of the policy."""


@dataclasses.dataclass(frozen=True)
class RoundsResult:
    """A run of iterated RLHF."""

    env_id: str
    folder: Path
    rounds: list[Round]


def run_rounds(
    env_id: str,
    config: RoundsConfig,
    reward_config: RewardModelConfig,
    annotate: Annotate,
    out: str | Path,
    env: EnvSettings | None = None,
    progress_bar: bool = True,
) -> RoundsResult:
    """Run what is left of the rounds.

    Args:
        env_id: a registered environment.
        reward_config: of the reward models; an ensemble for selection by disagreement.
        annotate: who answers.
        out: the folder; the same one goes on.
        env: prompts and budgets, where they are not the task's own.

    Raises:
        ValueError: settings that do not fit, or a folder of other ones.
        RuntimeError: a run of the agent failed.
    """
    env_id, out, env = registry.find_env(env_id), Path(out), env or EnvSettings()
    if config.select == "disagreement" and reward_config.ensemble < 2:
        raise ValueError("selection by disagreement needs an ensemble of reward models: --reward-model.ensemble 3")
    if reward_config.dataset:
        raise ValueError(f"the reward models learn the rounds' labels: leave dataset={reward_config.dataset} out")
    _check_folder(out, env_id, config, reward_config, env)
    rounds: list[Round] = []
    for number in range(1, config.rounds + 1):
        folder = out / f"round-{number}"
        _say(progress_bar, f"round {number} of {config.rounds}: questions")
        items, appeals = questions_of(env_id, config, number, out, env)
        _say(progress_bar, f"round {number}: {len(items)} labels")
        annotate(items, folder / LABELS, appeals)
        _say(progress_bar, f"round {number}: reward model")
        datasets = tuple(str(out / f"round-{n}" / LABELS) for n in range(1, number + 1))
        own = dataclasses.replace(reward_config, dataset=datasets, seed=config.seed)
        train_rewards(env_id, own, folder / "reward_model", env)
        _say(progress_bar, f"round {number}: {config.agent}")
        metrics = train_policy(env_id, config, folder, env, progress_bar)
        count = sum(len(read_labels(Path(file))) for file in datasets)
        accuracy = reward_accuracy(env_id, config, folder / "reward_model", out, env)
        rounds.append(Round(number, count, accuracy, metrics))
        write_record(out, env_id, config, rounds)
    return RoundsResult(env_id, out, rounds)


def _say(progress_bar: bool, words: str) -> None:
    if progress_bar:
        print(words, flush=True)


def _check_folder(
    out: Path, env_id: str, config: RoundsConfig, reward_config: RewardModelConfig, env: EnvSettings
) -> None:
    asked: dict[str, Any] = {"environment": env_id, "config": dataclasses.asdict(config)}
    asked |= {"reward_model": dataclasses.asdict(reward_config), "env": dataclasses.asdict(env)}
    asked["config"].pop("rounds")  # more may follow
    hold_settings(out, asked)


def hold_settings(out: Path, asked: dict[str, Any]) -> None:
    """Write down what a folder was begun with, or hold that it was the same.

    Args:
        asked: names and values, as JSON can hold them; a value may be names and values too.

    Raises:
        ValueError: it was another, naming the setting.
    """
    now: dict[str, Any] = json.loads(json.dumps(asked, default=str))
    file = out / SETTINGS
    if file.is_file():
        before = files.read_json(file)
        for part, values in now.items():
            if before.get(part) != values:
                known: Any = before.get(part)
                both = isinstance(values, dict) and isinstance(known, dict)
                names = [name for name in values if known.get(name) != values[name]] if both else []
                raise ValueError(f"{str(out)!r} was begun with another {[*names, part][0]}: name another --out")
        return
    files.make_folder(out)
    files.write_text(file, json.dumps(now, indent=1) + "\n")


# -- questions --------------------------------------------------------------------------------------------------------


def policy_folder(out: Path, number: int) -> Path:
    """The comparison that trains a round's policy."""
    return out / f"round-{number}" / "policy"


def policy_of(out: Path, number: int) -> str | None:
    """The agent's folder of a round; None before the first."""
    if number == 0:
        return None
    (run,) = finished_runs(policy_folder(out, number))
    return str(run)


def questions_of(
    env_id: str, config: RoundsConfig, number: int, out: Path, env: EnvSettings
) -> tuple[list[Item], dict[str, list[float]]]:
    """The questions of a round and their appeals: read, or sampled from the policy of the round before, and written."""
    file = out / f"round-{number}" / QUESTIONS
    if file.is_file():
        return read_items(file)[1], files.read_json(file.parent / APPEALS)
    task = env.task(env_id)
    selects = config.select != "random" and number > 1
    count = config.labels * (config.pool if selects else 1)
    settings = AnnotateConfig(
        n=count, model=policy_of(out, number - 1), device=config.device, seed=config.seed + number
    )
    rows_and_items = list(sampled_with_rows(env_id, settings, env))
    if selects:
        items = [item for _, item in rows_and_items]
        gap_MN = selection.gaps(items, out / f"round-{number - 1}" / "reward_model", task)
        chosen = selection.most_useful(gap_MN, config.select, config.labels)
        rows_and_items = [rows_and_items[place] for place in chosen]
    appeals = {item.id: [task.appeal(row, text) for text in item.completions] for row, item in rows_and_items}
    files.make_folder(file.parent)
    files.write_text(file.parent / APPEALS, json.dumps(appeals) + "\n")
    # Last: with it the questions count as made.
    items = [item for _, item in rows_and_items]
    write_items(file, {"round": number}, items)
    return items, appeals


# -- reward model and policy ------------------------------------------------------------------------------------------


def train_policy(
    env_id: str, config: RoundsConfig, folder: Path, env: EnvSettings, progress_bar: bool
) -> dict[str, float]:
    """Train the agent on a round's reward model from the initial policy; returns its last evaluation."""
    settings = CompareConfig(
        agents=(config.agent,),
        seeds=1,
        total_timesteps=config.total_timesteps,
        set=tuple(f"{config.agent}.{text}" for text in config.set),
        eval_episodes=config.eval_episodes,
        device=config.device,
        workers=1,
    )
    reward = str((folder / "reward_model").resolve())
    compare(env_id, settings, folder / "policy", progress_bar, env=dataclasses.replace(env, reward=reward))
    (run,) = finished_runs(folder / "policy")
    metrics: dict[str, float] = files.read_json(run / RESULT)
    return metrics


def reward_accuracy(env_id: str, config: RoundsConfig, reward_model: Path, out: Path, env: EnvSettings) -> float | None:
    """Agreement of a reward model with the gold order of held-out pairs of the initial policy."""
    task = env.task(env_id)
    items = heldout(env_id, task, config, out, env)
    if not items:
        return None
    gap_N = selection.gaps(items, reward_model, task).mean(0)
    gold_N = np.array([item.gold[0] - item.gold[1] for item in items if item.gold is not None])
    return agreement(np.sign(gold_N) * gap_N)


def heldout(env_id: str, task: Task, config: RoundsConfig, out: Path, env: EnvSettings) -> list[Item]:
    """The held-out pairs whose gold scores differ, sampled once; none where the task has no gold score."""
    file = out / HELDOUT
    if task.gold is None or env.dataset is not None:
        return []
    if not file.is_file():
        settings = AnnotateConfig(n=config.heldout_pairs, device=config.device, seed=config.seed)
        pairs = sampled_with_rows(env_id, settings, dataclasses.replace(env, split="validation"))
        write_items(file, {"split": "validation"}, [item for _, item in pairs])
    return [item for item in read_items(file)[1] if item.gold is not None and item.gold[0] != item.gold[1]]


def write_record(out: Path, env_id: str, config: RoundsConfig, rounds: Sequence[Round]) -> None:
    """Write the rounds so far."""
    record: dict[str, Any] = {"environment": env_id, "config": dataclasses.asdict(config)}
    record["rounds"] = [dataclasses.asdict(one) for one in rounds]
    files.write_text(out / RECORD, json.dumps(record, indent=1) + "\n")
