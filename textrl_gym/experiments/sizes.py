"""Policies by size: pretrained, supervised and RLHF models of one world, by their win rate against reference texts.

The figure of Stiennon et al. 2020 (arXiv:2009.01325, figure 1) and of every lecture on RLHF, in small. For each size

    OUT/SIZE/pretrained   a new model learns texts of all embedded worlds, of mixed quality: OUT/corpus
    OUT/SIZE/sft          it learns the task's demonstrations, which are what people wrote here: mediocre
    OUT/SIZE/rlhf         a comparison of one agent with several seeds, from the supervised model
    OUT/reward_model      one for all sizes, trained on the choices of simulated annotators without a bias

and each is sampled on held-out prompts and compared with their demonstrations by the gold score. OUT/sizes.json has the
numbers. Stopped, the same call goes on.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from annotated_types import Ge

from textrl_gym import files, registry
from textrl_gym.bounds import check_settings
from textrl_gym.core import Row
from textrl_gym.evaluation.metrics import SHARE
from textrl_gym.experiments.compare import CompareConfig, compare
from textrl_gym.experiments.results import finished_runs
from textrl_gym.judges.judge import Answer, reward_of
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task, load_env_task
from textrl_gym.stats.estimates import Estimate, difference_of_means, outcomes
from textrl_gym.stats.pairwise import win_rate

if TYPE_CHECKING:
    from textrl_gym.policy.policy import Policy

RECORD = "sizes.json"
"""What came out."""
STAGES = ("pretrained", "sft", "rlhf")
"""In the order in which a model goes through them."""
SHAPES = {
    "s": {"hidden_size": 64, "intermediate_size": 192, "layers": 4, "heads": 1},
    "m": {"hidden_size": 128, "intermediate_size": 384, "layers": 4, "heads": 2},
    "l": {"hidden_size": 256, "intermediate_size": 768, "layers": 5, "heads": 4},
}
"""Settings of `SFTConfig`: about 0.3, 1 and 4 million parameters. Heads are 64 wide, which copying wants."""
CORPUS = {"train": 40_000, "validation": 512}
"""Rows of the pretraining texts."""


@dataclasses.dataclass(frozen=True)
class SizesConfig:
    """Which sizes, and how much work they may cost."""

    sizes: tuple[str, ...] = ("s", "m", "l")
    """Of s, m and l: about 0.3, 1 and 4 million parameters."""
    agent: str = "grpo"
    """The algorithm of RLHF."""
    seeds: Annotated[int, Ge(1)] = 3
    """Runs of it for each size."""
    total_timesteps: Annotated[int, Ge(1)] = 60_000
    """Generated tokens of a run."""
    set: tuple[str, ...] = ()
    """Settings of the agent as name=value, the value in JSON or plain: learning_rate=1e-4."""
    reward_model: Path | None = None
    """A reward model to take; None: one is trained on the samples of the middle one of the sizes."""
    eval_rows: Annotated[int, Ge(2)] = 512
    """Held-out prompts that every model is sampled on."""
    scale: Annotated[float, Ge(0)] = 1.0
    """Multiplies all training: 0.1 for a quick look."""
    workers: Annotated[int, Ge(0)] = 0
    """Runs at a time; 0: one for each core."""

    def __post_init__(self) -> None:
        check_settings(self)
        for size in self.sizes:
            if size not in SHAPES:
                raise registry.unknown("size", size, SHAPES)
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes: name some of {', '.join(SHAPES)}, each once, got {self.sizes}")


@dataclasses.dataclass(frozen=True)
class Point:
    """A model of a size after a stage."""

    size: str
    stage: str
    parameters: int
    gold: float
    """Mean over the prompts, and over seeds where there are several."""
    win_rate: Estimate
    """Against the demonstrations, by the gold score, a tie half a win. The interval is over prompts; of RLHF with
    several seeds it is over seeds."""


@dataclasses.dataclass(frozen=True)
class SizesResult:
    """What came out."""

    env_id: str
    folder: Path
    reference_gold: float
    """Mean gold score of the demonstrations."""
    points: list[Point]


def run_sizes(env_id: str, config: SizesConfig, out: str | Path, progress_bar: bool = True) -> SizesResult:
    """Train what is left of every size and stage, and compare all with the reference texts.

    Args:
        env_id: an environment with a `recipe`.
        out: the folder; the same one goes on.

    Raises:
        ValueError: the environment has no recipe, or the folder holds other settings.
        RuntimeError: a run of RLHF failed.
    """
    env_id, out = registry.find_env(env_id), Path(out)
    task = load_env_task(env_id)
    if not _has_sizes(task) or task.gold is None or not hasattr(task, "demonstrations"):
        able = [name for name in sorted(registry.env_ids()) if _has_sizes(load_env_task(name))]
        raise ValueError(f"{env_id} has no recipe for models of several sizes; these have: {', '.join(able)}")
    if not (out / "corpus").is_dir():
        write_corpus(env_id, task, out / "corpus")
    for size in config.sizes:
        _say(progress_bar, f"{size}: pretraining, and supervised learning of the demonstrations")
        train_supervised(env_id, task, size, config, out)
    reward_model = config.reward_model or train_reward(env_id, task, config, out)
    for size in config.sizes:
        _say(progress_bar, f"{size}: {config.agent}, {config.seeds} seeds")
        run_agent(env_id, size, config, reward_model, out, progress_bar)
    return measure(env_id, task, config, out)


def _has_sizes(task: Task) -> bool:
    # Of a conversation there is no reward model, nor a text to pretrain on.
    return "fluent" in task.recipe and not task.replies_to_turns


def _say(progress_bar: bool, words: str) -> None:
    if progress_bar:
        print(words, flush=True)


# -- pretraining texts ------------------------------------------------------------------------------------------------


def corpus_rows(env_id: str, task: Task, split: str, seed: int) -> Iterator[Row]:
    """Texts as a web has them, without end: half of them of other worlds, and not all of them good.

    Of those of the task's world half are as a competent writer continues them, a quarter as the demonstrations do, and
    a quarter with the continuation of another prompt.
    """
    rng = random.Random(f"corpus {split} {seed}")
    others = [load_env_task(name) for name in sorted(registry.env_ids()) if name != env_id]
    sources = [other.references(split) for other in others if _has_sizes(other)]
    own, mediocre = task.references(split), cast("Any", task).demonstrations(split)
    while True:
        chance = rng.random()
        if sources and chance < 0.5:
            source = rng.choice(sources)
            yield _written(source[rng.randrange(len(source))], rng)
        elif chance < 0.75:
            yield _written(own[rng.randrange(len(own))], rng)
        elif chance < 0.875:
            yield _written(mediocre[rng.randrange(len(mediocre))], rng)
        else:
            prompt, other_row = (own[rng.randrange(len(own))] for _ in range(2))
            yield {**_written(other_row, rng), "prompt": prompt["prompt"]}


def _written(row: Row, rng: random.Random) -> dict[str, str]:
    """A row's prompt and one of its completions."""
    texts = row.get("completions") or [row["completion"]]
    return {"prompt": row["prompt"], "completion": rng.choice(texts)}


