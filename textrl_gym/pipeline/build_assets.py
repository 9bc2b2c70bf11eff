"""Rebuild the embedded models of the environments: `python -m textrl_gym.pipeline.build_assets [--env ENV ...]`

Each step uses what the command line has for users (`textrl-gym sft`, `textrl-gym reward-model`), with the settings of
the task's `recipe`:
1. "fluent": a model learns the task's `references`, from scratch. It is not bundled.
2. "policy": the fluent model unlearns on the task's poor `demonstrations`, so that RL has room but the model can do
   better. A model that is poor from the beginning could not.
3. "reward_model", and any other name: the fluent model's body, pretrained on replaced tokens where the task can corrupt
   its texts, and then trained on comparisons of the policy's samples and the task's candidates.
4. A name whose settings have "learns" is a language model of its own, which learns the rows that the task's method of
   that name gives, from scratch: a model that answers questions, say, which a reward asks.
Weights are stored as float16, which halves the package. The same seed gives the same files on the same machine with the
same number of threads; elsewhere sums are rounded differently and the measurements differ a little.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import tyro

from textrl_gym import files, registry
from textrl_gym.bounds import Seed
from textrl_gym.core import PromptSource
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task, load_env_task
from textrl_gym.mdp.text_env import vector_env
from textrl_gym.models import loading
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.reward_model import train_reward_model
from textrl_gym.pipeline.sft import LEARNT, SFTConfig, sft
from textrl_gym.pipeline.simulated_comparisons import decode, sample_texts
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import load_reward, reward_model
from textrl_gym.rollouts.collect import collect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFERENCES = 60_000
"""Rows that the fluent model may see, where its recipe does not say; 4,500 updates of 12 draw 54,000 of them, with
repetition."""
KEPT = frozenset({"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"})
"""Of a policy's folder, beside the record; a reward model's has its normalisation too."""


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """Settings of the rebuild."""

    env: tuple[str, ...] = ()
    """Environments; none: all that have a recipe."""
    out: Path | None = None
    """A folder for policy/, reward_model/ and so on, of one environment; None: the package's own."""
    work: Path | None = None
    """Where the models are trained, and found again by the next build; None: a temporary folder."""
    seed: Seed = 0
    """Seeds everything."""

    def __post_init__(self) -> None:
        if self.out is not None and len(self.env) != 1:
            raise ValueError(f"out is the folder of one environment: name it with --env, got {self.env}")


