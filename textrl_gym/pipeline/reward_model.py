"""Reward models: a language model's body with a scalar head, trained on preferences by -log sigmoid(r_w - r_l).

The K completions of one prompt go through the model as one sequence, prompt first: each sees the prompt and itself, so
that the prompt is computed once and all pairs among the K are compared (Stiennon et al. 2020, arXiv:2009.01325; their
batches hold all comparisons of a post too, which are seen for one epoch only, or the model overfits).

Shape legend: B prompts, K completions a prompt, N pairs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from textrl_gym import files, processes
from textrl_gym.data.ranked import RankedCompletions
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.models import loading, positions
from textrl_gym.models.packing import split
from textrl_gym.persistence import run_lock
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.pipeline.optim import TunedModel, cosine
from textrl_gym.pipeline.replaced_tokens import CorruptingTask, ReplacedTokens
from textrl_gym.pipeline.reward_data import (
    RewardData,
    RewardModelConfig,
    after,
    check_curve,
    first_pairs,
    gather,
    in_order,
    prompt_rows,
)
from textrl_gym.pipeline.reward_metrics import (
    accuracy_row,
    accuracy_table,
    by_subset,
    calibration,
    gaps,
    gold_agreement,
    normalisation,
    raw_rewards,
    score_all,
)
from textrl_gym.pipeline.trainer import MODEL, Phase, Trainer, finished_record, settings_of, write_run
from textrl_gym.rewards.reward_model import NORMALISATION_FILE
from textrl_gym.stats.pairwise import agreement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_RECORD = "reward_training.json"
"""Settings and measurements, in a reward model's folder."""


# -- model and loss ---------------------------------------------------------------------------------------------------


def bradley_terry_loss(
    raw_BK: Tensor, winner_N3: Tensor, weight_N: Tensor | None = None, probability_N: Tensor | None = None
) -> Tensor:
    """Mean of -log sigmoid(r_w - r_l) over N pairs (Bradley and Terry 1952; Stiennon et al. 2020, eq. 1).

    With soft labels p the cross entropy -p log sigmoid(r_w - r_l) - (1 - p) log sigmoid(r_l - r_w) (Lee et al. 2023,
    arXiv:2309.00267), which is the former where p is 1.

    Args:
        raw_BK: float32 rewards.
        winner_N3: int64 (prompt, chosen, rejected).
        weight_N: of each pair; a pair in both orders with weights p and 1 - p is one that is preferred with
            probability p. None: 1 each.
        probability_N: how likely the chosen one is the better one. None: 1 each.
    """
    assert raw_BK.ndim == 2
    assert winner_N3.shape[1] == 3
    prompt_N, chosen_N, rejected_N = winner_N3.unbind(1)
    gap_N = raw_BK[prompt_N, chosen_N] - raw_BK[prompt_N, rejected_N]
    loss_N = -F.logsigmoid(gap_N)
    if probability_N is not None:
        loss_N = probability_N * loss_N - (1 - probability_N) * F.logsigmoid(-gap_N)
    return loss_N.mean() if weight_N is None else (loss_N * weight_N).sum() / weight_N.sum()


def winners(batch: Sequence[RankedCompletions]) -> Tensor:
    """The pairs of a batch, int64 [N, 3]: prompt, chosen, rejected."""
    return torch.tensor([(row, *pair) for row, c in enumerate(batch) for pair in c.pairs]).view(-1, 3)


def pair_weights(batch: Sequence[RankedCompletions]) -> Tensor | None:
    """The weight of each of a batch's pairs, float32 [N]; None where none has one."""
    if not any(c.weights for c in batch):
        return None
    return torch.tensor([weight for c in batch for weight in c.weights or [1.0] * len(c.pairs)])


def pair_probabilities(batch: Sequence[RankedCompletions]) -> Tensor | None:
    """The probability of each of a batch's pairs, float32 [N]; None where all are 1."""
    if not any(c.probabilities for c in batch):
        return None
    return torch.tensor([chance for c in batch for chance in c.probabilities or [1.0] * len(c.pairs)])


