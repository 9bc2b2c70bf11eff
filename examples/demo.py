"""What `make demo` runs: GRPO and PPO learn a task; a table, samples before and after, and a report compare them."""

import os

# Before torch loads: two OpenMP threads that wait by spinning collapse beside a busy neighbour.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, len(os.sched_getaffinity(0)))))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as hf_logging

from textrl_gym import plugins
from textrl_gym.report import METRICS, Run, number, read_run, report

# Each is about two minutes on two cores, or a little more; the whole demo stays below eight.
TOKENS = {"grpo": 300_000, "ppo": 320_000}
EVAL_EVERY = 20  # updates
EVAL_EPISODES = 64
SAMPLES = 2

MEASURES = ("judge", "judge_greedy", "win_rate", "score", "kl_sequence", "completion_tokens", "eos_share")


def train(name: str, env_id: str, tokens: int, out: Path) -> Run:
    agent = plugins.load_agent_class(name)(env_id, seed=0, out=out)
    agent.learn(tokens, eval_every=EVAL_EVERY, eval_episodes=EVAL_EPISODES, show_samples=0)
    return read_run(out)


def comparison(runs: list[Run]) -> Table:
    """A column for the start, which all share, and one for each agent."""
    table = Table("held-out prompts")
    for heading in ("start", *(run.name.upper() for run in runs)):
        table.add_column(heading, justify="right")
    for key in MEASURES:
        if key in runs[0].end:
            table.add_row(METRICS[key][0], number(runs[0].start, key), *(number(run.end, key) for run in runs))
    table.add_row("Trained on, tokens", "0", *(f"{run.end['timesteps']:,}" for run in runs))
    table.add_row("Training, seconds", "0", *(f"{run.end['train_seconds']:.0f}" for run in runs))
    return table


def show_samples(console: Console, runs: list[Run]) -> None:
    """The same prompts answered by the start and by each agent."""
    first = [s for s in runs[0].samples if s["timesteps"] == runs[0].start["timesteps"]][:SAMPLES]
    for sample in first:
        table = Table(show_header=False, show_lines=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        table.add_row("prompt", sample["prompt"], "")
        table.add_row("start", sample["completion"].strip(), marks(sample))
        for run in runs:
            ends = [s for s in run.samples if s["timesteps"] == run.end["timesteps"] and s["index"] == sample["index"]]
            table.add_row(run.name.upper(), ends[0]["completion"].strip(), marks(ends[0]))
        if sample["reference"]:
            table.add_row("reference", sample["reference"].strip(), "")
        console.print(table)


def marks(sample: dict[str, Any]) -> str:
    return f"judge {sample['judge']:.2f}" if "judge" in sample else f"score {sample['score']:.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder; a demo that it holds is replaced")
    parser.add_argument("--env", default="TLDRSummarize-v0", help="an environment id")
    parser.add_argument("--tokens", type=int, help="tokens for each agent, in place of the usual budgets")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    hf_logging.disable_progress_bar()  # a checkpoint's bar breaks into training's own
    runs = []
    for name, tokens in TOKENS.items():
        if (args.out / name / "evaluations.jsonl").is_file():
            shutil.rmtree(args.out / name)  # the last demo's: two runs' logs would mix
        runs.append(train(name, args.env, args.tokens or tokens, args.out / name))
    console = Console()
    show_samples(console, runs)
    console.print(comparison(runs))
    page = report([args.out / name for name in TOKENS], args.out / "report.html")
    console.print(f"report: {page} ({time.perf_counter() - begin:.0f} s in all)", soft_wrap=True)


if __name__ == "__main__":
    main()
