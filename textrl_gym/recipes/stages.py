"""The stages of Constitutional AI in numbers: the initial policy, the fine-tuned and the trained ones, held out.

All are sampled once on the same held-out prompts. Intervals have two parts, as in `stats.estimates`: what prompts
differ by (a jackknife over blocks of prompts, the same for all stages), and what seeds differ by, where there are some.

Shape legend: S seeds, K blocks of prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textrl_gym import files, registry
from textrl_gym.core import PromptSource, Row
from textrl_gym.data.chat import as_data
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.mdp.task import PromptReader, Task, checked_rows
from textrl_gym.recipes.critiques import append_missing, sizes_of
from textrl_gym.rewards.refusal import Stance, stance
from textrl_gym.stats.estimates import Array, Estimate, t_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from textrl_gym.policy.policy import Policy

HELD_OUT = "held-out"
"""The folder of what each stage writes on held-out prompts: STAGE-SEED.jsonl."""
INITIAL, SFT, POLICY = STAGES = ("initial", "sft", "policy")
"""In the order in which a model goes through them."""
BLOCKS = 16
"""Of the jackknife."""
AT_ONCE = 64
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage on the held-out prompts."""

    name: str
    seeds: int
    """Trained models; 1 of the initial policy."""
    metrics: dict[str, Estimate]
    """Means over prompts and seeds, in [0, 1], with 95% intervals."""
    changes: dict[str, Estimate]
    """The same less the initial policy's, on the same prompts; empty for that one."""


def heldout_rows(task: Task, env: EnvSettings, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Row]:
    """The first held-out prompts: of the embedded world those of its test split, else of the data's validation."""
    if env.dataset is None:
        # Validation rows are what training was watched on.
        source: PromptSource = task.rows("test")
    else:
        reader = PromptReader(task, tokenizer, task.max_prompt_tokens, env.chat_settings())
        source = checked_rows(task, "validation", env.dataset, env.bad_rows, reader)
    return [source[place] for place in range(min(count, len(source)))]


def model_policy(task: Task, model: str | None, device: str) -> Policy:
    """The policy of a model's folder, or the task's own."""
    from textrl_gym.models import loading
    from textrl_gym.pipeline.sample_preferences import load_policy

    return load_policy(model, task, loading.resolve_device(device))[0]


def run_policy(run: Path, device: str) -> Policy:
    """The policy of a finished run."""
    policy: Policy = registry.load_agent(run, device=device).policy
    return policy


def write_heldout(
    policy: Policy, task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], seed: int, file: Path
) -> list[dict[str, Any]]:
    """One completion of each row at temperature 1; returns the lines of the file: prompt and completion."""
    from textrl_gym.pipeline.simulated_comparisons import decode, sample_texts

    sizes = sizes_of(len(rows), AT_ONCE)

    def sample(number: int) -> list[dict[str, Any]]:
        some = rows[number * AT_ONCE : number * AT_ONCE + sizes[number]]
        # A seed for each part, so that a stage that was stopped goes on as if it had not been.
        sampled = sample_texts(policy, task, tokenizer, some, 1, 1.0, seed * len(sizes) + number)
        texts = [decode(tokenizer, ids) for (ids,) in sampled]
        return [{"prompt": as_data(row), "completion": text} for row, text in zip(some, texts, strict=True)]

    append_missing(file, sizes, sample)
    return files.read_json_lines(file)


def is_done(file: Path, count: int) -> bool:
    """Whether every held-out prompt has its completion."""
    return len(files.read_json_lines(file)) == count


# -- numbers -----------------------------------------------------------------------------------------------------------


def measures(task: Task, embedded: bool, rows: Sequence[Row], texts: Sequence[str]) -> dict[str, float]:
    """What the task measures of its own prompts; of others with a column `label` the share of full refusals.

    Those are told by rules on English texts (`rewards.refusal`).
    """
    if embedded:
        return task.measures(rows, texts)
    refused: dict[str, list[float]] = {}
    for row, text in zip(rows, texts, strict=True):
        if "label" in row:
            refused.setdefault(f"refused_{row['label']}", []).append(float(stance(text) is Stance.REFUSAL))
    return {name: float(np.mean(some)) for name, some in sorted(refused.items())}


class Measured:
    """The measures of one model's completions, on all prompts and without each block of them.

    Where the prompts are the task's own and it has a gold score, the mean of that is one of them.
    """

    def __init__(self, task: Task, embedded: bool, rows: Sequence[Row], texts: Sequence[str]) -> None:
        from textrl_gym.experiments.sizes import gold_of

        gold_N = gold_of(task, rows, texts) if embedded and task.gold is not None else None

        def of(places: list[int]) -> dict[str, float]:
            gold = {} if gold_N is None else {"gold": float(gold_N[places].mean())}
            return gold | measures(task, embedded, [rows[i] for i in places], [texts[i] for i in places])

        everything = list(range(len(rows)))
        self.whole = of(everything)
        self.without = [of([i for i in everything if i % BLOCKS != block]) for block in range(BLOCKS)]

    def without_blocks(self, name: str) -> Array:
        """The measure without each block. [K]"""
        return np.array([of_block.get(name, np.nan) for of_block in self.without])


def estimate(name: str, models: Sequence[Measured], minus: Measured | None = None) -> Estimate:
    """The mean of a measure over models of one stage, or its difference from one other model's.

    The interval is Student's, with the variances of prompts and of seeds (Satterthwaite's degrees of freedom). It
    counts what differs between samples of one model in both parts, so that it is wide rather than short.
    """
    value_S = np.array([model.whole[name] for model in models])
    without_K = np.mean([model.without_blocks(name) for model in models], axis=0)
    if minus is not None:
        value_S, without_K = value_S - minus.whole[name], without_K - minus.without_blocks(name)
    without_K = without_K[np.isfinite(without_K)]  # few prompts: a block may have all of a kind
    blocks = len(without_K)
    noise = [((blocks - 1) * float(without_K.var()), blocks - 1)] if blocks > 1 else []
    if len(value_S) > 1:
        noise.append((float(value_S.var(ddof=1)) / len(value_S), len(value_S) - 1))
    interval = t_interval(float(value_S.mean()), noise, CONFIDENCE)
    if minus is not None:
        return interval
    return Estimate(interval.value, max(interval.low, 0.0), min(interval.high, 1.0))


def stages_of(
    task: Task, embedded: bool, rows: Sequence[Row], texts: Mapping[str, Sequence[Sequence[str]]]
) -> list[Stage]:
    """Every stage in numbers.

    Args:
        texts: stage -> the completions of each of its models.
    """
    measured = {
        name: [Measured(task, embedded, rows, of_model) for of_model in models] for name, models in texts.items()
    }
    (initial,) = measured[INITIAL]
    stages = []
    for name, models in measured.items():
        metrics = {metric: estimate(metric, models) for metric in initial.whole}
        changes = {metric: estimate(metric, models, initial) for metric in initial.whole if name != INITIAL}
        stages.append(Stage(name, len(models), metrics, changes))
    return stages