def write_corpus(env_id: str, task: Task, folder: Path, seed: int = 0) -> None:
    """Write the pretraining texts as a folder of data: train.jsonl, validation.jsonl."""
    folder.mkdir(parents=True)
    for split, count in CORPUS.items():
        rows = corpus_rows(env_id, task, split, seed)
        lines = "".join(json.dumps(next(rows)) + "\n" for _ in range(count))
        files.write_text(folder / f"{split}.jsonl", lines)


# -- training ---------------------------------------------------------------------------------------------------------


def _scaled(steps: int, config: SizesConfig) -> int:
    return max(1, round(steps * config.scale))


def train_supervised(env_id: str, task: Task, size: str, config: SizesConfig, out: Path) -> None:
    """Pretrain a model of a size on the corpus, and fine-tune it on the demonstrations."""
    from textrl_gym.pipeline.sft import SFTConfig, sft

    # The task's own tokenizer: its budgets are in tokens of it. Prompts of other worlds that do not fit are left out.
    corpus = EnvSettings(dataset=str(out / "corpus"), tokenizer=task.model, bad_rows="skip")
    shape: dict[str, Any] = dict(task.recipe["fluent"]) | SHAPES[size]
    shape.pop("vocab_size", None)
    shape["steps"] = _scaled(shape.get("steps", SFTConfig.steps), config)
    sft(env_id, SFTConfig(**shape), out / size / "pretrained", corpus)
    tuning = dict(task.recipe.get("policy", {}))
    tuning["steps"] = _scaled(tuning.get("steps", SFTConfig.steps), config)
    sft(env_id, SFTConfig(model=str(out / size / "pretrained"), **tuning), out / size / "sft")


