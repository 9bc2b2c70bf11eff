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

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from textrl_gym.cli.compare import compare, report, watch
from textrl_gym.cli.judge import evaluate, judge, print_rows
from textrl_gym.cli.options import flag, flat, parse, place
from textrl_gym.cli.train import train
from textrl_gym.registry import find_env, text_envs, unknown


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
    health = sys.modules.get(
        "textrl_gym.evaluation.health"
    )  # not imported for this: that would load torch for a wrong word
    return 1 if health is not None and isinstance(error, health.HealthError) else 2


# -- commands ---------------------------------------------------------------------------------------------------------


def envs(args: Sequence[str]) -> int:
    """List every registered environment, one row each."""
    parse("envs", envs.__doc__, [], args)
    from rich.console import Console
    from rich.table import Table

    from textrl_gym import registry

    table = Table()
    for heading in ("id", "task", "prompt tokens", "new tokens", "reward"):
        table.add_column(heading, no_wrap=heading == "id", justify="right" if "tokens" in heading else "left")
    for env_id, path in sorted(text_envs().items()):
        task = registry.load_task(path)
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
    from textrl_gym.evaluation import health
    from textrl_gym.evaluation.check_env import check_env
    from textrl_gym.training.agent import Agent

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


def sft(args: Sequence[str]) -> int:
    """Fine-tune a language model on a task's prompts and completions."""
    from textrl_gym.pipeline import sft as home

    _make_model("sft", home.SFTConfig, home.sft, args)
    return 0


def reward_model(args: Sequence[str]) -> int:
    """Train a reward model, or an ensemble of several, on preferences between completions."""
    from rich.console import Console

    from textrl_gym.pipeline import reward_data, reward_ensemble, reward_metrics

    record = _make_model("reward-model", reward_data.RewardModelConfig, reward_ensemble.train_rewards, args)
    Console().print(*reward_metrics.tables(record))
    return 0


def preferences(args: Sequence[str]) -> int:
    """Sample pairs of completions, label them, and write them as jsonl."""
    from textrl_gym.pipeline import sample_preferences as home

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
    from textrl_gym.experiments import bench as home

    parsed = parse("bench", bench.__doc__, [("config", flat(home.BenchConfig))], args)
    print_rows("textrl-gym bench", home.rows(home.bench(parsed.config)))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "envs": envs,
    "check": check,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "judge": judge,
    "watch": watch,
    "sft": sft,
    "reward-model": reward_model,
    "preferences": preferences,
    "bench": bench,
}
