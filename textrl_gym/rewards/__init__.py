"""Rewards: one file = one reward. `load_reward` turns a name, a path, a function or a mixture into one callable.

A file in this folder holds either of
    def reward(prompts, completions, **columns) -> list[float] | Tensor[B]       TRL's signature
    def make(argument, *, task, device, tokenizer) -> callable of that signature
the second where the reward takes an argument ("name:argument"), or needs the task, the device or the environment's
tokenizer; `make` names those of the three keywords that it needs. In place of a list a mapping of names to lists may
be given, whose sum is the reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from textrl_gym import processes, registry
from textrl_gym.bounds import shown
from textrl_gym.core import RewardSpec, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOLDERS = ("reward_model", "ensemble")
"""Rewards whose argument is a folder."""


TRL_ARGUMENTS = ("trainer_state", "log_extra", "log_metric")
"""What a reward is given beside the columns, under TRL's names."""


@dataclasses.dataclass
class TrainerState:
    """How far training is, by the names of transformers' TrainerState, for rewards that change as it goes on."""

    global_step: int = 0
    """Updates that are done."""
    max_steps: int = 0
    """Updates in all, as far as it is known: a run's length is counted in tokens. 0 outside of training."""
    epoch: float = 0.0
    """Passes over the prompts."""
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


class RewardScores(NamedTuple):
    """What a reward says of B completions."""

    total_B: Tensor
    """float32 on the CPU, the weighted sum of the parts that apply."""
    components: dict[str, Tensor]
    """Name of each part -> its unweighted scores, float32 [B] on the CPU; NaN where it gave None. A part that gave a
    mapping has those of its own as NAME/OWN, too."""
    logged: dict[str, list[Any]]
    """What the parts said of each completion by log_extra: name -> B items."""


class RewardFunction:
    """A reward whose result is checked: B finite numbers, or an error that names the reward and the row."""

    def __init__(self, name: str, parts: Mapping[str, tuple[float, Callable[..., Any]]]) -> None:
        """parts: name -> (weight, function); their weighted sum is the reward."""
        self.name = name
        self.parts = dict(parts)
        self.trainer_state = TrainerState()
        """What the parts are given as `trainer_state`; the training loop keeps it."""
        self._metrics: dict[str, tuple[float, int]] = {}
        self._said_none = False

    def __call__(self, /, prompts: list[str], completions: list[str], **columns: list[Any]) -> Tensor:
        """The scores of B completions, float32 [B] on the CPU; see `score`."""
        return self.score(prompts, completions, columns).total_B

    def score(self, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]) -> RewardScores:
        """Score B completions.

        Args:
            prompts: B texts.
            completions: B texts.
            columns: B items each: `prompt_ids`, `completion_ids` and the columns of the task's rows. One that has the
                name of the texts, or of what TRL gives, is left out.

        Raises:
            ValueError: a reward gave NaN, infinity, no number, or not B of them.
            RuntimeError: from the exception that a reward raised.
        """
        own = {name: values for name, values in columns.items() if name not in TRL_ARGUMENTS}
        batch = {**own, "prompts": prompts, "completions": completions}
        for name, values in batch.items():
            if len(values) != len(prompts):
                raise ValueError(f"reward {self.name!r}: {name} has {len(values)} items for {len(prompts)} prompts")
        logged: dict[str, list[Any]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != len(prompts):
                raise ValueError(f"log_extra({column!r}) has {len(values)} values for {len(prompts)} completions")
            logged[str(column)] = list(values)

        given = {"trainer_state": self.trainer_state, "log_extra": log_extra, "log_metric": self._log_metric}
        values_of = _call_all({name: function for name, (_, function) in self.parts.items()}, batch, given)
        components: dict[str, Tensor] = {}
        for name, values in values_of.items():
            components |= _scores_of(name, values, completions)
        return RewardScores(self._total(components, prompts, completions), components, logged)

    def scoring_models(self) -> list[nn.Module]:
        """The models that its parts score with, loaded; what a function of a user's own has is not known."""
        return [model for _, function in self.parts.values() for model in getattr(function, "scoring_models", list)()]

    def _total(self, components: Mapping[str, Tensor], prompts: list[str], completions: list[str]) -> Tensor:
        # In the order of the parts and not of the mapping: a sum of floats depends on its order.
        total_B = torch.zeros(len(prompts))
        none_B = torch.ones(len(prompts), dtype=torch.bool)
        for name, (weight, _) in self.parts.items():
            total_B += weight * components[name].nan_to_num(nan=0.0)
            none_B &= components[name].isnan()
        if none_B.any():
            self._say_none(int(none_B.nonzero()[0]), completions)
            scored = (~none_B).nonzero().flatten().tolist()
            for row in none_B.nonzero().flatten().tolist():
                # TRL takes it out of its group and gives it no advantage; with the mean of the others it has none, too.
                others = [n for n in scored if prompts[n] == prompts[row]] or scored
                total_B[row] = total_B[others].mean() if others else 0.0
        return total_B

    def _say_none(self, row: int, completion: list[str]) -> None:
        """Say once that a completion has no score."""
        if not self._said_none:
            self._said_none = True
            print(
                f"reward {self.name!r} gave None for completion {completion[row][:60]!r}: what nothing scores gets the "
                "mean score of its prompt's other completions",
                file=sys.stderr,
            )

    def _log_metric(self, name: str, value: float) -> None:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}) must have a finite number, got {value!r}")
        total, count = self._metrics.get(str(name), (0.0, 0))
        self._metrics[str(name)] = (total + number, count + 1)

    def take_metrics(self) -> dict[str, float]:
        """The means of what was given to log_metric since the last call: logged/NAME -> mean."""
        sums: dict[str, tuple[float, int]] = {}
        # Of several processes each has scored rows of its own.
        for metrics in processes.gather(self._metrics):
            for name, (total, count) in metrics.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = before[0] + total, before[1] + count
        self._metrics = {}
        return {f"logged/{name}": total / count for name, (total, count) in sums.items()}

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within, log_metric's numbers are others: what an evaluation logs is no part of training's means."""
        before, self._metrics = self._metrics, {}
        try:
            yield
        finally:
            self._metrics = before

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


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns of rows as a reward is given them, None where a row lacks one; the prompts' texts are apart."""
    # A row's own `completion_ids` would not be those of the completion that is scored.
    names = {name for row in rows for name in row} - {"prompt", "completion_ids"}
    return {name: [row.get(name) for row in rows] for name in sorted(names)}


