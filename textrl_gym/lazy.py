"""Lazy re-exports (PEP 562): a package names what its modules define, and a module is imported when a name is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `__name__`.
        homes: public name -> the module that defines it, without the package's name.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {', '.join(homes)}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        # Kept in the package: __getattr__ is only asked for names that are not there.
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
