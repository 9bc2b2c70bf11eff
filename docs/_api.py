"""MkDocs hook: the API, a group of pages for each wing and a page for each module, because they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "textrl_gym"
CORE = "core"
"""The group of the modules at the package's root."""
WINGS = (
    CORE,
    "envs",
    "mdp",
    "rewards",
    "judges",
    "llm",
    "rollouts",
    "agents",
    "training",
    "evaluation",
    "policy",
    "models",
    "data",
    "worlds",
    "persistence",
    "pipeline",
    "experiments",
    "reports",
    "integrations",
    "stats",
    "cli",
)
"""The order of the groups, by what a user needs first; wings that are not named here follow by name."""
PLUGINS = {"envs": ROOT / "envs", "agents": ROOT / "agents"}
"""Wings whose files lie beside the package."""


def modules() -> dict[str, list[str]]:
    """Wing -> the dotted names of its modules, the wing's own first."""
    package = ROOT / PACKAGE
    names = {CORE: [PACKAGE, *(f"{PACKAGE}.{path.stem}" for path in sorted(package.glob("[!_]*.py")))]}
    folders = {path.name: path for path in package.iterdir() if (path / "__init__.py").is_file()} | PLUGINS
    for wing, folder in folders.items():
        name = f"{PACKAGE}.{wing}"
        names[wing] = [name, *(f"{name}.{path.stem}" for path in sorted(folder.glob("[!_]*.py")))]
    rank = {wing: number for number, wing in enumerate(WINGS)}
    return {wing: names[wing] for wing in sorted(names, key=lambda wing: (rank.get(wing, len(WINGS)), wing))}


def page_of(wing: str, module: str) -> str:
    """The path of a module's page: api/WING/MODULE.md, and api/WING/index.md for the wing's own."""
    own = module in (PACKAGE, f"{PACKAGE}.{wing}") and module != f"{PACKAGE}.{CORE}"
    return f"api/{wing}/{'index' if own else module.rpartition('.')[2]}.md"


def on_config(config: Any) -> Any:
    """Put the pages into the navigation: a group for each wing."""
    groups = []
    for wing, names in modules().items():
        pages = [{name.removeprefix(f"{PACKAGE}.").rpartition(".")[2]: page_of(wing, name)} for name in names]
        groups.append({wing: pages})
    config["nav"].insert(-1, {"API by wing": groups})  # before what only developers read
    return config


def on_files(files: Files, config: Any) -> Files:
    """Write the pages: a directive of mkdocstrings for each module."""
    for wing, names in modules().items():
        for name in names:
            files.append(File.generated(config, page_of(wing, name), content=f"# {name}\n\n::: {name}\n"))
    return files
