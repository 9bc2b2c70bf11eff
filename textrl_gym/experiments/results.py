"""A comparison's folder: the names of its files, and its results read for the page, the tables and the live view.

`read_comparison` gives finished runs by agent and KL coefficient, and the others by name; `tidy` a row for each
evaluation; `progress` and `state_of` how far a run is. Nothing is computed here but the alarms of
textrl_gym.evaluation.reward_hacking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_gym import files, registry
from textrl_gym.evaluation import reward_hacking
from textrl_gym.evaluation.metrics import Scale, scale_of
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.stats.estimates import Array, by_prompt
from textrl_gym.training.run_folder import (
    COMPLETION,
    COMPLETION_MORE,
    EVALUATIONS,
    read_evaluations,
    read_rollouts,
    read_rows,
    renamed,
)

if TYPE_CHECKING:
    from pandas import DataFrame

PLAN = "compare.json"
"""What was asked for, in the folder of a comparison."""
RUNS = "runs"
"""The subfolder with a folder for each run."""
TABLE = "results"
"""The tidy table, as .csv and .parquet."""
SPEC = "cell.json"
"""What one run was asked for; the name is the one that 0.1 wrote."""
RESULT = "evaluation.json"
"""The last evaluation. A run is finished when this file is there."""
EPISODES = "episodes.jsonl"
"""The completions of the last evaluation."""
CREDIT = "credit.jsonl"
"""What the agent says of each token of some texts of the reference; see textrl_gym.evaluation.token_credit."""
FLOPS = "flops.json"
"""The floating-point operations of the first rollout and update, and that rollout's tokens."""
ERROR = "error.txt"
"""Why a run failed, written by the comparison when its process has ended."""
MACHINE = "machine.json"
"""Threads, processor and versions that a run was made with, on which its last digits depend."""
LOG = "log.txt"
"""What a run printed."""
PLAN_FIELDS: files.Kinds = {"environment": (str,), "config": (dict,)}
CONFIG_FIELDS: files.Kinds = {"agents": (list,), "total_timesteps": (int,), "eval_episodes": (int,)}
SPEC_FIELDS: files.Kinds = {
    "agent": (str,),
    "seed": (int,),
    "kl_coef": (*files.NUMBER, type(None)),
    "total_timesteps": (int,),
}
STATE_FIELDS: files.Kinds = {"config": (dict,), "kl_coef": files.NUMBER, "seconds": (dict,), "num_updates": (int,)}
CREDIT_FIELDS: files.Kinds = {
    "index": (int,),
    "prompt": (str,),
    "tokens": (list,),
    "score": files.NUMBER,
    "group_scores": (list,),
    "stop_reason": (str,),
}
KEPT_STATE = ("agent", "task", "model", "reference", "seed", "kl_coef", "total_timesteps", "config", "env", "num_envs")
"""Of agent.json; the rest is the state of random streams."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str
    spec: dict[str, Any]
    """cell.json: what was asked for."""
    final: dict[str, Any]
    """The last evaluation, on all of the comparison's prompts."""
    evaluations: list[dict[str, Any]]
    """Those of training, by timesteps; none of a saved agent."""
    alarms: list[reward_hacking.Alarm]
    """What was out of bounds at the last of them; their completions, of which it is seen too, are not kept."""
    episodes: list[dict[str, Any]]
    """A completion for each prompt of the last evaluation."""
    state: dict[str, Any]
    """agent.json, empty where there is none."""
    rollouts: list[dict[str, Any]]
    """Rows of the log, of the rollouts of training."""
    credit: list[dict[str, Any]]
    """What the agent says of each token of some texts; see textrl_gym.evaluation.token_credit."""
    flops: dict[str, Any]
    """Operations of the first rollout and update, and that rollout's tokens; empty where they were not counted."""

    def column(self, key: str) -> Array:
        """A number of every episode. [N]"""
        return np.array([episode[key] for episode in self.episodes], float)

    def start(self, key: str) -> Array | None:
        """The same of the initial policy's completions; None where they were not kept. [N]"""
        if not all(key in episode.get("start", ()) for episode in self.episodes):
            return None
        return np.array([episode["start"][key] for episode in self.episodes], float)

    @property
    def prompts(self) -> list[str]:
        return [episode["prompt"] for episode in self.episodes]


