"""What a taste for length does: annotators without and with it, a reward model of each, GRPO against each.

    python examples/length_bias.py --out runs/length

Each row of the table is a policy against the start on the same held-out posts, judged by the gold score, by annotators
who only mind gold, and by annotators who like length. The length-controlled win rate takes the taste for length out of
what the latter say (Dubois et al. 2024, arXiv:2404.04475). Stopped, the same command goes on with the next step.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

from textrl_gym.agents import GRPO
from textrl_gym.evaluation.evaluator import Evaluator
from textrl_gym.judges.annotators import Annotators
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.reward_model import train_reward_model
from textrl_gym.stats.estimates import Estimate, outcomes
from textrl_gym.stats.pairwise import length_controlled_win_rate, win_rate

ENV = "TLDRSummarize-v0"


def trained(out: Path, preference: float, args: argparse.Namespace) -> GRPO:
    """GRPO against the reward model of annotators with this preference for length."""
    reward, run = out / "reward", out / "grpo"
    if not (reward / "reward_model.json").is_file():
        config = RewardModelConfig(
            prompts=args.prompts,
            replaced_token_steps=args.replaced_token_steps,
            eval_prompts=args.eval_prompts,
            annotators=Annotators(length_preference=preference),
            seed=args.seed,
        )
        train_reward_model(ENV, config, reward)
    if (run / "agent.json").is_file():
        return GRPO.load(run)
    agent = GRPO(gym.make(ENV, reward=str(reward)), seed=args.seed, out=run, kl_coef=args.kl_coef)
    return agent.learn(args.tokens, show_samples=0, eval_episodes=min(64, args.episodes))


def judged(agent: GRPO, episodes: int, taste: float) -> dict[str, str]:
    """The agent's answers beside the start's, by several judges."""
    evaluator = Evaluator(agent.env, episodes)
    metrics, samples = evaluator.run(agent, greedy=False)
    gold_a, gold_b = (np.array([s["gold"] for s in some]) for some in (samples, start(evaluator, agent)))
    words_a, words_b = (
        np.array([len(s["completion"].split()) for s in some]) for some in (samples, start(evaluator, agent))
    )
    row: dict[str, Any] = {
        "gold": f"{gold_a.mean():.3f}",
        "words": f"{words_a.mean():.1f}",
        "KL, nats/seq": f"{metrics['kl_sequence']:.1f}",
        "wins by gold": shown(win_rate(outcomes(gold_a, gold_b))),
    }
    for name, preference in (("fair annotators", 0.0), ("length-loving", taste)):
        outcome = Annotators(length_preference=preference).probability(gold_a, gold_b, words_a, words_b)
        row[f"wins, {name}"] = shown(win_rate(outcome))
        row[f"controlled, {name}"] = shown(length_controlled_win_rate(outcome, words_a - words_b).win_rate)
    return row


def start(evaluator: Evaluator, agent: GRPO) -> list[dict[str, Any]]:
    reference = agent.policy.reference
    assert reference is not None
    return evaluator.start(reference)


def shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/length"), help="folder of reward models and runs")
    parser.add_argument("--preference", type=float, default=0.4, help="logits per word of those who like length")
    parser.add_argument("--prompts", type=int, default=400, help="prompts that a reward model learns from")
    parser.add_argument("--replaced-token-steps", type=int, default=100, help="updates of its pretraining")
    parser.add_argument("--eval-prompts", type=int, default=64, help="held-out prompts of a reward model")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each GRPO run")
    parser.add_argument("--kl-coef", type=float, default=0.02, help="of GRPO")
    parser.add_argument("--episodes", type=int, default=256, help="held-out posts of the comparison")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = {}
    for preference in (0.0, args.preference):
        agent = trained(args.out / f"preference-{preference:g}", preference, args)
        rows[f"{preference:g}"] = judged(agent, args.episodes, args.preference)
    table = Table("length preference", *(f"{name}" for name in rows))
    for measure in next(iter(rows.values())):
        table.add_row(measure, *(row[measure] for row in rows.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
