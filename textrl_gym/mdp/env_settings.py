"""Settings of an environment, as flags, TOML files and the functions of the pipeline take them. Loads no torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from textrl_gym import registry
from textrl_gym.bounds import check_settings

if TYPE_CHECKING:  # loads no torch
    from gymnasium.vector import VectorEnv

    from textrl_gym.data.chat import ChatSettings
    from textrl_gym.mdp.task import Task


@dataclasses.dataclass(frozen=True)
class EnvSettings:
    """Keyword arguments of the environment; None: the task's own."""

    split: Literal["train", "validation", "test"] = "train"
    """Which prompts: train are those of training, validation and test are held out."""
    dataset: str | None = None
    """A Hub id, or a local file or folder; None: the embedded prompts."""
    tokenizer: str | None = None
    """A Hub id or a folder; None: the model's."""
    reward: str | None = None
    """A name, name:argument, package.module:name or a folder with a reward model; or a weighted sum of such, as
    rouge=1.0,length=-0.01, or as JSON {"rouge": 1.0} (in a TOML file a table). An argument may hold "=": regex:the=1 is
    the pattern the=1."""
    max_prompt_tokens: Annotated[int | None, Ge(1)] = None
    """Longer prompts are cut at the end of their body."""
    max_new_tokens: Annotated[int | None, Ge(1)] = None
    """The budget of a completion; of a conversation, of all turns and replies."""
    max_turns: Annotated[int | None, Ge(1)] = None
    """Of a conversation: the budget of the agent's turns."""
    max_turn_tokens: Annotated[int | None, Ge(1)] = None
    """Of a conversation: the token budget of a turn."""
    turn_template: Literal["exact", "raw"] = "exact"
    """Of a conversation: exact refuses a chat template that rewrites earlier turns, raw leaves them as generated."""
    stop: tuple[str, ...] | None = None
    """Strings that end an episode."""
    eos_token_id: tuple[int, ...] | None = None
    """Ids of special or added tokens that end an episode; None: EOS and those that the model declares."""
    skip_special_tokens: bool = True
    """False shows special tokens to the reward by their names, but for ends and padding."""
    missing_eos_penalty: Annotated[float, Ge(0)] = 0.0
    """Taken off the score of an episode whose budget ran out."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with rows that cannot be used: no text where one must be, or a prompt that cannot be cut. All are
    looked at before work begins."""
    template: Literal["auto", "chat", "none"] = "auto"
    """auto: conversations are written by the tokenizer's chat template, texts letter for letter; chat: a text is what a
    user says; none: no chat template."""
    system_prompt: str | None = None
    """Stands before every conversation without a system message of its own; with it, or with few_shot, a text is what a
    user says."""
    few_shot: str | None = None
    """A JSON file of messages, [{"role": ..., "content": ...}, ...], before every conversation."""

    def __post_init__(self) -> None:
        check_settings(self)

    def keywords(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as the environment takes them."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {k: v for k, v in dataclasses.asdict(self).items() if v != defaults[k]}
        if self.reward is not None:
            given["reward"] = parse_reward(self.reward)
        for name in ("stop", "eos_token_id"):
            if getattr(self, name) is not None:
                given[name] = list(getattr(self, name))  # as a checkpoint's JSON gives it back
        return given

    def task(self, env_id: str) -> Task:
        """The task of a registered environment with these settings in place of its own budgets, stops and reward.

        Raises:
            ValueError: there is no such environment of text.
        """
        from textrl_gym.mdp.task import load_env_task

        task = copy.copy(load_env_task(env_id))  # which may be the one that the user has registered
        for name in ("max_prompt_tokens", "max_new_tokens", "max_turns", "max_turn_tokens", "stop"):
            if getattr(self, name) is not None:
                setattr(task, name, getattr(self, name))
        if self.reward is not None:
            task.reward = parse_reward(self.reward)
        return task

    def chat_settings(self) -> ChatSettings:
        """How prompts become conversations."""
        from textrl_gym.data.chat import ChatSettings, read_few_shot

        return ChatSettings(self.template, self.system_prompt, read_few_shot(self.few_shot))

    def import_code(self) -> None:
        """Import the rewards that are named as module:name, so that a checkpoint may name them too."""
        reward = self.keywords().get("reward", "")
        for name in [reward] if isinstance(reward, str) else reward:
            kind, colon, _ = name.partition(":")
            if colon and kind not in registry.names("rewards") and not _is_folder(name):
                registry.load_object(name)


def by_flag(values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings of an environment by the names of their flags; those that a file lacks are the defaults.

    An earlier version had fewer settings, and did what is the default now.
    """
    defaults = json.loads(json.dumps(dataclasses.asdict(EnvSettings())))
    return {f"env.{name}": value for name, value in (defaults | dict(values)).items()}


def parse_reward(text: str) -> str | dict[str, float]:
    """The reward that a flag names: "rouge" as it is, "rouge=1.0,length=-0.01" as a mapping of names to weights.

    "=" and "," may stand in a name too, so the rule is:

    1. A JSON object, {"regex:the=1": 0.5, "length": -0.01}, is a mixture: nothing in it is ambiguous.
    2. A folder that exists is a name; so is a path (with "/") of which the part before its last "=" is no reward.
    3. What begins with a reward and its argument ("regex:the=1") is a name, unless it is a list, parted by commas, of
       rewards that each have a weight ("regex:the=1,length=-0.01").
    4. All else with a "=" is a mixture.

    Raises:
        ValueError: a mixture with a part that has no name or no finite weight, or with one name twice.
    """
    if text.lstrip().startswith("{"):
        return _json_mixture(text)
    parts = [part.rpartition("=") for part in text.split(",")]
    if "=" not in text or _is_folder(text) or _is_argument(text, parts):
        return text
    if len(parts) == 1 and "/" in text and not _names_reward(parts[0][0]):
        return text  # load_reward says that there is no such folder
    mixture = {name: float(weight) for name, _, weight in parts if name and _finite(weight)}
    if len(mixture) < len(parts):
        raise ValueError(f"reward {text!r} must be a name, or NAME=WEIGHT,NAME=WEIGHT,... with each name once")
    return mixture


def _json_mixture(text: str) -> dict[str, float]:
    try:
        mixture = json.loads(text)
    except ValueError as error:
        raise ValueError(f"reward {text!r} is no JSON object of names and weights: {error}") from error
    for name, weight in mixture.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(
                f'the weight of reward {name!r} must be a finite number, as in {{"NAME": WEIGHT}}: {weight!r}'
            )
    return {name: float(weight) for name, weight in mixture.items()}


def _is_folder(text: str) -> bool:
    return Path(text).expanduser().is_dir()


def _names_reward(name: str) -> bool:
    """Whether a text can be a reward's name: of a file, an existing folder, or module:name."""
    kind, colon, attribute = name.partition(":")
    if kind in registry.names("rewards") or _is_folder(name):
        return True
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in kind.split("."))


def _is_argument(text: str, parts: list[tuple[str, str, str]]) -> bool:
    """Whether the "=" stands in the argument of a reward that the text begins with."""
    kind, colon, _ = text.partition(":")
    if not colon or kind not in registry.names("rewards"):
        return False
    return len(parts) == 1 or not (
        all(_finite(weight) for _, _, weight in parts) and all(_names_reward(name) for name, _, _ in parts)
    )


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
