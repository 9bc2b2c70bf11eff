"""The settings of a text environment: what is allowed, and the spaces and arrays that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Ge, Le
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike
from torch import Tensor

from textrl_gym import kl
from textrl_gym.bounds import MOST_ROWS, check, shown, unknown_settings
from textrl_gym.data.rows import OnBadRows
from textrl_gym.data.turn_markers import TurnTemplate
from textrl_gym.mdp.transition import BatchArray, State

if TYPE_CHECKING:
    from textrl_gym.mdp.task import Task
    from textrl_gym.policy.policy import Policy

MOST_TOKENS = 10_000_000
"""Of a prompt or a completion: more than any model has positions for, and less than would fill the memory."""


class MDPSettings(Protocol):
    """What the parts of TextVectorEnv read of it."""

    settings: dict[str, Any]
    num_envs: int
    group_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    max_turns: int
    max_turn_tokens: int | None
    vocab_size: int
    kl_coef: float
    kl_estimator: str
    missing_eos_penalty: float
    policy_logprob: Callable[[Any, Any], Any] | None
    stop: tuple[str, ...]
    skip_special_tokens: bool
    array: str
    bad_rows: OnBadRows
    render_mode: str | None
    device: torch.device
    task: Task

    @property
    def wants_logprob(self) -> bool:
        """Whether the policy's log-probability must come with the action."""
        ...

    @property
    def reference(self) -> Policy | None:
        """The frozen policy that the KL penalty is measured to."""
        ...


ALLOWED: dict[str, object] = {
    "num_envs": Annotated[int, Ge(1), Le(MOST_ROWS)],
    "group_size": Annotated[int, Ge(1)],
    "max_prompt_tokens": Annotated[int, Ge(1), Le(MOST_TOKENS)],
    "max_new_tokens": Annotated[int, Ge(1), Le(MOST_TOKENS)],
    "max_turns": Annotated[int, Ge(1)],
    "max_turn_tokens": Annotated[int | None, Ge(1)],
    "kl_coef": Annotated[float, Ge(0)],
    "missing_eos_penalty": Annotated[float, Ge(0)],
    "array": Literal["numpy", "torch"],
    "bad_rows": OnBadRows,
    "render_mode": Literal["ansi", "human", "rgb_array"] | None,
    "stop": tuple[str, ...],
    "skip_special_tokens": bool,
}
"""The types and bounds of an environment's settings."""
GIVEN: dict[str, object] = {
    "split": str,
    "dataset": str | Path | None,
    "system_prompt": str | None,
    "turn_template": TurnTemplate,
}
"""Those of arguments that the environment does not keep."""


def batched(observation: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """An observation as a batch of one or of many rows, and whether it was a single one.

    Args:
        observation: input_ids and attention_mask, [L] of a single environment or [B, L] of a vector environment.

    Returns:
        The same as [B, L], with B = 1 for a single one.

    Raises:
        ValueError: it is none of a text environment.
    """
    keys = ("input_ids", "attention_mask")
    if not isinstance(observation, Mapping) or any(key not in observation for key in keys):
        raise ValueError(
            f"an observation is a dict with {' and '.join(keys)}, as env.reset() and env.step() return it, got "
            f"{shown(observation)}"
        )
    ids, mask = (observation[key] for key in keys)
    if np.ndim(ids) not in (1, 2) or np.shape(ids) != np.shape(mask):
        raise ValueError(
            "input_ids and attention_mask must have one shape, (tokens,) or (rows, tokens), got "
            f"{tuple(np.shape(ids))} and {tuple(np.shape(mask))}"
        )
    single = np.ndim(ids) == 1
    return {key: torch.as_tensor(value)[None] if single else value for key, value in observation.items()}, single


def stop_strings(stop: object, of_task: Sequence[str]) -> tuple[str, ...]:
    """The strings that end an episode: one, several, or those of the task where None is given.

    Raises:
        ValueError: something else, or an empty one.
    """
    if stop is None:
        return tuple(of_task)
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, tuple | list) or any(not isinstance(text, str) or not text for text in texts):
        raise ValueError(f"stop must hold texts that are not empty, got {shown(stop)}")
    return tuple(texts)


