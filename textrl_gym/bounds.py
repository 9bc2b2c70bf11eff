"""Allowed values of settings, written once in a config's annotations: `clip_range: Annotated[float, Gt(0)] = 0.2`.

`check_settings` refuses values of another type, numbers that are not finite and values out of bounds, and the command
line prints the bounds with the help. Gt, Ge, Lt and Le are annotated_types'; a Literal allows what it lists; None is
allowed where the type has it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The values that a setting may have; None where nothing is said."""

    lower: float | None = None
    lower_open: bool = False
    """Whether `lower` itself is not allowed."""
    upper: float | None = None
    upper_open: bool = False
    choices: tuple[Any, ...] = ()

    def allow(self, value: Any) -> bool:
        """Whether the value is inside; NaN never is."""
        if self.choices:
            return value in self.choices
        # Comparisons that must hold, and not ones that must not: NaN fails every one.
        above = self.lower is None or (value > self.lower if self.lower_open else value >= self.lower)
        return above and (self.upper is None or (value < self.upper if self.upper_open else value <= self.upper))

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        if self.lower is None:
            return f"{'<' if self.upper_open else 'at most'} {self.upper:g}"
        if self.upper is None:
            return f"{'>' if self.lower_open else 'at least'} {self.lower:g}"
        return f"in {'[('[self.lower_open]}{self.lower:g}, {self.upper:g}{'])'[self.upper_open]}"


def bounds_of(config: type[Any]) -> Mapping[str, Bounds]:
    """The bounds of a dataclass's fields that have some.

    A field that a subclass declares again keeps the bounds of its base, and the tightest count.
    """
    names = [field.name for field in dataclasses.fields(config)]
    tightest: dict[str, Bounds] = {}
    # From the class itself to its bases; a field's bounds are looked up in every class that declares it, since
    # get_type_hints of the subclass alone shows only the last declaration.
    for cls in filter(dataclasses.is_dataclass, config.__mro__):
        hints = get_type_hints(cls, include_extras=True)
        for name in names:
            if name in hints:
                tightest[name] = _tightened(tightest.get(name, Bounds()), hints[name])
    return {name: bounds for name, bounds in tightest.items() if bounds != Bounds()}


Seed = Annotated[int, Ge(0)]
"""Of random numbers: numpy refuses a negative one, Python's generator takes -1 for 1."""
MOST_ROWS = 1_000_000
"""Of a vector environment or a batch: with more the memory would be gone before an error could be told."""
LONGEST = 200
"""Characters of a value in an error."""


def check_settings(config: object) -> None:
    """Check the type of every field of a dataclass, that its numbers are finite, and its bounds.

    Types that are checked are int, float, bool, str, Path, Literal, dataclasses, tuples of these, and any of them or
    None. A whole number is a float too; True is no number; a string that may be None may not be empty.

    Raises:
        ValueError: naming the field, what is allowed, and the value.
    """
    hints, bounds = get_type_hints(type(config)), bounds_of(type(config))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        _check(field.name, getattr(config, field.name), hints[field.name], bounds.get(field.name, Bounds()))


def check(name: str, value: object, hint: object) -> None:
    """Check an argument as `check_settings` does a field.

    Args:
        hint: its type, Annotated with its bounds.

    Raises:
        ValueError: naming the argument, what is allowed, and the value.
    """
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    _check(name, value, bare, _tightened(Bounds(), hint))


def shown(value: object) -> str:
    """A value in an error: as Python writes it, and not longer than a line or two."""
    # Python refuses to write out whole numbers of more than 4,300 digits.
    if isinstance(value, int) and value.bit_length() > 1_000:
        return f"a number of {value.bit_length():,} bits"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _check(name: str, value: object, hint: object, bounds: Bounds) -> None:
    words = _kind(hint)
    if words and not _is(value, hint):
        raise ValueError(f"{name} must be {words}, got {shown(value)}")
    values = value if isinstance(value, tuple | list) else (value,)
    for one in values:
        if isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise ValueError(f"{name} must be a number of at most 64 bits, got {shown(value)}")
        if one is not None and not bounds.allow(one):
            verb = "lie" if str(bounds).startswith("in ") else "be"
            raise ValueError(f"{name} must {verb} {bounds}, got {shown(value)}")


