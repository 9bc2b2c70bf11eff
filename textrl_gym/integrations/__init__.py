"""Other libraries: their algorithms on text environments, their tasks as environments, environments for their use.

- `sb3_policy`: a causal LM as Stable-Baselines3's actor-critic policy
- `sb3_env`: a text vector environment as Stable-Baselines3's VecEnv
- `sb3_agent`: Stable-Baselines3's algorithms as agents
- `textarena`: the single-player games of TextArena
- `minari`: trajectories to and from Minari data sets
- `trl`: prompts, rewards and environments for TRL's trainers
- `verifiers`: a text environment as a taskset of verifiers
- `openenv`: a text environment as an OpenEnv server
- `torchrl`: a text vector environment as TorchRL's EnvBase
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
        "TextArena": "textarena",
        "TorchRLEnv": "torchrl",
        "export": "export",
        "from_minari": "minari",
        "to_minari": "minari",
    },
)
