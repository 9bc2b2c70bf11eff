"""Environments and agents by the names that a user gives on the command line."""

from __future__ import annotations

import importlib
from typing import Any

from textrl_gym.run_settings import unknown


def text_envs() -> dict[str, Any]:
    """Environment id -> the task that it was registered with."""
    import gymnasium

    return {env_id: spec.kwargs["task"] for env_id, spec in gymnasium.registry.items() if "task" in spec.kwargs}


def find_env(name: str) -> str:
    """A registered id; "module:ID" imports the module that registers it, as gymnasium.make does."""

    module, _, env_id = name.rpartition(":")
    if module:
        importlib.import_module(module)
    if env_id not in text_envs():
        raise unknown("environment", env_id, text_envs(), ", or module:ID, where module registers ID")
    return env_id


def find_agent(name: str) -> Any:
    """The agent class of a file in agents/, or at module:Class."""
    from textrl_gym import plugins
    from textrl_gym.agent import Agent

    if ":" not in name and name not in plugins.names("agents"):
        raise unknown("agent", name, plugins.names("agents"), ", or module:Class")
    found = plugins.load_agent_class(name)
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ValueError(f"{name!r} is {found!r}, not a subclass of textrl_gym.agents.Agent")
    return found
