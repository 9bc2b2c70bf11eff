"""What torch.compile is worth: GRPO end to end with nothing, the update's passes, the decode step, or both compiled.

The model is bench's, a random Llama of width 256 with 4 layers: small kernels, where fusing and launching count most.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.numbers import Numbers
from textrl_gym.experiments import bench
from textrl_gym.policy import compiling

SIDES = ("none", "update", "decode", "all")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the numbers as they are known; returns 1 where a side failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, default in {"prompts": 32, "group": 8, "prompt-tokens": 350, "new-tokens": 64, "iterations": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--backend", default=compiling.BACKEND, help="of torch.compile")
    parser.add_argument("--cuda-graphs", action="store_true", help="decode on CUDA graphs, also where compiled")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    compiling.BACKEND = args.backend
    sizes = {name: getattr(args, name) for name in ("prompts", "group", "prompt_tokens", "new_tokens")}
    numbers = Numbers(args.out)
    numbers.add(work=sizes | {"shape": "width 256, 4 layers", "dtype": args.dtype, "iterations": args.iterations})
    sides: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for side in args.sides:
        config = bench.BenchConfig(
            **sizes,
            iterations=args.iterations,
            dtype=args.dtype,
            cuda_graphs=args.cuda_graphs,
            compile=side,
            scoring=False,
        )
        begin = time.monotonic()
        try:
            timing = bench.time_iterations(bench.make_agent(config), args.iterations)
        except (RuntimeError, ValueError) as error:  # PyTorch's and a missing compiler's
            failed[side] = str(error)
            numbers.add(failed=failed)
            continue
        sides[side] = {
            "completion_tokens_per_second": sum(timing.tokens) / sum(timing.seconds),
            "phase_seconds": {name: seconds / args.iterations for name, seconds in timing.phases.items()},
            # Of making the agent and of the first iteration, and so with compiling.
            "first_seconds": time.monotonic() - begin - sum(timing.seconds),
        }
        numbers.add(sides=sides)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
