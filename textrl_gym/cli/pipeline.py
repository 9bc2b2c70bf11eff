"""The commands of what precedes RL: `sft`, `reward-model` and `preferences`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrl_gym.cli.options import CONFIG_FILE, Part, env_flags, environment, flat, parse_command, write_toml
from textrl_gym.cli.terminal import print_rows, print_tables, records_table
from textrl_gym.registry import find_env

if TYPE_CHECKING:
    from rich.table import Table

    from textrl_gym.mdp.env_settings import EnvSettings


@dataclasses.dataclass(frozen=True)
class Output:
    """Where the work is written."""

    out: Path
    """The file or folder to write."""


def sft_command(args: Sequence[str]) -> int:
    """Fine-tune a language model on a task's prompts and completions."""
    from textrl_gym.pipeline import sft

    _run("sft", sft_command.__doc__, sft.SFTConfig, sft.sft, args)
    return 0


def reward_model_command(args: Sequence[str]) -> int:
    """Train a reward model, or an ensemble of several, on preferences between completions."""
    from textrl_gym.pipeline import reward_data, reward_ensemble

    about, config = reward_model_command.__doc__, reward_data.RewardModelConfig
    record = _run("reward-model", about, config, reward_ensemble.train_rewards, args)
    print_tables(*_reward_tables(record))
    return 0


def preferences_command(args: Sequence[str]) -> int:
    """Sample pairs of completions, label them, and write them as jsonl."""
    from textrl_gym.pipeline import sample_preferences

    about, config = preferences_command.__doc__, sample_preferences.PreferenceConfig
    _run("preferences", about, config, sample_preferences.make_preferences, args)
    return 0


def _run(
    command: str,
    about: str | None,
    config: type[Any],
    work: Callable[[str, Any, Path, EnvSettings], dict[str, Any]],
    args: Sequence[str],
) -> dict[str, Any]:
    """Read ENV, --out, and the flags of the config and the environment, do the work, and print what was measured.

    Returns:
        The record of the work.
    """
    table = command.replace("-", "_")
    parts: list[Part] = [environment(), ("output", flat(Output)), ("settings", flat(config)), env_flags()]
    tables = {"output": table, "settings": table, "env": "env"}
    parsed = parse_command(command, about, parts, tables, args)
    out = parsed.output.out
    record = work(find_env(parsed.environment), parsed.settings, out, parsed.env)
    config_file = out / CONFIG_FILE if out.is_dir() else out.with_suffix(".toml")
    write_toml(config_file, {"env": parsed.env, table: [parsed.output, parsed.settings]})
    # Lists and missing values stay in the record; a terminal has no room for them.
    measured = {name: value for name, value in record["measured"].items() if isinstance(value, int | float)}
    print_rows(f"saved in {out}", {name: f"{value:.4g}" for name, value in measured.items()})
    return record


def _reward_tables(record: Mapping[str, Any]) -> list[Table]:
    """The record of reward-model training as tables."""
    tables = [records_table("Accuracy on held-out pairs", record["accuracy"])]
    if "calibration" in record:  # an ensemble's record has none
        error = record["calibration"]["ece"]
        tables.append(records_table(f"Calibration: expected error {error:.3f}", record["calibration"]["bins"]))
    if record.get("curve"):
        tables.append(records_table("Accuracy by the number of training pairs", record["curve"]))
    return tables
