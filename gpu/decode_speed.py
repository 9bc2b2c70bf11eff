"""Sampling beside transformers.generate, in turns, and beside what the device's bandwidth and arithmetic allow.

The roofline of a decode step is the time in which the device can read what the step must read, or do the arithmetic
that it must do, whichever is longer: the weights once, each prompt's keys and values once, each row's own once. Both
ceilings are measured in the same process, as a large copy and a large matrix product.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bench_vs_generate
import torch
from torch.profiler import ProfilerActivity, profile

from gpu import shapes
from gpu.numbers import Numbers
from textrl_gym.experiments import bench
from textrl_gym.models import loading
from textrl_gym.policy.policy import Policy

SIDES = ("ours", "graphs", "graphs_bf16", "dynamic", "static", "compiled")
USUAL = ("ours", "graphs", "graphs_bf16", "dynamic", "static")


def make_sides(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Callable[[], int]], Any]:
    """What is measured by its name, and the model. Agents hold float32 weights and compute in bfloat16 by autocast."""
    dtype = loading.resolve_dtype(args.dtype)
    model = shapes.make(args.shape, torch.float32, device)
    low = shapes.make(args.shape, dtype, device)  # transformers' own side has weights of half the bytes
    work = bench_vs_generate.Work.of(args, shapes.SHAPES[args.shape]["vocab_size"], device)
    ours, graphs, graphs_bf16 = (
        Policy(model, dtype=dtype),
        Policy(model, dtype=dtype, cuda_graphs=True),
        Policy(low, dtype=dtype, cuda_graphs=True),
    )
    sides: dict[str, Callable[[], int]] = {
        "ours": lambda: work.ours(ours),
        "graphs": lambda: work.ours(graphs),
        "graphs_bf16": lambda: work.ours(graphs_bf16),
        "dynamic": lambda: work.theirs(low),
        "static": lambda: work.theirs(low, cache_implementation="static", disable_compile=True),
        "compiled": lambda: work.theirs(low, cache_implementation="static"),
    }
    return {name: sides[name] for name in args.sides}, low


def bandwidth_ceiling(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy; the best of a few."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    watch, best = bench.Stopwatch(device), 0.0
    for _ in range(8):
        begin = watch.now()
        target.copy_(source)
        best = max(best, 2 * size / (watch.now() - begin))
    return best


def step_needs(config: Any, prompts: int, group: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Bytes and floating-point operations of the mean decode step in bfloat16, each prompt read once.

    Args:
        config: of a Llama with tied embeddings.
    """
    width, heads, key_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_width, layers, rows = width // heads, config.num_hidden_layers, prompts * group
    of_layer = width * head_width * (2 * heads + 2 * key_heads) + 3 * width * config.intermediate_size
    weights = layers * of_layer + config.vocab_size * width
    own = (new_tokens + 1) / 2  # on average over the steps
    positions_read = prompts * prompt_tokens + rows * own
    read = 2.0 * (weights + 2 * layers * key_heads * head_width * positions_read)
    # A multiplication and an addition for each weight, and for each number of a score and of its share of the values.
    flop = 2.0 * rows * weights + 4.0 * layers * heads * head_width * rows * (prompt_tokens + own)
    return read, flop


def launches(work: Callable[[], int], new_tokens: int) -> dict[str, float]:
    """Kernels that run, and calls that start kernels or graphs, for each token of a rollout."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return {name: count / new_tokens for name, count in counts(found.events() or []).items()}


def counts(events: Iterable[Any]) -> dict[str, int]:
    """Of a profile: calls of the host that start a kernel or a graph, and what ran on the device."""
    found = {"launches_per_token": 0, "kernels_per_token": 0}
    for event in events:
        found["launches_per_token"] += "LaunchKernel" in event.name or "GraphLaunch" in event.name
        found["kernels_per_token"] += str(event.device_type).endswith("CUDA")
    return found


def try_out(sides: dict[str, Callable[[], int]], numbers: Numbers) -> dict[str, str]:
    """Run each side once, and leave out those that fail, so that the others are measured; their errors by name."""
    failed: dict[str, str] = {}
    for name in [*sides]:
        try:
            sides[name]()
        except RuntimeError as error:  # PyTorch's, out of memory included
            failed[name] = str(error)
            del sides[name]
            numbers.add(failed=failed)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the numbers as they are known; returns 1 where a side failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_vs_generate.add_sizes(parser)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=USUAL)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    numbers, device = Numbers(args.out), loading.resolve_device(args.device)
    names = ("shape", "dtype", "prompts", "group", "prompt_tokens", "new_tokens", "turns")
    numbers.add(work={name: getattr(args, name) for name in names}, device=str(device))
    sides, model = make_sides(args, device)
    failed = try_out(sides, numbers)
    speeds = bench_vs_generate.in_turns(
        sides, args.turns, device, lambda found: numbers.add(tokens_per_second={k: v for k, v in found.items() if v})
    )
    bandwidth, arithmetic = bandwidth_ceiling(device), bench.matmul_ceiling(device, loading.resolve_dtype(args.dtype))
    read, flop = step_needs(model.config, args.prompts, args.group, args.prompt_tokens, args.new_tokens)
    best_step = max(read / bandwidth, flop / arithmetic)
    rows = args.prompts * args.group
    numbers.add(
        bytes_per_second=bandwidth,
        flop_per_second=arithmetic,
        step_bytes=read,
        step_flop=flop,
        # Of the rollout as it is timed, its prompts and the host's work included.
        share_of_roofline={name: best_step * statistics.median(found) / rows for name, found in speeds.items()},
    )
    for name, work in sides.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            peak = torch.cuda.max_memory_allocated()
            numbers.add(**{f"{name}_peak_bytes": peak, f"{name}_launches": launches(work, args.new_tokens)})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
