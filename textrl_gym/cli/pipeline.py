"""The commands of what precedes RL: `sft`, `reward-model` and `preferences`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from textrl_gym import processes
from textrl_gym.cli.options import (
    CONFIG_FILE,
    Part,
    env_flags,
    environment,
    flag,
    flat,
    parse_command,
    parse_flags,
    write_toml,
)
from textrl_gym.cli.terminal import print_rows, print_tables, records_table
from textrl_gym.persistence.save_schedule import SaveOptions
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

    _train("sft", sft_command.__doc__, sft.SFTConfig, sft.sft, args)
    return 0


def reward_model_command(args: Sequence[str]) -> int:
    """Train a reward model, or an ensemble, on preferences; or measure one: --evaluate FOLDER --dataset ..."""
    if any(arg.partition("=")[0] == "--evaluate" for arg in args):
        return _measure_reward(args)
    from textrl_gym.pipeline import reward_data, reward_ensemble

    about, config = reward_model_command.__doc__, reward_data.RewardModelConfig
    record = _train("reward-model", about, config, reward_ensemble.train_rewards, args)
    print_tables(*_reward_tables(record))
    return 0


def _measure_reward(args: Sequence[str]) -> int:
    from textrl_gym.evaluation.reward_accuracy import RewardAccuracyConfig, reward_accuracy

    about = "Measure an existing reward model (a folder, or any classifier with one label) on preferences."
    parsed = parse_flags("reward-model --evaluate", about, [("config", flat(RewardAccuracyConfig))], args)
    record = reward_accuracy(parsed.config)
    print_tables(records_table(f"Accuracy of {parsed.config.evaluate}", record["accuracy"]))
    if "trained on" not in record["measured"]:
        print("what it was trained on is not known: --trained-on DATASET tells how many of the prompts it has seen")
    return 0


def preferences_command(args: Sequence[str]) -> int:
    """Sample pairs of completions, label them, and write them as jsonl."""
    from textrl_gym.llm.asking import EndpointConfig
    from textrl_gym.pipeline import sample_preferences

    about, config = preferences_command.__doc__, sample_preferences.PreferenceConfig
    asking: Part = ("endpoint", EndpointConfig, EndpointConfig())
    parsed = _parse("preferences", about, config, (Output,), args, asking)
    record = sample_preferences.make_preferences(
        find_env(parsed.environment), parsed.settings, parsed.output.out, parsed.env, parsed.endpoint
    )
    _finish("preferences", parsed, record)
    return 0


def _train(
    command: str,
    about: str | None,
    config: type[Any],
    work: Callable[[str, Any, Path, EnvSettings, SaveOptions], dict[str, Any]],
    args: Sequence[str],
) -> dict[str, Any]:
    """Train by the flags, or go on with the run that --resume names, and print what was measured.

    Returns:
        The record of the work.
    """
    # As in `train`: a run that goes on takes its settings from its folder, and not from arguments.
    if any(arg.partition("=")[0] == "--resume" for arg in args):
        from textrl_gym.pipeline.trainer import read_run

        out = parse_flags(command, about, [("resume", flag(Path, "the run's folder"))], args).resume
        env_id, env, settings, save = read_run(out, command, config)
        parsed = SimpleNamespace(environment=env_id, env=env, settings=settings, output=Output(out), save=save)
    else:
        about = f"{about}\n\nThe same command goes on where it was stopped; so does --resume OUT."
        parsed = _parse(command, about, config, (Output, SaveOptions), args)
    out = parsed.output.out
    try:
        record = work(find_env(parsed.environment), parsed.settings, out, parsed.env, parsed.save)
    except KeyboardInterrupt:
        if processes.is_first():
            print(f"go on with: textrl-gym {command} --resume {out}", file=sys.stderr)
        raise
    _finish(command, parsed, record)
    return record


def _parse(
    command: str, about: str | None, config: type[Any], own: Sequence[type[Any]], args: Sequence[str], *more: Part
) -> SimpleNamespace:
    """ENV, the flags of the command's own dataclasses, and those of the config and the environment.

    Args:
        more: arguments with a prefix, which is also the name of their table.
    """
    names = {Output: "output", SaveOptions: "save"}
    parts: list[Part] = [environment(), *((names[cls], flat(cls)) for cls in own), ("settings", flat(config))]
    tables = {part[0]: _table(command) for part in parts[1:]} | {name: name for name, *_ in (*more, env_flags())}
    return parse_command(command, about, [*parts, *more, env_flags()], tables, args)


def _table(command: str) -> str:
    """The command's table in a TOML file."""
    return command.replace("-", "_")


def _finish(command: str, parsed: SimpleNamespace, record: Mapping[str, Any]) -> None:
    """Write down the settings, and print what was measured."""
    out = parsed.output.out
    config_file = out / CONFIG_FILE if out.is_dir() else out.with_suffix(".toml")
    own = [getattr(parsed, name) for name in ("output", "save", "settings") if hasattr(parsed, name)]
    # Only where a language model was asked: the table would else stand in every file of pairs.
    asking = getattr(parsed, "endpoint", None)
    asked = {} if asking is None or asking == type(asking)() else {"endpoint": asking}
    write_toml(config_file, {"env": parsed.env, _table(command): own, **asked})
    # Lists and missing values stay in the record; a terminal has no room for them.
    measured = {name: value for name, value in record["measured"].items() if isinstance(value, int | float)}
    print_rows(f"saved in {out}", {name: f"{value:.4g}" for name, value in measured.items()})


def _reward_tables(record: Mapping[str, Any]) -> list[Table]:
    """The record of reward-model training as tables."""
    tables = [records_table("Accuracy on held-out pairs", record["accuracy"])]
    if "calibration" in record:  # an ensemble's record has none
        error = record["calibration"]["ece"]
        tables.append(records_table(f"Calibration: expected error {error:.3f}", record["calibration"]["bins"]))
    if record.get("curve"):
        tables.append(records_table("Accuracy by the number of training pairs", record["curve"]))
    return tables
