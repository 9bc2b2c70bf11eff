"""RLHF against RLAIF: one task, as many labels of simulated people and of an AI critic, and the gold score as a bound.

    python examples/rlhf_and_rlaif.py --out runs/rlaif

People are simulated annotators: fair ones, and ones who fear trigger words. The AI is the rule-based critic of
HelpfulHarmless-v0, with its errors, which compares by the principles of a constitution and stands for a language model
(Bai et al. 2022, arXiv:2212.08073; Lee et al. 2023, arXiv:2309.00267). All label the same pairs of the initial policy;
a reward model learns each set of labels, and GRPO each reward. `textrl-gym rlhf --by endpoint` asks a language model in
the same place. Stopped, the same command goes on.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from textrl_gym import files
from textrl_gym.data.labels import Item
from textrl_gym.experiments.compare import CompareConfig, compare
from textrl_gym.experiments.results import RESULT, finished_runs
from textrl_gym.feedback.answers import LabelFile
from textrl_gym.feedback.constitution import read_constitution
from textrl_gym.feedback.critics import CriticErrors, load_rule_critic
from textrl_gym.feedback.simulated import answer_all
from textrl_gym.judges.annotators import Annotators
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import load_env_task
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.recipes.constitutional import COMPARED, ConstitutionalConfig
from textrl_gym.recipes.critiques import judge_pairs
from textrl_gym.recipes.rounds import RoundsConfig, run_rounds
from textrl_gym.stats.estimates import difference_of_means

ENV = "HelpfulHarmless-v0"
AGENT = "grpo"
SETTINGS = {"rollout_episodes": 64, "group_size": 8, "minibatches": 2, "learning_rate": 7e-4, "kl_coef": 0.1}
PEOPLE = {"people": Annotators(bias=0.0), "people who fear words": Annotators()}
CRITIC, GOLD, START = "AI critic", "the gold score itself", "initial policy"
METRICS = ("gold", "helpful", "harmless", "refused_scary", "kl_sequence")
"""Of an evaluation, beside the accuracy of the reward model."""


def labeller(name: str, seed: int) -> Callable[[Sequence[Item], Path, dict[str, list[float]]], None]:
    """Who answers the questions into a file of labels."""

    def people(items: Sequence[Item], path: Path, appeals: dict[str, list[float]]) -> None:
        with LabelFile(path) as file:
            answer_all(items, file, PEOPLE[name], appeals, seed)

    def critic(items: Sequence[Item], path: Path, appeals: dict[str, list[float]]) -> None:
        rules = load_rule_critic(load_env_task(ENV), CriticErrors(seed=seed))
        judge_pairs(items, path, rules, read_constitution(), ConstitutionalConfig(seed=seed))

    return critic if name == CRITIC else people


def from_labels(name: str, seed: int, args: argparse.Namespace, reward_model: RewardModelConfig) -> dict[str, float]:
    """One round of RLHF: labels, a reward model and a policy; its last evaluation."""
    config = RoundsConfig(
        rounds=1, labels=args.labels, agent=AGENT, total_timesteps=args.tokens, set=settings(), seed=seed,
        eval_episodes=args.episodes,
    )  # fmt: skip
    out = args.out / name.replace(" ", "-") / str(seed)
    (done,) = run_rounds(ENV, config, reward_model, labeller(name, seed), out, progress_bar=False).rounds
    accuracy = {} if done.reward_accuracy is None else {"accuracy": done.reward_accuracy}
    return done.metrics | accuracy


def from_gold(agent: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """The gold score as the reward: what perfect labels without end would give; or the initial policy."""
    config = CompareConfig(
        agents=(agent,), seeds=args.seeds, total_timesteps=args.tokens, workers=1, eval_episodes=args.episodes,
        set=tuple(f"{AGENT}.{text}" for text in settings()) if agent == AGENT else (),
    )  # fmt: skip
    out, gold = args.out / agent, load_env_task(ENV).gold
    assert isinstance(gold, str)
    compare(ENV, config, out, progress_bar=False, env=EnvSettings(reward=gold))
    results: list[dict[str, float]] = [files.read_json(run / RESULT) for run in finished_runs(out)]
    return results


def settings() -> tuple[str, ...]:
    return tuple(f"{name}={value}" for name, value in SETTINGS.items())


def shown(values: Sequence[float]) -> str:
    """Mean and 95% interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    one = difference_of_means(values, 0.0)
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rlaif"))
    parser.add_argument("--labels", type=int, default=2000, help="pairs that each labels (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=15_000, help="of each training (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=256, help="held-out prompts (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=COMPARED.epochs, help="of a reward model (default: %(default)s)")
    args = parser.parse_args(argv)

    reward_model = RewardModelConfig(epochs=args.epochs, learning_rate=COMPARED.learning_rate)
    results: dict[str, list[dict[str, Any]]] = {START: from_gold("reference", args)}
    for name in (*PEOPLE, CRITIC):
        results[name] = [from_labels(name, seed, args, reward_model) for seed in range(args.seeds)]
    results[GOLD] = from_gold(AGENT, args)

    table = Table(title=f"{ENV}: {args.labels:,} labels, {args.seeds} seeds")
    for heading in ("labels of", "accuracy of the reward model", *METRICS):
        table.add_column(heading)
    for name, runs in results.items():
        columns = ([run[metric] for run in runs if metric in run] for metric in ("accuracy", *METRICS))
        table.add_row(name, *map(shown, columns))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
