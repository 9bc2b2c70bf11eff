"""MkDocs hook: a page of the API for every module and for every folder of plug-ins, because they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FIRST = (
    "core",
    "tasks",
    "env",
    "mdp",
    "kl",
    "rewards",
    "policy",
    "sampler",
    "rollout",
    "functional",
    "agent",
    "train",
    "evaluation",
)
"""The order in which the data flows; modules that are not named here follow by name."""
FOLDERS = {"envs": ROOT / "envs", "agents": ROOT / "agents", "rewards": ROOT / "textrl_gym" / "rewards"}


def pages() -> dict[str, list[str]]:
    """Page name -> the modules that it shows."""
    found = {p.stem: [f"textrl_gym.{p.stem}"] for p in (ROOT / "textrl_gym").glob("[!_]*.py")}
    for name, folder in FOLDERS.items():
        plugins = [f"textrl_gym.{name}.{p.stem}" for p in sorted(folder.glob("[!_]*.py"))]
        if (folder / "__init__.py").is_file():
            found[name] = [f"textrl_gym.{name}", *plugins]
    rank = {name: number for number, name in enumerate(FIRST)}
    return {name: found[name] for name in sorted(found, key=lambda n: (rank.get(n, len(FIRST)), n))}


def on_config(config: Any) -> Any:
    """Put the pages into the navigation."""
    config["nav"].append({"API": [{name: f"api/{name}.md"} for name in pages()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Write the pages: a directive of mkdocstrings for each module."""
    for name, modules in pages().items():
        if len(modules) == 1:
            text = f"# textrl_gym.{name}\n\n::: {modules[0]}\n"
        else:
            parts = [f"## {m}\n\n::: {m}\n    options:\n      heading_level: 3\n" for m in modules]
            text = f"# textrl_gym.{name}\n\n" + "\n".join(parts)
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files
