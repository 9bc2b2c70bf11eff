"""Constitutional AI (Bai et al. 2022, arXiv:2212.08073): harmlessness from principles and a critic, without labels.

    OUT/answers.jsonl      the initial policy's answers, a share of them to red-team prompts
    OUT/revisions.jsonl    critiques and revisions of these, each by a principle
    OUT/demonstrations     what is learnt: the last revisions, and the other answers as they are
    OUT/sft/SEED           supervised models
    OUT/questions.jsonl    pairs of answers of the first of them
    OUT/preferences.jsonl  which one the critic prefers, by one principle: labels as `annotate` writes them
    OUT/reward_model       trained on these
    OUT/policy             a comparison of one agent with several seeds, from the first supervised model
    OUT/held-out           what each stage's models write on held-out prompts
    OUT/constitutional.json, OUT/report.html

Stopped anywhere, the same call goes on. Departures from the paper: a preference is a verdict in both orders, and no
probability (section 4.1), so that a principle may leave a tie, which the next one breaks; help has no human labels of
its own, the same critic judges it; only the last revision of an answer is learnt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le

from textrl_gym import files, registry
from textrl_gym.bounds import Seed, check_settings
from textrl_gym.data.labels import Label, read_labels
from textrl_gym.experiments.compare import CompareConfig, compare
from textrl_gym.experiments.results import finished_runs
from textrl_gym.feedback.constitution import Constitution, read_constitution
from textrl_gym.feedback.critics import Critic
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import Task
from textrl_gym.persistence import run_lock
from textrl_gym.pipeline.reward_data import RewardModelConfig
from textrl_gym.pipeline.reward_ensemble import train_rewards
from textrl_gym.pipeline.sft import SFTConfig, sft
from textrl_gym.recipes import critiques, stages
from textrl_gym.recipes.rounds import hold_settings
from textrl_gym.recipes.stages import Stage

RECORD = "constitutional.json"
"""The stages in numbers, in the folder."""
REWARD_MODEL = "reward_model"
SUPERVISED = SFTConfig(epochs=2.0, learning_rate=5e-4, batch_size=24)
"""Of the supervised stage where nothing else is asked for: as the embedded models want it. Those of 100 million
parameters and more want a learning rate of 1e-5 to 5e-5."""

COMPARED = RewardModelConfig(epochs=3, learning_rate=3e-4)
"""Of the reward model where nothing else is asked for. Three passes: after one over 2,074 decided pairs the order of
227 held-out ones was right in 0.62, after three in 0.72."""


@dataclasses.dataclass(frozen=True)
class ConstitutionalConfig:
    """How much work each stage may cost."""

    constitution: Path | None = None
    """A TOML file of principles; None: ours, on harm, reasons, help, over-refusal, honesty and clarity."""
    model: str | None = None
    """The initial policy: a Hub id or a folder; None: the environment's own."""
    prompts: Annotated[int, Ge(20)] = 1500
    """Prompts that it answers, for the supervised stage."""
    red_team_share: Annotated[float, Ge(0), Le(1)] = 0.5
    """Of red-team prompts among them, whose answers are criticised and revised. They are those whose column `label`
    says unsafe; where there is no such column all are."""
    revisions: Annotated[int, Ge(1)] = 4
    """Critiques and revisions of each of these answers, one after the other, each by another principle."""
    pairs: Annotated[int, Ge(20)] = 3000
    """Pairs of answers of the supervised model that the critic compares."""
    pair_principles: Annotated[int, Ge(1)] = 6
    """A pair that one principle leaves a tie is compared by the next one in a random order, at most so many times."""
    agent: str = "grpo"
    """The algorithm of the RL stage."""
    total_timesteps: Annotated[int, Ge(1)] = 20_000
    """Generated tokens of each of its runs."""
    set: tuple[str, ...] = ()
    """Settings of the agent as name=value, the value in JSON or plain: learning_rate=1e-4."""
    seeds: Annotated[int, Ge(1)] = 3
    """Runs of the RL stage, and of the supervised one. The reward model is one, and the RL runs begin with the first
    supervised model: their intervals say nothing of what other answers and other labels would give."""
    eval_rows: Annotated[int, Ge(32)] = 512
    """Held-out prompts that every model is sampled on."""
    workers: Annotated[int, Ge(0)] = 0
    """RL runs at a time; 0: one for each core."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: Seed = 0
    """Seeds prompts, samples, principles and the supervised models."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class ConstitutionalResult:
    """What came out."""

    env_id: str
    folder: Path
    critic: str
    counts: dict[str, float]
    """Of the data: answers, criticised, changed by revision, preferences, ties, and so on."""
    stages: list[Stage]


