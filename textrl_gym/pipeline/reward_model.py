"""Reward models: a language model's body with a scalar head, trained on preferences by -log sigmoid(r_w - r_l).

The K completions of one prompt go through the model as one sequence, prompt first: each sees the prompt and itself, so
that the prompt is computed once and all pairs among the K are compared (Stiennon et al. 2020, arXiv:2009.01325; their
batches hold all comparisons of a post too, which are seen for one epoch only, or the model overfits).

Shape legend: B prompts, K completions a prompt, N pairs.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from textrl_gym import files
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.models import loading
from textrl_gym.pipeline.optim import RunningMean, adamw, cosine, descend, progress_bar
from textrl_gym.pipeline.replaced_tokens import CorruptingTask, train_replaced_tokens
from textrl_gym.pipeline.reward_data import RewardData, RewardModelConfig, check_curve, first_pairs, gather, in_order
from textrl_gym.pipeline.reward_metrics import (
    accuracy_row,
    accuracy_table,
    calibration,
    gaps,
    gold_agreement,
    normalisation,
    raw_rewards,
    score_all,
)
from textrl_gym.rewards.reward_model import NORMALISATION_FILE
from textrl_gym.stats.pairwise import agreement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_RECORD = "reward_training.json"
"""Settings and measurements, in a reward model's folder."""


# -- model and loss ---------------------------------------------------------------------------------------------------


def bradley_terry_loss(raw_BK: Tensor, winner_N3: Tensor) -> Tensor:
    """Mean of -log sigmoid(r_w - r_l) over N pairs (Bradley and Terry 1952; Stiennon et al. 2020, eq. 1).

    Args:
        raw_BK: float32 rewards.
        winner_N3: int64 (prompt, chosen, rejected).
    """
    assert raw_BK.ndim == 2
    assert winner_N3.shape[1] == 3
    prompt_N, chosen_N, rejected_N = winner_N3.unbind(1)
    return -F.logsigmoid(raw_BK[prompt_N, chosen_N] - raw_BK[prompt_N, rejected_N]).mean()


def winners(batch: Sequence[RankedCompletions]) -> Tensor:
    """The pairs of a batch, int64 [N, 3]: prompt, chosen, rejected."""
    return torch.tensor([(row, *pair) for row, c in enumerate(batch) for pair in c.pairs]).view(-1, 3)


def new_reward_model(language_model: nn.Module, seed: int) -> PreTrainedModel:
    """The body of a causal LM with a fresh head N(0, 1 / sqrt(d + 1)) (Stiennon et al. 2020, appendix B.1)."""
    body = cast("PreTrainedModel", language_model)
    # The language model goes on being used, and shares its config object with nobody.
    config = copy.deepcopy(body.config)
    config.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(body.base_model.state_dict())
    head = cast(nn.Linear, model.score)
    width = head.weight.shape[1]
    # A generator of its own, so that member i of an ensemble has the head of its seed, whatever ran before.
    nn.init.normal_(head.weight, 0.0, 1 / math.sqrt(width + 1), torch.Generator().manual_seed(seed))
    return model.eval()  # no dropout: rewards must not depend on chance


def batched(stream: Iterator[RankedCompletions], size: int) -> Iterator[list[RankedCompletions]]:
    """Lists of `size` items, the last one shorter."""
    while batch := list(itertools.islice(stream, size)):
        yield batch


# -- training ---------------------------------------------------------------------------------------------------------


def pretrain(model: PreTrainedModel, data: RewardData, config: RewardModelConfig) -> float | None:
    """Replaced-token detection, where the task can corrupt its texts; returns its last loss in nats a token."""
    if not config.replaced_token_steps or not isinstance(data.task, CorruptingTask):
        return None
    with progress_bar() as bar:
        row = bar.add_task("replaced tokens", total=config.replaced_token_steps, note="")
        return train_replaced_tokens(
            model,
            data.task,
            data.tokenizer,
            data.task.rows(data.env.split, data.env.dataset),
            steps=config.replaced_token_steps,
            batch_size=config.replaced_token_batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            seed=config.seed,
            report=lambda loss: bar.update(row, advance=1, note=f"loss {loss:.3f}"),
        )


def train_epoch(
    model: PreTrainedModel, stream: Iterator[RankedCompletions], total: int, config: RewardModelConfig
) -> float:
    """One epoch over the comparisons; the running mean of the loss at its end, in nats a pair."""
    optimizer = adamw(model, config.learning_rate)
    steps = math.ceil(total / config.batch_size)
    mean_loss = RunningMean()
    with progress_bar() as bar:
        row = bar.add_task("reward model", total=steps, note="")
        for step, batch in enumerate(batched(stream, config.batch_size)):
            winner_N3 = winners(batch).to(model.device)
            # The mean of no pairs is nan, and one step with it would be the end of the model.
            if len(winner_N3) == 0:  # every prompt had one distinct completion
                continue
            loss = bradley_terry_loss(raw_rewards(model, batch), winner_N3)
            rate = config.learning_rate * cosine(step, steps, config.warmup_steps)
            descend(model, optimizer, loss, rate, config.max_grad_norm)
            bar.update(row, advance=1, note=f"loss {mean_loss.update(loss.item()):.3f}")
    return mean_loss.value