def given_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the arguments of an environment's __init__, in which those that there are not are `other`.

    Raises:
        ValueError: there are some of these; with their names here.
    """
    settings = {k: v for k, v in arguments.items() if k not in ("self", "num_envs", "other", "__class__")}
    if arguments["other"]:
        raise unknown_settings("a text environment", arguments["other"], ["num_envs", *settings], around=())
    return settings


def check_settings(env: MDPSettings, autoreset_mode: AutoresetMode | str) -> AutoresetMode:
    """Raise ValueError naming a setting with a value that is not allowed; return the autoreset mode."""
    for name, hint in ALLOWED.items():
        check(name, getattr(env, name), hint)
    for name, hint in GIVEN.items():
        check(name, env.settings[name], hint)
    if isinstance(env.settings["tokenizer"], str):  # or a loaded one
        check("tokenizer", env.settings["tokenizer"], str | None)
    reference = env.settings["reference"]
    if not isinstance(reference, torch.nn.Module | str | Path | None):
        raise ValueError(f"reference must be a model, a Hub id or a folder, got {shown(reference)}")
    if not env.task.replies_to_turns:
        given = [name for name in ("max_turns", "max_turn_tokens") if env.settings[name] is not None]
        if given:
            raise ValueError(f"{given[0]}={env.settings[given[0]]} is for tasks that define reply(row, turns)")
    if env.num_envs % env.group_size:
        raise ValueError(f"num_envs={env.num_envs} is no multiple of group_size={env.group_size}")
    kl.check_estimator(env.kl_estimator)
    logprob: object = env.policy_logprob  # whatever the user gave
    if logprob is not None and not callable(logprob):
        raise ValueError(f"policy_logprob must be fn(observation, action) or None, got {shown(logprob)}")
    # By name, value or member: gymnasium.make_vec passes what its caller wrote, a text on the command line.
    for mode in AutoresetMode:
        if isinstance(autoreset_mode, str | AutoresetMode) and autoreset_mode in (mode.name, mode.value, mode):
            return mode
    allowed = ", ".join(mode.name for mode in AutoresetMode)
    raise ValueError(f"autoreset_mode must be one of {allowed}, got {shown(autoreset_mode)}")


def spaces(env: MDPSettings) -> tuple[gym.spaces.Dict, gym.Space]:
    """The observation and action spaces of one row."""
    places, vocab = env.max_prompt_tokens + env.max_new_tokens, env.vocab_size
    observation: Any = gym.spaces.Dict(
        {
            "input_ids": gym.spaces.Box(0, vocab - 1, (places,), np.int64),
            "attention_mask": gym.spaces.Box(0, 1, (places,), np.int8),
        }
    )
    # What a policy that is shown nothing but spaces (Stable-Baselines3's) starts from.
    observation.task, observation.prompt_places = env.task, env.max_prompt_tokens
    token = gym.spaces.Discrete(vocab)
    if not env.wants_logprob:
        return observation, token
    # 0 is the log-probability of a certain token; there is no least one.
    shape = (vocab,) if env.kl_estimator == "full" else ()
    return observation, gym.spaces.Dict({"token": token, "logprob": gym.spaces.Box(-np.inf, 0.0, shape, np.float32)})


def reset_mask(mask: Any, num_envs: int) -> np.ndarray:
    """Which rows a reset is for: the option `reset_mask`, or every row where it is None. bool [B].

    Raises:
        ValueError: it is not a boolean for each row, or all are False.
    """
    if mask is None:
        return np.ones(num_envs, bool)
    wrong = f"reset_mask must be {num_envs} booleans with at least one True, got {shown(mask)}"
    try:
        mask_B = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths
        raise ValueError(wrong) from error
    if mask_B.shape != (num_envs,) or mask_B.dtype != np.bool_ or not mask_B.any():
        raise ValueError(wrong)
    return mask_B


def to_tensor(values: ArrayLike | Tensor, device: torch.device) -> Tensor:
    """The values on the device; arrays, which may be read-only, are copied."""
    if isinstance(values, Tensor):
        return values.to(device)
    # torch.tensor and not from_numpy, which would share memory with an array that the caller goes on writing to.
    return torch.tensor(np.asarray(values), device=device)


class Arrays:
    """The two kinds of arrays of a batch: those that it is stepped with, and those that are returned.

    Args:
        num_envs: B.
        device: numpy's arrays are stepped on the CPU, torch's tensors elsewhere.
        form: "numpy" or "torch", in which everything is returned.
    """

    def __init__(self, num_envs: int, device: torch.device, form: str) -> None:
        self.num_envs, self.device, self.form = num_envs, device, form
        self.on_host = device.type == "cpu"

    def zeros(self) -> BatchArray:
        """float32 [B], to step with."""
        return np.zeros(self.num_envs, np.float32) if self.on_host else torch.zeros(self.num_envs, device=self.device)

    def host(self, array: BatchArray) -> np.ndarray:
        """An array that is stepped with, as numpy's."""
        return array if self.on_host else array.cpu().numpy()

    def places(self, array: np.ndarray) -> BatchArray:
        """Flags or numbers of rows from the host, beside the arrays that are stepped with."""
        return array if self.on_host else torch.as_tensor(array, device=self.device)

    def state(self, state: State) -> State:
        """A new state, where it is stepped."""
        return state if self.on_host else state.to(self.device)

    def returned(self, array: BatchArray, dtype: type[np.generic]) -> BatchArray:
        """An array in the form that the user asked for; numpy's of the given type."""
        if self.form == "torch":
            return to_tensor(array, self.device)
        return (array.cpu().numpy() if isinstance(array, Tensor) else array).astype(dtype)

    def flags(self, flag_B: np.ndarray) -> BatchArray:
        """A copy of flags, in the form that the user asked for. bool [B]."""
        return torch.tensor(flag_B, device=self.device) if self.form == "torch" else flag_B.copy()

    def observation(self, state: State) -> dict[str, Any]:
        """Copies of the tokens and their mask, since the state goes on being written to. [B, L]"""
        arrays = {"input_ids": state.token_BL, "attention_mask": state.mask_BL}
        if not self.on_host:
            return {k: v.clone() if self.form == "torch" else v.cpu().numpy() for k, v in arrays.items()}
        return {k: torch.from_numpy(v.copy()) if self.form == "torch" else v.copy() for k, v in arrays.items()}
