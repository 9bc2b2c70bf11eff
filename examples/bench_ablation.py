"""What each technique of docs/performance.md is worth: GRPO end to end with one of them switched off at a time.

    python examples/bench_ablation.py                 # 8 prompts x 8, prompt 350, 48 new

Each measurement is a process of its own, all variants in turn, several turns; the median of each is printed with its
range. What lies within another's range is no difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, len(os.sched_getaffinity(0)))))


def nothing() -> None:
    """Everything as it is."""


def own_prompts() -> None:
    """Each row computes its own prompt, in sampling and training, as a model that cannot share does."""
    from textrl_gym.policy.backbone import Trunk

    Trunk.shares_prompts = False  # type: ignore[assignment, method-assign]


def plain_products() -> None:
    """PyTorch's own products in linear layers."""
    from textrl_gym.models import onednn

    onednn.is_faster = lambda: False  # type: ignore[assignment]


def kept_scores() -> None:
    """Attention in training passes by plain products, whose scores are kept for the backward pass."""
    from textrl_gym.policy import attention_kernels

    attention_kernels.KERNELS.clear()


def whole_prompts() -> None:
    """The last layer of a prompt is computed to its end."""
    from textrl_gym.policy import prefix_attention

    class Whole(prefix_attention.PromptLayer):
        def __init__(self, last: bool) -> None:
            super().__init__(last=False)

    prefix_attention.PromptLayer = Whole  # type: ignore[misc]


def all_logits() -> None:
    """The logits of all places at once, kept for the backward pass."""
    from textrl_gym.policy import policy

    policy.CHUNK_NUMBERS = 2**62


VARIANTS: dict[str, Callable[[], None]] = {
    "everything on": nothing,
    "each row computes its own prompt": own_prompts,
    "PyTorch's own products": plain_products,
    "no fused attention": kept_scores,
    "the last layer of prompts computed": whole_prompts,
    "all logits at once": all_logits,
}


def measure(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: what bench measures with one technique off."""
    VARIANTS[variant]()
    from textrl_gym.experiments import bench

    config = bench.BenchConfig(
        prompts=args.prompts,
        group=args.group,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        vocab_size=args.vocab_size,
        iterations=args.iterations,
        scoring=False,
        device="cpu",
    )
    return bench.bench(config)["measured"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=350)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=list(VARIANTS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.turns):
        for variant, rows in results.items():
            command = [sys.executable, "-W", "ignore", __file__, *(argv or sys.argv[1:]), "--only", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    for variant, rows in results.items():
        speeds = [row["completion_tokens_per_second"] for row in rows]
        memory = statistics.median(row["peak_memory_bytes"] for row in rows) / 2**20
        print(
            f"{variant:36} {statistics.median(speeds):7,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})"
            f"  {memory:7,.0f} MiB"
        )


if __name__ == "__main__":
    main()
