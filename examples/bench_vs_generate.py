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
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from textrl_gym.experiments.bench import Stopwatch
from textrl_gym.models import tiny
from textrl_gym.policy.policy import Policy
from textrl_gym.rollouts.sampler import generate


class EndsAt(StoppingCriteria):
    """Row b ends after ends[b] tokens."""

    def __init__(self, prompt_tokens: int, ends: torch.Tensor) -> None:
        self.prompt_tokens, self.ends = prompt_tokens, ends

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] - self.prompt_tokens >= self.ends


@dataclasses.dataclass(frozen=True)
class Work:
    """Random prompts, how many completions of each, and where each completion ends."""

    prompt_UP: torch.Tensor
    source_B: torch.Tensor
    end_B: torch.Tensor
    vocab_size: int
    new_tokens: int

    @classmethod
    def of(cls, args: argparse.Namespace, vocab_size: int, device: torch.device) -> Work:
        prompt_UP = torch.randint(1, vocab_size - 1, (args.prompts, args.prompt_tokens), device=device)
        source_B = torch.arange(args.prompts, device=device).repeat_interleave(args.group)
        end_B = torch.full_like(source_B, args.new_tokens)
        if args.spread:
            rows = len(source_B)
            end_B = (torch.arange(rows) % args.new_tokens + 1)[torch.randperm(rows)].to(device)
        return cls(prompt_UP, source_B, end_B, vocab_size, args.new_tokens)

    def ours(self, policy: Policy) -> int:
        """Sample with textrl-gym; the number of tokens."""
        rows, device = len(self.source_B), self.source_B.device
        uniform_BT = torch.rand(rows, self.new_tokens, device=device) * 0.9
        # A uniform number just below 1 takes the last token of the vocabulary, and one below 0.9 never does.
        uniform_BT[torch.arange(rows, device=device), self.end_B - 1] = 1 - 2**-24
        mask_UP = torch.ones_like(self.prompt_UP, dtype=torch.bool)
        sizes: dict[str, Any] = {"max_new_tokens": self.new_tokens, "end_ids": (self.vocab_size - 1,)}
        return int(generate(policy, self.prompt_UP, mask_UP, self.source_B, uniform_BT, **sizes).mask_BT.sum())

    def theirs(self, model: Any, **settings: Any) -> int:
        """Sample with transformers' generate; the number of tokens.

        Args:
            settings: of generate, such as cache_implementation.
        """
        prompt_BP = self.prompt_UP[self.source_B]
        usual: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad():
            model.generate(
                input_ids=prompt_BP,
                attention_mask=torch.ones_like(prompt_BP),
                max_new_tokens=self.new_tokens,
                stopping_criteria=StoppingCriteriaList([EndsAt(prompt_BP.shape[1], self.end_B)]),
                **(usual | settings),
            )
        return int(self.end_B.sum())


def add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=350)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument(
        "--spread", action="store_true", help="ends spread evenly over 1..new tokens, not all at the end"
    )
    parser.add_argument("--turns", type=int, default=5)


def in_turns(
    sides: Mapping[str, Callable[[], int]],
    turns: int,
    device: torch.device,
    tell: Callable[[dict[str, list[float]]], None] = lambda speeds: None,
) -> dict[str, list[float]]:
    """Tokens a second of each side in each turn, after a turn that warms up.

    Args:
        tell: called with the speeds so far after each measurement.
    """
    watch, speeds = Stopwatch(device), {name: list[float]() for name in sides}
    for turn in range(turns + 1):
        for name, work in sides.items():
            begin = watch.now()
            tokens = work()
            if turn:
                speeds[name].append(tokens / (watch.now() - begin))
                tell(speeds)
    return speeds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    args = parser.parse_args(argv)
    model, device = tiny.llama(2048, width=256, layers=4, heads=4), torch.device("cpu")
    policy, work = Policy(model), Work.of(args, 2048, device)
    sides = {"ours": lambda: work.ours(policy), "generate": lambda: work.theirs(model)}
    speeds = in_turns(sides, args.turns, device)
    for name, found in speeds.items():
        print(f"{name}: {statistics.median(found):,.0f} tokens/s ({min(found):,.0f} to {max(found):,.0f})")
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["generate"], strict=True)]
    print(f"ours / generate = {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
