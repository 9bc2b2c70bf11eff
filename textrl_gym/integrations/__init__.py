"""Other libraries: their algorithms on text environments, and the trained model for their use.

- `sb3_policy`: a causal LM as Stable-Baselines3's actor-critic policy
- `sb3_env`: a text vector environment as Stable-Baselines3's VecEnv
- `sb3_agent`: Stable-Baselines3's algorithms as agents
- `export`: a run's model as a folder for transformers, vLLM and llama.cpp
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "CausalLMPolicy": "sb3_policy",
        "PolicyLogprob": "sb3_policy",
        "TextVecEnv": "sb3_env",
        "SB3Agent": "sb3_agent",
        "export": "export",
    },
)