def measure_simulated(
    model: PreTrainedModel, data: RewardData, raw: Sequence[Sequence[float]]
) -> tuple[dict[str, float], dict[str, float | None]]:
    """The normalisation and the agreements, for simulated annotators, of held-out comparisons and their raw rewards."""
    (mixed,) = data.heldout.values()
    own = score_all(model, data.samples)
    reference = [row[0] for row in score_all(model, data.references)]
    samples = [value for values, c in zip(own, data.samples, strict=True) for value in values[: c.sampled]]
    sample_gold = [value for c in data.samples for value in c.gold[: c.sampled]]
    norm = normalisation(reference, samples)
    return norm, {
        "annotator_agreement": agreement(gaps(raw, mixed)),
        "gold_agreement": gold_agreement(raw, mixed),
        "gold_agreement_samples": gold_agreement(own, data.samples, samples_only=True),
        "sample_score": (sum(samples) / len(samples) - norm["bias"]) * norm["scale"],
        "sample_gold": sum(sample_gold) / len(sample_gold),
    }


# -- the whole --------------------------------------------------------------------------------------------------------


def measure_curve(initial: PreTrainedModel, data: RewardData, config: RewardModelConfig) -> list[dict[str, Any]]:
    """The accuracy on all held-out pairs after one epoch over so many pairs each, from the same initial model."""
    train, rows = list(data.train), []
    check_curve(config, sum(len(c.pairs) for c in train))
    for number in sorted(set(config.curve)):
        model, some = copy.deepcopy(initial), first_pairs(train, number)
        train_epoch(model, iter(some), len(some), config)
        gap_N = [gap for pairs in data.compared.values() for gap in gaps(score_all(model, pairs), pairs)]
        rows.append({"training pairs": number} | {k: v for k, v in accuracy_row("", gap_N).items() if k != "data"})
    return rows


def train_reward_model(
    env_id: str, config: RewardModelConfig, out: str | Path, env: EnvSettings | None = None
) -> dict[str, Any]:
    """Train a reward model and save it with its tokenizer, `reward_model.json` and `reward_training.json`.

    Args:
        env_id: a registered environment, whose task says how prompts are cut and how long completions may be.
        out: the folder to write; `reward="reward_model:FOLDER"` scores with it.
        env: the prompts that simulated annotators see (dataset and split) and the budgets, where they are not the
            task's own.

    Returns:
        What is in reward_training.json: settings and measurements.

    Raises:
        ValueError: an unknown environment, pairs in no known schema, or nothing to compare.
    """
    return train_on(gather(env_id, config, env), config, Path(out))


def train_on(data: RewardData, config: RewardModelConfig, out: Path) -> dict[str, Any]:
    """train_reward_model, of data that has been gathered."""
    # 1. The model.
    model = new_reward_model(data.task.load_model(config.model), config.seed)
    pretraining_loss = None if config.dataset else pretrain(model, data, config)

    # 2. Train.
    # Each point of the curve begins where this training does, pretraining included.
    initial = copy.deepcopy(model) if config.curve else None
    # One epoch: a second one overfits (Stiennon et al. 2020, appendix B.1).
    data = dataclasses.replace(data, train=in_order(data.train, config))
    loss = train_epoch(model, iter(data.train), data.total, config)

    # 3. Measure.
    raw = {name: score_all(model, pairs) for name, pairs in data.compared.items()}
    gaps_of = {name: gaps(raw[name], pairs) for name, pairs in data.compared.items()}
    if config.dataset:
        own = data.heldout
        # Users' data have no samples of the policy, so that scores are scaled by their own completions.
        chosen = [raw[name][row][w] for name, pairs in own.items() for row, c in enumerate(pairs) for w, _ in c.pairs]
        norm = normalisation(chosen, [value for name in own for row in raw[name] for value in row])
        measured: dict[str, float | None] = {
            "annotator_agreement": agreement([gap for name in own for gap in gaps_of[name]])
        }
    else:
        norm, measured = measure_simulated(model, data, raw[next(iter(data.heldout))])
        measured["replaced_token_loss"] = pretraining_loss
    record: dict[str, Any] = {
        "environment": data.env_id,
        "env": dataclasses.asdict(data.env),
        "config": dataclasses.asdict(config),
        "measured": {"train_loss": loss, **measured},
        "accuracy": accuracy_table(gaps_of),
        "calibration": calibration([gap for gap_N in gaps_of.values() for gap in gap_N]),
        "curve": [] if initial is None else measure_curve(initial, data, config),
    }

    # 4. Save, whole or not at all.
    text = json.dumps(record, indent=2)

    def fill(folder: Path) -> None:
        with loading.no_bars():
            model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        (folder / NORMALISATION_FILE).write_text(json.dumps(norm, indent=2) + "\n", encoding="utf-8")
        (folder / TRAINING_RECORD).write_text(text + "\n", encoding="utf-8")

    files.write_folder(out, fill)
    return json.loads(text)


# -- records ----------------------------------------------------------------------------------------------------------

RENAMED = {
    "reading_steps": "replaced_token_steps",
    "reading_batch_size": "replaced_token_batch_size",
    "reading_loss": "replaced_token_loss",
}
"""Keys of records that version 0.1 wrote -> their names now."""


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a reward model's training, with today's names also where 0.1 wrote it; None where there is none."""
    file = folder / TRAINING_RECORD
    if not file.is_file():
        return None
    record = files.read_json(file)
    for part in ("config", "measured"):
        record[part] = {RENAMED.get(name, name): value for name, value in record[part].items()}
    return record
