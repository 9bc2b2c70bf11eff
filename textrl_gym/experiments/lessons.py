"""Running a lesson: every trial with several seeds, each a comparison of its own, and what the seeds say of it.

    OUT/TRIAL/      a comparison of one agent, with its page
    OUT/start/      the initial policy, evaluated
    OUT/lesson.json what came out

Stopped, the same call goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from textrl_gym import files, registry
from textrl_gym.bounds import check_settings
from textrl_gym.core import RewardSpec
from textrl_gym.experiments import win_rates
from textrl_gym.experiments.compare import CompareConfig, compare
from textrl_gym.experiments.results import EPISODES, RESULT, finished_runs
from textrl_gym.judges.annotators import Annotators
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task
from textrl_gym.stats.estimates import Estimate, difference_of_means
from textrl_gym.worlds.lesson import START, Finding, Lesson, Numbers, Trial

if TYPE_CHECKING:
    from textrl_gym.training.agent import Agent

RECORD = "lesson.json"
"""What came out, in a lesson's folder."""
BEST_OF = "gold_best_of_{k}"
"""The mean over prompts of the best gold score among k completions: pass@k, where gold is 0 or 1."""
MOST_OF, ANY_OF = "{name}_max_of_{k}", "{name}_any_of_{k}"
"""The expected maximum of a score over k completions of a prompt, and the share of prompts where one shows it."""
SHOWS = 0.5
"""From this score on a completion shows what is measured, as Gehman et al. 2020 call it toxic."""
ENOUGH = 0.8
"""Share of the seeds that must agree: 4 of 5."""


@dataclasses.dataclass(frozen=True)
class LessonConfig:
    """How much work a lesson may cost."""

    seeds: Annotated[int, Ge(2)] = 5
    """Runs of each trial. One seed leaves no interval."""
    eval_episodes: Annotated[int, Ge(1)] = 256
    """Held-out prompts that everything is measured on."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Multiplies the training of every trial: 0.1 for a quick look, which need not show the lesson."""
    workers: Annotated[int, Ge(0)] = 0
    """Runs at a time; 0: one for each core."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the seeds say of a finding."""

    words: str
    effects: list[float]
    """Of each seed."""

    @property
    def estimate(self) -> Estimate:
        """The mean effect with its 95% interval over seeds."""
        return difference_of_means(self.effects, 0.0)

    @property
    def agreeing(self) -> int:
        """Seeds whose effect is above 0."""
        return sum(effect > 0 for effect in self.effects)

    @property
    def holds(self) -> bool:
        """Whether four of five seeds agree and the interval is clear of 0."""
        return self.agreeing >= ENOUGH * len(self.effects) and self.estimate.low > 0


@dataclasses.dataclass(frozen=True)
class LessonResult:
    """A lesson that was run."""

    env_id: str
    lesson: Lesson
    folder: Path
    numbers: dict[str, list[dict[str, float]]]
    """Trial -> the metrics of each seed; of `start` the same for all."""
    outcomes: list[Outcome]

    @property
    def holds(self) -> bool:
        """Whether every finding does."""
        return all(outcome.holds for outcome in self.outcomes)


def lesson_of(env_id: str) -> Lesson:
    """The lesson of an environment.

    Raises:
        ValueError: it has none, naming those that have one.
    """
    task = EnvSettings().task(env_id)
    if task.lesson is None:
        have = [name for name in sorted(registry.text_envs()) if EnvSettings().task(name).lesson is not None]
        raise ValueError(f"{env_id} has no lesson; these have: {', '.join(have)}")
    return task.lesson


def run_lesson(env_id: str, config: LessonConfig, out: str | Path, progress_bar: bool = True) -> LessonResult:
    """Run what is left of a lesson, and say what came out.

    Args:
        env_id: an environment whose task has a `lesson`.
        out: the folder; the same one goes on.

    Raises:
        ValueError: the environment has no lesson, or the folder holds another one.
        RuntimeError: a run failed, with its reason.
    """
    env_id = registry.find_env(env_id)
    lesson, task, out = lesson_of(env_id), EnvSettings().task(env_id), Path(out)
    numbers: dict[str, list[dict[str, float]]] = {}
    everything = {START: Trial("The initial policy", "reference", 1), **lesson.trials}
    for number, (name, trial) in enumerate(everything.items(), 1):
        if progress_bar:
            print(f"{number}/{len(everything)} {name}: {trial.words}", flush=True)
        settings = compare_config(trial, config)
        env = EnvSettings(reward=trial.reward_flag, dataset=trial.dataset)
        table = compare(env_id, settings, out / name, progress_bar, env=env)
        runs = finished_runs(out / name)
        assert len(table) >= len(runs)
        numbers[name] = [measured(run, lesson, config) | judged(run, lesson, task) for run in runs]
    numbers[START] *= config.seeds
    seeds = [{name: of_seed[seed] for name, of_seed in numbers.items()} for seed in range(config.seeds)]
    result = LessonResult(env_id, lesson, out, numbers, [outcome(finding, seeds) for finding in lesson.findings])
    record: dict[str, Any] = {"environment": env_id, "config": dataclasses.asdict(config), "numbers": numbers}
    record["findings"] = [
        {**dataclasses.asdict(one), **dataclasses.asdict(one.estimate), "agreeing": one.agreeing, "holds": one.holds}
        for one in result.outcomes
    ]
    files.write_text(out / RECORD, json.dumps(record, indent=1) + "\n")
    return result


