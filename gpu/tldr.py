"""GRPO on TLDRSummarize-v0: the gold score before and after training, and the curve between.

230,000 tokens are about 200 updates. With --real the posts are those of TEXTRL_GYM_DATA (a file or folder), the model
is TEXTRL_GYM_WEIGHTS (a folder, a Hub id, or smollm2-135m where its package is installed), and the reward is ROUGE-L.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

import textrl_gym  # noqa: F401 # registers the environments
from gpu.numbers import Numbers
from textrl_gym.agents.grpo import GRPO
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.training.callbacks import EvaluationCallback

WATCHED = ("timesteps", "updates", "score", "gold", "kl_sequence", "train_seconds")


class Curve(EvaluationCallback):
    """Writes each evaluation during training."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.numbers, self.rows = numbers, list[dict[str, float]]()

    def on_evaluation(self, row: dict[str, Any], samples: list[dict[str, Any]]) -> bool:
        self.rows.append({name: float(row[name]) for name in WATCHED if name in row})
        self.numbers.add(curve=self.rows)
        return True


def make_env(real: bool) -> Any:
    """The environment of embedded posts, or of real ones."""
    if not real:
        return gym.make("TLDRSummarize-v0")
    missing = [name for name in ("TEXTRL_GYM_DATA", "TEXTRL_GYM_WEIGHTS") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"--real needs {' and '.join(missing)} in the environment: the posts and the model")
    return gym.make(
        "TLDRSummarize-v0",
        dataset=os.environ["TEXTRL_GYM_DATA"],
        tokenizer=os.environ["TEXTRL_GYM_WEIGHTS"],
        reward="rouge",
        max_prompt_tokens=384,
        max_new_tokens=48,
    )


def held_out(agent: GRPO, episodes: int, seed: int) -> dict[str, Any]:
    """The mean score of one sampled completion of each held-out post, and its interval over posts (95%)."""
    _, samples = Evaluator(agent.env, episodes, seed).run(agent, greedy=False)
    scores = [sample.get("gold", sample["score"]) for sample in samples]
    half = 1.96 * statistics.stdev(scores) / math.sqrt(len(scores))
    mean = statistics.mean(scores)
    return {"mean": mean, "interval": [mean - half, mean + half], "posts": len(scores)}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure, and write the numbers as they are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=230_000, help="generated in training")
    parser.add_argument("--episodes", type=int, default=256, help="held-out posts of the first and last measurement")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cuda-graphs", action="store_true", help="decode on CUDA graphs")
    parser.add_argument("--real", action="store_true", help="real posts and weights, from the environment's variables")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    numbers = Numbers(args.out)
    settings: dict[str, Any] = {"dtype": args.dtype, "cuda_graphs": args.cuda_graphs}
    if args.real:  # a step of 5e-4 suits the embedded model of a million parameters
        settings |= {"learning_rate": 1e-5, "model": os.environ.get("TEXTRL_GYM_WEIGHTS")}
    with tempfile.TemporaryDirectory() as folder:
        env = make_env(args.real)
        agent = GRPO(env, seed=args.seed, device=args.device, out=folder, **settings)
        numbers.add(
            work={"tokens": args.tokens, "dtype": args.dtype, "seed": args.seed, "real": args.real},
            device=str(agent.device),
        )
        numbers.add(before=held_out(agent, args.episodes, args.seed))
        begin = time.monotonic()
        agent.learn(args.tokens, callback=Curve(numbers), progress_bar=False)
        numbers.add(seconds=time.monotonic() - begin, updates=agent.num_updates, tokens=agent.num_timesteps)
        numbers.add(after=held_out(agent, args.episodes, args.seed))


if __name__ == "__main__":
    main()
