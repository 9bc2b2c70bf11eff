"""Recipes: whole ways from an initial policy to an aligned one, each a command of several stages.

- `rounds`: iterated RLHF: labels, reward model and policy, several times
- `constitutional`: Constitutional AI: critique, revision, supervised learning, AI preferences and RL
- `critiques`: its data: answers, revisions, demonstrations and preferences
- `stages`: its stages in numbers, on held-out prompts
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "ConstitutionalConfig": "constitutional",
        "run_constitutional": "constitutional",
    },
)
