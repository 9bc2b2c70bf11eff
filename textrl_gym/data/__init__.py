"""Prompts and preferences, from files, folders and the Hub.

- `prompts`: the published schemas of prompts, and their encoding under a token budget
- `preferences`: the published schemas of preferences
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "encode_prompt": "prompts",
        "tldr_prompt": "prompts",
        "Preference": "preferences",
        "Preferences": "preferences",
    },
)
