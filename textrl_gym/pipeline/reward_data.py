"""Data of reward-model training: the settings, and the comparisons that are read or sampled before training."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le

from textrl_gym.bounds import MOST_ROWS, Seed, check_settings
from textrl_gym.core import PromptSource, Row
from textrl_gym.data.encoding import encode_completions, end_ids, prompt_of
from textrl_gym.data.labels import AnnotatorWeights
from textrl_gym.data.preferences import load_preferences
from textrl_gym.data.ranked import RankedCompletions, read_preferences
from textrl_gym.judges.annotators import Annotators
from textrl_gym.mdp import budgets
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import PromptReader, Task, checked_rows
from textrl_gym.models import loading
from textrl_gym.models.loading import declared_ends
from textrl_gym.pipeline.optim import FineTuning
from textrl_gym.pipeline.simulated_comparisons import Comparer, ComparisonStream
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards.ensemble import COEFFICIENT, Combination, check_combination

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class RewardModelConfig(FineTuning):
    """Settings of reward-model training."""

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
    curve: Annotated[tuple[int, ...], Ge(1)] = ()
    """Also train on only so many pairs each, and measure the accuracy on the same held-out pairs."""
    replaced_token_steps: Annotated[int, Ge(0)] = 900
    """Updates of replaced-token detection before the comparisons (see pipeline.replaced_tokens), where simulated
    annotators compare and the task can corrupt its texts (`corrupted`)."""
    replaced_token_batch_size: Annotated[int, Ge(1), Le(MOST_ROWS)] = 12
    """Prompts of such an update, four corrupted texts each."""
    prompts: Annotated[int, Ge(1)] = 5000
    """Prompts to compare completions of; of each dataset, at most so many rows."""
    samples: Annotated[int, Ge(0)] = 2
    """Completions that the model samples for each prompt, at a temperature between 0.5 and 1.2."""
    candidates: Annotated[int, Ge(0)] = 7
    """Completions that the task makes for each prompt, from perfect to poor."""
    epochs: Annotated[int, Ge(1), Le(1_000)] = 1
    """Passes over the comparisons. One: a second one overfits (Stiennon et al. 2020, appendix B.1)."""
    batch_size: Annotated[int, Ge(1), Le(MOST_ROWS)] = 8
    """Prompts of an update."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate of AdamW: linear warm-up, then a cosine to a twentieth. 1e-3 suits models of a few million
    parameters; those of 100M and more want 5e-6 to 2e-5 when all of it is trained, 1e-4 to 3e-4 by a LoRA."""
    warmup_steps: Annotated[int, Ge(0)] = 50
    """Updates until the peak learning rate."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to at most this global norm."""
    eval_prompts: Annotated[int, Ge(1)] = 256
    """Held-out prompts for the normalisation and the accuracy; of each dataset, at most so many rows."""
    annotator_weights: AnnotatorWeights = "none"
    """How the labels of several annotators count, of a dataset that `annotate` wrote. "none": each by itself;
    "dawid-skene" or "bradley-terry": one comparison for each item, by how likely it is after all of its labels, where
    an annotator counts by how often the others agree (see `textrl_gym.stats.annotators`)."""
    annotators: Annotators = dataclasses.field(default_factory=Annotators)
    """Who compares, where no dataset is given."""
    gold: str | None = None
    """The gold score that they judge by: a reward's name, module:function or a folder; None: the task's own."""
    seed: Seed = 0
    """Seeds the head, replaced-token detection and, where data_seed is None, the comparisons."""
    data_seed: Annotated[int | None, Ge(0)] = None
    """Seeds the comparisons: prompts, samples, candidates and annotators; `seed` then shuffles them. None: as seed."""
    ensemble: Annotated[int, Ge(0)] = 0
    """Train so many reward models on the same comparisons, with the seeds seed, seed + 1, ...; 0: a single one."""
    combine: Combination = "mean"
    """How the scores of an ensemble become one; see `textrl_gym.rewards.ensemble`."""
    coefficient: float = COEFFICIENT
    """Of the variance of the members' scores, where combine is uncertainty."""

    def __post_init__(self) -> None:
        for name in ("dataset", "eval_dataset"):
            value = getattr(self, name)
            if isinstance(value, str | None):
                object.__setattr__(self, name, () if value is None else (value,))
        if isinstance(self.annotators, dict):  # as a run's record has them
            object.__setattr__(self, "annotators", Annotators(**self.annotators))
        check_settings(self)
        if self.ensemble and self.curve:
            raise ValueError("curve is of a single reward model: leave ensemble out")
        if self.lora_rank and (self.curve or not self.dataset):
            raise ValueError(f"lora_rank={self.lora_rank} is for a user's pairs (dataset), and not with a curve")
        if self.annotator_weights != "none" and not self.dataset:
            raise ValueError(
                f"annotator_weights={self.annotator_weights!r} is for labels of annotators: give a dataset"
            )
        check_combination(self.combine, self.coefficient)


