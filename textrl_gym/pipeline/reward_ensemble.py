"""Reward-model ensembles: several reward models trained on the same comparisons, and measured on held-out ones.

Member i is the reward model of `seed + i`: another head, other corrupted texts in `pipeline.replaced_tokens`, and the
same comparisons in another order; member 0 is the model that is trained without --ensemble. All begin with one body, so
that what its pretraining got wrong is wrong in all of them: Eisenstein et al. 2023 (arXiv:2312.09244) found that
ensembles of several pretrainings do better than those that differ by the fine-tuning seed only, and that both leave
hacks that all members share. For the former, train members with --model, --seed and --data-seed each, and list their
folders in an ensemble.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from textrl_gym import files, processes
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.models import loading
from textrl_gym.persistence import run_lock
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.pipeline.reward_data import RewardData, RewardModelConfig, gather
from textrl_gym.pipeline.reward_metrics import accuracy_row, gaps, gold_agreement, score_all
from textrl_gym.pipeline.reward_model import TRAINING_RECORD, read_record, train_on, train_reward_model
from textrl_gym.pipeline.trainer import finished_record, settings_of, write_run
from textrl_gym.rewards import ensemble, reward_model

ENSEMBLE_RECORD = "ensemble_training.json"
"""Settings and measurements, in an ensemble's folder."""

CompletionScores = list[list[float]]
"""Of each completion of each prompt."""


def train_rewards(
    env_id: str,
    config: RewardModelConfig,
    out: str | Path,
    env: EnvSettings | None = None,
    save: SaveOptions | None = None,
) -> dict[str, Any]:
    """A single reward model, or an ensemble where config.ensemble says so; returns the record of the work.

    Raises:
        ValueError: as of either; or the folder holds the other kind.
    """
    out = Path(out)
    kind, train, other = "a reward model", train_reward_model, ensemble.ENSEMBLE_FILE
    if config.ensemble:
        kind, train, other = "an ensemble", train_ensemble, reward_model.NORMALISATION_FILE
    # A folder with both would be read as the one or the other by what is looked for first.
    if (out / other).is_file():
        raise ValueError(f"{str(out)!r} holds {other}, so {kind} cannot be written to it: name another --out")
    return train(env_id, config, out, env, save)


def train_ensemble(
    env_id: str,
    config: RewardModelConfig,
    out: str | Path,
    env: EnvSettings | None = None,
    save: SaveOptions | None = None,
) -> dict[str, Any]:
    """Train the members that are missing, and write `ensemble.json` and `ensemble_training.json`.

    Args:
        env_id, env, save: as of `train_reward_model`.
        out: the folder; members are its subfolders 0, 1, ... The same call goes on where the last one was stopped.

    Raises:
        ValueError: as of `train_reward_model`; or the folder holds another training's members.
    """
    out, env, save = Path(out), env or EnvSettings(), save or SaveOptions()
    if processes.size() > 1:
        raise ValueError(
            f"ensemble={config.ensemble} is trained in one process: leave it out, or start without torchrun"
        )
    data_seed = config.seed if config.data_seed is None else config.data_seed
    single = dataclasses.replace(config, ensemble=0, combine="mean", coefficient=ensemble.COEFFICIENT)
    members = {
        str(i): dataclasses.replace(single, seed=config.seed + i, data_seed=data_seed) for i in range(config.ensemble)
    }
    with run_lock.alone(out):
        missing = {
            name: member
            for name, member in members.items()
            if finished_record(out / name, TRAINING_RECORD, env_id, env, member, read_record) is None
        }
        files.check_free(out, "reward-model")
        write_run(out, "reward-model", settings_of(env_id, env, config), save)
        data = gather(env_id, config, env)
        if missing:
            # Simulated comparisons are sampled as they are read; each member needs all of them again.
            data.train = list(data.train)
        for name, member in missing.items():
            with run_lock.alone(out / name):
                train_on(data, member, out / name, save)
        record = {
            "environment": env_id,
            "env": dataclasses.asdict(env),
            "config": dataclasses.asdict(config),
            **measure_ensemble([out / name for name in members], data, config),
        }
        settings = {"members": list(members), "combine": config.combine, "coefficient": config.coefficient}
        text = json.dumps(record, indent=2)
        files.write_text(out / ENSEMBLE_RECORD, text + "\n")
        # Last: with it the folder is an ensemble.
        files.write_text(out / ensemble.ENSEMBLE_FILE, json.dumps(settings, indent=2) + "\n")
    return json.loads(text)


# -- measuring --------------------------------------------------------------------------------------------------------


def normalised(folder: Path, comparisons: Sequence[RankedCompletions]) -> CompletionScores:
    """A saved reward model's normalised scores."""
    # Raw rewards of two members have other zeros and other scales; their spread would mean nothing.
    norm = reward_model.read_normalisation(folder / reward_model.NORMALISATION_FILE)
    raw = score_all(loading.load_classifier(folder), comparisons)
    return [[(value - norm["bias"]) * norm["scale"] for value in row] for row in raw]


def stacked(of_members: Sequence[CompletionScores]) -> Tensor:
    """Members' scores as [M, completions]."""
    return torch.tensor([[value for row in scores for value in row] for scores in of_members])


def combined(of_members: Sequence[CompletionScores], how: str, coefficient: float) -> CompletionScores:
    """The members' scores as one."""
    flat = iter(ensemble.combine(stacked(of_members), how, coefficient).tolist())
    return [[next(flat) for _ in row] for row in of_members[0]]


def measure_ensemble(folders: Sequence[Path], data: RewardData, config: RewardModelConfig) -> dict[str, Any]:
    """The accuracy of members and combinations on all held-out pairs, and how far members are apart.

    Apart: the standard deviation of their normalised scores of one completion, averaged over completions. A unit is
    the standard deviation of a member's scores of the initial policy's samples.
    """
    pairs = [c for some in data.compared.values() for c in some]
    of_members = [normalised(folder, pairs) for folder in folders]
    scores: Mapping[str, CompletionScores] = {
        **{f"member {folder.name}": some for folder, some in zip(folders, of_members, strict=True)},
        **{how: combined(of_members, how, config.coefficient) for how in get_args(ensemble.Combination)},
    }
    rows = [accuracy(name, some, pairs) for name, some in scores.items()]
    by_name = {row["reward"]: row["accuracy"] for row in rows}
    measured = {
        "accuracy_members": sum(row["accuracy"] for row in rows[: len(folders)]) / len(folders),
        f"accuracy_{config.combine}": by_name[config.combine],
        "apart_heldout": stacked(of_members).std(0, unbiased=False).mean().item(),
    }
    if data.samples:
        own = stacked([normalised(folder, data.samples) for folder in folders])
        measured["apart_samples"] = own.std(0, unbiased=False).mean().item()
    return {"measured": measured, "accuracy": rows}


def accuracy(name: str, scores: CompletionScores, pairs: Sequence[RankedCompletions]) -> dict[str, Any]:
    """A line of the table of accuracies, with the agreement with the gold score where there is one."""
    row = accuracy_row(name, gaps(scores, pairs))
    row = {"reward": row.pop("data"), **row}
    has_gold = all(c.gold for c in pairs)
    return row | ({"gold_agreement": gold_agreement(scores, pairs)} if has_gold else {})
