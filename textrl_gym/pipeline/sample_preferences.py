"""Preference pairs made here: completions sampled from one or two policies, labelled, and written as jsonl.

The file has the form of trl-lib/tldr-preference (prompt, chosen, rejected), with the labeller's scores beside them.
Where the chat template wrote the prompt they are lists of messages, as TRL has conversations.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray

from textrl_gym import files
from textrl_gym.bounds import MOST_ROWS, Seed, check_settings
from textrl_gym.core import Row
from textrl_gym.data.chat import as_data, completion_as_data, tools_as_data
from textrl_gym.data.preferences import PROBABILITY
from textrl_gym.judges.annotators import Annotators
from textrl_gym.judges.judge import Answer, Judge, compare
from textrl_gym.judges.llm_judge import load_language_judge
from textrl_gym.llm.asking import ENDPOINT, EndpointConfig, is_language_model
from textrl_gym.mdp import budgets
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import PromptReader, Task, checked_rows
from textrl_gym.models import loading
from textrl_gym.models.tokenizer import vocab_size
from textrl_gym.pipeline.optim import progress_bar
from textrl_gym.pipeline.simulated_comparisons import decode, sample_texts
from textrl_gym.policy.policy import Policy
from textrl_gym.rewards import columns_of, load_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = "start"
"""The name of the task's initial policy as a model."""
ANNOTATORS, GOLD_LABEL = "annotators", "gold"
# A labeller that ties nearly always would otherwise be asked without end.
MOST_PROMPTS = 20
"""Prompts that are drawn at most for each pair that is wanted, since some give ties."""


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Settings of sampled preferences."""

    n: Annotated[int, Ge(1)] = 5000
    """Pairs to write."""
    model: str | None = None
    """Whose completions: the folder of a saved agent, or a causal LM (folder, Hub id); None: the task's
    initial policy."""
    other_model: str | None = None
    """Whose completions they are compared to, of the same tokenizer; "start" is the task's initial policy; None: other
    completions of `model`."""
    label: str = ANNOTATORS
    """Who chooses. "annotators": the simulated ones, by the task's gold score, noise and all; "gold": the
    higher gold score; a language model (endpoint, local:FOLDER, local for the task's own), which compares in both
    orders; else the higher score of this reward (a name, package.module:name or a folder)."""
    temperature: Annotated[float, Ge(0)] = 1.0
    """Of sampling; 0 is greedy, for two different models."""
    batch_size: Annotated[int, Ge(1), Le(MOST_ROWS)] = 64
    """Prompts that are sampled at a time."""
    annotators: Annotators = dataclasses.field(default_factory=Annotators)
    """Who the simulated annotators are."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: Seed = 0
    """Seeds the order of prompts, the samples and the annotators."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.temperature == 0 and self.other_model is None:
            raise ValueError("at temperature 0 a model's completions of a prompt are equal: give other_model")


# -- policies ---------------------------------------------------------------------------------------------------------


def load_policy(spec: str | None, task: Task, device: str | torch.device) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy of a saved agent, of a model, or of the task's initial policy, and its tokenizer.

    Raises:
        ValueError: nothing can be loaded, or its tokenizer is another model's.
    """
    name = None if spec == START else spec
    model, tokenizer = task.load_model(name), task.load_tokenizer(name)
    loading.check_vocab(tokenizer, model)
    policy = Policy(model.to(device), vocab_size=vocab_size(tokenizer))
    policy.try_out(task.max_prompt_tokens, task.max_new_tokens)
    return policy, tokenizer


def load_policies(task: Task, config: PreferenceConfig) -> tuple[list[Policy], PreTrainedTokenizerBase]:
    """One policy, or two of one tokenizer, and that."""
    device = loading.resolve_device(config.device)
    policy, tokenizer = load_policy(config.model, task, device)
    if config.other_model is None:
        return [policy], tokenizer
    other, others = load_policy(config.other_model, task, device)
    if others.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{config.model or START!r} and {config.other_model!r} have different tokenizers")
    return [policy, other], tokenizer


# -- labels -----------------------------------------------------------------------------------------------------------


class Labeller:
    """Scores completions, and says which of two is chosen."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, config: PreferenceConfig) -> None:
        """Raises ValueError where nothing is named so, or the task has no gold score."""
        reward = task.gold if config.label in (ANNOTATORS, GOLD_LABEL) else config.label
        if reward is None:
            raise ValueError(
                f"label {config.label!r} needs the task's gold score, and {type(task).__name__} has none: name a "
                f"reward, as --label {task.reward if isinstance(task.reward, str) else 'package.module:name'}"
            )
        self.task = task
        self.annotators = config.annotators if config.label == ANNOTATORS else None
        device = loading.resolve_device(config.device)
        self.reward = load_reward(reward, task=task, device=device, tokenizer=tokenizer)

    def scores(
        self, rows: Sequence[Row], prompt_ids: list[list[int]], completion_ids: list[list[int]], texts: list[str]
    ) -> NDArray[np.float64]:
        """The score of each text."""
        columns = columns_of(rows) | {"prompt_ids": prompt_ids, "completion_ids": completion_ids}
        return self.reward.score([row["prompt"] for row in rows], texts, columns).total_B.double().numpy()

    def choose(
        self,
        score_N2: NDArray[np.float64],
        texts_N2: list[list[str]],
        rows: Sequence[Row],
        rng: np.random.Generator,
    ) -> list[int | None]:
        """0 or 1, the place of the chosen text of each pair; None for a tie."""
        if self.annotators is None:
            return [None if a == b else int(b > a) for a, b in score_N2]
        appeal_N2 = [[self.task.appeal(row, text) for text in texts] for row, texts in zip(rows, texts_N2, strict=True)]
        score_N2 = score_N2 + self.annotators.bias * np.array(appeal_N2)
        words_N2 = np.array([[len(text.split()) for text in texts] for texts in texts_N2])
        (score_a, score_b), (words_a, words_b) = score_N2.T, words_N2.T
        first_N = self.annotators.prefer(score_a, score_b, words_a, words_b, rng)
        return [int(not first) for first in first_N]


# -- pairs ------------------------------------------------------------------------------------------------------------


def draw_prompts(size: int, count: int, seed: int) -> Iterator[list[int]]:
    """Endless lists of `count` places below `size`: each once in a random order, then each again in another."""
    rng = np.random.default_rng([seed, 0])
    endless = (int(place) for _ in itertools.count() for place in rng.permutation(size))
    while True:
        yield list(itertools.islice(endless, count))


class CompletionSampler:
    """Samples completions of a task's prompts from one policy or from two."""

    def __init__(self, env_id: str, config: PreferenceConfig, env: EnvSettings) -> None:
        """Raises ValueError where the models or the prompts are not to be had."""
        self.task = task = env.task(env_id)
        self.config = config
        self.policies, self.tokenizer = load_policies(task, config)
        reader = PromptReader(task, self.tokenizer, task.max_prompt_tokens, env.chat_settings())
        self.source = checked_rows(task, env.split, env.dataset, env.bad_rows, reader)
        self.lengths = budgets.told_of_splits({env.split: self.source}, task, self.tokenizer)

    def sample(self, rows: Sequence[Row], number: int, rng: np.random.Generator) -> list[list[list[int]]]:
        """Token ids of `number` completions of each row's prompt, in the order of `writers`."""
        shares = [number] if len(self.policies) == 1 else [number - number // 2, number // 2]
        sampled = [
            sample_texts(
                policy, self.task, self.tokenizer, rows, share, self.config.temperature, int(rng.integers(2**62))
            )
            for policy, share in zip(self.policies, shares, strict=True)
        ]
        return [[ids for some in of_row for ids in some] for of_row in zip(*sampled, strict=True)]

    def writers(self, number: int) -> list[str]:
        """Whose so many completions of a prompt are: of two policies, the first one's half (or more) comes first."""
        own = self.config.model or START
        if len(self.policies) == 1:
            return [own] * number
        return [own] * (number - number // 2) + [str(self.config.other_model)] * (number // 2)


class Pairer(CompletionSampler):
    """Samples pairs of a task's prompts and has them labelled."""

    def __init__(self, env_id: str, config: PreferenceConfig, env: EnvSettings, judge: Judge | None = None) -> None:
        """Raises ValueError where the models, the label or the prompts are not to be had.

        Args:
            judge: who compares in place of the label; None: the label.
        """
        super().__init__(env_id, config, env)
        self.labeller = Labeller(self.task, self.tokenizer, config) if judge is None else None
        self.judge = judge
        self.counts = {"prompts": 0, "equal": 0, "ties": 0}
        """Prompts drawn; those whose texts were equal, and those whose scores were: neither are pairs."""
        if judge is not None:
            self.counts |= {"no_verdict": 0, "compared": 0, "flipped": 0}
        """Of a judge: pairs without a verdict, those compared in both orders, and those whose verdict turned round."""

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Labelled pairs without end.

        Raises:
            ValueError: nearly all prompts give none.
        """
        config, counts, written = self.config, self.counts, 0
        for number, places in enumerate(draw_prompts(len(self.source), config.batch_size, config.seed)):
            if counts["prompts"] >= MOST_PROMPTS * max(config.n, config.batch_size):
                reasons = f"{counts['equal']} with equal texts, {counts['ties']} with equal scores"
                raise ValueError(f"{counts['prompts']} prompts did not give n={config.n} pairs: {reasons}")
            rng = np.random.default_rng([config.seed, 1, number])
            rows = [self.source[place] for place in places]
            both = self.sample(rows, 2, rng)
            texts = [[decode(self.tokenizer, ids) for ids in two] for two in both]
            differing = [pair for pair in zip(rows, both, texts, strict=True) if pair[2][0] != pair[2][1]]
            counts["prompts"] += len(rows)
            counts["equal"] += len(rows) - len(differing)
            if differing and self.judge is not None:
                # A verdict may cost money: no more are asked for than pairs are still wanted.
                while differing and written < config.n:
                    some, differing = differing[: config.n - written], differing[config.n - written :]
                    for pair in self._judged(self.judge, [(row, two) for row, _, two in some]):
                        written += 1
                        yield pair
            elif differing:
                yield from self._labelled(differing, rng)

    def _judged(self, judge: Judge, pairs: list[tuple[Row, list[str]]]) -> Iterator[dict[str, Any]]:
        """Pairs as a judge compares them, with a column `probability` where it says how sure it is."""
        a, b = ([Answer(two[place]) for _, two in pairs] for place in (0, 1))
        comparisons = compare(judge, [row for row, _ in pairs], a, b)
        counts = self.counts
        for (row, two), outcome, likely, flipped in zip(pairs, *(one_N.tolist() for one_N in comparisons), strict=True):
            if math.isnan(outcome):
                counts["no_verdict"] += 1
                continue
            counts["compared"] += int(not math.isnan(flipped))
            counts["flipped"] += int(flipped == 1)
            # The probability and not the outcome: two orders that disagree are a tie, which it may still decide.
            first = outcome if math.isnan(likely) else likely
            if first == 0.5:
                counts["ties"] += 1
                continue
            soft = {} if math.isnan(likely) else {PROBABILITY: max(first, 1 - first)}
            yield self._pair(row, two, int(first < 0.5)) | soft

    def _pair(self, row: Row, texts: list[str], chosen: int) -> dict[str, Any]:
        order, names = {"chosen": chosen, "rejected": 1 - chosen}, self.writers(2)
        pair: dict[str, Any] = {"prompt": as_data(row)} | tools_as_data(row)
        pair |= {name: completion_as_data(row, texts[place]) for name, place in order.items()}
        return pair | {f"model_{name}": names[place] for name, place in order.items()}

    def _labelled(
        self, pairs: list[tuple[Row, list[list[int]], list[str]]], rng: np.random.Generator
    ) -> Iterator[dict[str, Any]]:
        assert self.labeller is not None
        rows = [row for row, _, _ in pairs for _ in range(2)]
        prompt_ids = [self.task.encode(row, self.tokenizer, self.task.max_prompt_tokens) for row in rows]
        flat_ids = [ids for _, both, _ in pairs for ids in both]
        flat_texts = [text for _, _, both in pairs for text in both]
        score_N2 = self.labeller.scores(rows, prompt_ids, flat_ids, flat_texts).reshape(-1, 2)
        chosen_N = self.labeller.choose(score_N2, [texts for _, _, texts in pairs], [row for row, _, _ in pairs], rng)
        for (row, _, texts), scores, chosen in zip(pairs, score_N2.tolist(), chosen_N, strict=True):
            if chosen is None:
                self.counts["ties"] += 1
                continue
            order = {"score_chosen": chosen, "score_rejected": 1 - chosen}
            yield self._pair(row, texts, chosen) | {name: scores[place] for name, place in order.items()}


def make_preferences(
    env_id: str,
    config: PreferenceConfig,
    out: str | Path,
    env: EnvSettings | None = None,
    endpoint: EndpointConfig | None = None,
) -> dict[str, Any]:
    """Sample, label and write pairs; the file appears when it is whole.

    Args:
        env_id: a registered environment.
        out: the file to write, *.jsonl.
        env: the prompts (dataset and split) and the budgets, where they are not the task's own.
        endpoint: how a language model is asked, where it is the label.

    Returns:
        {"measured": what was counted: pairs, prompts drawn, those with equal texts and with ties, mean scores}; of a
        language model the pairs without a verdict, and the share whose verdict turned round with the order.

    Raises:
        ValueError: an unknown environment, model or label; a file that is there already; or too few pairs.
        EndpointError: the endpoint fails for good; the verdicts that were given until then are kept.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ValueError(f"out must be a file *.jsonl, got {str(out)!r}")
    if out.exists():
        raise ValueError(f"{str(out)!r} is there already: name another file")
    env, endpoint = env or EnvSettings(), endpoint or EndpointConfig()
    judge = None
    if is_language_model(config.label):
        where: dict[str, Any] = {"task": env.task(env_id), "device": loading.resolve_device(config.device)}
        judge = load_language_judge(config.label, endpoint, out.parent, **where)
    elif endpoint != EndpointConfig():
        raise ValueError(f"the settings of an endpoint are of label {ENDPOINT!r}, and the label is {config.label!r}")
    pairer = Pairer(env_id, config, env, judge)
    counts = pairer.counts
    # What a judge compares has no scores.
    total = {"score_chosen": 0.0, "score_rejected": 0.0} if judge is None else {}
    files.make_folder(out.parent)
    with files.atomic_writer(out) as file, progress_bar() as bar:
        line = bar.add_task("pairs", total=config.n, note="")
        for pair in itertools.islice(pairer.pairs(), config.n):
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            total = {name: value + pair[name] for name, value in total.items()}
            bar.update(line, advance=1, note=f"{counts['equal']} equal, {counts['ties']} ties")
    means = {name: value / config.n for name, value in total.items()}
    if counts.get("compared"):
        means["flipped"] = counts.pop("flipped") / counts["compared"]
    return {"measured": {"pairs": config.n, **counts, **means}, "lengths": pairer.lengths}
