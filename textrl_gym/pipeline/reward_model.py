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
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from textrl_gym import files
from textrl_gym.judges.annotators import Annotators
from textrl_gym.models import loading
from textrl_gym.pipeline.induction import cosine, descend
from textrl_gym.pipeline.replaced_tokens import learn_to_read
from textrl_gym.pipeline.reward_metrics import gaps, gold_agreement, normalisation, raw_rewards, references, score_all
from textrl_gym.pipeline.reward_report import accuracy_row, accuracy_table, calibration
from textrl_gym.pipeline.sft import progress_bar
from textrl_gym.pipeline.simulated_comparisons import Comparer, Comparison, read_preferences
from textrl_gym.policy.policy import Policy
from textrl_gym.registry import load_env_task
from textrl_gym.rewards.ensemble import COEFFICIENT, Combination, check_combination
from textrl_gym.rewards.reward_model import FILE
from textrl_gym.stats.pairwise import agreement

RECORD = "reward_training.json"
"""What was asked for and measured, in a reward model's folder."""


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """Settings of reward-model training. One epoch: every prompt is seen once."""

    model: str | None = None
    """The causal LM whose body and tokenizer are taken (Hub id, folder); None: the task's own."""
    policy: str | None = None
    """The causal LM whose samples are compared, of the same tokenizer; None: the task's own. Where `model` is another,
    its samples take turns: they are nearer to what an optimised policy writes."""
    dataset: tuple[str, ...] = ()
    """Preferences to learn, one or several: Hub ids, local files or folders, each in a schema of
    `data.preferences`; none: simulated annotators compare samples of the model and the task's `candidates`."""
    eval_dataset: tuple[str, ...] = ()
    """Preferences to measure the accuracy on besides; a single file as a whole."""
    curve: tuple[int, ...] = ()
    """Also train on only so many pairs each, and measure the accuracy on the same held-out pairs."""
    reading_steps: int = 900
    """Updates of replaced-token detection before the comparisons (see pipeline.replaced_tokens), where simulated
    annotators compare and the task has `falsified` texts to read."""
    reading_batch_size: int = 12
    """Prompts of such an update, four falsified texts each."""
    prompts: int = 5000
    """Prompts to compare completions of; of each dataset, at most so many rows."""
    samples: int = 2
    """Completions that the model samples for each prompt, at a temperature between 0.5 and 1.2."""
    candidates: int = 7
    """Completions that the task makes for each prompt, from perfect to poor."""
    batch_size: int = 8
    """Prompts of an update."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to a twentieth."""
    warmup_steps: int = 50
    """Updates until the peak learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to at most this global norm."""
    eval_prompts: int = 256
    """Held-out prompts for the normalisation and the accuracy; of each dataset, at most so many rows."""
    annotators: Annotators = dataclasses.field(default_factory=Annotators)
    """Who compares, where no dataset is given."""
    seed: int = 0
    """Seeds the head and the reading and, where data_seed does not, the comparisons."""
    data_seed: int | None = None
    """Seeds the comparisons: prompts, samples, candidates and annotators; `seed` then shuffles them. None: as seed."""
    ensemble: int = 0
    """Train so many reward models on the same comparisons, with the seeds seed, seed + 1, ...; 0: a single one."""
    combine: Combination = "mean"
    """How the scores of an ensemble become one; see `textrl_gym.rewards.ensemble`."""
    coefficient: float = COEFFICIENT
    """Of the variance of the members' scores, where combine is uncertainty."""

    def __post_init__(self) -> None:
        for name in ("dataset", "eval_dataset"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        for name in ("prompts", "eval_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.curve, default=1) < 1:
            raise ValueError(f"curve must hold numbers of pairs of at least 1, got {self.curve}")
        if self.ensemble < 0:
            raise ValueError(f"ensemble must be >= 0, got {self.ensemble}")
        if self.ensemble and self.curve:
            raise ValueError("curve is of a single reward model: leave ensemble out")
        check_combination(self.combine, self.coefficient)


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


def winners(batch: Sequence[Comparison]) -> Tensor:
    """The pairs of a batch, int64 [N, 3]: prompt, chosen, rejected."""
    return torch.tensor([(row, *pair) for row, c in enumerate(batch) for pair in c.pairs]).view(-1, 3)


def new_reward_model(language_model: Any, seed: int) -> Any:
    """The body of a causal LM with a fresh head N(0, 1 / sqrt(d + 1)) (Stiennon et al. 2020, appendix B.1)."""
    config = copy.deepcopy(language_model.config)
    config.num_labels = 1
    model: Any = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(language_model.base_model.state_dict())
    width = model.score.weight.shape[1]
    nn.init.normal_(model.score.weight, 0.0, 1 / math.sqrt(width + 1), torch.Generator().manual_seed(seed))
    return model.eval()  # no dropout: rewards must not depend on chance


def batched(stream: Iterator[Comparison], size: int) -> Iterator[list[Comparison]]:
    """Lists of `size` items, the last one shorter."""
    while batch := list(itertools.islice(stream, size)):
        yield batch


# -- training ---------------------------------------------------------------------------------------------------------


def read_first(model: Any, task: Any, tokenizer: Any, config: RewardModelConfig) -> float | None:
    """The reading step, where the task has texts for it; its last loss in nats a token."""
    if not config.reading_steps or not hasattr(task, "falsified"):
        return None
    with progress_bar() as bar:
        row = bar.add_task("reading", total=config.reading_steps, note="")
        return learn_to_read(
            model,
            task,
            tokenizer,
            task.rows("train"),
            steps=config.reading_steps,
            batch_size=config.reading_batch_size,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            seed=config.seed,
            report=lambda loss: bar.update(row, advance=1, note=f"loss {loss:.3f}"),
        )


def train_epoch(model: Any, stream: Iterator[Comparison], total: int, config: RewardModelConfig) -> float:
    """One epoch over the comparisons; the running mean of the loss at its end, in nats a pair."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = math.ceil(total / config.batch_size)
    smooth = math.nan
    with progress_bar() as bar:
        row = bar.add_task("reward model", total=steps, note="")
        for step, batch in enumerate(batched(stream, config.batch_size)):
            winner_N3 = winners(batch).to(model.device)
            if len(winner_N3) == 0:  # every prompt had one distinct completion
                continue
            loss = bradley_terry_loss(raw_rewards(model, batch), winner_N3)
            rate = config.learning_rate * cosine(step, steps, config.warmup_steps)
            descend(model, optimizer, loss, rate, config.max_grad_norm)
            smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
            bar.update(row, advance=1, note=f"loss {smooth:.3f}")
    return smooth


def measure(model: Any, data: Data, raw: Sequence[Sequence[float]]) -> tuple[dict[str, float], dict[str, float | None]]:
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


# -- data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    """What reward models are trained on and measured on."""

    task: Any
    tokenizer: Any
    train: Iterable[Comparison]
    total: int
    """How many comparisons `train` has."""
    heldout: dict[str, list[Comparison]]
    """By data set; those of the data that was trained on."""
    measured_only: dict[str, list[Comparison]] = dataclasses.field(default_factory=dict)
    """By data set; held out in whole."""
    samples: list[Comparison] = dataclasses.field(default_factory=list)
    """Samples of the policy at temperature 1 on held-out prompts; none where the pairs are a user's."""
    references: list[Comparison] = dataclasses.field(default_factory=list)
    """The reference texts of these prompts."""

    @property
    def compared(self) -> dict[str, list[Comparison]]:
        """All that accuracy is measured on, by data set."""
        return self.heldout | self.measured_only


def gather(env_id: str, config: RewardModelConfig) -> Data:
    """Everything that is read or sampled before training; the same for every `seed` where `data_seed` is given.

    Raises:
        ValueError: an unknown environment, pairs in no known schema, or nothing to compare.
    """
    drawn = dataclasses.replace(config, seed=config.seed if config.data_seed is None else config.data_seed)
    task = load_env_task(env_id)
    tokenizer = task.load_tokenizer(config.model)
    budget: dict[str, Any] = {"most": config.eval_prompts, "seed": drawn.seed, "whole": True}
    more = {
        name: read_preferences(name, "validation", task, tokenizer, **budget)
        for name in config.eval_dataset
        if name not in config.dataset
    }
    made = from_datasets if config.dataset else simulated
    return dataclasses.replace(made(task, tokenizer, drawn), measured_only=more)


def simulated(task: Any, tokenizer: Any, config: RewardModelConfig) -> Data:
    """Comparisons by simulated annotators, sampled while they are learnt (before, where a curve needs them again)."""
    names = dict.fromkeys([config.policy, config.model])
    comparer = Comparer(task, [Policy(task.load_model(name)) for name in names], tokenizer, config)
    check_curve(config, config.prompts * math.comb(config.samples + config.candidates, 2))
    stream: Iterable[Comparison] = comparer.stream("train", config.prompts, config.seed + 1)
    if config.curve:
        stream = list(stream)
    heldout = list(comparer.stream("validation", config.eval_prompts, config.seed))
    source = task.rows("validation")
    rows = [source[i] for i in range(min(config.eval_prompts, len(source)))]
    samples = comparer.compare(comparer.policies[0], rows, config.seed, samples=4, temperature=1.0, candidates=0)
    return Data(
        task,
        tokenizer,
        stream,
        config.prompts,
        {"simulated annotators": heldout},
        samples=samples,
        references=references(task, tokenizer, rows),
    )


def from_datasets(task: Any, tokenizer: Any, config: RewardModelConfig) -> Data:
    """The user's preferences, of all data sets in one random order."""
    train: list[Comparison] = []
    heldout = {}
    for name in config.dataset:
        train += read_preferences(name, "train", task, tokenizer, most=config.prompts, seed=config.seed)
        heldout[name] = read_preferences(
            name, "validation", task, tokenizer, most=config.eval_prompts, seed=config.seed
        )
    random.Random(config.seed).shuffle(train)
    check_curve(config, sum(len(c.pairs) for c in train))
    return Data(task, tokenizer, train, len(train), heldout)


def in_order(train: Iterable[Comparison], config: RewardModelConfig) -> Iterable[Comparison]:
    """As they come; shuffled by the seed where it is not that of the data."""
    if config.data_seed in (None, config.seed):
        return train
    shuffled = list(train)
    random.Random(config.seed).shuffle(shuffled)
    return shuffled


def first_pairs(comparisons: Sequence[Comparison], number: int) -> list[Comparison]:
    """The first so many pairs."""
    taken: list[Comparison] = []
    for c in comparisons:
        kept = c.pairs[:number]
        if kept:
            taken.append(dataclasses.replace(c, pairs=kept))
        number -= len(kept)
    return taken


def check_curve(config: RewardModelConfig, pairs: int) -> None:
    """Raise ValueError where the curve asks for more pairs than there are."""
    if max(config.curve, default=0) > pairs:
        raise ValueError(f"curve asks for {max(config.curve)} pairs; there are {pairs} to train on")


# -- the whole --------------------------------------------------------------------------------------------------------


def measure_curve(start: Any, data: Data, config: RewardModelConfig) -> list[dict[str, Any]]:
    """The accuracy on all held-out pairs after one epoch over so many pairs each, from the same start."""
    train, rows = list(data.train), []
    check_curve(config, sum(len(c.pairs) for c in train))
    for number in sorted(set(config.curve)):
        model, some = copy.deepcopy(start), first_pairs(train, number)
        train_epoch(model, iter(some), len(some), config)
        gap_N = [gap for pairs in data.compared.values() for gap in gaps(score_all(model, pairs), pairs)]
        rows.append({"training pairs": number} | {k: v for k, v in accuracy_row("", gap_N).items() if k != "data"})
    return rows


def train_reward_model(env_id: str, config: RewardModelConfig, out: Path) -> dict[str, Any]:
    """Train a reward model and save it with its tokenizer, `reward_model.json` and `reward_training.json`.

    Args:
        env_id: a registered environment, whose task says how prompts are cut and how long completions may be.
        out: the folder to write; `reward="reward_model:FOLDER"` scores with it.

    Returns:
        What is in reward_training.json: settings and measurements.

    Raises:
        ValueError: an unknown environment, pairs in no known schema, or nothing to compare.
    """
    return train_on(gather(env_id, config), env_id, config, out)


def train_on(data: Data, env_id: str, config: RewardModelConfig, out: Path) -> dict[str, Any]:
    """train_reward_model, of data that has been gathered."""
    # 1. The model.
    model = new_reward_model(data.task.load_model(config.model), config.seed)
    reading = None if config.dataset else read_first(model, data.task, data.tokenizer, config)

    # 2. Train.
    start = copy.deepcopy(model) if config.curve else None
    data = dataclasses.replace(data, train=in_order(data.train, config))
    loss = train_epoch(model, iter(data.train), data.total, config)

    # 3. Measure.
    raw = {name: score_all(model, pairs) for name, pairs in data.compared.items()}
    gaps_of = {name: gaps(raw[name], pairs) for name, pairs in data.compared.items()}
    if config.dataset:
        own = data.heldout
        chosen = [raw[name][row][w] for name, pairs in own.items() for row, c in enumerate(pairs) for w, _ in c.pairs]
        norm = normalisation(chosen, [value for name in own for row in raw[name] for value in row])
        measured: dict[str, float | None] = {
            "annotator_agreement": agreement([gap for name in own for gap in gaps_of[name]])
        }
    else:
        norm, measured = measure(model, data, raw[next(iter(data.heldout))])
        measured["reading_loss"] = reading
    record: dict[str, Any] = {
        "environment": env_id,
        "config": dataclasses.asdict(config),
        "measured": {"train_loss": loss, **measured},
        "accuracy": accuracy_table(gaps_of),
        "calibration": calibration([gap for gap_N in gaps_of.values() for gap in gap_N]),
        "curve": [] if start is None else measure_curve(start, data, config),
    }

    # 4. Save, whole or not at all.
    text = json.dumps(record, indent=2)

    def fill(folder: Path) -> None:
        with loading.no_bars():
            model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        (folder / FILE).write_text(json.dumps(norm, indent=2) + "\n", encoding="utf-8")
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")

    files.write_folder(out, fill)
    return json.loads(text)
