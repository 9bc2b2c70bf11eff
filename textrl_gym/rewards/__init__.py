"""Rewards: one file = one reward. `load_reward` turns a name, a path, a function or a mixture into one callable.

A file in this folder holds either of
    def reward(prompts, completions, **columns) -> list[float] | Tensor[B]       TRL's signature
    def make(argument, *, task, device, tokenizer) -> callable of that signature
the second where the reward takes an argument ("name:argument"), or needs the task, the device or the environment's
tokenizer; `make` names those of the three keywords that it needs.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from textrl_gym import registry
from textrl_gym.bounds import shown
from textrl_gym.core import RewardSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOLDERS = ("reward_model", "ensemble")
"""Rewards whose argument is a folder."""


class RewardFunction:
    """A reward whose result is checked: B finite numbers, or an error that names the reward and the row."""

    def __init__(self, name: str, parts: Mapping[str, tuple[float, Callable[..., Any]]]) -> None:
        """parts: name -> (weight, function); their weighted sum is the reward."""
        self.name = name
        self.parts = dict(parts)

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> Tensor:
        """The scores of B completions, float32 [B] on the CPU: the weighted sum of `components`."""
        return self.total(self.components(prompts, completions, **columns))

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of what `components` returned, float32 [B]."""
        # In the order of the parts and not of the mapping: a sum of floats depends on its order.
        total_B = torch.zeros_like(next(iter(components.values())))
        for name, (weight, _) in self.parts.items():
            total_B += weight * components[name]
        return total_B

    def components(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> dict[str, Tensor]:
        """The unweighted scores of B completions by each part: name -> float32 [B] on the CPU.

        Args:
            prompts: B texts.
            completions: B texts.
            columns: B items each: `prompt_ids`, `completion_ids` and the columns of the task's rows.

        Raises:
            ValueError: a reward gave None, NaN, infinity, no number, or not B of them.
            RuntimeError: from the exception that a reward raised.
        """
        batch = {"prompts": prompts, "completions": completions, **columns}
        for name, values in batch.items():
            if len(values) != len(prompts):
                raise ValueError(f"reward {self.name!r}: {name} has {len(values)} items for {len(prompts)} prompts")
        return {name: _checked(name, function, batch) for name, (_, function) in self.parts.items()}

    def __repr__(self) -> str:
        return f"RewardFunction({self.name!r})"


def load_reward(
    spec: RewardSpec | RewardFunction,
    *,
    task: object = None,
    device: str | torch.device = "cpu",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RewardFunction:
    """The reward that spec names.

    Args:
        spec: a file in rewards/ ("rouge", or "rouge:rouge1" with an argument), "package.module:name", a folder with a
            saved reward model or an ensemble, a callable of TRL's signature, or a mapping of names as above to weights.
        task: the task whose completions are scored; some rewards ask it for its own data or model.
        device: where reward models run.
        tokenizer: the environment's tokenizer, which made `prompt_ids` and `completion_ids`; None: the task's own.

    Raises:
        ValueError: nothing is named so, or its argument is wrong.
    """
    if isinstance(spec, RewardFunction):
        return spec
    given = {"task": task, "device": device, "tokenizer": tokenizer}
    if isinstance(spec, str | Path):
        return RewardFunction(str(spec), {str(spec): (1.0, _load_named(str(spec), given))})
    if isinstance(spec, Mapping):
        if not spec:
            raise ValueError("a mixture of rewards must name at least one, as {'rouge': 1.0, 'length': -0.1}")
        for name, weight in spec.items():
            # A bool is an int in Python, and {"rouge": True} is a slip rather than a weight of 1.
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a finite number, not {weight!r}")
        parts = {str(name): (float(weight), _load_named(str(name), given)) for name, weight in spec.items()}
        return RewardFunction(" ".join(f"{weight:+g}*{name}" for name, (weight, _) in parts.items()), parts)
    if callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__)
        return RewardFunction(name, {name: (1.0, spec)})
    raise ValueError(f"unknown reward {spec!r}; allowed: {_allowed()}")


def _load_named(spec: str, given: dict[str, Any]) -> Callable[..., Any]:
    name, colon, argument = spec.partition(":")
    if name in registry.names("rewards"):
        module = importlib.import_module(f"textrl_gym.rewards.{name}")
        if hasattr(module, "make"):
            return module.make(argument if colon else None, **_accepted(module.make, given))
        if colon:
            raise ValueError(f"reward {name!r} takes no argument, given {argument!r}")
        return module.reward
    # Before module:name: a folder's name may hold a colon too.
    if Path(spec).expanduser().is_dir():
        kind = "ensemble" if (Path(spec).expanduser() / "ensemble.json").is_file() else "reward_model"
        return _load_named(f"{kind}:{spec}", given)
    if not colon:
        where = f": there is no such folder in {Path.cwd()}" if "/" in spec else ""
        raise ValueError(f"unknown reward {spec!r}{where}; allowed: {_allowed()}")
    try:
        reward = registry.load_object(spec)
    except ValueError as error:
        raise ValueError(f"unknown reward {spec!r}: {error}; allowed: {_allowed()}") from error
    if not callable(reward):
        raise ValueError(f"reward {spec!r} is {reward!r}, not a callable f(prompts, completions, **columns)")
    return reward


def folder_of(name: str) -> tuple[str, str | None]:
    """The kind that a reward's name begins with ("ensemble:worst:") and the folder that it names; None: no folder."""
    kind, colon, argument = name.partition(":")
    if colon and kind in FOLDERS:
        folder = argument
        if kind == "ensemble":  # it may say how its members are combined
            folder = next((rest for rest in _rests(argument) if Path(rest).expanduser().is_dir()), argument)
        return name.removesuffix(folder), folder
    is_named = kind in registry.names("rewards")
    return "", None if is_named else name


def _rests(argument: str) -> list[str]:
    """An argument, and what stands behind each of its first two colons."""
    parts = argument.split(":", 2)
    return [":".join(parts[i:]) for i in range(len(parts))]


def _allowed() -> str:
    names = ", ".join(registry.names("rewards"))
    return f"{names}, each also with an argument as name:argument; package.module:name; a folder with a reward model"


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name in offered}


