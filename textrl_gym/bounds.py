"""Allowed values of settings, written once in a config's annotations: `clip_range: Annotated[float, Gt(0)] = 0.2`.

`check_settings` refuses values of another type, numbers that are not finite and values out of bounds, and the command
line prints the bounds with the help. Gt, Ge, Lt and Le are annotated_types'; a Literal allows what it lists; None is
allowed where the type has it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
from collections.abc import Mapping
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


def check_settings(config: object) -> None:
    """Check the type of every field of a dataclass, that its numbers are finite, and its bounds.

    Types that are checked are int, float, bool, str, Path, tuples of these, and any of them or None. A whole number is
    a float too; True is no number.

    Raises:
        ValueError: naming the field, what is allowed, and the value.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        words = _kind(hints[field.name])
        value = getattr(config, field.name)
        if words and not _is(value, hints[field.name]):
            raise ValueError(f"{field.name} must be {words}, got {value!r}")
    for name, bounds in bounds_of(type(config)).items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple | list) else (value,)
        if any(one is not None and not bounds.allow(one) for one in values):
            verb = "lie" if str(bounds).startswith("in ") else "be"
            raise ValueError(f"{name} must {verb} {bounds}, got {value!r}")


_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    types.NoneType: "None",
}


def _kind(hint: object) -> str:
    """A type in words; empty where it is none of those that are checked."""
    if get_origin(hint) is tuple:
        element = _kind(get_args(hint)[0])
        return element and f"a list, each {element}"
    if get_origin(hint) in (Union, types.UnionType):
        options = [_kind(option) for option in get_args(hint)]
        return " or ".join(options) if all(options) else ""
    return _WORDS.get(hint, "")


def _is(value: object, hint: object) -> bool:
    """Whether a value has a type that `_kind` has words for."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and all(_is(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is(value, option) for option in get_args(hint))
    if isinstance(value, bool):  # an int in Python
        return hint is bool
    if hint is int:
        return isinstance(value, numbers.Integral)  # numpy's whole numbers too
    if hint is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    if hint is Path:
        return isinstance(value, str | Path)
    assert isinstance(hint, type)
    return isinstance(value, hint)


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
