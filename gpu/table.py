"""The GPU part of docs/performance.md, from the result.json of a run of `make gpu`.

    cp runs/gpu/result.json docs/data/gpu.json    # of a run on a GPU
    python -m gpu.table

Without that file the part says that nothing has been run.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from textrl_gym import files

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULT = ROOT / "docs" / "data" / "gpu.json"
BEGIN, END = "<!-- gpu: written by python -m gpu.table -->", "<!-- gpu: end -->"
NOT_RUN = """**Not run yet.** `make gpu` measures what this section is for, in nine minutes, and
`python -m gpu.table` writes it here. Until then no number of a GPU stands on this page."""
SIDES = {
    "ours": "textrl-gym, step by step",
    "graphs": "textrl-gym, CUDA graphs",
    "graphs_bf16": "textrl-gym, CUDA graphs, bfloat16 weights",
    "dynamic": "`generate`, dynamic cache",
    "static": "`generate`, static cache",
    "compiled": "`generate`, static cache, compiled",
}
TRAINED = {"grpo": "GRPO, textrl-gym", "trl_grpo": "GRPO, TRL", "ppo": "PPO with a reward model, textrl-gym"}


def spread(values: list[float]) -> str:
    """A median with its range."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def of_work(work: dict[str, Any]) -> str:
    """What was measured, in words."""
    return (
        f"{work['shape']}, {work['dtype']}, {work['prompts']} x {work['group']}, "
        f"{work['prompt_tokens']} + {work['new_tokens']}"
    )


def decode_table(numbers: dict[str, Any]) -> str:
    """Sampling: each side's speed, its ratio to generate, its share of the roofline, launches and memory."""
    speeds: dict[str, list[float]] = numbers.get("tokens_per_second", {})
    theirs = speeds.get("dynamic") or speeds.get("compiled")
    rows = []
    for name, found in speeds.items():
        ratio = f"{statistics.median(found) / statistics.median(theirs):.1f}" if theirs else "-"
        share = numbers.get("share_of_roofline", {}).get(name)
        started = numbers.get(f"{name}_launches", {}).get("launches_per_token")
        peak = numbers.get(f"{name}_peak_bytes")
        rows.append(
            [
                SIDES[name],
                spread(found),
                ratio,
                "-" if share is None else f"{share:.0%}",
                "-" if started is None else f"{started:,.0f}",
                "-" if peak is None else f"{peak / 2**30:.1f}",
            ]
        )
    beside = "`generate`, dynamic" if speeds.get("dynamic") else "`generate`, compiled"
    head = ["side", "tokens/s", f"times {beside}", "of the roofline", "launches a token", "peak GiB"]
    return f"Sampling: {of_work(numbers['work'])}\n\n{table(head, rows)}"


def train_table(numbers: dict[str, Any]) -> str:
    """Training end to end: speed and memory, with the ratios to TRL."""
    rows = []
    turns: dict[str, list[dict[str, float]]] = {name: found for name, found in numbers["turns"].items() if found}
    middle = {
        key: {name: statistics.median(turn[key] for turn in found) for name, found in turns.items()}
        for key in ("tokens_per_second", "peak_bytes")
    }
    for name, found in turns.items():
        cells = [TRAINED[name], spread([turn["tokens_per_second"] for turn in found])]
        cells.append(f"{middle['peak_bytes'][name] / 2**30:.1f}")
        for of in middle.values():
            cells.append(f"{of[name] / of['trl_grpo']:.2f}" if "trl_grpo" in of else "-")
        rows.append(cells)
    head = ["side", "completion tokens/s", "peak GiB", "speed / TRL's GRPO", "memory / TRL's GRPO"]
    return f"Training: {of_work(numbers['work'])}\n\n{table(head, rows)}"


def compile_table(numbers: dict[str, Any]) -> str:
    """Training with parts compiled: speed, phases, and what the first iteration took with compiling."""
    rows = [
        [
            f'`compile="{name}"`',
            f"{side['completion_tokens_per_second']:,.0f}",
            f"{side['phase_seconds']['rollout']:.3f}",
            f"{side['phase_seconds']['update']:.3f}",
            f"{side['first_seconds']:.0f}",
        ]
        for name, side in numbers["sides"].items()
    ]
    head = ["compiled", "completion tokens/s", "rollout, s", "update, s", "first iteration, s"]
    return f"torch.compile: {of_work(numbers['work'])}\n\n{table(head, rows)}"


def tldr_lines(numbers: dict[str, Any]) -> str:
    """The score of held-out posts before and after training."""
    words = ", ".join(
        f"{when} {found['mean']:.2f} ({found['interval'][0]:.2f} to {found['interval'][1]:.2f})"
        for when in ("before", "after")
        if (found := numbers.get(when))
    )
    done = f" {numbers['updates']} updates in {numbers['seconds']:.0f} s." if "seconds" in numbers else ""
    what = "ROUGE-L on real posts" if numbers["work"]["real"] else "Gold score on `TLDRSummarize-v0`"
    beside = "" if numbers["work"]["real"] else " On a CPU: [five seeds](embedded-world.md#results-of-rl)."
    return f"{what}: {words}.{done}{beside}"


def tests_lines(numbers: dict[str, Any]) -> str:
    """How many tests passed, and the names of those that did not."""
    failed = "".join(f"\n- failed: `{name}`" for name in numbers["failed"])
    return f"Tests on the device: {len(numbers['passed'])} passed, {len(numbers['failed'])} failed.{failed}"


def section(result: dict[str, Any] | None) -> str:
    """What stands between the markers."""
    if result is None or not result["cuda"]:
        return NOT_RUN
    parts = [
        f"`make gpu` on {result['device']}, {result['date'][:10]}: torch {result['torch']}, "
        f"transformers {result['transformers']}. Each ratio is of medians; ranges are over the turns."
    ]
    writers = {"tests": tests_lines, "decode": decode_table, "train": train_table, "tldr": tldr_lines}
    writers |= {"real": tldr_lines, "compile": compile_table}
    for step in result["steps"]:
        write = writers[step["name"].split("-")[0]]
        # A step that was cut short has some of its numbers: without the first of them there is nothing to write.
        if set(step["numbers"]) - {"work", "device", "trl", "failed"}:
            parts.append(write(step["numbers"]))
        if step["status"] != "ok":
            parts.append(f"Step `{step['name']}` {step['status']}: {step['reason'].splitlines()[0]}.")
    return "\n\n".join(parts)


def page(text: str, result: dict[str, Any] | None) -> str:
    """The page with its GPU part as the result says."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"the page must have one part between {BEGIN} and {END}"
    return pattern.sub(lambda _: f"{BEGIN}\n\n{section(result)}\n\n{END}", text)


def read_result(path: Path = RESULT) -> dict[str, Any] | None:
    """The committed result; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    """Write the page."""
    files.write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), read_result()))


if __name__ == "__main__":
    main()
