"""Comparing agents over several tasks: a comparison a task, run as one, and their scores on one scale.

OUT/suite.json     what was asked for
OUT/ENV/           the comparison of one task, with its page
OUT/results.csv    the tidy tables of all tasks, with a column `environment`; results.parquet too, where pyarrow is
OUT/report.html    all tasks in one page (reports.suite_page)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from textrl_gym import files, registry
from textrl_gym.experiments import compare as comparing
from textrl_gym.experiments.compare import CompareConfig
from textrl_gym.experiments.launching import LaunchConfig
from textrl_gym.experiments.results import PLAN, RESULT, RUNS, Comparison, read_comparison
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.stats import suites
from textrl_gym.stats.estimates import Array

if TYPE_CHECKING:
    from pandas import DataFrame

SUITE = "suite.json"
"""What was asked for, in the folder of a comparison over tasks."""
SUITES = {
    "all": "every environment of textrl-gym",
    "lessons": "those that have a lesson",
    "verifiable": "those whose reward is a program, and no reward model",
    "benchmark": "every environment, with the agents, seeds and budget of docs/benchmark.md",
}
BENCHMARK = CompareConfig(
    agents=("reference", "ppo", "grpo", "dapo", "rloo", "reinforce", "reinforce_pp", "raft", "online_dpo"),
    seeds=3,
    # What two cores do in about two hours, three quarters of it in training.
    total_timesteps=10_000,
    eval_episodes=128,
    eval_every=0,  # the last evaluation alone: the others would take a third of the time
    # A line of the health card that fails is a result, and no reason to leave a task without one.
    on_bad_health="warn",
)
"""What `--suite benchmark` runs where flags say nothing else."""


def suite(name: str) -> list[str]:
    """The environments of a suite.

    Raises:
        ValueError: naming the suites.
    """
    if name not in SUITES:
        raise registry.unknown("suite", name, SUITES)
    tasks = {env_id: EnvSettings().task(env_id) for env_id in registry.env_ids()}
    if name == "lessons":
        return [env_id for env_id, task in tasks.items() if task.lesson is not None]
    if name == "verifiable":
        return [env_id for env_id, task in tasks.items() if task.reward != "reward_model"]
    return list(tasks)


def compare_suite(
    environments: Sequence[str],
    config: CompareConfig,
    out: str | Path,
    progress_bar: bool = True,
    *,
    env: EnvSettings | None = None,
    trust_code: bool = False,
    launch: LaunchConfig | None = None,
) -> DataFrame:
    """Run a comparison over tasks, or what is left of it.

    Args:
        environments: ids, or module:ID.
        config, env, out, progress_bar, trust_code, launch: as of `compare`; the same settings for every task.

    Returns:
        the tidy tables of all tasks, with a column `environment`.

    Raises:
        ValueError: as of `compare`, before any run begins; or an environment that is there twice.
    """
    import pandas as pd

    out, env = Path(out), env or EnvSettings()
    comparing.check_launch(config, launch or LaunchConfig())
    env_ids = [comparing.check(name, config, env) for name in environments]
    repeated = sorted({env_id for env_id in env_ids if env_ids.count(env_id) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)} is there twice")
    if (out / PLAN).is_file():
        raise ValueError(f"{str(out)!r} holds the comparison of a single task: name another --out")
    folders = {
        f"{env_id}/{name}": folder
        for env_id in env_ids
        for name, folder in comparing.prepare(out / env_id, env_id, config, env).items()
    }
    plan = {"environments": env_ids, "config": dataclasses.asdict(config), "env": dataclasses.asdict(env)}
    files.write_text(out / SUITE, json.dumps(plan, indent=1) + "\n")
    comparing.run_folders(folders, config, out, progress_bar, trust_code, launch)
    tables = [comparing.collect_table(out / env_id).assign(environment=env_id) for env_id in env_ids]
    table = pd.concat(tables, ignore_index=True)
    comparing.save(table, out)
    return table


@dataclasses.dataclass(frozen=True)
class SuiteResult:
    """A comparison over tasks that was run."""

    folder: Path
    comparisons: dict[str, Comparison]
    """By environment; those with a finished run."""
    anchors: dict[str, tuple[float, float]]
    """Environment -> the scores of the initial policy and of the best that is known."""
    scores: dict[str, dict[str, Array]]
    """Agent -> environment -> its runs' scores, normalised. [S]"""
    of_prompts: dict[str, dict[str, Array]]
    """The same of each prompt, [S, N]; [S] of a task whose runs did not all meet the same prompts."""
    untrained: set[str]
    """Agents that no seed changes."""
    failed: dict[str, str]
    """ENV/RUN, or ENV -> why it is not in the numbers."""

    @property
    def complete(self) -> list[str]:
        """Agents that have a finished run on every task; only those are compared over all."""
        return [agent for agent, of_tasks in self.scores.items() if len(of_tasks) == len(self.comparisons)]

    def table(self, agent: str) -> list[Array]:
        """An agent's scores, a task in each row."""
        return [self.scores[agent][env_id] for env_id in self.comparisons]

    def table_of_prompts(self, agent: str) -> list[Array]:
        """The same of each prompt, where all runs of a task met the same ones."""
        return [self.of_prompts[agent][env_id] for env_id in self.comparisons]