@dataclasses.dataclass
class RewardData:
    """What reward models are trained on and measured on."""

    env_id: str
    env: EnvSettings
    task: Task
    tokenizer: PreTrainedTokenizerBase
    train: Iterable[RankedCompletions]
    total: int
    """How many comparisons `train` has."""
    heldout: dict[str, list[RankedCompletions]]
    """By data set; those of the data that was trained on."""
    measured_only: dict[str, list[RankedCompletions]] = dataclasses.field(default_factory=dict)
    """By data set; held out in whole."""
    samples: list[RankedCompletions] = dataclasses.field(default_factory=list)
    """Samples of the policy at temperature 1 on held-out prompts; none where the pairs are a user's."""
    lengths: dict[str, Any] = dataclasses.field(default_factory=dict)
    """By split, or by data set and split: see mdp.budgets."""
    references: list[RankedCompletions] = dataclasses.field(default_factory=list)
    """The reference texts of these prompts."""

    @property
    def compared(self) -> dict[str, list[RankedCompletions]]:
        """All that accuracy is measured on, by data set."""
        return self.heldout | self.measured_only


def gather(env_id: str, config: RewardModelConfig, env: EnvSettings | None = None) -> RewardData:
    """Everything that is read or sampled before training; the same for every `seed` where `data_seed` is given.

    Raises:
        ValueError: an unknown environment, pairs in no known schema, nothing to compare, or a model that is an
            encoder-decoder.
    """
    drawn = dataclasses.replace(config, seed=config.seed if config.data_seed is None else config.data_seed)
    env = env or EnvSettings()
    task = env.task(env_id)
    if config.model is not None and loading.is_encoder_decoder(config.model):
        raise ValueError(loading.no_reward_model(repr(config.model)))  # now, and not when all pairs are sampled
    tokenizer = task.load_tokenizer(env.tokenizer or config.model)
    budget: dict[str, Any] = {"most": config.eval_prompts, "seed": drawn.seed, "whole": True, "bad_rows": env.bad_rows}
    budget["chat_settings"] = env.chat_settings()
    budget["end_ids"] = end_ids(tokenizer, declared_ends(tokenizer.name_or_path))
    more = {
        name: read_preferences(name, "validation", task, tokenizer, **budget)
        for name in config.eval_dataset
        if name not in config.dataset
    }
    make = from_datasets if config.dataset else simulated
    return dataclasses.replace(make(env_id, env, task, tokenizer, drawn), measured_only=more)


def simulated(
    env_id: str, env: EnvSettings, task: Task, tokenizer: PreTrainedTokenizerBase, config: RewardModelConfig
) -> RewardData:
    """Comparisons by simulated annotators, sampled while they are learnt (before, where a curve needs them again)."""
    names = dict.fromkeys([config.policy, config.model])
    policies = [Policy(task.load_model(name)) for name in names]
    for policy in policies:
        policy.try_out(task.max_prompt_tokens, task.max_new_tokens)
    comparer = Comparer(task, policies, tokenizer, config)
    check_curve(config, config.prompts * math.comb(config.samples + config.candidates, 2))
    training, source = (prompt_rows(task, tokenizer, env, split) for split in (env.split, "validation"))
    lengths = budgets.told_of_splits({env.split: training, "validation": source}, task, tokenizer)
    total = min(config.prompts, len(training))
    stream: Iterable[RankedCompletions] = ComparisonStream(comparer, training, total, config.seed + 1)
    if config.curve:
        stream = list(stream)
    heldout = list(comparer.stream(source, config.eval_prompts, config.seed))
    rows = [source[i] for i in range(min(config.eval_prompts, len(source)))]
    samples = comparer.compare(comparer.policies[0], rows, config.seed, samples=4, temperature=1.0, candidates=0)
    return RewardData(
        env_id,
        env,
        task,
        tokenizer,
        stream,
        total,
        {"simulated annotators": heldout},
        samples=samples,
        lengths=lengths,
        references=references(task, tokenizer, rows),
    )


