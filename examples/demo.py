"""What `make demo` runs: PPO, GRPO and best-of-n from the same start, two seeds, and the page that compares them."""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from textrl_gym.experiments.compare import CompareConfig, compare, print_finals
from textrl_gym.experiments.results import Comparison, read_comparison
from textrl_gym.reports.comparison_page import comparison_report

AGENTS = ("reference", "best_of_n", "grpo", "ppo")
TOKENS = 160_000  # of each run; the whole demo stays below eight minutes on two cores
SEEDS = 2
SAMPLES = 2


def show_samples(console: Console, comparison: Comparison) -> None:
    """The same held-out prompts answered by the start and by the first seed of each agent."""
    for number, asked in enumerate(comparison.runs[0].episodes[:SAMPLES]):
        table = Table(show_header=False, show_lines=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_column(justify="right", no_wrap=True)
        table.add_row("prompt", asked["prompt"], "")
        for group in comparison.groups:
            sample = group.runs[0].episodes[number]
            mark = f"gold {sample['gold']:.2f}" if "gold" in sample else f"score {sample['score']:.2f}"
            table.add_row(group.label, sample["completion"].strip(), mark)
        if asked["reference"]:
            table.add_row("human", asked["reference"].strip(), "")
        console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder; the demo that it holds goes on")
    parser.add_argument("--env", default="TLDRSummarize-v0", help="an environment id")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="generated tokens that each run trains for")
    args = parser.parse_args(argv)
    begin = time.perf_counter()
    print(f"{', '.join(AGENTS)} on {args.env}, {SEEDS} seeds: seven to nine minutes on two cores at the usual size")
    config = CompareConfig(AGENTS, seeds=SEEDS, total_timesteps=args.tokens)
    table = compare(args.env, config, args.out)
    show_samples(Console(), read_comparison(args.out))
    print_finals(table)
    page = comparison_report(args.out)
    print(f"report: {page} ({time.perf_counter() - begin:.0f} s in all)")


if __name__ == "__main__":
    main()