def read_suite(folder: Path) -> SuiteResult:
    """Read a folder that `compare_suite` filled.

    Raises:
        ValueError: it is no such folder, or no run in it is finished.
    """
    file = folder / SUITE
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} holds no comparison over tasks: no {SUITE}")
    plan = files.read_json(file)
    files.check_fields(plan, file, {"environments": (list,), "config": (dict,)})
    env_ids = [str(env_id) for env_id in plan["environments"]]
    # A comparison that goes on has tasks that have not begun; where all have not, the first says so.
    begun = [env_id for env_id in env_ids if any((folder / env_id / RUNS).glob(f"*/{RESULT}"))] or env_ids[:1]
    comparisons = {env_id: read_comparison(folder / env_id) for env_id in begun}
    anchors = {env_id: _anchors(comparison) for env_id, comparison in comparisons.items()}
    scores: dict[str, dict[str, Array]] = {}
    of_prompts: dict[str, dict[str, Array]] = {}
    untrained: set[str] = set()
    failed = {env_id: "no run has finished yet" for env_id in env_ids if env_id not in begun}
    for env_id, comparison in comparisons.items():
        reasons = comparison.failed | comparison.unfinished
        failed |= {f"{env_id}/{name}": why for name, why in reasons.items()}
        paired = not comparison.same_prompts()[1]
        for group in comparison.groups:
            finals = group.finals(comparison.gold)
            if not finals:
                continue
            given = group.scores_of_prompts(comparison.gold) if paired else finals
            scores.setdefault(group.label, {})[env_id] = suites.normalised(finals, *anchors[env_id])
            of_prompts.setdefault(group.label, {})[env_id] = suites.normalised(given, *anchors[env_id])
            if group.untrained:
                untrained.add(group.label)
    return SuiteResult(folder, comparisons, anchors, scores, of_prompts, untrained, failed)


def _anchors(comparison: Comparison) -> tuple[float, float]:
    """The initial policy's score on the prompts of the last evaluation, and the best that is known of the task.

    The best known is the task's `best_gold`, or what an agent of the comparison reached, whichever is higher.
    """
    starts = [run.start(comparison.gold) for group in comparison.groups for run in group.runs]
    known = [start_N for start_N in starts if start_N is not None]
    if not known:
        raise ValueError(f"no run on {comparison.environment} says what the initial policy scored on its prompts")
    reached = [value for group in comparison.groups for value in group.finals(comparison.gold)]
    best = None
    if comparison.environment in registry.text_envs():
        best = EnvSettings().task(comparison.environment).best_gold
    start = float(np.mean(known[0]))
    best = max([*reached, *([best] if best is not None else [])])
    return start, best if best > start else start + 1.0