def prompt_rows(task: Task, tokenizer: PreTrainedTokenizerBase, env: EnvSettings, split: str) -> PromptSource:
    """The prompts of a split, looked at before any is sampled from."""
    reader = PromptReader(task, tokenizer, task.max_prompt_tokens, env.chat_settings())
    return checked_rows(task, split, env.dataset, env.bad_rows, reader)


def from_datasets(
    env_id: str, env: EnvSettings, task: Task, tokenizer: PreTrainedTokenizerBase, config: RewardModelConfig
) -> RewardData:
    """The user's preferences, of all data sets in one random order."""
    train: list[RankedCompletions] = []
    heldout = {}
    drawn: dict[str, Any] = {"seed": config.seed, "bad_rows": env.bad_rows}
    drawn["chat_settings"] = env.chat_settings()
    drawn["end_ids"] = end_ids(tokenizer, declared_ends(tokenizer.name_or_path))
    lengths = {}
    for name in config.dataset:
        for split in ("train", "validation"):
            rows = load_preferences(
                name, split, tokenizer, bad_rows=env.bad_rows, chat_settings=drawn["chat_settings"]
            ).rows
            lengths[f"{name}, {split}"] = budgets.measure_preferences(rows, task, tokenizer, drawn["end_ids"])
        weights = config.annotator_weights
        train += read_preferences(
            name, "train", task, tokenizer, most=config.prompts, annotator_weights=weights, **drawn
        )
        heldout[name] = read_preferences(name, "validation", task, tokenizer, most=config.eval_prompts, **drawn)
    budgets.tell(lengths)
    random.Random(config.seed).shuffle(train)
    check_curve(config, sum(len(c.pairs) for c in train))
    return RewardData(env_id, env, task, tokenizer, train, len(train), heldout, lengths=budgets.record(lengths))


def in_order(train: Iterable[RankedCompletions], config: RewardModelConfig) -> Iterable[RankedCompletions]:
    """As they come; shuffled by the seed where it is not that of the data."""
    if config.data_seed in (None, config.seed):
        return train
    shuffled = list(train)
    random.Random(config.seed).shuffle(shuffled)
    return shuffled


def after(train: Iterable[RankedCompletions], skip: int) -> Iterator[RankedCompletions]:
    """The comparisons behind the first so many."""
    return train.after(skip) if isinstance(train, ComparisonStream) else itertools.islice(train, skip, None)


def first_pairs(comparisons: Sequence[RankedCompletions], number: int) -> list[RankedCompletions]:
    """The first so many pairs."""
    taken: list[RankedCompletions] = []
    for c in comparisons:
        pairs = c.pairs[:number]
        if pairs:
            weights, chances = c.weights[:number], c.probabilities[:number]
            taken.append(dataclasses.replace(c, pairs=pairs, weights=weights, probabilities=chances))
        number -= len(pairs)
    return taken


def check_curve(config: RewardModelConfig, pairs: int) -> None:
    """Raise ValueError where the curve asks for more pairs than there are."""
    if max(config.curve, default=0) > pairs:
        raise ValueError(f"curve asks for {max(config.curve)} pairs; there are {pairs} to train on")


def references(task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[RankedCompletions]:
    """The rows' reference texts, as comparisons of one completion each."""
    completions = []
    for row in rows:
        ids = encode_completions(prompt_of(row), [row["completion"]], tokenizer, task.max_new_tokens)
        completions.append(RankedCompletions(task.encode(row, tokenizer, task.max_prompt_tokens), ids, []))
    return completions