@dataclass(frozen=True, eq=False)
class Group:
    """The seeds of an agent with one KL coefficient."""

    label: str
    agent: str
    kl_coef: float | None
    """None: the agent's own."""
    color: int
    """The agent's place among the agents."""
    variant: int
    """The coefficient's place among the agent's own ones."""
    runs: tuple[Result, ...]

    def finals(self, key: str) -> list[float]:
        """A number of the last evaluations, one for each seed that has it."""
        return [run.final[key] for run in self.runs if key in run.final]

    def scores_of_prompts(self, key: str) -> Array:
        """A number of every prompt of the last evaluations, the mean over its completions. [S, N]"""
        return np.stack([by_prompt(run.column(key), run.prompts) for run in self.runs])

    @property
    def untrained(self) -> bool:
        """Whether nothing was ever updated, so that no seed changes the agent."""
        return all(run.final.get("updates") == 0 for run in self.runs)

    @property
    def coefficient(self) -> str:
        """The KL coefficient in words."""
        if self.kl_coef is not None:
            return f"{self.kl_coef:g}"
        own = {run.state["kl_coef"] for run in self.runs if "kl_coef" in run.state}
        return f"own, {min(own):g}" if len(own) == 1 else "own"


@dataclass(frozen=True)
class Comparison:
    """A comparison's folder."""

    environment: str
    config: dict[str, Any]
    """What was asked for, a CompareConfig."""
    env: EnvSettings
    """The settings of the environment."""
    versions: dict[str, str]
    groups: tuple[Group, ...]
    """In the order in which the agents were named."""
    failed: dict[str, str]
    """Name of a run -> its error."""
    unfinished: dict[str, str]
    """Name of a run -> how far it is."""

    @property
    def gold(self) -> str:
        """What is compared: "gold", or "score" where the task has no gold score."""
        return "gold" if all("gold" in run.final for run in self.runs) else "score"

    @property
    def runs(self) -> list[Result]:
        return [run for group in self.groups for run in group.runs]

    @property
    def prompt_counts(self) -> list[int]:
        """How many prompts the last evaluations had, each number once: one where all runs met as many."""
        known = {len(set(run.prompts)) for run in self.runs if run.episodes}
        return sorted(known) or [self.config["eval_episodes"]]

    @property
    def repeats(self) -> bool:
        """Whether the last evaluations had more completions than prompts."""
        return any(len(set(run.prompts)) < len(run.episodes) for run in self.runs)

    def scale(self, key: str) -> Scale | None:
        """The least and the largest value of a number of evaluations; None where they are not known."""
        named = self.config.get("gold") not in (None, "gold")
        known = None if named or self.env.dataset is not None else gold_scale(self.environment)
        return scale_of(key, known)

    def same_prompts(self) -> tuple[list[Group], list[str]]:
        """Groups whose runs all met the first run's prompts, and the labels of the others."""
        prompts = self.runs[0].prompts

        def meets(run: Result) -> bool:
            return bool(prompts) and run.prompts == prompts and all(self.gold in e for e in run.episodes)

        groups = [group for group in self.groups if all(meets(run) for run in group.runs)]
        return groups, [group.label for group in self.groups if group not in groups]


def gold_scale(env_id: str) -> Scale | None:
    """The scale of an environment's own gold score; None where it is not known."""
    # A task may be registered by a module that is not loaded here.
    return EnvSettings().task(env_id).gold_scale if env_id in registry.text_envs() else None


def read_plan(folder: Path) -> dict[str, Any]:
    """What was asked for.

    Raises:
        ValueError: the folder holds no comparison, or the file not what `compare` writes.
    """
    file = folder / PLAN
    if not file.is_file():
        raise ValueError(f"{str(folder)!r} holds no comparison: no {PLAN}")
    plan = files.read_json(file)
    files.check_fields(plan, file, PLAN_FIELDS, {"versions": (dict,), "registered": (dict,), "env": (dict,)})
    files.check_fields(plan["config"], f"{file}, config", CONFIG_FIELDS)
    if not all(isinstance(agent, str) for agent in plan["config"]["agents"]):
        raise ValueError(f"{str(file)!r} is damaged: 'agents' must be names, got {plan['config']['agents']!r}")
    try:
        spec_env(plan["config"] | plan)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from error
    return plan


def spec_env(spec: dict[str, Any]) -> EnvSettings:
    """The settings of a run's environment; a comparison of 0.1 named the reward alone.

    Raises:
        ValueError: a setting that there is not, or a value that it cannot have.
    """
    values = spec.get("env", {"reward": spec.get("reward")})
    try:
        return EnvSettings(**values)
    except TypeError as error:
        raise ValueError(f"'env' of a run is damaged: {error}") from error


