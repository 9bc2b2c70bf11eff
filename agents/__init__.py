"""One file = one algorithm. The folder is the registry: `from textrl_gym.agents import PPO, GRPO, Agent`."""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "textrl_gym.agents":  # `import agents` at the repository's root would make a second copy of every module
    raise ImportError("import textrl_gym.agents, not agents: this folder is installed as textrl_gym.agents")

from textrl_gym import registry

if TYPE_CHECKING:
    from textrl_gym.agents.grpo import GRPO as GRPO
    from textrl_gym.agents.ppo import PPO as PPO
    from textrl_gym.training.agent import Agent as Agent
    from textrl_gym.training.config import AgentConfig as AgentConfig


def __getattr__(name: str) -> Any:
    if name in ("Agent", "AgentConfig"):
        module = "textrl_gym.training.agent" if name == "Agent" else "textrl_gym.training.config"
        return getattr(importlib.import_module(module), name)
    for stem in registry.names("agents"):
        if stem.replace("_", "") == name.lower():  # GRPO in grpo.py, BestOfN in best_of_n.py
            return registry.load_agent_class(stem)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; agents: {', '.join(registry.names('agents'))}"
    )
