"""`textrl-gym export`: the model of a run for other libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from textrl_gym import files
from textrl_gym.cli.options import flat, parse_flags, positional


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    """Where to, and in which form."""

    to: Path
    """A new or empty folder."""
    merge: bool = False
    """Add a LoRA to the weights, so that no peft is needed to load the model."""
    base_model: str | None = None
    """Where the base of a LoRA stands now (a folder), if it was moved."""
    push: str | None = None
    """Also upload the folder to this repository of the Hub (USER/NAME), a private one where it does not exist yet."""


def export_command(args: Sequence[str]) -> int:
    """Write a run's model for transformers, vLLM and llama.cpp: RUN --to FOLDER."""
    parts = [("run", positional("RUN", Path, "the folder of a run")), ("flags", flat(ExportFlags))]
    parsed = parse_flags("export", export_command.__doc__, parts, args)
    # Before torch is loaded: a wrong folder is said at once.
    files.read_state(files.whole_checkpoint(parsed.run))
    from textrl_gym.integrations.export import export

    flags = parsed.flags
    folder = export(parsed.run, flags.to, merge=flags.merge, push=flags.push, base_model=flags.base_model)
    print(f"saved in {folder}" + (f" and uploaded to {flags.push}" if flags.push else ""))
    return 0