def read_comparison(folder: Path) -> Comparison:
    """Read a folder that `compare` filled.

    Raises:
        ValueError: it is no such folder, no run in it is finished, or a file is broken.
    """
    plan = read_plan(folder)
    results: list[Result] = []
    agents: dict[str, None] = {}
    failed: dict[str, str] = {}
    unfinished: dict[str, str] = {}
    for file in sorted((folder / RUNS).glob(f"*/{SPEC}")):
        run = file.parent
        agents[_agent_of(run.name, read_spec(run))] = None
        if (run / RESULT).is_file():
            result = _read_result(run)
            # A collapsed run may end with nan: no mean over seeds can take it in, so it is named among the failed ones.
            bad = [key for key in ("gold", "score") if not math.isfinite(result.final.get(key, 0.0))]
            if bad:
                failed[run.name] = f"its last evaluation has {bad[0]} {result.final[bad[0]]}"
            else:
                results.append(result)
        elif (run / ERROR).is_file():
            failed[run.name] = (run / ERROR).read_text(encoding="utf-8").strip()
        else:
            done = progress(run).get("time/total_timesteps", 0)
            unfinished[run.name] = f"{int(done):,} of {read_spec(run)['total_timesteps']:,} tokens"
    if not results:
        others = [f"{name} ({why})" for name, why in (failed | unfinished).items()]
        reasons = "; ".join(others[:3]) + (f"; and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(f"{str(folder)!r} holds no finished run, so there is nothing to report: {reasons or 'no run'}")
    groups = _groups(results, list(agents), plan["config"]["agents"])
    return Comparison(
        plan["environment"],
        renamed(plan["config"]),
        spec_env(plan["config"] | plan),
        plan.get("versions", {}),
        groups,
        failed,
        unfinished,
    )


def read_spec(folder: Path) -> dict[str, Any]:
    """What a run was asked for.

    Raises:
        ValueError: the file does not hold what `compare` writes.
    """
    spec = renamed(files.read_json(folder / SPEC))
    files.check_fields(spec, folder / SPEC, SPEC_FIELDS, {"environment": (str,)})
    return spec


def _read_result(folder: Path) -> Result:
    evaluations = read_evaluations(folder)
    return Result(
        folder.name,
        read_spec(folder),
        _read_final(folder),
        [evaluation.row for evaluation in evaluations],
        reward_hacking.last_alarms(evaluations),
        _read_episodes(folder / EPISODES),
        _read_state(folder / files.STATE_FILE),
        read_rollouts(folder),
        _read_credit(folder / CREDIT),
        _read_flops(folder / FLOPS),
    )


def _read_final(folder: Path) -> dict[str, Any]:
    final = renamed(files.read_json(folder / RESULT))
    files.check_fields(final, folder / RESULT, {"timesteps": (int,)}, {"updates": (int,)})
    files.check_numbers(final, folder / RESULT)
    return final


def _read_episodes(file: Path) -> list[dict[str, Any]]:
    episodes = read_rows(file)
    for number, episode in enumerate(episodes):
        where = f"{file}, row {number + 1}"
        files.check_fields(episode, where, COMPLETION, COMPLETION_MORE | {"start": (dict,)})
        if "start" in episode:  # the initial policy's, of the same prompt
            start = {"prompt": episode["prompt"]} | episode["start"]
            files.check_fields(start, f"{where}, start", COMPLETION, COMPLETION_MORE)
        # Columns of numbers are made of them.
        for name in ("gold", "tokens", "start"):
            if (name in episode) != (name in episodes[0]):
                raise ValueError(f"{where!r} is damaged: only some rows have {name!r}")
            if name != "start" and (name in episode.get("start", {})) != (name in episodes[0].get("start", {})):
                raise ValueError(f"{where!r} is damaged: only some rows have {name!r} in 'start'")
    return episodes


def _read_state(file: Path) -> dict[str, Any]:
    state = files.read_json(file) if file.is_file() else {}
    files.check_fields(state, file, {}, STATE_FIELDS)
    files.check_numbers(state.get("seconds", {}), f"{file}, seconds")
    return {key: state[key] for key in (*KEPT_STATE, "seconds", "num_updates") if key in state}


def _read_credit(file: Path) -> list[dict[str, Any]]:
    from textrl_gym.evaluation.token_credit import QUANTITIES  # loads torch, which the names of files do without

    lines = files.read_json_lines(file)
    for number, line in enumerate(lines):
        where = f"{file}, row {number + 1}"
        files.check_fields(line, where, CREDIT_FIELDS, dict.fromkeys(QUANTITIES, (list,)))
        if not all(isinstance(token, str) for token in line["tokens"]):
            raise ValueError(f"{where!r} is damaged: 'tokens' must be texts")
        for name in ("group_scores", *(name for name in QUANTITIES if name in line)):
            of_tokens = name in QUANTITIES
            if not all(isinstance(x, (*files.NUMBER, type(None))) for x in line[name]) or (
                of_tokens and len(line[name]) != len(line["tokens"])
            ):
                raise ValueError(f"{where!r} is damaged: {name!r} must be numbers, of {name} one for each token")
    return lines


def _read_flops(file: Path) -> dict[str, Any]:
    flops = files.read_json(file) if file.is_file() else {}
    if flops:
        files.check_fields(flops, file, {"flop": files.NUMBER, "tokens": (int,)})
    return flops


def _agent_of(run_name: str, spec: dict[str, Any]) -> str:
    # compare writes a saved agent's folder as an absolute path, and never a name in agents/.
    return run_name if Path(spec["agent"]).is_absolute() else spec["agent"]


def _groups(runs: list[Result], agents: list[str], named: list[str]) -> tuple[Group, ...]:
    """Finished runs by agent and coefficient.

    Args:
        agents: of all runs, finished or not: an agent keeps its colour while the others' runs end.
        named: agents in the order in which they were asked for.
    """
    order = {name: place for place, name in enumerate(named)}
    colors = {name: color for color, name in enumerate(sorted(agents, key=lambda a: (order.get(a, len(order)), a)))}
    members: dict[tuple[str, float | None], list[Result]] = {}
    for run in runs:
        members.setdefault((_agent_of(run.name, run.spec), run.spec["kl_coef"]), []).append(run)
    groups = []
    for agent, color in colors.items():
        # The agent's own coefficient comes first, then rising ones; colours and symbols follow this order.
        coefs = sorted((c for a, c in members if a == agent), key=lambda c: -1.0 if c is None else c)
        for variant, coef in enumerate(coefs):
            label = agent if coef is None else f"{agent} (KL {coef:g})"
            seeds = tuple(sorted(members[agent, coef], key=lambda run: run.spec["seed"]))
            groups.append(Group(label, agent, coef, color, variant, seeds))
    return tuple(groups)


# -- how far runs are ----------------------------------------------------------------------------------------------


def finished_runs(folder: Path) -> list[Path]:
    """The folders of the runs of a comparison, in order.

    Raises:
        RuntimeError: one of them has no result.
    """
    runs = sorted((folder / RUNS).iterdir())
    missing = [run.name for run in runs if not (run / RESULT).is_file()]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} in {str(folder)!r} failed; its log.txt says why")
    return runs


