"""What a run stands on beside its checkpoint: its initial model, its reference and its reward models, known by hash.

A checkpoint names them by folder, as they were given. Where another model stands under that name by now, going on
would measure the KL to that one, or train on another reward, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from textrl_gym import files
from textrl_gym.models import fingerprint
from textrl_gym.rewards import folder_of

if TYPE_CHECKING:
    from textrl_gym.core import RewardSpec
    from textrl_gym.mdp.task import Task

FLAGS = {
    "model": "say where it is with --base-model FOLDER (in Python base_model=)",
    "reference": "put it there again, or give the reference as a loaded model",
    "dataset": "say where it is with --env.dataset (in Python env_settings={'dataset': ...})",
    "reward": "say where it is with --env.reward (in Python env_settings={'reward': ...})",
}


class Fingerprints(TypedDict):
    """The hashes of what a run depends on; None of what is no folder (a Hub id, a package's model)."""

    model: str | None
    reference: str | None
    reward: dict[str, str]
    """Name of a reward -> the hash of the folder that it names."""


def fingerprints(model: str | None, reference: str | None, reward: object) -> Fingerprints:
    """The hashes of what the specs name."""
    return {
        "model": fingerprint.of(model) if model else None,
        "reference": fingerprint.of(reference) if reference else None,
        "reward": of_rewards(reward),
    }


def of_rewards(spec: object) -> dict[str, str]:
    """The hash of each folder that a reward names."""
    names = [spec] if isinstance(spec, str | Path) else list(spec) if isinstance(spec, Mapping) else []
    hashes = {str(name): fingerprint.of(folder) for name in names if (folder := folder_of(str(name))[1])}
    return {name: value for name, value in hashes.items() if value is not None}


def known(state: dict[str, Any], file: Path) -> Fingerprints:
    """The hashes in the JSON of a checkpoint; none in one of before.

    Raises:
        ValueError: they are no hashes.
    """
    kinds: files.Kinds = {"model": (str, type(None)), "reference": (str, type(None)), "reward": (dict,)}
    saved = state.get("fingerprints", {"model": None, "reference": None, "reward": {}})
    files.check_fields({"fingerprints": saved}, file, {"fingerprints": (dict,)})
    files.check_fields(saved, file, kinds)
    files.check_fields(saved["reward"], file, dict.fromkeys(saved["reward"], (str,)))
    return {"model": saved["model"], "reference": saved["reference"], "reward": saved["reward"]}


def initial_model(folder: Path, task: Task, saved: str | None, expected: str | None, given: str | None) -> str | None:
    """What the task is to load as the model that a run started from; None: its own.

    Args:
        folder: the run's checkpoint.
        saved: the name in it.
        expected: the hash in it.
        given: where the user says that it is now.

    Raises:
        ValueError: another model stands there.
    """
    if given is not None:
        check(given, f"base_model={given!r}", folder, expected)
        return given
    if saved is None:
        if task.model:
            check(task.model, "the task's own model", folder, expected)
        return None
    return saved if expected is None else fingerprint.locate(saved, folder, expected, FLAGS["model"])


def check(where: str, words: str, folder: Path, expected: str | None) -> None:
    """Hold that a folder is the model that a run depends on."""
    if expected is not None and (now := fingerprint.of(where)) != expected:
        state = f"has the fingerprint {now}" if now else "is no folder of a model"
        raise ValueError(
            f"{words} {state}, and {str(folder)!r} depends on a model with the fingerprint {expected}: {FLAGS['model']}"
        )


def located_reward(folder: Path, spec: Any, expected: dict[str, str]) -> Any:
    """A saved reward, with the folders where its models are now.

    Raises:
        ValueError: another model stands there.
    """

    def now(name: str) -> str:
        if name not in expected:
            return name
        kind, path = folder_of(name)
        return kind + fingerprint.locate(path or name, folder, expected[name], FLAGS["reward"])

    if isinstance(spec, Mapping):
        return {now(name): weight for name, weight in spec.items()}
    return now(spec) if isinstance(spec, str) else spec


def other_reward(folder: Path, spec: RewardSpec, expected: dict[str, str]) -> str | None:
    """How a reward that the user gives differs from the run's, in words; None where its models are the same."""
    if sorted(fingerprints := of_rewards(spec).values()) == sorted(expected.values()):
        return None
    ours, theirs = (", ".join(values) or "no model" for values in (fingerprints, expected.values()))
    return f"the reward {spec!r} has the fingerprint {ours}, and {str(folder)!r} was trained on {theirs}"