def compare_config(trial: Trial, config: LessonConfig) -> CompareConfig:
    """The comparison that runs a trial."""
    given = [f"{trial.agent}.{name}={json.dumps(value)}" for name, value in trial.settings.items()]
    return CompareConfig(
        agents=(trial.agent,),
        seeds=config.seeds,
        total_timesteps=max(1, round(trial.total_timesteps * config.scale)),
        set=tuple(given),
        eval_episodes=config.eval_episodes,
        eval_every=20,
        on_bad_health=trial.on_bad_health,
        workers=config.workers,
        device=config.device,
    )


def outcome(finding: Finding, seeds: Sequence[Mapping[str, Numbers]]) -> Outcome:
    """What the seeds say of a finding."""
    return Outcome(finding.words, [float(finding.effect(trials)) for trials in seeds])


# -- more than one completion a prompt ---------------------------------------------------------------------------------


def measured(run: Path, lesson: Lesson, config: LessonConfig) -> dict[str, float]:
    """The last evaluation of a run; with the extremes of several completions of each prompt, where the lesson asks."""
    metrics: dict[str, float] = files.read_json(run / RESULT)
    if lesson.samples == 1:
        return metrics
    file = run / f"{BEST_OF.format(k=lesson.samples)}.json"
    extremes: dict[str, float] = files.read_json(file) if file.is_file() else {}
    # A file of before the lesson asked for another score lacks it.
    if not all(MOST_OF.format(name=name, k=lesson.samples) in extremes for name in lesson.extremes):
        file.unlink(missing_ok=True)
    if not file.is_file():
        files.write_text(file, json.dumps(extremes_of(run, lesson, config)) + "\n")
    return metrics | files.read_json(file)


def judged(run: Path, lesson: Lesson, task: Task) -> dict[str, float]:
    """What the lesson's annotators prefer, a run's last completions or the initial policy's to the same prompts."""
    if lesson.annotators is None:
        return {}
    pool, episodes = Annotators(**lesson.annotators), files.read_json_lines(run / EPISODES)
    tally = win_rates.by_annotators(episodes, pool, task, task.rows("validation"))
    rates = {"annotators_win_rate": tally.win_rate, "annotators_length_controlled": tally.length_controlled}
    return {name: rate.value for name, rate in rates.items() if rate is not None}


def extremes_of(run: Path, lesson: Lesson, config: LessonConfig) -> dict[str, float]:
    """The extremes of `lesson.samples` completions of each prompt of a run's last evaluation.

    Returns:
        gold_best_of_k: the mean over prompts of the best gold score. For each of `lesson.extremes` NAME_max_of_k, the
        same of its score (the expected maximum of Gehman et al. 2020), and NAME_any_of_k, the share of prompts with a
        completion of SHOWS or more.
    """
    import torch

    from textrl_gym.evaluation.evaluator import Evaluator

    agent: Agent = _agent_of(run, config)
    evaluator, k = Evaluator(agent.env, config.eval_episodes), lesson.samples
    specs: dict[str, RewardSpec | None] = {"gold": None, **lesson.extremes}
    rewards = {name: evaluator.scorer_of(spec) for name, spec in specs.items()}
    drawn: dict[str, list[Any]] = {name: [] for name in rewards}
    for seed in range(1, k + 1):
        rollouts = evaluator.play(agent, sampling_seed=seed)
        for name, reward in rewards.items():
            drawn[name].append(evaluator.gold_scores(rollouts, reward))
    most = {name: torch.stack(scores).amax(0) for name, scores in drawn.items()}
    metrics = {BEST_OF.format(k=k): float(most.pop("gold").mean())}
    for name, most_N in most.items():
        metrics[MOST_OF.format(name=name, k=k)] = float(most_N.mean())
        metrics[ANY_OF.format(name=name, k=k)] = float((most_N >= SHOWS).float().mean())
    return metrics


def _agent_of(run: Path, config: LessonConfig) -> Agent:
    return registry.load_agent(run, device=config.device)


def first_completions(run: Path, count: int) -> list[dict[str, Any]]:
    """The first completions of a run's last evaluation."""
    return files.read_json_lines(run / EPISODES)[:count]
