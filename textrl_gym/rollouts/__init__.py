"""The fast driver of the MDP: complete episodes, all rows at once.

- `collect`: collect(env, policy) -> Rollout
- `sampler`: cached sampling of completions
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "rollout_of": "collect",
        "complete": "collect",
        "generate": "sampler",
        "Completions": "sampler",
    },
)
