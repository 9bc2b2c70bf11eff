"""What `make gpu` does, in order of worth: every step with its time limit, and its small form for a CPU."""

from __future__ import annotations

import dataclasses

BUDGET_SECONDS = 540
GRACE_SECONDS = 2
"""What ending a step that ran out of time, and writing its result, may take."""

SHAPE = ("--shape", "smollm2-135m", "--dtype", "bfloat16", "--prompts", "32", "--group", "8")
LENGTHS = ("--prompt-tokens", "350", "--new-tokens", "64")
LARGER = ("--shape", "qwen2.5-0.5b", "--sides", "graphs", "graphs_bf16", "dynamic", "--turns", "2")
TINY = (
    "--shape",
    "tiny",
    "--prompts",
    "2",
    "--group",
    "2",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "4",
    "--turns",
    "1",
)
SMALL = ("--prompts", "2", "--group", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--iterations", "1")


@dataclasses.dataclass(frozen=True)
class Step:
    """One process of the plan."""

    name: str
    shows: str
    """What is known when it has run, in words."""
    seconds: int
    """Its time limit."""
    command: tuple[str, ...]
    """Arguments of the Python interpreter on a GPU. `{out}` is the file that it writes its numbers to."""
    on_cpu: tuple[str, ...] | None
    """The same, small, on a machine without a GPU; None: it is skipped there."""
    why_not: str = ""
    """Why it is skipped, or what its small form leaves out."""
    needs: str = ""
    """An environment variable without which the step is skipped on any machine."""


PLAN = (
    Step(
        "tests",
        "the CUDA paths are right",
        100,
        ("-m", "gpu.tests", "--device", "cuda", "--out", "{out}"),
        ("-m", "gpu.tests", "--device", "cpu", "--out", "{out}"),
        "the same test bodies on the CPU; CUDA graphs and the watch for host synchronisation need a GPU",
    ),
    Step(
        "decode",
        "tokens a second beside transformers.generate and beside the roofline",
        65,
        ("-m", "gpu.decode_speed", *SHAPE, *LENGTHS, "--turns", "3", "--out", "{out}"),
        ("-m", "gpu.decode_speed", *TINY, "--out", "{out}"),
        "a tiny shape; kernel launches are counted on a GPU only",
    ),
    Step(
        "train",
        "GRPO and PPO end to end beside TRL's GRPO, in turns, with peak memory",
        85,
        ("-m", "gpu.train_speed", *SHAPE, *LENGTHS, "--seconds", "76", "--out", "{out}"),
        ("-m", "gpu.train_speed", *TINY, "--iterations", "1", "--out", "{out}"),
        "a tiny shape; TRL's side only where TRL is installed",
    ),
    Step(
        "tldr",
        "200 updates of GRPO on TLDRSummarize-v0 in bfloat16 reach the CPU's gold score",
        90,
        ("-m", "gpu.tldr", "--dtype", "bfloat16", "--cuda-graphs", "--out", "{out}"),
        ("-m", "gpu.tldr", "--tokens", "2000", "--episodes", "8", "--out", "{out}"),
        "two updates and 8 posts",
    ),
    Step(
        "decode-compiled",
        "transformers.generate with a static cache and torch.compile, beside ours",
        60,
        ("-m", "gpu.decode_speed", *SHAPE, *LENGTHS, "--sides", "graphs", "compiled", "--turns", "2", "--out", "{out}"),
        None,
        "transformers compiles its decoding on a GPU only",
    ),
    Step(
        "compile",
        "GRPO with the update's passes, the decode step, or both compiled, beside nothing compiled",
        45,
        ("-m", "gpu.compile_speed", "--dtype", "bfloat16", "--cuda-graphs", "--out", "{out}"),
        ("-m", "gpu.compile_speed", *SMALL, "--backend", "eager", "--sides", "none", "update", "--out", "{out}"),
        "tiny sizes; what the compiler is given is run as it is, since compiling takes a CPU minutes",
    ),
    Step(
        "decode-0.5b",
        "the same as decode with the shape of Qwen2.5-0.5B",
        35,
        ("-m", "gpu.decode_speed", *SHAPE, *LENGTHS, *LARGER, "--out", "{out}"),
        None,
        "a model of that size takes minutes on a CPU",
    ),
    Step(
        "real-posts",
        "200 updates on real posts with the weights that TEXTRL_GYM_WEIGHTS names",
        40,
        ("-m", "gpu.tldr", "--dtype", "bfloat16", "--real", "--cuda-graphs", "--out", "{out}"),
        None,
        "a real model takes minutes an update on a CPU",
        needs="TEXTRL_GYM_WEIGHTS",
    ),
)
