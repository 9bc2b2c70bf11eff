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
from typing import Any, Literal

import torch

from textrl_gym import files, registry
from textrl_gym.core import Row
from textrl_gym.mdp.task import Task
from textrl_gym.mdp.text_env import TextVectorEnv
from textrl_gym.models import flops, loading, onednn, tiny
from textrl_gym.rewards.reward_model import RewardModel
from textrl_gym.rollouts import sampler

PHASES = ("rollout", "scoring", "reference", "values", "update")
"""What an iteration is made of. The rest, "other", is prompts, texts and rewards on the host."""


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    agent: Literal["grpo", "ppo"] = "grpo"
    """The algorithm whose update is measured."""
    model: str | None = None
    """A Hub id, a folder or smollm2-135m; None: a random Llama of width 256 with 4 layers and 2,048 tokens."""
    prompts: int = 8
    """Different prompts of a rollout."""
    group: int = 8
    """Completions of each prompt."""
    prompt_tokens: int = 350
    """Tokens of every prompt."""
    vocab_size: int = 2048
    """Tokens of the random model."""
    new_tokens: int = 48
    """Most tokens of a completion; a random model hardly ever ends before."""
    scoring: bool = True
    """Score with a reward model of the same shape; without, with the length of the text."""
    iterations: int = 5
    """Measured iterations, after one that is not."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes."""
    cuda_graphs: bool = False
    """Decode at fixed shapes, on a GPU as CUDA graphs."""
    out: Path | None = None
    """Also write the numbers to this JSON file."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "prompt_tokens", "new_tokens", "vocab_size", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.agent == "grpo" and self.group < 2:
            raise ValueError(f"grpo compares completions of a prompt: group must be at least 2, got {self.group}")


class RandomPrompts(Task):
    """Prompts of random tokens, all of one length."""

    id = "bench"
    kl_coef = 0.04

    def __init__(self, config: BenchConfig) -> None:
        self.model, self.vocab_size = config.model or "made in code", config.vocab_size
        self.max_prompt_tokens, self.max_new_tokens = config.prompt_tokens, config.new_tokens

    def rows(self, split: str, dataset: str | None = None) -> Sequence[Row]:
        """Rows that differ in their prompts only."""
        return [{"prompt": f"prompt {i}", "number": i} for i in range(4096)]

    def load_tokenizer(self, name: str | None = None) -> Any:
        if self.model == "made in code":
            return tiny.symbol_tokenizer([f"t{i}" for i in range(1, self.vocab_size)])
        return super().load_tokenizer(name)

    def load_model(self, name: str | None = None, **kwargs: Any) -> Any:
        if self.model == "made in code":
            return tiny.llama(self.vocab_size, width=256, layers=4, heads=4)
        return super().load_model(name, **kwargs)

    def encode(self, row: Row, tokenizer: Any, max_prompt_tokens: int) -> list[int]:
        generator = torch.Generator().manual_seed(row["number"])
        return torch.randint(1, len(tokenizer), (max_prompt_tokens,), generator=generator).tolist()


@dataclasses.dataclass
class Stopwatch:
    """Seconds by phase, the device's work included."""

    device: torch.device
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def on(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        """Inside, calls of owner.name are counted as this phase."""
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds[phase] += self.now() - begin

        setattr(owner, name, timed)
        try:
            yield
        finally:
            setattr(owner, name, plain)


def make_agent(config: BenchConfig, **settings: Any) -> Any:
    """The agent to measure, on its own environment, with one optimizer step a rollout."""
    task = RandomPrompts(config)
    device = loading.resolve_device(config.device)
    tokenizer = task.load_tokenizer()
    reward: Any = "length"
    if config.scoring:
        shape = task.load_model().config
        shape.num_labels, shape.pad_token_id = 1, tokenizer.eos_token_id
        from transformers import AutoModelForSequenceClassification

        dtype = loading.resolve_dtype(config.dtype)
        scorer = AutoModelForSequenceClassification.from_config(shape).to(device=device, dtype=dtype).eval()
        reward = RewardModel(scorer, tokenizer, env_tokenizer=tokenizer)
    env = TextVectorEnv(
        config.prompts * config.group,
        task=task,
        reward=reward,
        group_size=config.group,
        device=str(device),
        array="torch",
        autoreset_mode="Disabled",
    )
    usual: dict[str, Any] = {"epochs": 1, "minibatches": 1, "lr_schedule": "constant"}
    usual |= {"dtype": config.dtype, "cuda_graphs": config.cuda_graphs}
    return registry.load_agent_class(config.agent)(env, device=str(device), **(usual | settings))


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product, the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    layer = torch.nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = functools.partial(onednn.linear, layer) if device.type == "cpu" and onednn.is_faster() else layer
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


def bench(config: BenchConfig, **settings: Any) -> dict[str, Any]:
    """Measure, and return the numbers; see `rows` for what they are.

    Args:
        settings: fields of the agent's config.

    Raises:
        ValueError: a model that cannot be loaded, a device that is not there.
    """
    agent = make_agent(config, **settings)
    device, policy = agent.device, agent.policy
    before = peak_bytes(device)
    watch = Stopwatch(device)
    tokens, seconds = [], []
    with contextlib.ExitStack() as stack:
        for owner, name, phase in (
            (sampler, "generate", "rollout"),
            (agent.env, "score", "scoring"),
            (policy.reference, "logprobs", "reference"),
            (policy, "values", "values"),
            (agent, "update", "update"),
        ):
            stack.enter_context(watch.on(owner, name, phase))
        for number in range(config.iterations + 1):
            begin = watch.now()
            rollout = agent.collect()
            agent.update(rollout)
            if number == 0:  # caches, compilation, allocation
                watch.seconds = dict.fromkeys(PHASES, 0.0)
                continue
            seconds.append(watch.now() - begin)
            tokens.append(rollout.num_tokens)
    peak = peak_bytes(device) - before
    with flops.counter() as counter:
        agent.update(agent.collect())
    total = sum(seconds)
    phases = {name: value / total for name, value in watch.seconds.items() if value > 0}
    ceiling = matmul_ceiling(device, loading.resolve_dtype(config.dtype))
    found = {
        "completion_tokens_per_second": sum(tokens) / total,
        "rollout_tokens_per_second": sum(tokens) / watch.seconds["rollout"],
        "iteration_seconds": statistics.median(seconds),
        "iteration_seconds_spread": [min(seconds), max(seconds)],
        "peak_memory_bytes": peak,
        "share": phases | {"other": 1 - sum(phases.values())},
        "flop_per_iteration": counter.get_total_flops(),
        "ceiling_flop_per_second": ceiling,
        "utilisation": counter.get_total_flops() / statistics.median(seconds) / ceiling,
    }
    device_name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    record = {
        "config": dataclasses.asdict(config) | {"out": None},
        "agent": dataclasses.asdict(agent.config),
        "device": device_name,
        "torch": torch.__version__,
        "measured": found,
    }
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(config.out, json.dumps(record, indent=2) + "\n")
    return record


def rows(record: dict[str, Any]) -> dict[str, str]:
    """The record as lines of a table."""
    found, config = record["measured"], record["config"]
    low, high = found["iteration_seconds_spread"]
    lines = {
        "device": record["device"],
        "work": f"{config['prompts']} prompts x {config['group']}, {config['prompt_tokens']} + {config['new_tokens']}",
        "completion tokens/s, end to end": f"{found['completion_tokens_per_second']:,.0f}",
        "completion tokens/s, rollout alone": f"{found['rollout_tokens_per_second']:,.0f}",
        "seconds an iteration": f"{found['iteration_seconds']:.3f} ({low:.3f} to {high:.3f})",
        "peak memory above the start, MiB": f"{found['peak_memory_bytes'] / 2**20:,.0f}",
    }
    lines |= {f"share of time: {name}": f"{share:.0%}" for name, share in found["share"].items()}
    lines["matrix-product ceiling, GFLOP/s"] = f"{found['ceiling_flop_per_second'] / 1e9:,.0f}"
    lines["of the ceiling"] = f"{found['utilisation']:.0%}"
    return lines
