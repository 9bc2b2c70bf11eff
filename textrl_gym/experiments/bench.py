"""How fast training is on this machine, by phase: rollout, scoring, reference and values, update.

Random prompts of one length, a random model (or any other) and a reward model of the same shape go through the very
`collect` and `update` that training uses. Times are wall-clock. FLOPs are counted by PyTorch in one iteration of the
same work and compared with what a large matrix product reaches in the same process, the ceiling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge

from textrl_gym import files, registry
from textrl_gym.bounds import check_settings
from textrl_gym.core import Row
from textrl_gym.mdp.env_settings import EnvSettings, make_env
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.models import flops, loading, onednn, tiny
from textrl_gym.rewards.reward_model import RewardModel
from textrl_gym.rollouts.phases import Phase, listening
from textrl_gym.training.agent import Agent

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

PHASES: tuple[Phase, ...] = ("rollout", "scoring", "reference", "values", "update")
"""What an iteration is made of. The rest, "other", is prompts, texts and rewards on the host."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    agent: Literal["grpo", "ppo"] = "grpo"
    """The algorithm whose update is measured."""
    model: str | None = None
    """A Hub id, a folder or smollm2-135m; None: a random Llama."""
    prompts: Annotated[int, Ge(1)] = 8
    """Different prompts of a rollout."""
    group: Annotated[int, Ge(1)] = 8
    """Completions of each prompt."""
    prompt_tokens: Annotated[int, Ge(1)] = 350
    """Tokens of every prompt."""
    vocab_size: Annotated[int, Ge(1)] = 2048
    """Tokens of the random model."""
    layers: Annotated[int, Ge(1)] = 4
    """Of the random model, which has as many heads of width 64."""
    new_tokens: Annotated[int, Ge(1)] = 48
    """Most tokens of a completion; a random model hardly ever ends before."""
    scoring: bool = True
    """Score with a reward model of the same shape; without, with the length of the text."""
    iterations: Annotated[int, Ge(1)] = 5
    """Measured iterations, after one that is not."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes."""
    cuda_graphs: bool = False
    """Decode at fixed shapes, on a GPU as CUDA graphs."""
    compile: Literal["none", "update", "decode", "all"] = "none"
    """What torch.compile compiles."""
    scaling: bool = False
    """Measure the cost of a token by rows (8 to 4,096) and by new tokens (32 to 2,048) instead, with a model so small
    that what is around it shows."""
    out: Path | None = None
    """Also write the numbers to this JSON file."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.agent == "grpo" and self.group < 2:
            raise ValueError(f"grpo compares completions of a prompt: group must be at least 2, got {self.group}")


class RandomPrompts(Task):
    """Prompts of random tokens, all of one length."""

    id = "bench"
    kl_coef = 0.04

    def __init__(self, config: BenchConfig) -> None:
        self.model, self.vocab_size, self.layers = config.model or "made in code", config.vocab_size, config.layers
        self.max_prompt_tokens, self.max_new_tokens = config.prompt_tokens, config.new_tokens

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        """Rows that differ in their prompts only."""
        return [{"prompt": f"prompt {i}", "number": i} for i in range(4096)]

    def load_tokenizer(self, name: str | None = None) -> PreTrainedTokenizerBase:
        if self.model == "made in code":
            return tiny.symbol_tokenizer([f"t{i}" for i in range(1, self.vocab_size)])
        return super().load_tokenizer(name)

    def load_model(self, name: str | None = None, **kwargs: Any) -> nn.Module:
        if self.model == "made in code":
            return tiny.llama(self.vocab_size, width=64 * self.layers, layers=self.layers, heads=self.layers)
        return super().load_model(name, **kwargs)

    def encode(self, row: Row, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[int]:
        # A function of the row alone, so that a prompt is the same in each of its group's rows and in each run.
        generator = torch.Generator().manual_seed(row["number"])
        return torch.randint(1, len(tokenizer), (max_prompt_tokens,), generator=generator).tolist()


@dataclasses.dataclass
class Stopwatch:
    """Seconds by phase, the device's work included."""

    device: torch.device
    seconds: dict[Phase, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def now(self) -> float:
        # A GPU works on while Python goes on, so that without waiting a phase would be charged with the one before.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def on(self, phase: Phase) -> Iterator[None]:
        """Inside, time is counted as this phase."""
        begin = self.now()
        try:
            yield
        finally:
            self.seconds[phase] += self.now() - begin


def make_agent(
    config: BenchConfig, env_id: str | None = None, env: EnvSettings | None = None, **settings: Any
) -> Agent:
    """The agent to measure, with one optimizer step a rollout."""
    device = loading.resolve_device(config.device)
    # No schedule, so that all iterations are the same work.
    usual: dict[str, Any] = {"epochs": 1, "minibatches": 1, "lr_schedule": "constant"}
    usual |= {"dtype": config.dtype, "cuda_graphs": config.cuda_graphs, "compile": config.compile}
    rows = {"rollout_episodes": config.prompts * config.group, "group_size": config.group}
    environment = (
        random_env(config)
        if env_id is None
        else make_env(env_id, env or EnvSettings(), config.model, str(device), rows)
    )
    model = None if env_id is None else config.model
    return registry.load_agent_class(config.agent)(environment, model, device=str(device), **(usual | settings))


def random_env(config: BenchConfig) -> TextVectorEnv:
    """Random prompts of one length, scored by a reward model of the policy's shape or by the length of the text."""
    task = RandomPrompts(config)
    device = loading.resolve_device(config.device)
    tokenizer = task.load_tokenizer()
    reward: str | RewardModel = "length"
    if config.scoring:
        # A body like the policy's, so that scoring costs what a reward model of that size does.
        shape: Any = task.load_model().config
        shape.num_labels, shape.pad_token_id = 1, tokenizer.eos_token_id
        from transformers import AutoModelForSequenceClassification

        dtype = loading.resolve_dtype(config.dtype)
        scorer = AutoModelForSequenceClassification.from_config(shape).to(device=device, dtype=dtype).eval()
        reward = RewardModel(scorer, tokenizer, env_tokenizer=tokenizer)
    return TextVectorEnv(
        config.prompts * config.group,
        task=task,
        reward=reward,
        group_size=config.group,
        device=str(device),
        array="torch",
        autoreset_mode="Disabled",
    )


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product, the best of a few."""
    # Large enough that caches and launches do not count, and done in well under a second.
    size = 1024 if device.type == "cpu" else 8192
    layer = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = functools.partial(onednn.linear, layer) if device.type == "cpu" and onednn.is_faster() else layer
    # The best and not the mean: a ceiling is what the machine can do when nothing else runs.
    watch, best = Stopwatch(device), 0.0
    for _ in range(8):
        begin = watch.now()
        product(a)
        best = max(best, 2 * size**3 / (watch.now() - begin))
    return best


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the process on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclasses.dataclass(frozen=True)
class Timing:
    """What the measured iterations took."""

    tokens: list[int]
    """Completion tokens of each iteration."""
    seconds: list[float]
    """Of each iteration."""
    phases: dict[Phase, float]
    """Seconds of all iterations by phase."""


def time_iterations(agent: Agent, iterations: int) -> Timing:
    """Time iterations of collect and update, after one that is not counted."""
    watch = Stopwatch(agent.device)
    tokens, seconds = [], []
    with listening(lambda phase: watch.on(phase) if phase in PHASES else contextlib.nullcontext()):
        for number in range(iterations + 1):
            begin = watch.now()
            rollout = agent.collect()
            with watch.on("update"):
                agent.update(rollout)
            if number == 0:  # caches, compilation, allocation
                watch.seconds = dict.fromkeys(PHASES, 0.0)
                continue
            seconds.append(watch.now() - begin)
            tokens.append(rollout.num_tokens)
    return Timing(tokens, seconds, watch.seconds)


def bench(
    config: BenchConfig, env_id: str | None = None, env: EnvSettings | None = None, **settings: Any
) -> dict[str, Any]:
    """Measure, and return the numbers; see `rows` for what they are.

    Args:
        env_id: an environment with its prompts, budgets, model and reward, in place of random prompts.
        env: settings of that environment.
        settings: fields of the agent's config.

    Raises:
        ValueError: a model that cannot be loaded, a device that is not there.
    """
    if env_id is None and env not in (None, EnvSettings()):
        raise ValueError("settings of the environment (--env.) need an environment: textrl-gym bench ENV")
    agent = make_agent(config, env_id, env, **settings)
    device = agent.device
    before = peak_bytes(device)
    timing = time_iterations(agent, config.iterations)
    peak = peak_bytes(device) - before
    # An iteration of its own, and after the timed ones: the counter sees each operation in Python, which takes time.
    with flops.counter() as counter:
        agent.update(agent.collect())
    measured = numbers(timing, counter.get_total_flops(), matmul_ceiling(device, loading.resolve_dtype(config.dtype)))
    device_name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    record = {
        "environment": env_id,
        "config": dataclasses.asdict(config) | {"out": None},
        "agent": dataclasses.asdict(agent.config),
        "device": device_name,
        "torch": torch.__version__,
        "measured": measured | {"peak_memory_bytes": peak},
    }
    write(record, config.out)
    return record


SCALES: dict[str, tuple[int, ...]] = {"rows": (8, 64, 512, 4096), "new tokens": (32, 128, 512, 2048)}
"""What `scaling` varies: the rows of a rollout of 32 new tokens, and the new tokens of a rollout of 64 rows."""


def scaling(config: BenchConfig) -> dict[str, Any]:
    """Microseconds a completion token in rollout and update, as rows grow and as completions grow.

    The model is a Llama of width 64 with one layer: behind a large one a loop over rows, groups or prefixes would not
    show. The fixed cost of a decoding step is shared by its rows, so that few rows cost more a token, and attention
    costs more the longer a text is. What else rises with rows or length would be such a loop.

    Raises:
        ValueError: a model is named, or an environment.
    """
    if config.model is not None:
        raise ValueError(
            f"--scaling has a model of its own, a random one of width 64: leave out --model {config.model}"
        )
    measured = []
    for axis, values in SCALES.items():
        for value in values:
            rows_new = (value, 32) if axis == "rows" else (64, value)
            work: dict[str, Any] = {
                "prompts": rows_new[0] // 8,
                "group": 8,
                "prompt_tokens": 16,
                "new_tokens": rows_new[1],
            }
            agent = make_agent(dataclasses.replace(config, scoring=False, layers=1, **work))
            timing = time_iterations(agent, config.iterations)
            tokens = sum(timing.tokens)
            micro = {name: 1e6 * timing.phases[name] / tokens for name in ("rollout", "reference", "update")}
            whole = [1e6 * seconds / count for seconds, count in zip(timing.seconds, timing.tokens, strict=True)]
            point = {"axis": axis, "value": value, "tokens": tokens // config.iterations}
            measured.append(point | micro | {"all": statistics.median(whole), "range": [min(whole), max(whole)]})
    record = {"config": dataclasses.asdict(config) | {"out": None}, "torch": torch.__version__, "measured": measured}
    write(record, config.out)
    return record


def scaling_rows(record: dict[str, Any]) -> dict[str, str]:
    """The record of `scaling` as lines of a table."""
    lines = {}
    for point in record["measured"]:
        low, high = point["range"]
        parts = ", ".join(f"{name} {point[name]:,.1f}" for name in ("rollout", "reference", "update"))
        lines[f"{point['value']:,} {point['axis']}"] = f"{point['all']:,.1f} ({low:,.1f} to {high:,.1f}): {parts}"
    return lines


def write(record: dict[str, Any], file: Path | None) -> None:
    """Write a record as JSON, where a file is named."""
    if file is not None:
        files.make_folder(file.parent)
        files.write_text(file, json.dumps(record, indent=2) + "\n")


def numbers(timing: Timing, flop: int, ceiling: float) -> dict[str, Any]:
    """Rates and shares of the measured iterations.

    Args:
        flop: floating-point operations of one iteration.
        ceiling: those a second of a large matrix product.
    """
    total, tokens = sum(timing.seconds), sum(timing.tokens)
    phases: dict[str, float] = {name: value / total for name, value in timing.phases.items() if value > 0}
    # The median of iterations, since a shared machine has slow ones; tokens a second are of all of them.
    iteration = statistics.median(timing.seconds)
    return {
        "completion_tokens_per_second": tokens / total,
        "rollout_tokens_per_second": tokens / timing.phases["rollout"],
        "iteration_seconds": iteration,
        "iteration_seconds_spread": [min(timing.seconds), max(timing.seconds)],
        "share": phases | {"other": 1 - sum(phases.values())},
        "flop_per_iteration": flop,
        "ceiling_flop_per_second": ceiling,
        "utilisation": flop / iteration / ceiling,
    }


def rows(record: dict[str, Any]) -> dict[str, str]:
    """The record as lines of a table."""
    measured, config = record["measured"], record["config"]
    low, high = measured["iteration_seconds_spread"]
    sizes = f"{config['prompt_tokens']} + {config['new_tokens']}"
    lines = {
        "device": record["device"],
        "work": f"{config['prompts']} prompts x {config['group']}, {record['environment'] or sizes}",
        "completion tokens/s, end to end": f"{measured['completion_tokens_per_second']:,.0f}",
        "completion tokens/s, rollout alone": f"{measured['rollout_tokens_per_second']:,.0f}",
        "seconds an iteration": f"{measured['iteration_seconds']:.3f} ({low:.3f} to {high:.3f})",
        "peak memory above the start, MiB": f"{measured['peak_memory_bytes'] / 2**20:,.0f}",
    }
    lines |= {f"share of time: {name}": f"{share:.0%}" for name, share in measured["share"].items()}
    lines["matrix-product ceiling, GFLOP/s"] = f"{measured['ceiling_flop_per_second'] / 1e9:,.0f}"
    lines["of the ceiling"] = f"{measured['utilisation']:.0%}"
    return lines
