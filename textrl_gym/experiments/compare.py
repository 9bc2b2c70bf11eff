"""compare(): every agent x seed x KL coefficient on the same prompts, reward, reference and token budget.

Each run is a process of its own (experiments.worker) in a folder of its own, so that a failure takes no other down, and
what is finished is never run again: the same call goes on where the last one was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from textrl_gym import files, registry
from textrl_gym.bounds import Seed, check_settings
from textrl_gym.console import plain
from textrl_gym.experiments import launching
from textrl_gym.experiments.launching import LaunchConfig
from textrl_gym.experiments.progress import LiveTable
from textrl_gym.experiments.results import PLAN, RUNS, SPEC, TABLE, spec_env, tidy
from textrl_gym.mdp.env_settings import EnvSettings, by_flag
from textrl_gym.training.config import make_config
from textrl_gym.training.run_folder import renamed

if TYPE_CHECKING:
    from pandas import DataFrame

RUN_COLUMNS = frozenset({"run", "agent", "seed", "kl_coef", "final"})
"""Of the tidy table: which evaluation a row is of, and no result of it."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared, and by what work."""

    agents: tuple[str, ...]
    """Names of files in agents/, module:Class, or folders of saved agents, which are only evaluated."""
    seeds: Annotated[int, Ge(1)] = 3
    """Runs of each agent, with the seeds 0, 1, ...; one of an agent that does not train."""
    total_timesteps: Annotated[int, Ge(1)] = 100_000
    """Generated tokens of each run."""
    kl_coef: Annotated[tuple[float, ...], Ge(0)] = ()
    """KL coefficients, each with every agent and seed; none: the agents' own."""
    set: tuple[str, ...] = ()
    """Settings as agent.setting=value, the value in JSON or plain: ppo.learning_rate=1e-4."""
    model: str | None = None
    """The initial policy of all runs: a Hub id or a folder; None: the task's own."""
    gold: str | None = None
    """The gold score: gold (the task's own), or a reward (its name, module:function, a folder with a reward model);
    None: the task's own, where it has one. A language model judges finished runs: textrl-gym judge."""
    eval_episodes: Annotated[int, Ge(1)] = 256
    """Held-out prompts of the last evaluation."""
    eval_seed: Seed = 0
    """Of these prompts and of sampling on them."""
    eval_every: Annotated[int, Ge(0)] = 20
    """Updates between two evaluations during training (on 64 prompts), at most; every tenth of a run has one too. 0 for
    none but the first and the last."""
    save_every: Annotated[int, Ge(1)] = 10
    """Updates between two checkpoints, from which a stopped run goes on."""
    on_bad_health: Literal["stop", "warn"] = "stop"
    """What a run does when a line of its health card fails before the first update."""
    workers: Annotated[int, Ge(0)] = 0
    """Runs at a time, which share the cores evenly; 0: one for each core, or for each GPU, of which a run of several
    processes takes as many. The number of threads of a run decides the order of its float sums, and with it the last
    digits of the table."""
    device: str = "auto"
    """auto, cpu or cuda; each process of a run gets a GPU of its own in turn."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.agents:
            raise ValueError("agents: name at least one")
        repeated = sorted({a for a in self.agents if self.agents.count(a) > 1})
        if repeated:
            raise ValueError(f"agents: {', '.join(repeated)} is there twice; give it other settings under module:Class")


def settings_of(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Agent -> its settings from `set`, checked against its config.

    Raises:
        ValueError: naming the setting that is not of the form agent.setting=value, of an agent that is not compared, or
            refused by the agent's config.
    """
    settings_by_agent: dict[str, dict[str, Any]] = {agent: {} for agent in config.agents}
    for text in config.set:
        where, equals, value = text.partition("=")
        agent, dot, name = where.rpartition(".")
        if not equals or not dot or agent not in settings_by_agent:
            raise ValueError(f"set: {text!r} is not agent.setting=value with an agent of {', '.join(config.agents)}")
        try:
            # JSON gives numbers, booleans and null their types; what is no JSON is a plain string.
            settings_by_agent[agent][name] = json.loads(value)
        except json.JSONDecodeError:
            settings_by_agent[agent][name] = value
    for agent, settings in settings_by_agent.items():
        if Path(agent).is_dir():
            if settings:
                raise ValueError(f"set: {agent!r} is a saved agent, whose settings are what they are")
            continue
        agent_class = registry.load_agent_class(agent)
        make_config(agent_class.Config, settings, agent)
    return settings_by_agent