def train_reward(env_id: str, task: Task, config: SizesConfig, out: Path) -> Path:
    """Train the one reward model on the choices of annotators without a bias; returns its folder."""
    from textrl_gym.judges.annotators import Annotators
    from textrl_gym.pipeline.reward_data import RewardModelConfig
    from textrl_gym.pipeline.reward_model import train_reward_model

    size = config.sizes[len(config.sizes) // 2]
    recipe = next((dict(values) for name, values in task.recipe.items() if name not in ("fluent", "policy")), {})
    for name, usual in (("prompts", RewardModelConfig.prompts), ("replaced_token_steps", 900)):
        recipe[name] = _scaled(recipe.get(name, usual), config)
    recipe["annotators"] = Annotators(bias=0.0)
    models = {"model": str(out / size / "pretrained"), "policy": str(out / size / "sft")}
    train_reward_model(env_id, RewardModelConfig(**(recipe | models)), out / "reward_model")
    return out / "reward_model"


def run_agent(env_id: str, size: str, config: SizesConfig, reward_model: Path, out: Path, progress_bar: bool) -> None:
    """RLHF of a size's supervised model with every seed."""
    settings = CompareConfig(
        agents=(config.agent,),
        seeds=config.seeds,
        total_timesteps=_scaled(config.total_timesteps, config),
        set=tuple(f"{config.agent}.{text}" for text in config.set),
        model=str(out / size / "sft"),
        eval_episodes=min(config.eval_rows, 256),
        workers=config.workers,
    )
    env = EnvSettings(reward=f"reward_model:{reward_model}", tokenizer=str(out / size / "sft"))
    compare(env_id, settings, out / size / "rlhf", progress_bar, env=env)
    finished_runs(out / size / "rlhf")


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(env_id: str, task: Task, config: SizesConfig, out: Path) -> SizesResult:
    """Sample every model on the same held-out prompts and compare it with their demonstrations."""
    from textrl_gym.policy.policy import Policy

    source = cast("Any", task).demonstrations("test")
    rows = [source[number] for number in range(config.eval_rows)]
    reference_N = gold_of(task, rows, [row["completion"] for row in rows])
    points = []
    for size in config.sizes:
        for stage in STAGES[:2]:
            policy = Policy(cast("Any", task.load_model(str(out / size / stage))))
            gold_N = sampled_gold(policy, task, rows, 0)
            count = sum(parameter.numel() for parameter in policy.model.parameters())
            rate = win_rate(outcomes(gold_N, reference_N))
            points.append(Point(size, stage, count, float(gold_N.mean()), rate))
        golds, rates = [], []
        for seed, run in enumerate(finished_runs(out / size / "rlhf")):
            gold_N = sampled_gold(registry.load_agent(run, device="cpu").policy, task, rows, seed)
            golds.append(float(gold_N.mean()))
            rates.append(outcomes(gold_N, reference_N))
        rate = of_seeds([float(one.mean()) for one in rates]) if len(rates) > 1 else win_rate(rates[0])
        points.append(Point(size, "rlhf", points[-1].parameters, float(np.mean(golds)), rate))
    result = SizesResult(env_id, out, float(reference_N.mean()), points)
    record = {"environment": env_id, "config": dataclasses.asdict(config), "reference_gold": result.reference_gold}
    record["points"] = [dataclasses.asdict(point) for point in points]
    files.write_text(out / RECORD, json.dumps(record, indent=1, default=str) + "\n")
    return result


def of_seeds(rates: Sequence[float]) -> Estimate:
    """The mean of win rates with its interval over seeds, on the scale of win rates."""
    return difference_of_means(rates, 0.0).within(SHARE)


def gold_of(task: Task, rows: Sequence[Row], texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The gold score of a completion for each row. [N]"""
    from textrl_gym.rewards import load_reward

    assert task.gold is not None
    scorer = load_reward(task.gold, task=task, tokenizer=task.load_tokenizer())
    return reward_of(scorer, rows, [Answer(text) for text in texts]).double().numpy()


def sampled_gold(policy: Policy, task: Task, rows: Sequence[Row], seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The gold score of one sample for each row at temperature 1. [N]"""
    from textrl_gym.pipeline.simulated_comparisons import decode, sample_texts

    tokenizer = task.load_tokenizer()
    samples = sample_texts(policy, task, tokenizer, rows, 1, 1.0, seed)
    return gold_of(task, rows, [decode(tokenizer, ids) for (ids,) in samples])