def run_constitutional(
    env_id: str,
    config: ConstitutionalConfig,
    sft_config: SFTConfig,
    reward_config: RewardModelConfig,
    make_critic: Callable[[], Critic],
    out: str | Path,
    env: EnvSettings | None = None,
    progress_bar: bool = True,
) -> ConstitutionalResult:
    """Run what is left of the stages.

    Args:
        env_id: a registered environment.
        sft_config: of the supervised stage; its model and seed are those of `config`.
        reward_config: of the reward model; where it names no model its body is the first supervised one.
        make_critic: loads or connects the critic; called once.
        out: the folder; the same one goes on.
        env: prompts and budgets, where they are not the task's own.

    Raises:
        ValueError: settings that do not fit, a bad constitution, or a folder of other settings or of another process.
        RuntimeError: a run of the agent failed.
        EndpointError: the critic's endpoint failed for good.
    """
    env_id, out, env = registry.find_env(env_id), Path(out), env or EnvSettings()
    constitution, task = read_constitution(config.constitution), env.task(env_id)
    if sft_config.model is not None or reward_config.dataset:
        name = "--sft.model: name --model" if sft_config.model else "--reward-model.dataset: pairs are made here"
        raise ValueError(f"leave out {name}")
    critic = make_critic()
    critic.check(constitution)
    with run_lock.alone(out):
        _hold(out, env_id, config, sft_config, reward_config, constitution, critic, env)
        _say(progress_bar, f"answers to {config.prompts:,} prompts")
        answers = critiques.write_answers(env_id, config, out, env)
        _say(progress_bar, f"critiques and revisions by {critic.name}")
        revisions = critiques.write_revisions(critic, constitution, config, answers, out)
        data = critiques.write_demonstrations(answers, revisions, out)
        _say(progress_bar, f"supervised learning, {config.seeds} seeds")
        models = [train_sft(env_id, task, config, sft_config, seed, data, out, env) for seed in range(config.seeds)]
        _say(progress_bar, f"{config.pairs:,} pairs of answers, and preferences of {critic.name}")
        items = critiques.write_questions(env_id, str(models[0]), config, out, env)
        critiques.judge_pairs(items, out / critiques.PREFERENCES, critic, constitution, config)
        _say(progress_bar, "reward model")
        rewards = dataclasses.replace(
            reward_config,
            model=reward_config.model or str(models[0]),
            dataset=(str(out / critiques.PREFERENCES),),
            seed=config.seed,
        )
        train_rewards(env_id, rewards, out / REWARD_MODEL, _as_written(env))
        _say(progress_bar, f"{config.agent}, {config.seeds} seeds")
        train_policies(env_id, config, models[0], out, env, progress_bar)
        _say(progress_bar, f"every stage on {config.eval_rows} held-out prompts")
        measured = measure(task, config, models, out, env)
        labels = read_labels(out / critiques.PREFERENCES)
        result = ConstitutionalResult(env_id, out, critic.name, counts_of(answers, revisions, labels), measured)
        write_record(result, config, constitution)
        return result


def _say(progress_bar: bool, words: str) -> None:
    if progress_bar:
        print(words, flush=True)


def _hold(
    out: Path,
    env_id: str,
    config: ConstitutionalConfig,
    sft_config: SFTConfig,
    reward_config: RewardModelConfig,
    constitution: Constitution,
    critic: Critic,
    env: EnvSettings,
) -> None:
    """Hold that the folder was begun with the same settings and the same principles."""
    asked: dict[str, Any] = {"environment": env_id, "config": dataclasses.asdict(config)}
    # The words of the principles count, and not where they stand; how many runs are side by side changes nothing.
    asked["config"] = {k: v for k, v in asked["config"].items() if k not in ("constitution", "workers")}
    asked |= {"principles": {one.name: dataclasses.asdict(one) for one in constitution}}
    asked |= {"critic": dict(critic.settings), "sft": dataclasses.asdict(sft_config)}
    asked |= {"reward_model": dataclasses.asdict(reward_config), "env": dataclasses.asdict(env)}
    hold_settings(out, asked)


# -- training ----------------------------------------------------------------------------------------------------------


def _as_written(env: EnvSettings) -> EnvSettings:
    """For data that were written here, whose conversations hold the system prompt and the examples already."""
    return dataclasses.replace(env, system_prompt=None, few_shot=None)