def missing_reference(name: str, columns: Mapping[str, object]) -> ValueError:
    """The error of a reward that compares with reference texts, where the rows have none."""
    columns_there = sorted(set(columns) - set(TRL_ARGUMENTS))
    return ValueError(f"{name} needs a reference text, column 'completion'; the rows have {columns_there}")


def _accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the offered keywords that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name in offered}


def _filled(function: Callable[..., Any]) -> set[str]:
    """Names of parameters that a call fills by itself: the object of a method, what a partial holds."""
    if isinstance(function, functools.partial):
        return set(function.keywords)
    method: Any = function
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        method = type(function).__call__.__get__(function)
    if not inspect.ismethod(method):
        return set()
    return set(itertools.islice(inspect.signature(method.__func__).parameters, 1))


def call_function(function: Callable[..., Any], batch: dict[str, list[Any]], given: dict[str, Any]) -> Any:
    """Call with keywords, as TRL does: its functions may leave `prompts` out or have other parameters before it.

    A function without a parameter called `completions` is called with the two texts by position.
    """
    # The texts and what TRL gives come last: a column of the data that has such a name never takes their place.
    offered = {name: values for name, values in (batch | given).items() if name not in _filled(function)}
    parameters = inspect.signature(function).parameters
    if "completions" in parameters:
        return function(**_accepted(function, offered))
    texts = {"prompts", "completions", *itertools.islice(parameters, 2)}
    columns = {name: values for name, values in offered.items() if name not in texts}
    return function(batch["prompts"], batch["completions"], **_accepted(function, columns))


def _call_all(
    functions: Mapping[str, Callable[..., Any]], batch: dict[str, list[Any]], given: dict[str, Any]
) -> dict[str, Any]:
    """What each function gives; asynchronous ones run side by side, when the others are done."""
    values: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            values[name] = call_function(
                function, batch, given
            )  # may be anything: it is checked afterwards, not believed
        except (Exception, SystemExit) as error:  # a script that was made a reward may call sys.exit("...")
            for value in filter(inspect.iscoroutine, values.values()):
                value.close()  # begun by nobody
            raise RuntimeError(_name_row(name, function, batch, given, error)) from error
    waiting = {name: value for name, value in values.items() if inspect.isawaitable(value)}
    for name, value in zip(waiting, _wait_for(list(waiting.values())), strict=True):
        if isinstance(value, BaseException):
            raise RuntimeError(_name_row(name, functions[name], batch, given, value)) from value
        values[name] = value
    return values


