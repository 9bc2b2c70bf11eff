"""Sampling alone: textrl-gym's sampler and `transformers.generate` in turns, on the same random Llama and prompts.

python examples/bench_vs_generate.py                          # 8 prompts x 8, prompt 350, 48 new
python examples/bench_vs_generate.py --prompts 64 --group 1 --spread   # ends spread evenly over 1..48
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_NUM_THREADS", str(min(8, len(os.sched_getaffinity(0)))))

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.sampler import generate


class EndsAt(StoppingCriteria):
    """Row b ends after ends[b] tokens."""

    def __init__(self, prompt_tokens: int, ends: torch.Tensor) -> None:
        self.prompt_tokens, self.ends = prompt_tokens, ends

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] - self.prompt_tokens >= self.ends


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=350)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument(
        "--spread", action="store_true", help="ends spread evenly over 1..new tokens, not all at the end"
    )
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args(argv)
    model = tiny.llama(2048, width=256, layers=4, heads=4)
    policy, rows = Policy(model), args.prompts * args.group
    prompt_UP = torch.randint(1, 2048, (args.prompts, args.prompt_tokens))
    mask_UP = torch.ones_like(prompt_UP, dtype=torch.bool)
    source_B = torch.arange(args.prompts).repeat_interleave(args.group)
    ends_B = torch.full((rows,), args.new_tokens)
    if args.spread:
        ends_B = (torch.arange(rows) % args.new_tokens + 1)[torch.randperm(rows)]

    def ours() -> int:
        uniform_BT = torch.rand(rows, args.new_tokens) * 0.9
        # A uniform number just below 1 takes the last token of the vocabulary, and one below 0.9 never does.
        uniform_BT[torch.arange(rows), ends_B - 1] = 1 - 2**-24
        out = generate(policy, prompt_UP, mask_UP, source_B, uniform_BT, max_new_tokens=args.new_tokens, eos_id=2047)
        return int(out.mask_BT.sum())

    def theirs() -> int:
        stop = StoppingCriteriaList([EndsAt(args.prompt_tokens, ends_B)])
        settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad():
            model.generate(
                input_ids=prompt_UP[source_B],
                attention_mask=mask_UP[source_B].long(),
                max_new_tokens=args.new_tokens,
                stopping_criteria=stop,
                **settings,
            )
        return int(ends_B.sum())

    speeds: dict[str, list[float]] = {"ours": [], "generate": []}
    for turn in range(args.turns + 1):
        for name, work in (("ours", ours), ("generate", theirs)):
            begin = time.perf_counter()
            tokens = work()
            if turn:  # the first turn warms up
                speeds[name].append(tokens / (time.perf_counter() - begin))
    for name, found in speeds.items():
        print(f"{name}: {statistics.median(found):,.0f} tokens/s ({min(found):,.0f} to {max(found):,.0f})")
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["generate"], strict=True)]
    print(f"ours / generate = {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
