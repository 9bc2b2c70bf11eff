"""Optional packages: how the ones of an extra are installed, in the words of an error. Loads nothing."""

from __future__ import annotations

import importlib.metadata
import re


def install(extra: str) -> str:
    """The command that installs an extra's packages, whichever way textrl-gym itself was installed.

    The name of an extra would do only where an index has textrl-gym, or in its checkout.
    """
    packages = dict.fromkeys(package for one in _with_its_extras(extra) for package in _required(one))
    if not packages:  # run from a checkout that was never installed
        return f"pip install '.[{extra}]' in the checkout of textrl-gym"
    return "pip install " + " ".join(f"'{package}'" for package in packages)


def _with_its_extras(extra: str) -> list[str]:
    """An extra, behind those of textrl-gym that it is made of."""
    names = [name for line in _lines(extra) if line.startswith("textrl-gym[") for name in line[11:-1].split(",")]
    return [*(part for name in names for part in _with_its_extras(name)), extra]


def _required(extra: str) -> list[str]:
    return [line for line in _lines(extra) if not line.startswith("textrl-gym[")]


def _lines(extra: str) -> list[str]:
    """What an extra asks for, in the installed package's own metadata."""
    mark = re.compile(rf"""extra == ["']{re.escape(extra)}["']""")
    try:
        lines = importlib.metadata.requires("textrl-gym") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line.partition(";")[0].strip() for line in lines if mark.search(line)]
