"""Settings of a run's environment, as flags and TOML files give them. Loads no torch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # loads no torch
    from gymnasium.vector import VectorEnv


@dataclasses.dataclass(frozen=True)
class EnvSettings:
    """Keyword arguments of the environment; None: the task's own."""

    split: Literal["train", "validation", "test"] = "train"
    """The prompts to train on."""
    dataset: str | None = None
    """A Hub id, or a local file or folder; None: the embedded prompts."""
    tokenizer: str | None = None
    """A Hub id or a folder; None: the model's."""
    reward: str | None = None
    """A name, name:argument, package.module:name or a folder with a reward model; or a weighted sum of such, as
    rouge=1.0,length=-0.01 (in a TOML file a table)."""
    max_prompt_tokens: int | None = None
    """Longer prompts are cut at the end of their body."""
    max_new_tokens: int | None = None
    """The budget of a completion."""
    stop: tuple[str, ...] | None = None
    """Strings that end an episode."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of an episode whose budget ran out."""

    def keywords(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as the environment takes them."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {k: v for k, v in dataclasses.asdict(self).items() if v != defaults[k]}
        if self.reward is not None:
            given["reward"] = parse_reward(self.reward)
        if self.stop is not None:
            given["stop"] = list(self.stop)  # as a checkpoint's JSON gives it back
        return given


def parse_reward(text: str) -> str | dict[str, float]:
    """The reward that a flag names: "rouge" as it is, "rouge=1.0,length=-0.01" as a mapping of names to weights."""
    if Path(text).is_dir():
        return text  # a folder's name may hold "=" too
    # From the right: a reward's argument may hold "=" itself.
    parts = [part.rpartition("=") for part in text.split(",")]
    if not any(equals for _, equals, _ in parts):
        return text
    mixture: dict[str, float] = {}
    for name, _, weight in parts:
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or name in mixture or not math.isfinite(value):
            raise ValueError(f"reward {text!r} must be a name, or NAME=WEIGHT,NAME=WEIGHT,... with each name once")
        mixture[name] = value
    return mixture


def make_env(
    env_id: str, settings: EnvSettings, model: str | None, device: str, config: dict[str, Any]
) -> VectorEnv[Any, Any, Any]:
    """The vector environment that an agent would make for itself, with the given settings."""
    import gymnasium
    from gymnasium.vector import AutoresetMode

    from textrl_gym.models import loading

    # The environment must cut and decode by the tokens of the model that will act in it.
    tokenizer = {} if model is None else {"tokenizer": model}
    return gymnasium.make_vec(
        env_id,
        num_envs=config["rollout_episodes"],
        group_size=config["group_size"],
        array="torch",
        device=str(loading.resolve_device(device)),
        autoreset_mode=AutoresetMode.DISABLED,
        **(tokenizer | settings.keywords()),
    )