def train_sft(
    env_id: str,
    task: Task,
    config: ConstitutionalConfig,
    sft_config: SFTConfig,
    seed: int,
    data: Path,
    out: Path,
    env: EnvSettings,
) -> Path:
    """Fine-tune the initial policy on the demonstrations; returns the model's folder."""
    folder = out / "sft" / str(seed)
    own = dataclasses.replace(sft_config, model=config.model or task.model, seed=config.seed + seed)
    sft(env_id, own, folder, dataclasses.replace(_as_written(env), dataset=str(data), split="train"))
    return folder


def train_policies(
    env_id: str, config: ConstitutionalConfig, model: Path, out: Path, env: EnvSettings, progress_bar: bool
) -> None:
    """RL from a supervised model on the reward model, with every seed."""
    settings = CompareConfig(
        agents=(config.agent,),
        seeds=config.seeds,
        total_timesteps=config.total_timesteps,
        set=tuple(f"{config.agent}.{text}" for text in config.set),
        model=str(model.resolve()),
        eval_episodes=min(config.eval_rows, 256),
        device=config.device,
        workers=config.workers,
    )
    own = dataclasses.replace(
        env, reward=f"reward_model:{(out / REWARD_MODEL).resolve()}", tokenizer=str(model.resolve())
    )
    compare(env_id, settings, out / "policy", progress_bar, env=own)
    finished_runs(out / "policy")


# -- numbers -----------------------------------------------------------------------------------------------------------


def measure(
    task: Task, config: ConstitutionalConfig, models: Sequence[Path], out: Path, env: EnvSettings
) -> list[Stage]:
    """Sample every stage's models on the same held-out prompts, as far as that is not done, and measure them."""
    tokenizer = task.load_tokenizer(env.tokenizer or config.model)
    rows = stages.heldout_rows(task, env, tokenizer, config.eval_rows)
    runs = finished_runs(out / "policy")
    loads: dict[str, list[Callable[[], Any]]] = {
        stages.INITIAL: [partial(stages.model_policy, task, config.model, config.device)],
        stages.SFT: [partial(stages.model_policy, task, str(model), config.device) for model in models],
        stages.POLICY: [partial(stages.run_policy, run, config.device) for run in runs],
    }
    texts: dict[str, list[list[str]]] = {}
    for name, of_stage in loads.items():
        for seed, load in enumerate(of_stage):
            file = heldout_file(out, name, seed)
            if not stages.is_done(file, len(rows)):
                stages.write_heldout(load(), task, tokenizer, rows, seed, file)
            lines = files.read_json_lines(file)
            texts.setdefault(name, []).append([line["completion"] for line in lines])
    return stages.stages_of(task, env.dataset is None, rows, texts)


def heldout_file(out: Path, stage: str, seed: int) -> Path:
    """What a model wrote on the held-out prompts."""
    return out / stages.HELD_OUT / f"{stage}-{seed}.jsonl"


def counts_of(
    answers: Sequence[dict[str, Any]], revisions: Sequence[dict[str, Any]], labels: Sequence[Label]
) -> dict[str, float]:
    """What the data are: how many answers were criticised and changed, how many pairs the critic decided."""
    first = {line["id"]: line["answer"] for line in revisions if line["number"] == 1}
    last = {line["id"]: line["revision"] for line in revisions}
    decided = [label for label in labels if label.ranks is not None and len(set(label.ranks)) > 1]
    counts: dict[str, float] = {
        "answers": len(answers),
        "criticised": len(first),
        "changed": sum(last[number] != text for number, text in first.items()),
        "pairs": len(labels),
        "decided": len(decided),
        "ties": sum(label.ranks is not None and len(set(label.ranks)) == 1 for label in labels),
        "no_verdict": sum(label.ranks is None for label in labels),
    }
    known = [label for label in decided if label.gold is not None and label.gold[0] != label.gold[1]]
    if known:
        # Rank 1 is the best: the order of gold scores is the reverse of that of ranks.
        right = sum((one.gold[0] > one.gold[1]) == (one.ranks[0] < one.ranks[1]) for one in known)  # type: ignore[index]
        counts["gold_agreement"] = right / len(known)
    return counts


def write_record(result: ConstitutionalResult, config: ConstitutionalConfig, constitution: Constitution) -> None:
    """Write the numbers."""
    record: dict[str, Any] = {"environment": result.env_id, "config": dataclasses.asdict(config)}
    record |= {"critic": result.critic, "principles": [dataclasses.asdict(one) for one in constitution]}
    record |= {"counts": result.counts, "stages": [dataclasses.asdict(stage) for stage in result.stages]}
    files.write_text(result.folder / RECORD, json.dumps(record, indent=1, default=str) + "\n")
