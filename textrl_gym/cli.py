"""The command line: `textrl-gym COMMAND ...`. What a command needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import os

# Read by OpenMP when torch loads. Threads that wait by spinning collapse beside a busy neighbour: two of them fell from
# 6,300 to 170 tokens/s where passive ones kept 3,000. But passive ones sleep between any two operations: a spin of some
# microseconds first samples 1.5 times as fast alone and costs a quarter beside one busy process (docs/performance.md).
# Matrices as small as the embedded ones gain nothing from over 8.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, len(os.sched_getaffinity(0)))))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads above are all there are to share
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings are about uses that are not ours

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from textrl_gym.judge_command import evaluate, judge, print_rows
from textrl_gym.names import find_agent, find_env, text_envs
from textrl_gym.run_settings import (
    EnvSettings,
    RunSettings,
    as_arguments,
    flag,
    flat,
    make_env,
    parse,
    place,
    read_toml,
    unknown,
)

RUN_FILE = "run.json"
"""How a run was started; `train --resume` takes its options from there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 for a failed check; 2 for a wrong input; 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = [arg for arg in given if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if "" not in sys.path:
        sys.path.insert(0, "")  # module:Class may name a file of the folder that the user is in
    try:
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        return COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stopped:  # tyro has printed the help, or what is wrong with a flag
        return stopped.code if isinstance(stopped.code, int) else 2
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if "--debug" in given:
            raise
        return show_error(error)


def help_text() -> str:
    """One line for each command: the first of its docstring."""
    rows = [f"  {name:<14}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return (
        "textrl-gym: text generation as Gymnasium environments, and the agents that learn in them.\n\n"
        "usage: textrl-gym COMMAND ...\n\n"
        + "\n".join(rows)
        + "\n\n`textrl-gym COMMAND --help` lists a command's settings; --debug shows the traceback of an error."
    )


def show_error(error: Exception) -> int:
    """Print an error as one red line; returns the exit code."""
    from rich.console import Console

    text = str(error) or type(error).__name__
    Console(stderr=True, soft_wrap=True).print(f"error: {text}", style="bold red", markup=False, highlight=False)
    health = sys.modules.get("textrl_gym.health")  # not imported for this: that would load torch for a wrong word
    return 1 if health is not None and isinstance(error, health.HealthError) else 2


# -- commands ---------------------------------------------------------------------------------------------------------


def envs(args: Sequence[str]) -> int:
    """List every registered environment, one row each."""
    parse("envs", envs.__doc__, [], args)
    from rich.console import Console
    from rich.table import Table

    from textrl_gym import plugins

    table = Table()
    for heading in ("id", "task", "prompt tokens", "new tokens", "reward"):
        table.add_column(heading, no_wrap=heading == "id", justify="right" if "tokens" in heading else "left")
    for env_id, path in sorted(text_envs().items()):
        task = plugins.load_task(path)
        lines = (type(task).__doc__ or "").strip().splitlines() or [""]
        budgets = (str(task.max_prompt_tokens), str(task.max_new_tokens))
        reward = task.reward if isinstance(task.reward, str) else repr(task.reward)
        table.add_row(env_id, lines[0], *budgets, reward.rpartition(":")[2] if ":" in reward else reward)
    Console().print(table)
    return 0


def check(args: Sequence[str]) -> int:
    """Check an environment, and print the health card of its task's model."""
    parsed = parse("check", check.__doc__, [("env", place(str, "an environment id, or module:ID"))], args)
    env_id = find_env(parsed.env)
    from textrl_gym import health
    from textrl_gym.agent import Agent
    from textrl_gym.check import check_env

    try:
        held = check_env(env_id)
    except AssertionError as error:
        show_error(error)
        return 1
    print("Environment\n" + "\n".join(f"  ok   {line}" for line in held))
    agent = Agent(env_id, rollout_episodes=16, group_size=4, device="cpu")
    lines = health.card(agent.policy, agent.collect(), agent.env.eos_id, fresh=True)
    print(health.text(lines))
    return 0 if all(line.ok for line in lines) else 1


TRAIN = """Train an agent: textrl-gym train AGENT ENV --total-timesteps N --out DIR; --resume DIR goes on.

An agent that does not train is evaluated and saved, and needs no --total-timesteps.

AGENT is the name of a file in agents/, or module:Class; ENV is an environment id, or module:ID. They come first. The
settings of AGENT are among those below. A TOML file given by --config holds the tables [agent], [train] and [env]."""


def train(args: Sequence[str]) -> int:
    """Train an agent: AGENT ENV --total-timesteps N --out DIR, or --resume DIR."""
    if any(arg.partition("=")[0] == "--resume" for arg in args):
        return resume(args)
    names = [arg for arg in args[:2] if not arg.startswith("-")]
    if len(names) < 2 and not {"-h", "--help"} & set(args):
        raise ValueError("train needs AGENT and ENV first: textrl-gym train AGENT ENV --total-timesteps N --out DIR")
    from textrl_gym.agent import Agent
    from textrl_gym.train import TrainOptions

    agent_class = find_agent(names[0]) if names else Agent
    env_id = find_env(names[1]) if len(names) == 2 else ""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config", type=Path)
    file = flags.parse_known_args(args[2:])[0].config
    schema = {"agent": (agent_class.Config,), "train": (RunSettings, TrainOptions), "env": (EnvSettings,)}
    tables = read_toml(file, schema) if file else {name: {} for name in schema}
    parts = [
        ("run", flat(RunSettings)),
        ("options", flat(TrainOptions)),
        ("agent", flat(agent_class.Config)),
        ("env", EnvSettings, EnvSettings(**tables["env"])),
    ]
    # The agent's settings are checked together, so the file's are given as flags and not as a finished default.
    before = [*as_arguments(tables["train"]), *as_arguments(tables["agent"])]
    parsed = parse(" ".join(["train", *names]), TRAIN, parts, [*before, *args[len(names) :]])

    run = parsed.run
    if agent_class.trains and run.total_timesteps is None:
        raise ValueError(f"{names[0]} trains: give --total-timesteps N, the generated tokens to train for")
    out = run.out or Path("runs") / f"{names[0].rpartition(':')[2]}-{env_id}-seed{run.seed}"
    refuse_used(out)
    config = dataclasses.asdict(parsed.agent)
    agent = agent_class(
        make_env(env_id, parsed.env, run.model, run.device, config),
        run.model,
        seed=run.seed,
        device=run.device,
        out=out,
        **config,
    )
    out.mkdir(parents=True, exist_ok=True)
    record = {"command": list(args), "environment": env_id, "options": dataclasses.asdict(parsed.options)}
    (out / RUN_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return learn(agent, run.total_timesteps or 0, parsed.options, goes_on=False)


def refuse_used(out: Path) -> None:
    """Raise where a folder holds a run already: two runs' logs would mix."""
    if any((out / name).exists() for name in ("agent.json", "evaluations.jsonl")):
        raise ValueError(f"{str(out)!r} holds a run already: go on with --resume {out}, or name another --out")


def learn(agent: Any, timesteps: int, options: Any, goes_on: bool) -> int:
    """Train and say where the results are; Ctrl-C leaves a checkpoint."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # what may be downloaded is here; a checkpoint's bar breaks into training's own
    try:
        agent.learn(timesteps, reset_num_timesteps=not goes_on, **dataclasses.asdict(options))
    except KeyboardInterrupt:
        print(f"go on with: textrl-gym train --resume {agent.out}", file=sys.stderr)
        raise
    print(f"saved in {agent.out}; plots: textrl-gym report {agent.out}")
    return 0


def resume(args: Sequence[str]) -> int:
    """Go on with an interrupted run, or with a finished one for more tokens."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume", type=Path, nargs="?")
    folder = peek.parse_known_args(args)[0].resume
    from textrl_gym import checkpoint
    from textrl_gym.evaluation import load_agent
    from textrl_gym.train import TrainOptions

    saved = {}
    if folder is not None and (folder / RUN_FILE).is_file():
        saved = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["options"]
    more = "tokens more than now; None: up to the run's own total"
    parts = [
        ("resume", flag(Path, "the run's folder")),
        ("total_timesteps", flag(int | None, more), None),
        ("device", flag(str, "auto, cpu, cuda or cuda:N"), "auto"),
        ("options", flat(TrainOptions), TrainOptions(**saved)),
    ]
    parsed = parse("train", resume.__doc__, parts, args)
    total = checkpoint.read_state(parsed.resume)["total_timesteps"]
    agent = load_agent(parsed.resume, device=parsed.device, out=parsed.resume)
    if not agent.trains:
        raise ValueError(
            f"{str(parsed.resume)!r} holds {type(agent).__name__}, which does not train: nothing to resume"
        )
    left = total - agent.num_timesteps if parsed.total_timesteps is None else parsed.total_timesteps
    if left < 1:
        done = f"{str(parsed.resume)!r} has {agent.num_timesteps:,} of {total:,} tokens"
        raise ValueError(f"{done}: give --total-timesteps N, at least 1, to train for N more")
    return learn(agent, left, parsed.options, goes_on=True)


def compare(args: Sequence[str]) -> int:
    """Compare agents x seeds x KL coefficients on the same prompts, reward and budget; stopped, it goes on."""
    from textrl_gym import cell
    from textrl_gym import compare as home

    parts = [
        ("env", place(str, "an environment id, or module:ID")),
        ("out", flag(Path, "the comparison's folder; the same one goes on")),
        ("config", flat(home.CompareConfig)),
    ]
    parsed = parse("compare", compare.__doc__, parts, args)
    env_id = find_env(parsed.env)
    for agent in parsed.config.agents:
        if not Path(agent).is_dir():
            find_agent(agent)
    try:
        table = home.compare(env_id, parsed.config, parsed.out)
    except KeyboardInterrupt:
        print(f"go on with the same command, --out {parsed.out}", file=sys.stderr)
        raise
    home.print_finals(table)
    failed = [path.parent.name for path in sorted((parsed.out / home.RUNS).glob(f"*/{cell.ERROR}"))]
    if not table.empty:
        show_page(parsed.out)
    print(f"saved in {parsed.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def show_page(folder: Path) -> None:
    """Write a comparison's page; what has been computed is not worth less without plotly."""
    from textrl_gym.comparison_page import comparison_report

    try:
        print(comparison_report(folder))
    except ImportError as error:
        print(f"no page: {error}", file=sys.stderr)


def report(args: Sequence[str]) -> int:
    """Write DIR/report.html, one self-contained file, about a run, the runs in DIR's subfolders, or a comparison."""
    parsed = parse("report", report.__doc__, [("folder", place(Path, "a run, a folder of runs, a comparison"))], args)
    from textrl_gym import compare as comparison
    from textrl_gym import report as home

    if (parsed.folder / comparison.PLAN).is_file():
        from textrl_gym.comparison_page import comparison_report

        print(comparison_report(parsed.folder))
        return 0
    print(home.report([parsed.folder], parsed.folder / "report.html"))
    return 0


def sft(args: Sequence[str]) -> int:
    """Fine-tune a language model on a task's prompts and completions."""
    from textrl_gym import sft as home

    _make_model("sft", home.SFTConfig, home.sft, args)
    return 0


def reward_model(args: Sequence[str]) -> int:
    """Train a reward model on preferences between completions."""
    from rich.console import Console

    from textrl_gym import reward_report
    from textrl_gym import reward_training as home

    record = _make_model("reward-model", home.RewardModelConfig, home.train_reward_model, args)
    Console().print(*reward_report.tables(record))
    return 0


def preferences(args: Sequence[str]) -> int:
    """Sample pairs of completions, label them, and write them as jsonl."""
    from textrl_gym import pairing as home

    _make_model("preferences", home.PreferenceConfig, home.make_preferences, args)
    return 0


def _make_model(command: str, config: type[Any], work: Callable[..., dict[str, Any]], args: Sequence[str]) -> Any:
    """Parse, work, print what was measured; the record of the work."""
    parts = [
        ("env", place(str, "an environment id, or module:ID")),
        ("out", flag(Path, "the file or folder to write")),
        ("config", flat(config)),
    ]
    parsed = parse(command, COMMANDS[command].__doc__, parts, args)
    record = work(find_env(parsed.env), parsed.config, parsed.out)
    measured = {name: value for name, value in record["measured"].items() if isinstance(value, int | float)}
    print_rows(f"saved in {parsed.out}", {name: f"{value:.4g}" for name, value in measured.items()})
    return record


def bench(args: Sequence[str]) -> int:
    """Measure how fast rollout and update are on this machine."""
    from textrl_gym import bench as home

    parsed = parse("bench", bench.__doc__, [("config", flat(home.BenchConfig))], args)
    print_rows("textrl-gym bench", home.rows(home.bench(parsed.config)))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "envs": envs,
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "judge": judge,
    "report": report,
    "sft": sft,
    "reward-model": reward_model,
    "preferences": preferences,
    "bench": bench,
}