def run_specs(environment: str, config: CompareConfig, env: EnvSettings) -> dict[str, dict[str, Any]]:
    """Name of each run -> what textrl_gym.experiments.worker needs to know."""
    apart = {"agents", "seeds", "kl_coef", "set", "workers"}
    shared = {name: value for name, value in dataclasses.asdict(config).items() if name not in apart}
    shared["env"] = dataclasses.asdict(env)
    registered = registry.registration(environment)
    if registered is not None:
        shared["registered"] = registered
    specs = {}
    for agent, settings in settings_of(config).items():
        saved = Path(agent).is_dir()
        trains = not saved and registry.load_agent_class(agent).trains
        short = Path(agent).resolve().name if saved else agent.replace(":", ".")
        for coef in (None,) if saved else config.kl_coef or (None,):
            # Evaluated on the same prompts with the same random numbers, an untrained agent has one number whatever the
            # seed.
            for seed in range(config.seeds if trains else 1):
                name = short if saved else "-".join([short, *([f"kl{coef:g}"] if coef is not None else []), str(seed)])
                if name in specs:
                    raise ValueError(f"agents: two of them would be called {name!r}")
                spec = {"agent": str(Path(agent).resolve()) if saved else agent, "seed": seed, "kl_coef": coef}
                specs[name] = {"environment": environment, **spec, "settings": settings, **shared}
    return specs


def prepare(out: Path, environment: str, config: CompareConfig, env: EnvSettings | None = None) -> dict[str, Path]:
    """Write the plan and a folder for each run; returns name -> folder.

    Raises:
        ValueError: the folder holds a comparison with which this one cannot go on, naming what differs.
    """
    env = env or EnvSettings()
    specs = run_specs(environment, config, env)
    files.make_folder(out)
    for name, spec in specs.items():
        file = out / RUNS / name / SPEC
        if not file.is_file():
            files.make_folder(file.parent)
            files.write_text(file, json.dumps(spec, indent=1) + "\n")
            continue
        before, now = _flattened(renamed(files.read_json(file))), _flattened(json.loads(json.dumps(spec)))
        # The device may change: a comparison that was begun on a CPU may end on a GPU, whose numbers differ by
        # rounding.
        other = [key for key in now if key != "device" and before.get(key) != now[key]]
        if other:
            key = other[0]
            raise ValueError(
                f"{str(out)!r} holds the run {name} with {key}={before.get(key)!r}, not {now[key]!r}: go on with "
                "that, or name another --out"
            )
    plan: dict[str, Any] = {"environment": environment, "config": dataclasses.asdict(config), "versions": versions()}
    plan["env"] = dataclasses.asdict(env)
    registered = registry.registration(environment)
    if registered is not None:
        plan["registered"] = registered
    files.write_text(out / PLAN, json.dumps(plan, indent=1) + "\n")
    return {name: out / RUNS / name for name in specs}