_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    dict: "a dictionary",
    types.NoneType: "None",
}


def _kind(hint: object) -> str:
    """A type in words; empty where it is none of those that are checked."""
    if get_origin(hint) is tuple:
        element = _kind(get_args(hint)[0])
        return element and f"a list, each {element}"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        options = [_kind(option) for option in get_args(hint)]
        return " or ".join(options).replace("a string or", "a string that is not empty or") if all(options) else ""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"of the class {hint.__name__}"
    return _WORDS.get(hint, "")


def _is(value: object, hint: object) -> bool:
    """Whether a value has a type that `_kind` has words for."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and all(_is(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is Literal:
        # True == 1, and a list can be compared but not looked up.
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is(value, option) for option in get_args(hint)) and value != ""
    if isinstance(value, bool):  # an int in Python
        return hint is bool
    if hint is int:
        return isinstance(value, numbers.Integral)  # numpy's whole numbers too
    if hint is float:
        return isinstance(value, numbers.Real) and _finite(value)
    if hint is Path:
        return isinstance(value, str | Path)
    assert isinstance(hint, type)
    return isinstance(value, hint)


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _tightened(bounds: Bounds, hint: object) -> Bounds:
    """The bounds with those of a type in them."""
    origin = get_origin(hint)
    if origin is Annotated:
        kind, *constraints = get_args(hint)
        bounds = _tightened(bounds, kind)
        for constraint in constraints:
            limit: Any  # the library's type is whatever can be compared
            if isinstance(constraint, Gt | Ge):
                limit = constraint.gt if isinstance(constraint, Gt) else constraint.ge
                if bounds.lower is None or limit > bounds.lower:
                    bounds = dataclasses.replace(bounds, lower=limit, lower_open=isinstance(constraint, Gt))
            elif isinstance(constraint, Lt | Le):
                limit = constraint.lt if isinstance(constraint, Lt) else constraint.le
                if bounds.upper is None or limit < bounds.upper:
                    bounds = dataclasses.replace(bounds, upper=limit, upper_open=isinstance(constraint, Lt))
        return bounds
    if origin is tuple:
        return _tightened(bounds, get_args(hint)[0])
    if origin is Literal:
        return bounds if bounds.choices else dataclasses.replace(bounds, choices=get_args(hint))
    if origin in (Union, types.UnionType):
        # int | None: None means that nothing was said, and is let through by check_settings before bounds are asked.
        options = [option for option in get_args(hint) if option is not type(None)]
        return _tightened(bounds, options[0]) if len(options) == 1 else bounds
    return bounds


# -- names of settings ------------------------------------------------------------------------------------------------


ELSEWHERE: dict[str, tuple[str, ...]] = {
    # TRL
    "beta": ("kl_coef",),
    "num_generations": ("group_size",),
    "epsilon": ("clip_low", "clip_range"),
    "epsilon_high": ("clip_high",),
    "scale_rewards": ("scale_by_std",),
    "loss_type": ("aggregation",),
    "num_iterations": ("epochs",),
    "num_ppo_epochs": ("epochs",),
    "num_mini_batches": ("minibatches",),
    "cliprange": ("clip_range", "clip_low"),
    "cliprange_value": ("clip_range_value",),
    "lam": ("gae_lambda",),
    "lr_scheduler_type": ("lr_schedule",),
    "gradient_accumulation_steps": ("micro_batch_tokens",),
    "per_device_train_batch_size": ("rollout_episodes",),
    "max_completion_length": ("env.max_new_tokens",),
    "max_prompt_length": ("env.max_prompt_tokens",),
    "response_length": ("env.max_new_tokens",),
    "stop_token": ("env.stop",),
    "reward_funcs": ("env.reward",),
    "reward_weights": ("env.reward",),
    "max_steps": ("total_timesteps",),
    "num_train_epochs": ("total_timesteps",),
    "output_dir": ("out",),
    "report_to": ("log_to",),
    "save_steps": ("save_every",),
    "eval_steps": ("eval_every",),
    # Stable-Baselines3 and CleanRL
    "n_steps": ("rollout_episodes",),
    "num_envs": ("rollout_episodes",),
    "num_steps": ("rollout_episodes",),
    "n_envs": ("rollout_episodes",),
    "batch_size": ("minibatches",),
    "n_epochs": ("epochs",),
    "update_epochs": ("epochs",),
    "num_minibatches": ("minibatches",),
    "ent_coef": ("entropy_coef",),
    "clip_coef": ("clip_range", "clip_low"),
    "clip_range": ("clip_low",),
    "clip_range_vf": ("clip_range_value",),
    "normalize_advantage": ("whiten_advantages",),
    "norm_adv": ("whiten_advantages",),
    "anneal_lr": ("lr_schedule",),
    "tensorboard_log": ("out",),
    # OpenAI and vLLM
    "max_tokens": ("env.max_new_tokens",),
    # verl, OpenRLHF and RL4LMs
    "clip_ratio": ("clip_range", "clip_low"),
    "clip_ratio_low": ("clip_low",),
    "clip_ratio_high": ("clip_high",),
    "eps_clip": ("clip_range", "clip_low"),
    "entropy_coeff": ("entropy_coef",),
    "kl_loss_coef": ("kl_coef",),
    "init_kl_coef": ("kl_coef",),
    "kl_penalty": ("kl_estimator",),
    "lambd": ("gae_lambda",),
    "n_samples_per_prompt": ("group_size",),
    "rollout_n": ("group_size",),
    "rollout_batch_size": ("rollout_episodes",),
    "train_batch_size": ("rollout_episodes",),
    "ppo_mini_batch_size": ("minibatches",),
    "ppo_epochs": ("epochs",),
    "ppo_micro_batch_size": ("micro_batch_tokens",),
    "actor_learning_rate": ("learning_rate",),
    "lr": ("learning_rate",),
    "vllm_importance_sampling_cap": ("importance_cap",),
    "rollout_is_threshold": ("importance_cap",),
}
"""What settings are called elsewhere -> what they are called here, the first that an agent has. docs/coming-from.md
says where the numbers mean something else."""
AROUND = ("total_timesteps", "out", "log_to", "save_every", "eval_every")
"""Settings that are not the agent's: of a run, or keywords of the agent and of learn()."""
NEAR = 0.75
"""How alike a name must be to one that is allowed to be taken for it."""


def name_here(name: str, allowed: Collection[str], around: Collection[str] = AROUND) -> str | None:
    """What a setting of another library is called here, of the allowed names; None: nothing is known of it.

    Args:
        allowed: of an agent, or of an environment: env.stop is then stop.
        around: what else may be meant.
    """
    for own in ELSEWHERE.get(name, ()):
        if own.removeprefix("env.") in allowed:
            return own.removeprefix("env.")
        if own in around or (around and own.startswith("env.")):
            return own
    return None


def unknown_settings(
    whose: str, unknown: Iterable[str], allowed: Collection[str], around: Collection[str] = AROUND
) -> ValueError:
    """An error for settings that there are not, with what they are called here, or the nearest names."""

    def words(name: str) -> str:
        here, near = name_here(name, allowed, around), difflib.get_close_matches(name, allowed, n=1, cutoff=NEAR)
        hint = f" (here {here})" if here else f" (did you mean {near[0]!r}?)" if near else ""
        return f"{name!r}{hint}"

    return ValueError(f"{whose} has no setting {', '.join(map(words, unknown))}; allowed: {', '.join(allowed)}")
