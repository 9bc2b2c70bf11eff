"""textrl-gym: text generation as Gymnasium environments, and the agents that learn in them.

Importing this package registers the environments and loads no torch; the names below load what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textrl_gym import registry as _registry
from textrl_gym.lazy import lazy as _lazy

if TYPE_CHECKING:
    from textrl_gym.core import Reply as Reply
    from textrl_gym.core import Rollout as Rollout
    from textrl_gym.core import StopReason as StopReason
    from textrl_gym.evaluation.check_env import check_env as check_env
    from textrl_gym.evaluation.evaluator import evaluate as evaluate
    from textrl_gym.mdp.env_settings import EnvSettings as EnvSettings
    from textrl_gym.mdp.task import Task as Task
    from textrl_gym.mdp.text_env import TextEnv as TextEnv
    from textrl_gym.mdp.text_env import TextVectorEnv as TextVectorEnv
    from textrl_gym.policy.policy import Policy as Policy
    from textrl_gym.rollouts.collect import collect as collect
    from textrl_gym.rollouts.text_actions import TextActions as TextActions

__version__ = "0.2.0.dev0"

_HOME = {
    "check_env": "evaluation.check_env",
    "Reply": "core",
    "Rollout": "core",
    "StopReason": "core",
    "TextEnv": "mdp.text_env",
    "TextVectorEnv": "mdp.text_env",
    "evaluate": "evaluation.evaluator",
    "Policy": "policy.policy",
    "collect": "rollouts.collect",
    "TextActions": "rollouts.text_actions",
    "Task": "mdp.task",
    "EnvSettings": "mdp.env_settings",
}

register = _registry.register

__all__ = ["__version__", "register", *_HOME]


__getattr__ = _lazy(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)


_registry.register_envs()