def _flattened(spec: dict[str, Any]) -> dict[str, Any]:
    """A run's specification with the settings of its environment by the names of their flags."""
    return {key: value for key, value in spec.items() if key != "env"} | by_flag(dataclasses.asdict(spec_env(spec)))


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import importlib.metadata
    import platform

    names = ("textrl-gym", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")
    versions_by_name = {"python": platform.python_version()}
    for name in names:
        try:
            versions_by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions_by_name[name] = "not installed"
    return versions_by_name


# -- running ----------------------------------------------------------------------------------------------------------


def compare(
    environment: str,
    config: CompareConfig,
    out: str | Path,
    progress_bar: bool = True,
    *,
    env: EnvSettings | None = None,
    trust_code: bool = False,
    launch: LaunchConfig | None = None,
) -> DataFrame:
    """Run the comparison, or what is left of it.

    Args:
        environment: an id that is registered, or module:ID.
        config: what is compared.
        out: its folder; the same one goes on.
        env: the prompts, budgets and reward of all runs, where they are not the task's own. Saved agents are evaluated
            in this environment too, with the tokenizers of their own; without one they keep the environment that they
            were trained in.
        progress_bar: show a live table.
        trust_code: import what the folders of saved agents name, though it is not part of textrl_gym; see Agent.load.
        launch: where the runs are started; None: on this machine.

    Returns:
        the tidy table, a pandas DataFrame; see `tidy`. Runs that failed are not in it, and named in a warning.

    Raises:
        ValueError: an unknown agent, environment, reward or gold score, a wrong setting, a folder with another
            comparison, no cluster.
    """
    out, env = Path(out), env or EnvSettings()
    check_launch(config, launch or LaunchConfig())
    environment = check(environment, config, env)
    run_folders(prepare(out, environment, config, env), config, out, progress_bar, trust_code, launch)
    return collect_table(out)


def check(environment: str, config: CompareConfig, env: EnvSettings) -> str:
    """Check what a comparison names before anything is written or run; returns the environment's id.

    Raises:
        ValueError: as of `compare`.
    """
    from textrl_gym.judges.judge import load_scorer
    from textrl_gym.mdp.task import checked_rows
    from textrl_gym.rewards import load_reward

    environment = registry.find_env(environment)  # of module:ID the id
    task = env.task(environment)
    # Both are made again in each worker: an object with a model cannot be handed to another process.
    if config.gold is not None:  # a wrong name is told before any run begins
        load_scorer(config.gold, task=task)
    if env.reward is not None:
        load_reward(task.reward, task=task)
    checked_rows(task, env.split, env.dataset, env.bad_rows)
    return environment


def check_launch(config: CompareConfig, launch: LaunchConfig) -> None:
    """Check that the agents can be run by so many processes, before anything is written or run.

    Raises:
        ValueError: an agent that trains in one process or cannot be sharded, or fewer GPUs than processes of a run.
    """
    count = launch.processes_per_run
    if count == 1:
        return
    for agent in config.agents:
        if Path(agent).is_dir():
            continue
        agent_class = registry.load_agent_class(agent)
        if agent_class.one_process:
            raise ValueError(f"processes_per_run={count}: {agent} trains in one process; compare it without")
        if launch.shard and agent_class.trains and not agent_class.shardable:
            raise ValueError(f"shard: {agent} cannot be sharded; compare it without")
    gpus = launching.visible_gpus() if launch.launcher == "local" and config.device != "cpu" else []
    if gpus:
        launching.gpus_of_slots(gpus, 1, count)


def run_folders(
    folders: Mapping[str, Path],
    config: CompareConfig,
    out: Path,
    progress_bar: bool = True,
    trust_code: bool = False,
    launch: LaunchConfig | None = None,
) -> None:
    """Run what is not finished of some folders, with a live table; runs that failed are named in a warning.

    Args:
        out: the comparison's folder, where a cluster's jobs are written down.
    """
    launch, trust_code = launch or LaunchConfig(), trust_code or registry.trust_all
    with LiveTable(folders, config.total_timesteps, progress_bar) as table:
        if launch.launcher == "submitit":
            launching.run_jobs(folders, launch, out / launching.JOBS, config.workers, table, trust_code)
        else:
            gpus = launching.visible_gpus() if config.device != "cpu" else []
            at_a_time = len(gpus or os.sched_getaffinity(0)) // launch.processes_per_run
            workers = config.workers or max(1, at_a_time)
            launching.run_local(folders, workers, launch, gpus, table, trust_code)
    failed = launching.errors(folders)
    if failed:
        import warnings

        errors = "; ".join(f"{name}: {error}" for name, error in failed.items())
        warnings.warn(f"{len(failed)} of {len(folders)} runs failed: {errors}", stacklevel=3)


def collect_table(out: Path) -> DataFrame:
    """The tidy table of a comparison's finished runs, which is also saved."""
    table_of_runs = tidy(out)
    save(table_of_runs, out)
    return table_of_runs


def save(table: DataFrame, out: Path) -> None:
    """Write a tidy table into a comparison's folder."""
    # CSV always, since everything reads it; Parquet keeps types and is small.
    table.to_csv(out / f"{TABLE}.csv", index=False)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return
    table.to_parquet(out / f"{TABLE}.parquet", index=False)


def print_finals(table: DataFrame) -> None:
    """A line an agent: the mean of its seeds' last evaluations. The page and the table of the comparison have more.

    Shown are the metrics that have a short heading, and those that the registry does not know, by their own names.
    """
    from rich.console import Console
    from rich.table import Table

    from textrl_gym.evaluation.metrics import METRICS, metric, metric_names, number

    if table.empty:
        return
    last = table[table["final"]]
    measured = [name for name in last if name not in RUN_COLUMNS and last[name].notna().any()]
    names = [name for name in metric_names([dict.fromkeys(measured)]) if name not in METRICS or metric(name).short]
    swept = last["kl_coef"].notna().any()
    shown = Table("agent", *(["coef."] if swept else []), "seeds")
    shown.columns[0].no_wrap = True
    for name in names:
        shown.add_column(plain(metric(name).short or name), justify="right")
    for (agent, coef), rows in last.groupby(["agent", "kl_coef"], sort=False, dropna=False):
        means = {name: mean for name in names if (mean := rows[name].mean()) == mean}
        numbers = [number(means, name) if name in means else "" for name in names]
        named = [agent, "own" if coef != coef else f"{coef:g}"] if swept else [agent]
        shown.add_row(*map(plain, named), str(len(rows)), *numbers)
    Console().print(shown)