def state_of(folder: Path, running: bool) -> str:
    """ "done", "failed", "running" or "waiting"."""
    if (folder / RESULT).is_file():
        return "done"
    if running:
        return "running"
    return "failed" if (folder / ERROR).is_file() else "waiting"


def progress(folder: Path) -> dict[str, Any]:
    """The numbers of the last row of a run's log; none before the first."""
    # A resumed run has a log for each call, and the newest may be empty still.
    logs = sorted(folder.glob("progress*.json"), key=lambda file: file.stat().st_mtime)
    for file in reversed(logs):
        if row := files.last_json_line(file):
            return {key: value for key, value in row.items() if isinstance(value, files.NUMBER)}
    return {}


# -- the tidy table ---------------------------------------------------------------------------------------------------


def tidy(out: str | Path) -> DataFrame:
    """A DataFrame with a row for each evaluation of each finished run.

    Columns: run, agent, seed, kl_coef (NaN: the agent's own), timesteps, final (the last evaluation, on eval_episodes
    prompts; the others are those of training, on 64), and the metrics of textrl_gym.evaluation.evaluator.
    """
    import pandas as pd

    return pd.DataFrame(list(_rows(Path(out))))


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted((out / RUNS).iterdir()):
        if not (folder / RESULT).is_file():
            continue
        spec = read_spec(folder)
        agent = folder.name if Path(spec["agent"]).is_dir() else spec["agent"]
        shared = {"run": folder.name, "agent": agent, "seed": spec["seed"], "kl_coef": spec["kl_coef"]}
        # What was evaluated both before and after a stop counts once.
        for evaluation in reward_hacking.evaluations(read_rows(folder / EVALUATIONS), []):
            yield {**shared, "final": False, **evaluation.row}
        last = _read_final(folder)
        yield {**shared, "final": True, **last}
