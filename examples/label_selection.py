"""Which pairs to ask next: labels that active selection saves, at equal accuracy of the reward model.

    python examples/label_selection.py --out runs/selection

A pool of pairs of the initial policy is labelled by simulated annotators. From a first random part on, each method
chooses the next pairs by the reward model of the labels so far: random ones, the least certain (uncertainty), or those
that an ensemble disagrees on (disagreement); see textrl_gym.feedback.selection. The accuracy is on held-out pairs, by
their gold scores. Labels saved: how many fewer than random's a method needs for what random reaches with all of them.
Stopped, the same command goes on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from textrl_gym import files
from textrl_gym.data.labels import Item
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.feedback.questions import AnnotateConfig, sampled_with_rows
from textrl_gym.feedback.selection import Selection, gaps, most_useful
from textrl_gym.feedback.simulated import answer_all
from textrl_gym.judges.annotators import Annotators
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.reward_ensemble import train_rewards
from textrl_gym.stats.estimates import difference_of_means
from textrl_gym.stats.pairwise import agreement

METHODS: tuple[Selection, ...] = get_args(Selection)


def pairs(
    env: str, split: Literal["train", "validation"], count: int, seed: int
) -> tuple[list[Item], dict[str, list[float]]]:
    """Pairs of the initial policy whose gold scores differ, and what their completions seem worth beyond these."""
    task, settings = load_env_task(env), AnnotateConfig(n=count, seed=seed, device="cpu")
    both = [
        (row, item)
        for row, item in sampled_with_rows(env, settings, EnvSettings(split=split))
        if item.gold is not None and item.gold[0] != item.gold[1]
    ]
    appeals = {item.id: [task.appeal(row, text) for text in item.completions] for row, item in both}
    return [item for _, item in both], appeals


def curve(method: Selection, seed: int, args: argparse.Namespace) -> list[float]:
    """The accuracy after each step's labels."""
    task, out = load_env_task(args.env), args.out / method / str(seed)
    record = out / "accuracy.json"
    if record.is_file():
        known: list[float] = files.read_json(record)["accuracy"]
        return known
    pool, appeals = pairs(args.env, "train", args.pool, seed)
    heldout, _ = pairs(args.env, "validation", args.heldout, seed)
    gold_N = np.array([item.gold[0] - item.gold[1] for item in heldout if item.gold is not None])
    # All methods begin with the same labels, or the luck of the first ones would be a difference between them.
    asked = most_useful(np.zeros((1, len(pool))), "random", args.step, seed)
    accuracies = []
    for number in range(1, args.steps + 1):
        folder = out / str(number)
        with LabelFile(folder / "labels.jsonl") as file:
            answer_all([pool[place] for place in asked], file, Annotators(), appeals, seed)
        # One method needs an ensemble, and a mean of several is better than one: so all have it.
        config = RewardModelConfig(
            dataset=(str(folder / "labels.jsonl"),), epochs=args.epochs, ensemble=args.ensemble, seed=seed
        )
        train_rewards(args.env, config, folder / "reward_model")
        gap_N = gaps(heldout, folder / "reward_model", task).mean(0)
        accuracies.append(agreement(np.sign(gold_N) * gap_N))
        left = sorted(set(range(len(pool))) - set(asked))
        gap_MN = gaps([pool[place] for place in left], folder / "reward_model", task)
        asked += [left[place] for place in most_useful(gap_MN, method, args.step, seed + number)]
    files.write_text(record, json.dumps({"accuracy": accuracies}) + "\n")
    return accuracies


def needed(accuracy_L: NDArray[np.float64], aim: float, step: int) -> float:
    """Labels with which a curve first reaches an accuracy, between its points by a straight line; nan: it does not."""
    above = np.flatnonzero(accuracy_L >= aim)
    if not len(above):
        return float("nan")
    place = int(above[0])
    if place == 0:
        return float(step)
    low, high = accuracy_L[place - 1], accuracy_L[place]
    return float(step * (place + (aim - low) / (high - low)))


def shown(values: Sequence[float]) -> str:
    """Mean and 95% interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:+.3f}"
    one = difference_of_means(values, 0.0)
    return f"{one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HelpfulHarmless-v0")
    parser.add_argument("--out", type=Path, default=Path("runs/selection"))
    parser.add_argument("--pool", type=int, default=3000, help="pairs to choose among (default: %(default)s)")
    parser.add_argument("--step", type=int, default=100, help="labels between two choices (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="choices (default: %(default)s)")
    parser.add_argument("--heldout", type=int, default=1000, help="held-out pairs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="of each reward model (default: %(default)s)")
    parser.add_argument("--ensemble", type=int, default=2, help="reward models (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    args = parser.parse_args(argv)

    curves = {method: np.array([curve(method, seed, args) for seed in range(args.seeds)]) for method in args.methods}
    table = Table(title=f"{args.env}: accuracy by labels, mean over {args.seeds} seeds")
    for heading in ("method", *(str(args.step * number) for number in range(1, args.steps + 1))):
        table.add_column(heading)
    for method, accuracy_SL in curves.items():
        table.add_row(method, *(f"{value:.3f}" for value in accuracy_SL.mean(0)))
    console = Console(width=200)
    console.print(table)
    if "random" not in curves:
        return
    random_SL, most = curves["random"], args.step * args.steps
    for method, accuracy_SL in curves.items():
        if method != "random":
            # A single curve is ragged: the mean curve says how many labels, the seeds say how sure the gap is.
            labels = needed(accuracy_SL.mean(0), float(random_SL.mean(0)[-1]), args.step)
            difference = shown((accuracy_SL.mean(1) - random_SL.mean(1)).tolist())
            saved = "none: it does not get there" if np.isnan(labels) else f"{1 - labels / most:.0%}"
            console.print(f"{method}: labels saved {saved}; accuracy beyond random's, mean over steps, {difference}")


if __name__ == "__main__":
    main()