def _wait_for(awaitables: list[Awaitable[Any]]) -> list[Any]:
    """The results of all, or the exceptions that they raised."""
    if not awaitables:
        return []

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    return asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid())).result()


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop that asynchronous rewards of this process run in.

    One for all calls, since clients that a user opens once belong to a loop; in a thread of its own, since a notebook's
    thread has a loop that runs already.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards of process {process}", daemon=True).start()
    return loop


def _scores_of(name: str, values: Any, completions: list[str]) -> dict[str, Tensor]:
    """The scores that a function gave: a list, or a mapping of names to lists, which add up."""
    if not isinstance(values, Mapping):
        return {name: _checked(name, values, completions)}
    if not values:
        raise ValueError(f"reward {name!r} gave an empty mapping: name at least one part, with a list of numbers")
    for part in values:
        if not isinstance(part, str) or not part:
            raise ValueError(f"reward {name!r} gave a part called {shown(part)}: its name must be a text")
    own = {f"{name}/{part}": _checked(f"{name}/{part}", of_part, completions) for part, of_part in values.items()}
    stacked_NB = torch.stack(list(own.values()))
    total_B = stacked_NB.nan_to_num(nan=0.0).sum(0)
    total_B[stacked_NB.isnan().all(0)] = math.nan  # None in every part
    return {name: total_B, **own}


def _checked(name: str, values: Any, completions: list[str]) -> Tensor:
    """A function's scores as float32 [B] on the CPU, each a finite number, or NaN where it gave None."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"reward {name!r} gave a tensor of shape {list(values.shape)}, not [{len(completions)}]")
        values = values.tolist()
    elif isinstance(values, str | bytes | Mapping | set | frozenset) or not _has_length(values):
        raise ValueError(f"reward {name!r} gave {shown(values)}, not a list or tensor of {len(completions)} numbers")
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} gave {len(values)} values for {len(completions)} completions")
    numbers = [0.0 if v is None else _number(name, row, v, completions[row]) for row, v in enumerate(values)]
    score_B = torch.tensor(numbers, dtype=torch.float32)
    for row in (~score_B.isfinite()).nonzero().flatten().tolist():  # 1e39 is infinite in float32, too
        raise ValueError(f"{_where(name, row, values[row], completions[row])}: every row needs a finite number")
    score_B[[row for row, value in enumerate(values) if value is None]] = math.nan
    return score_B


def _has_length(values: object) -> bool:
    return hasattr(values, "__len__") and getattr(values, "shape", None) != ()  # an array of no dimension has none


def _where(name: str, row: int, value: object, completion: str) -> str:
    return f"reward {name!r} gave {shown(value)} for row {row}, completion {completion[:60]!r}"


def _number(name: str, row: int, value: Any, completion: str) -> float:
    # float() would take "1.5": a text is more likely an answer that nobody has parsed than a score.
    if isinstance(value, str | bytes):
        raise ValueError(f"{_where(name, row, value, completion)}: every row needs a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{_where(name, row, value, completion)}: every row needs a number") from error


def _name_row(
    name: str, function: Callable[..., Any], batch: dict[str, list[Any]], given: dict[str, Any], error: BaseException
) -> str:
    """Words for an exception of a batch, with the first row that raises alone."""
    # A reward may ask a model or a server; after a failure the rows' second call is worth its cost, because "row 37"
    # is what the user needs to know.
    completions = batch["completions"]
    silent = given | {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
    for row in range(len(completions)):
        alone: Any = None
        try:
            alone = call_function(function, {column: values[row : row + 1] for column, values in batch.items()}, silent)
            if inspect.isawaitable(alone):
                alone = _wait_for([alone])[0]
        except (Exception, SystemExit) as raised:  # noqa: BLE001 - the caller raises what is said here
            alone = raised
        if isinstance(alone, BaseException):
            words = f"{type(alone).__name__}: {alone}"
            return f"reward {name!r} raised on row {row}, completion {completions[row][:60]!r}: {words}"
    words = f"{type(error).__name__}: {error}"
    return f"reward {name!r} raised on the batch of {len(completions)}, but on no row alone: {words}"