def total_weight(batch: Sequence[RankedCompletions]) -> float:
    """Of all pairs of a batch."""
    return sum(sum(c.weights) if c.weights else len(c.pairs) for c in batch)


def new_reward_model(language_model: nn.Module, seed: int) -> PreTrainedModel:
    """The body of a causal LM with a fresh head N(0, 1 / sqrt(d + 1)) (Stiennon et al. 2020, appendix B.1).

    Raises:
        ValueError: it is an encoder-decoder.
    """
    body = cast("PreTrainedModel", language_model)
    if body.config.is_encoder_decoder:
        raise ValueError(loading.no_reward_model(type(body).__name__))
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


def pretraining(model: PreTrainedModel, data: RewardData, config: RewardModelConfig) -> list[Phase]:
    """Replaced-token detection, where annotators are simulated and the task can corrupt its texts."""
    if config.dataset or not config.replaced_token_steps or not isinstance(data.task, CorruptingTask):
        return []
    phase = ReplacedTokens(
        model,
        data.task,
        data.tokenizer,
        prompt_rows(data.task, data.tokenizer, data.env, data.env.split),
        steps=config.replaced_token_steps,
        batch_size=config.replaced_token_batch_size,
        rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        seed=config.seed,
    )
    return [phase]


class PreferenceUpdates(Phase):
    """Updates on comparisons; the place in them is the number of updates."""

    name = "reward model"
    tuned: TunedModel

    def __init__(
        self,
        tuned: TunedModel,
        train: Iterable[RankedCompletions],
        total: int,
        config: RewardModelConfig,
        measure: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """measure: gives the accuracies on held-out pairs."""
        self.in_a_pass = math.ceil(total / config.batch_size)
        super().__init__(self.in_a_pass * config.epochs, config.max_grad_norm)
        self.tuned, self.train, self.config, self.measure = tuned, train, config, measure

    def go_to(self, step: int, state: Mapping[str, Any]) -> None:
        size, done = self.config.batch_size, step % self.in_a_pass
        self._batches = batched(after(self.train, done * size), size)

    def losses(self, step: int) -> Iterator[Tensor]:
        if step and step % self.in_a_pass == 0:
            self.go_to(step, {})
        batch = next(self._batches)
        device, pairs = self.tuned.model.device, total_weight(batch)
        if not any(c.pairs for c in batch):  # every prompt had one distinct completion
            return
        items = [(c.prompt_ids, c.completion_ids) for c in batch]
        parts = split(items, self.config.micro_batch_tokens, multiple_of=processes.size())
        for part, share in self.tuned.deal(parts):
            some = [batch[number] for number in part]
            raw_BK = self.tuned.run(functools.partial(raw_rewards, batch=some))
            winner_N3 = winners(some).to(device)
            if not len(winner_N3):
                # The mean of no pairs is nan, and one step with it would be the end of the model. A pass is made
                # nevertheless, as other processes may wait for it.
                yield raw_BK.sum() * 0
                continue
            beside = (pair_weights(some), pair_probabilities(some))
            weight_N, probability_N = (None if x_N is None else x_N.to(device) for x_N in beside)
            loss = bradley_terry_loss(raw_BK, winner_N3, weight_N, probability_N)
            yield loss * (share * total_weight(some) / pairs)

    def learning_rate(self, step: int) -> float:
        return self.config.learning_rate * cosine(step, self.steps, self.config.warmup_steps)

    def heldout(self, updates: int) -> dict[str, float]:
        every = self.config.eval_every
        if not every or updates % every or updates >= self.steps:
            return {}
        self.tuned.gather()
        return self.measure()

    def measured(self, steps: int, mean_loss: float) -> dict[str, float]:
        """The running mean of the loss at its end, in nats a pair."""
        return {"train_loss": mean_loss}


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


CURVE = "curve"
"""Folder with the points of the curve that have been trained, while others have not."""


def measure_curve(
    initial: PreTrainedModel, data: RewardData, config: RewardModelConfig, trainer: Trainer
) -> list[dict[str, Any]]:
    """The accuracy on all held-out pairs after one epoch over so many pairs each, from the same initial model."""
    train, rows = list(data.train), []
    check_curve(config, sum(len(c.pairs) for c in train))
    for number in sorted(set(config.curve)):
        folder = trainer.folder / CURVE / str(number)
        file = folder / "row.json"
        if not file.is_file():
            model, some = copy.deepcopy(initial), first_pairs(train, number)
            with Trainer(folder, trainer.settings, trainer.schedule.options) as point:
                if point.source is not None:
                    model = cast("PreTrainedModel", loading.load_classifier(point.source / MODEL))
                tuned = TunedModel(model, config, config.seed)
                point.train(model, [PreferenceUpdates(tuned, some, len(some), config)], saving(tuned, data))
            gap_N = [gap for pairs in data.compared.values() for gap in gaps(score_all(model, pairs), pairs)]
            row = {"training pairs": number} | {k: v for k, v in accuracy_row("", gap_N).items() if k != "data"}
            files.write_text(file, json.dumps(row) + "\n")
            point.finish()
        rows.append(files.read_json(file))
    return rows


def saving(tuned: TunedModel, data: RewardData, initial: PreTrainedModel | None = None) -> Callable[[Path], None]:
    """A function that writes a model and its tokenizer into a checkpoint, and the model that the curve begins with."""

    def save(folder: Path) -> None:
        tuned.save(folder / MODEL)
        if initial is not None:
            with loading.no_bars():
                initial.save_pretrained(folder / INITIAL)
        data.tokenizer.save_pretrained(folder / MODEL)

    return save


INITIAL = "initial"
"""Folder in a checkpoint of the model after its pretraining, where a curve is asked for."""


def train_reward_model(
    env_id: str,
    config: RewardModelConfig,
    out: str | Path,
    env: EnvSettings | None = None,
    save: SaveOptions | None = None,
) -> dict[str, Any]:
    """Train a reward model and save it with its tokenizer, `reward_model.json` and `reward_training.json`.

    The same call goes on where one was stopped, and returns the record of one that has ended.

    Args:
        env_id: a registered environment, whose task says how prompts are cut and how long completions may be.
        out: the folder to write; `reward="reward_model:FOLDER"` scores with it.
        env: the prompts that simulated annotators see (dataset and split) and the budgets, where they are not the
            task's own.
        save: when checkpoints are written.

    Returns:
        What is in reward_training.json: settings and measurements.

    Raises:
        ValueError: an unknown environment, pairs in no known schema, or nothing to compare; or the folder holds a
            training of other settings, or another process trains in it.
    """
    out, env, save = Path(out), env or EnvSettings(), save or SaveOptions()
    if processes.size() > 1 and config.curve:
        raise ValueError(f"curve={config.curve} is trained in one process: leave it out, or start without torchrun")
    with run_lock.alone(out):
        record = finished_record(out, TRAINING_RECORD, env_id, env, config, read_record)
        if record is not None:
            return record
        files.check_free(out, "reward-model")
        write_run(out, "reward-model", settings_of(env_id, env, config), save)
        return train_on(gather(env_id, config, env), config, out, save)


def train_on(data: RewardData, config: RewardModelConfig, out: Path, save: SaveOptions | None = None) -> dict[str, Any]:
    """train_reward_model, of data that has been gathered; the caller holds the folder's lock."""
    data = dataclasses.replace(data, train=in_order(data.train, config))
    with Trainer(out, settings_of(data.env_id, data.env, config), save) as trainer:
        if trainer.source is None:
            _remove_curve(out)
        model, initial, trained = _train(data, config, trainer)
    norm, measured = measure(model, data, config)
    record: dict[str, Any] = {
        "environment": data.env_id,
        "env": dataclasses.asdict(data.env),
        "config": dataclasses.asdict(config),
        **measured,
        "measured": trained | measured["measured"],
        "lengths": data.lengths,
        "curve": [] if initial is None else measure_curve(initial, data, config, trainer),
    }
    text = json.dumps(record, indent=2)

    def fill(folder: Path) -> None:
        with loading.no_bars():
            model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        (folder / NORMALISATION_FILE).write_text(json.dumps(norm, indent=2) + "\n", encoding="utf-8")
        (folder / TRAINING_RECORD).write_text(text + "\n", encoding="utf-8")

    files.write_folder(out, fill)  # whole or not at all
    trainer.finish()
    _remove_curve(out)
    return json.loads(text)


def _remove_curve(out: Path) -> None:
    if processes.is_first():
        shutil.rmtree(out / CURVE, ignore_errors=True)


def _train(
    data: RewardData, config: RewardModelConfig, trainer: Trainer
) -> tuple[PreTrainedModel, PreTrainedModel | None, dict[str, float | None]]:
    """The trained model, the one that the curve begins with, and what was measured of the training."""
    initial: PreTrainedModel | None = None
    if trainer.source is None or config.lora_rank:  # a checkpoint of a LoRA has what is trained alone
        body = data.task.load_model(config.model)
        positions.check(body, positions.limit(body), data.task.max_prompt_tokens, data.task.max_new_tokens)
        model = new_reward_model(body, config.seed)
    else:
        model = cast("PreTrainedModel", loading.load_classifier(trainer.source / MODEL))
        if (trainer.source / INITIAL).is_dir():
            initial = cast("PreTrainedModel", loading.load_classifier(trainer.source / INITIAL))
    tuned = TunedModel(model, config, config.seed)
    if trainer.source is not None and config.lora_rank:
        tuned.load_adapter(trainer.source / MODEL)
    phases = pretraining(tuned.model, data, config)
    if phases:
        trainer.train(tuned.model, phases, saving(tuned, data, initial))
    if config.curve and initial is None:
        # Each point of the curve begins where this training does, pretraining included.
        initial = copy.deepcopy(tuned.model)
    measure = functools.partial(heldout_accuracies, tuned, data)
    phases.append(PreferenceUpdates(tuned, data.train, data.total, config, measure))
    trained = trainer.train(tuned.model, phases, saving(tuned, data, initial))
    measured: dict[str, float | None] = {**trained}
    if not config.dataset:
        measured.setdefault("replaced_token_loss", None)
    return tuned.merged(), initial, measured


def heldout_accuracies(tuned: TunedModel, data: RewardData) -> dict[str, float]:
    """The accuracy on held-out pairs as training goes, by data set and subset where there are several."""
    with tuned.precision():
        scores = {name: score_all(tuned.model, pairs) for name, pairs in data.compared.items()}
    rows = accuracy_table(by_subset(scores, data.compared))
    return {"accuracy" if len(rows) == 1 else f"accuracy/{row['data']}": row["accuracy"] for row in rows}


def measure(
    model: PreTrainedModel, data: RewardData, config: RewardModelConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """The normalisation, and what the record says of the held-out pairs."""
    raw = {name: score_all(model, pairs) for name, pairs in data.compared.items()}
    gaps_of = {name: gaps(raw[name], pairs) for name, pairs in data.compared.items()}
    subsets = by_subset(raw, data.compared)
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
    return norm, {
        "measured": measured,
        "accuracy": accuracy_table(subsets),
        "calibration": calibration([gap for gap_N in gaps_of.values() for gap in gap_N]),
    }


# -- records ----------------------------------------------------------------------------------------------------------

RENAMED = {
    "reading_steps": "replaced_token_steps",
    "reading_batch_size": "replaced_token_batch_size",
    "reading_loss": "replaced_token_loss",
}
"""Keys of records that version 0.1 wrote -> their names now."""


def read_record(file: Path) -> dict[str, Any]:
    """The record of a reward model's training, with today's names also where 0.1 wrote it."""
    record = files.read_json(file)
    files.check_fields(record, file, {"config": (dict,), "measured": (dict,)})
    for part in ("config", "measured"):
        record[part] = {RENAMED.get(name, name): value for name, value in record[part].items()}
    return record
