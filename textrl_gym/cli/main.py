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

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence

from textrl_gym import processes, registry
from textrl_gym.cli.about import agents_command, completion_command, env_info_command, print_version
from textrl_gym.cli.collect import collect_command
from textrl_gym.cli.compare import (
    compare_command,
    lesson_command,
    report_command,
    reproduce_command,
    sizes_command,
    watch_command,
)
from textrl_gym.cli.export import export_command
from textrl_gym.cli.feedback import annotate_command, constitutional_command, labels_command, rlhf_command
from textrl_gym.cli.judge import evaluate_command, judge_command
from textrl_gym.cli.options import Part, env_flags, environment, flat, parse_command, parse_flags, positional
from textrl_gym.cli.pipeline import preferences_command, reward_model_command, sft_command
from textrl_gym.cli.play import play_command
from textrl_gym.cli.terminal import make_table, print_rows, print_tables, show_error
from textrl_gym.cli.train import train_command
from textrl_gym.registry import find_env, text_envs, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 1 for a failed check; 2 for a wrong input; 128 + N for signal N."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = [arg for arg in given if arg not in ("--debug", "--trust-code")]
    if "" not in sys.path:
        sys.path.insert(0, "")  # module:Class may name a file of the folder that the user is in
    registry.trust_all = "--trust-code" in given
    try:
        try:
            return _run_in_processes(args, debug="--debug" in given)
        finally:
            sys.stdout.flush()  # here, where an error of it is caught
    except BrokenPipeError:  # the reader has left, as `head` does
        # Python flushes once more at its end, into what takes anything.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run_in_processes(args: list[str], debug: bool) -> int:
    """`_run`, as one of the processes that torchrun starts, or as the only one."""
    # Before the group is joined: a process that is refused must not leave the others waiting for it.
    if processes.launched() and args and args[0] in COMMANDS and args[0] not in IN_PROCESSES:
        allowed = ", ".join(IN_PROCESSES)
        return show_error(ValueError(f"{args[0]} runs in one process; torchrun is for {allowed}"))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(processes.join())
        except (ValueError, RuntimeError) as error:
            return show_error(error)
        if not processes.is_first():  # the first says it for all; what goes wrong is said by whom it happens to
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return _run(args, debug)


def _run(args: list[str], debug: bool) -> int:
    try:
        if not args or args[0] in ("-h", "--help"):
            print(help_text())
            return 0
        if args[0] in ("-V", "--version"):
            print_version()
            return 0
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        return COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt as stopped:
        if processes.is_first():
            print("interrupted", file=sys.stderr)
        return 128 + getattr(stopped, "number", signal.SIGINT)  # as shells count: 130 for Ctrl-C, 143 for SIGTERM
    except SystemExit as stopped:
        # With a number tyro has printed the help, or what is wrong with a flag; with words nobody has.
        if isinstance(stopped.code, str):
            return show_error(RuntimeError(stopped.code))
        return stopped.code or 0
    except BrokenPipeError:
        raise
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if debug:
            raise
        return show_error(error)


def help_text() -> str:
    """One line for each command: the first of its docstring."""
    rows = [f"  {name:<16}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return (
        "textrl-gym: text generation as Gymnasium environments, and the agents that learn in them.\n\n"
        "usage: textrl-gym COMMAND ... | --version\n\n"
        + "\n".join(rows)
        + "\n\n`textrl-gym COMMAND --help` lists a command's settings; --debug shows the traceback of an error;\n"
        "--trust-code imports agents, tasks and rewards that a saved folder names and that are not part of textrl-gym."
    )


# -- commands ---------------------------------------------------------------------------------------------------------


def envs_command(args: Sequence[str]) -> int:
    """List every registered environment, one row each."""
    parse_flags("envs", envs_command.__doc__, [], args)
    from textrl_gym.mdp.task import load_task

    rows = []
    for env_id, path in sorted(text_envs().items()):
        task = load_task(path)
        lines = (type(task).__doc__ or "").strip().splitlines() or [""]
        budgets = (str(task.max_prompt_tokens), str(task.max_new_tokens))
        reward = task.reward if isinstance(task.reward, str) else repr(task.reward)
        rows.append((env_id, lines[0], *budgets, reward.rpartition(":")[2] if ":" in reward else reward))
    headings = ("id", "task", "prompt tokens", "new tokens", "reward")
    print_tables(make_table(None, headings, rows, left=("id", "task", "reward"), no_wrap=("id",)))
    return 0


def check_command(args: Sequence[str]) -> int:
    """Check an environment, and print the health card of its task's model."""
    parsed = parse_command("check", check_command.__doc__, [environment(), env_flags()], {"env": "env"}, args)
    env_id = find_env(parsed.environment)
    settings = {"rollout_episodes": 16, "group_size": 4}
    import gymnasium

    from textrl_gym.evaluation import health
    from textrl_gym.evaluation.check_env import check_env
    from textrl_gym.mdp.env_settings import make_env
    from textrl_gym.training.agent import Agent

    try:
        held = check_env(gymnasium.make(env_id, **parsed.env.keywords()))
    except AssertionError as error:
        show_error(error)
        return 1
    print("Environment\n" + "\n".join(f"  ok   {line}" for line in held))
    agent = Agent(make_env(env_id, parsed.env, None, "cpu", settings), device="cpu")
    lines = health.card(agent.policy, agent.collect(), agent.env.end_ids, fresh=True)
    print(health.text(lines))
    return 0 if all(line.ok for line in lines) else 1


def bench_command(args: Sequence[str]) -> int:
    """Measure how fast rollout and update are on this machine."""
    from textrl_gym.experiments import bench

    about = "an environment, whose prompts and reward are used; none: random prompts of one length"
    parts: list[Part] = [
        ("environment", positional("[ENV]", str | None, about), None),
        ("settings", flat(bench.BenchConfig)),
        env_flags(),
    ]
    tables = {"settings": "bench", "env": "env"}
    parsed = parse_command("bench", bench_command.__doc__, parts, tables, args)
    env_id = None if parsed.environment is None else find_env(parsed.environment)
    if parsed.settings.scaling:
        if env_id is not None:
            raise ValueError(f"--scaling has prompts of its own: leave out {env_id}")
        print_rows("microseconds a token", bench.scaling_rows(bench.scaling(parsed.settings)))
        return 0
    print_rows("textrl-gym bench", bench.rows(bench.bench(parsed.settings, env_id, parsed.env)))
    return 0


def complete_command(args: Sequence[str]) -> int:
    """Print what a shell evaluates to complete words: eval "$(textrl-gym completion bash)"."""
    return completion_command(COMMANDS, args)


IN_PROCESSES = ("train", "sft", "reward-model")
"""Commands that several processes may run together, started by torchrun."""
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "envs": envs_command,
    "agents": agents_command,
    "check": check_command,
    "train": train_command,
    "evaluate": evaluate_command,
    "compare": compare_command,
    "lesson": lesson_command,
    "sizes": sizes_command,
    "reproduce": reproduce_command,
    "report": report_command,
    "judge": judge_command,
    "watch": watch_command,
    "sft": sft_command,
    "reward-model": reward_model_command,
    "preferences": preferences_command,
    "annotate": annotate_command,
    "labels": labels_command,
    "play": play_command,
    "collect": collect_command,
    "rlhf": rlhf_command,
    "constitutional": constitutional_command,
    "export": export_command,
    "bench": bench_command,
    "env-info": env_info_command,
    "completion": complete_command,
}