def write_references(
    task: Task, folder: Path, rows: int, of_split: Callable[[str], PromptSource] | None = None
) -> Path:
    """A task's references, or other rows of it, as a user's folder of data: train.jsonl, validation.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", 256)):
        source = (of_split or task.references)(split)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(count):
                columns = ("prompt", *LEARNT)
                row = {name: value for name, value in source[index].items() if name in columns}
                file.write(json.dumps(row) + "\n")
    return folder


def initial_policy_quality(task: Task, folder: Path, prompts: int = 128, seed: int = 0) -> dict[str, float]:
    """Gold of the initial policy on held-out prompts: of samples, greedy, and the best of 8 samples."""
    assert task.gold is not None, "a task with a recipe has a gold score"
    tokenizer = task.load_tokenizer(str(folder))
    source = task.rows("validation")
    rows = [source[i] for i in range(prompts)]
    policy = Policy(cast("Any", task.load_model(str(folder))))
    gold_score = load_reward(task.gold, task=task, tokenizer=tokenizer)

    def gold(number: int, temperature: float) -> list[list[float]]:
        completions = sample_texts(policy, task, tokenizer, rows, number, temperature, seed)
        texts = [decode(tokenizer, ids) for some in completions for ids in some]
        spread = [row for row in rows for _ in range(number)]
        columns = {name: [row[name] for row in spread] for name in rows[0] if name != "prompt"}
        flat = gold_score([row["prompt"] for row in spread], texts, **columns).tolist()
        return [flat[start : start + number] for start in range(0, len(flat), number)]

    # Best of 8 says what the policy can do at its luckiest, and so how much RL has to gain.
    sampled = gold(8, 1.0)
    return {
        "greedy_gold": sum(map(sum, gold(1, 0.0))) / prompts,
        "sampled_gold": sum(map(sum, sampled)) / (8 * prompts),
        "best_of_8_gold": sum(map(max, sampled)) / prompts,
    }


def initial_dialogue_quality(env_id: str, folder: Path, prompts: int = 128, seed: int = 0) -> dict[str, float]:
    """The same of a conversation, and what its turns are rewarded with, of samples."""
    task = load_env_task(env_id)
    assert task.gold is not None, "a task with a recipe has a gold score"
    env = vector_env(
        env_id, num_envs=prompts, split="validation", tokenizer=str(folder), reward=task.gold, array="torch"
    )
    policy = Policy(cast("Any", task.load_model(str(folder))))
    generator = torch.Generator().manual_seed(seed)
    play = functools.partial(collect, env, policy, kl_coef=0.0, prompt_indices=np.arange(prompts))
    sampled = [play(generator=generator) for _ in range(8)]
    gold_8B = torch.stack([rollout.score_B for rollout in sampled])
    rewards = [float((rollout.outcome_B - rollout.score_B).mean()) for rollout in sampled]
    return {
        "greedy_gold": float(play(greedy=True).score_B.mean()),
        "sampled_gold": float(gold_8B.mean()),
        "best_of_8_gold": float(gold_8B.amax(0).mean()),
        "sampled_turn_rewards": sum(rewards) / len(rewards),
    }


def store(source: Path, folder: Path, record_file: str, **measured: float) -> dict[str, Any]:
    """Store a trained model with its weights as float16, without what a run needs; returns its completed record."""
    is_reward_model = (source / reward_model.NORMALISATION_FILE).is_file()
    file_names = KEPT | ({reward_model.NORMALISATION_FILE} if is_reward_model else set())
    loaded = loading.load_classifier(source) if is_reward_model else loading.load_model(source)
    record = files.read_json(source / record_file)
    record["measured"] |= measured
    # Where the build happened to stand says nothing to anyone.
    record["config"] |= {name: None for name in ("model", "policy", "dataset") if name in record["config"]}
    record.pop("env", None)
    folder.mkdir(parents=True, exist_ok=True)
    for name in file_names:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    with loading.no_bars():
        # textrl_gym.models.loading loads them as float32
        cast("PreTrainedModel", loaded).half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / record_file).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({str(folder): record["measured"]}, indent=2), flush=True)
    return record


def build(env_id: str, config: BuildConfig, work: Path) -> dict[str, Any]:
    """Make an environment's models; returns their records by folder."""
    task = load_env_task(env_id)
    out = config.out or Path(task.model).parent
    fluent, policy = work / "fluent", work / "policy"
    settings = {name: dict(values) for name, values in task.recipe.items()}
    references = work / "references"
    rows = settings["fluent"].pop("references", REFERENCES)
    if not references.is_dir():
        write_references(task, references, rows)
    # Each is left as it is where it is finished, and goes on where it was stopped.
    sft(env_id, SFTConfig(seed=config.seed, **settings.pop("fluent")), fluent, EnvSettings(dataset=str(references)))
    sft(env_id, SFTConfig(model=str(fluent), seed=config.seed, **settings.pop("policy")), policy)
    quality = (
        initial_dialogue_quality(env_id, policy) if task.replies_to_turns else initial_policy_quality(task, policy)
    )
    records = {"policy": store(policy, out / "policy", "sft.json", **quality)}
    for name, values in settings.items():
        if "learns" in values:
            records[name] = _build_reader(task, name, values, config.seed, work, out)
            continue
        judging = RewardModelConfig(model=str(fluent), policy=str(policy), seed=config.seed, **values)
        train_reward_model(env_id, judging, work / name)
        records[name] = store(work / name, out / name, "reward_training.json")
    return records


def _build_reader(task: Task, name: str, values: dict[str, Any], seed: int, work: Path, out: Path) -> dict[str, Any]:
    """A language model that learns rows of its own, whose prompts hold a completion of the policy's."""
    rows, learns = values.pop("references", REFERENCES), values.pop("learns")
    data = work / f"{name}_rows"
    if not data.is_dir():
        write_references(task, data, rows, getattr(task, learns))
    # The recipe may name a seed of its own, so that such a model does not begin as the policy did.
    config = SFTConfig(**{"seed": seed, **values})
    longest = EnvSettings(dataset=str(data), max_prompt_tokens=task.max_prompt_tokens + task.max_new_tokens)
    sft(task.id, config, work / name, longest)
    return store(work / name, out / name, "sft.json")


def main(config: BuildConfig) -> None:
    """Build the environments that are named, or all that have a recipe."""
    env_ids = config.env or [env_id for env_id in registry.env_ids() if load_env_task(env_id).recipe]
    with tempfile.TemporaryDirectory() as scratch:
        for env_id in env_ids:
            build(registry.find_env(env_id), config, (config.work or Path(scratch)) / env_id)


if __name__ == "__main__":
    main(tyro.cli(BuildConfig))
