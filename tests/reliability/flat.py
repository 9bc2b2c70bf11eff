"""Memory, file handles and threads of a training, written down as it goes.

    python tests/reliability/flat.py grpo --updates 2000 --folder /tmp/flat

Prints a JSON object: resident bytes, open handles and threads, one of each for every 20th update.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

from textrl_gym import registry
from textrl_gym.mdp.env_settings import EnvSettings
from textrl_gym.persistence.save_schedule import SaveOptions
from textrl_gym.pipeline import sft
from textrl_gym.pipeline.trainer import Trainer

EVERY = 20


class Meter:
    """Looks at this process."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"bytes": [], "handles": [], "threads": []}
        self.calls = 0

    def __call__(self, *_: object) -> bool:
        self.calls += 1
        if self.calls % EVERY == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen["bytes"].append(pages * os.sysconf("SC_PAGE_SIZE"))
            self.seen["handles"].append(len(os.listdir("/proc/self/fd")))
            self.seen["threads"].append(len(os.listdir("/proc/self/task")))
        return True


def train(work: str, updates: int, folder: Path) -> Meter:
    """So many updates of an agent, or of supervised training, with checkpoints and evaluations between them."""
    meter = Meter()
    often = max(10, updates // 20)
    if work == "sft":
        log = Trainer._log

        def watched(*args: Any) -> None:
            log(*args)
            meter()

        patched: Any = Trainer
        patched._log = watched  # the only moment between two updates
        config = sft.SFTConfig(
            steps=updates, copy_steps=0, hidden_size=16, intermediate_size=32, layers=2, vocab_size=300
        )
        sft.sft("CopyText-v0", config, folder, EnvSettings(), SaveOptions(save_every=often))
        return meter
    agent = registry.load_agent_class(work)("CopyText-v0", rollout_episodes=8, seed=0, out=folder)
    quiet: dict[str, Any] = {"progress_bar": False, "eval_episodes": 4, "on_bad_health": "warn", "on_hacking": "off"}

    def until(local: dict[str, Any], everything: dict[str, Any]) -> bool:
        meter()
        return agent.num_updates < updates

    agent.learn(10**9, callback=until, eval_every=often, save_every=often, **quiet)
    return meter


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("--updates", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    print(json.dumps(train(arguments.work, arguments.updates, arguments.folder).seen))
