"""GRPO and PPO end to end beside TRL's GRPO, in turns, each side and turn in a process of its own.

The work of both sides is that of examples/bench_vs_trl.py, which this runs. Our PPO also scores with a reward model of
the policy's shape, which TRL's GRPO does not. TRL computes its update in parts of the size of ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import shapes
from gpu.numbers import Numbers
from textrl_gym.models import loading
from textrl_gym.training.config import AgentConfig

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "bench_vs_trl.py"
SIDES = {"grpo": ("grpo", "ours"), "trl_grpo": ("grpo", "trl"), "ppo": ("ppo", "ours")}


def measure(agent: str, side: str, work: Sequence[str]) -> dict[str, float] | str:
    """One side's numbers; the end of its output where it failed."""
    command = [sys.executable, str(EXAMPLE), agent, "--side", side, *work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def parts(prompts: int, group: int, prompt_tokens: int, new_tokens: int) -> int:
    """In how many micro-batches our update computes a rollout, as the next divisor of its rows."""
    places = prompts * prompt_tokens + prompts * group * new_tokens
    least = math.ceil(places / AgentConfig().micro_batch_tokens)
    return next(n for n in range(least, prompts * group + 1) if prompts % n == 0 or n == prompts * group)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the numbers as they are known; returns 1 where a side failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, default in {"prompts": 32, "group": 8, "prompt-tokens": 350, "new-tokens": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--iterations", type=int, default=3, help="measured in each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=90, help="no side is begun that would end later")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    begin, longest = time.monotonic(), 0.0
    numbers, device = Numbers(args.out), loading.resolve_device("auto").type
    sizes = {name: getattr(args, name) for name in ("prompts", "group", "prompt_tokens", "new_tokens")}
    numbers.add(work=sizes | {"shape": args.shape, "dtype": args.dtype, "iterations": args.iterations}, device=device)
    speeds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    failed: dict[str, str] = {}
    missing = [name for name in ("trl", "datasets", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        numbers.add(trl=f"its side was skipped: {', '.join(missing)} not installed")
        del speeds["trl_grpo"]
    with tempfile.TemporaryDirectory() as folder:
        shapes.save(args.shape, Path(folder))
        work = ["--model", folder, "--device", device, "--dtype", args.dtype, "--iterations", str(args.iterations)]
        work += ["--accumulate", str(parts(**sizes))]
        for name, size in sizes.items():
            work += [f"--{name.replace('_', '-')}", str(size)]
        for side in [*speeds] * args.turns:
            started = time.monotonic()
            if side in failed or started - begin + longest > args.seconds:
                continue
            found = measure(*SIDES[side], work)
            longest = max(longest, time.monotonic() - started)
            if isinstance(found, str):
                failed[side] = found
            else:
                speeds[side].append(found)
            numbers.add(turns=speeds, failed=failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
