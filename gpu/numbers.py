"""The numbers of one step, on disk the moment they are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from textrl_gym import files


@dataclasses.dataclass
class Numbers:
    """A JSON object that is written whole at every change."""

    path: Path
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, **numbers: Any) -> None:
        """Add or replace entries, write the file, and print what is new."""
        self.found |= numbers
        files.write_text(self.path, json.dumps(self.found, indent=1) + "\n")
        print(json.dumps(numbers), flush=True)