def _call(function: Callable[..., Any], batch: dict[str, list[Any]]) -> Any:
    """Call with keywords, as TRL does: its functions may leave `prompts` out or have other parameters before it.

    A function without a parameter called `completions` is called with the two texts by position.
    """
    if "completions" in inspect.signature(function).parameters:
        return function(**_accepted(function, batch))
    columns = {name: values for name, values in batch.items() if name not in ("prompts", "completions")}
    return function(batch["prompts"], batch["completions"], **_accepted(function, columns))


def _checked(name: str, function: Callable[..., Any], batch: dict[str, list[Any]]) -> Tensor:
    """The function's scores as float32 [B] on the CPU, each a finite number."""
    try:
        values = _call(function, batch)  # may be anything: a user's function is checked below, not believed
    except (Exception, SystemExit) as error:  # a script that was made a reward may call sys.exit("...")
        raise RuntimeError(_name_row(name, function, batch, error)) from error
    completions = batch["completions"]
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"reward {name!r} gave a tensor of shape {list(values.shape)}, not [{len(completions)}]")
        values = values.tolist()
    elif isinstance(values, str | bytes | Mapping | set | frozenset) or not _has_length(values):
        raise ValueError(f"reward {name!r} gave {shown(values)}, not a list or tensor of {len(completions)} numbers")
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} gave {len(values)} values for {len(completions)} completions")
    score_B = torch.tensor(
        [_number(name, row, value, completions[row]) for row, value in enumerate(values)], dtype=torch.float32
    )
    for row in (~score_B.isfinite()).nonzero().flatten().tolist():  # 1e39 is infinite in float32, too
        raise ValueError(f"{_where(name, row, values[row], completions[row])}: every row needs a finite number")
    return score_B


def _has_length(values: object) -> bool:
    return hasattr(values, "__len__") and getattr(values, "shape", None) != ()  # an array of no dimension has none


def _where(name: str, row: int, value: object, completion: str) -> str:
    return f"reward {name!r} gave {shown(value)} for row {row}, completion {completion[:60]!r}"


def _number(name: str, row: int, value: Any, completion: str) -> float:
    # float() would take "1.5": a text is more likely an answer that nobody has parsed than a score.
    if value is None or isinstance(value, str | bytes):
        raise ValueError(f"{_where(name, row, value, completion)}: every row needs a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{_where(name, row, value, completion)}: every row needs a number") from error


def _name_row(name: str, function: Callable[..., Any], batch: dict[str, list[Any]], error: BaseException) -> str:
    """Words for an exception of a batch, with the first row that raises alone."""
    # A reward may ask a model or a server; after a failure the rows' second call is worth its cost, because "row 37"
    # is what the user needs to know.
    completions = batch["completions"]
    for row in range(len(completions)):
        try:
            _call(function, {column: values[row : row + 1] for column, values in batch.items()})
        except (Exception, SystemExit) as alone:  # noqa: BLE001 - the caller raises what is said here
            raised = f"{type(alone).__name__}: {alone}"
            return f"reward {name!r} raised on row {row}, completion {completions[row][:60]!r}: {raised}"
    raised = f"{type(error).__name__}: {error}"
    return f"reward {name!r} raised on the batch of {len(completions)}, but on no row alone: {raised}"
