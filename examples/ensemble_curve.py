"""Gold of the best of n by one reward model and by an ensemble of several, over the KL of best-of-n.

    textrl-gym reward-model TLDRSummarize-v0 --ensemble 5 --prompts 100 --replaced-token-steps 0 --out runs/weak5
    python examples/ensemble_curve.py runs/weak5 --plot runs/weak5/curve.html

A pool of completions of each held-out post is sampled once from the start policy. All selectors choose from it, and
what the best of n is worth is averaged over all choices of n from the pool (stats.overoptimization.best_of_n).
"""

import argparse
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline.simulated_comparisons import sample_texts
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import load_reward
from textrl_gym.rewards.ensemble import Combination, combine, make
from textrl_gym.stats.overoptimization import BestOfN, best_of_n

ROWS_AT_ONCE = 1024


def pool(task: Any, tokenizer: Any, posts: int, size: int, seed: int) -> dict[str, list[Any]]:
    """`size` completions of each held-out post by the start policy, as the columns that rewards take."""
    policy, source = Policy(task.load_model()), task.rows("validation")
    rows = [source[i] for i in np.random.default_rng(seed).choice(len(source), posts, replace=False)]
    columns: dict[str, list[Any]] = {name: [] for name in ("prompts", "completions", "prompt_ids", "completion_ids")}
    at_once = max(1, ROWS_AT_ONCE // size)
    for first in range(0, posts, at_once):
        some = rows[first : first + at_once]
        for row, found in zip(some, sample_texts(policy, task, tokenizer, some, size, 1.0, seed + first), strict=True):
            columns["prompts"] += [row["prompt"]] * size
            columns["prompt_ids"] += [task.encode(row, tokenizer, task.max_prompt_tokens)] * size
            columns["completion_ids"] += found
            columns["completions"] += [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
            for name in set(row) - {"prompt", "completion"}:
                columns.setdefault(name, []).extend([row[name]] * size)
    return columns


def selectors(folder: str, task: Any, tokenizer: Any, columns: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    """Name -> the scores of all completions: of each member, and of their combinations."""
    ensemble = make(folder, task=task, device="cpu", tokenizer=tokenizer)
    score_MB = torch.stack([member(**columns) for member in ensemble.members])
    scores = {f"single {number}": score_B.numpy() for number, score_B in enumerate(score_MB)}
    for how in get_args(Combination):
        scores[how] = combine(score_MB, how, ensemble.coefficient).numpy()
    return scores


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Mean difference of two numbers of each post, with its standard error."""
    return f"{(a - b).mean():+.3f} ± {(a - b).std(ddof=1) / math.sqrt(len(a)):.3f}"


def tables(curves: dict[str, list[BestOfN]]) -> list[Table]:
    """Gold by each selector for each n, and each combination's lead over a single reward model."""
    singles = [curve for name, curve in curves.items() if name.startswith("single")]
    ensembles = [name for name in curves if name in get_args(Combination)]
    others = [*ensembles, "by gold"]
    shown = Table("n", "KL", "single", "range of singles", *others, title="Gold of the best of n, by selector")
    leads = Table("n", *ensembles, title="Lead over a single one, ± its standard error over posts")
    for row, point in enumerate(singles[0]):
        of_singles = np.stack([curve[row].gold_P for curve in singles])
        means = of_singles.mean(1)
        cells = [str(point.n), f"{point.kl:.2f}", f"{means.mean():.3f}", f"{means.min():.3f} to {means.max():.3f}"]
        shown.add_row(*cells, *(f"{curves[name][row].gold_P.mean():.3f}" for name in others))
        leads.add_row(str(point.n), *(difference(curves[name][row].gold_P, of_singles.mean(0)) for name in ensembles))
    return [shown, leads]


def plot(curves: dict[str, list[BestOfN]], file: Path) -> None:
    """Gold over KL, a line for each selector, as a page that needs no network."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, curve in curves.items():
        single = name.startswith("single")
        gold = [point.gold_P.mean() for point in curve]
        line = {"color": "lightgrey"} if single else {"width": 3}
        figure.add_scatter(x=[point.kl for point in curve], y=gold, name=name, line=line)
    figure.update_layout(xaxis_title="KL of best-of-n (bound), nats", yaxis_title="gold")
    figure.write_html(file, include_plotlyjs="inline")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", help="folder of an ensemble of reward models")
    parser.add_argument("--env", default="TLDRSummarize-v0", help="an environment id, whose task has a judge")
    parser.add_argument("--posts", type=int, default=64, help="held-out prompts")
    parser.add_argument("--pool", type=int, default=256, help="completions of each, and the largest n")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and samples")
    parser.add_argument("--plot", type=Path, help="also write a chart to this HTML file (needs the extra report)")
    args = parser.parse_args(argv)
    task: Any = load_env_task(args.env)
    tokenizer = task.load_tokenizer()
    columns = pool(task, tokenizer, args.posts, args.pool, args.seed)
    gold_PN = load_reward(task.gold, task=task, tokenizer=tokenizer)(**columns).view(args.posts, args.pool).numpy()
    sizes = [2**power for power in range(int(math.log2(args.pool)) + 1)]
    curves = {
        name: [best_of_n(score_B.reshape(args.posts, args.pool), gold_PN, n) for n in sizes]
        for name, score_B in selectors(args.ensemble, task, tokenizer, columns).items()
    }
    curves["by gold"] = [best_of_n(gold_PN, gold_PN, n) for n in sizes]
    Console().print(*tables(curves))
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
