"""The token MDP as Gymnasium environments.

- `task`: Task: prompts, budgets, model and reward of one environment id
- `env_settings`: EnvSettings: the environment as flags, TOML files and the pipeline's functions name it
- `budgets`: how long prompts and completions of data are, and how many a budget cuts
- `transition`: the MDP as pure functions: append a token, when an episode ends, reward
- `vector_env`: TextVectorEnv: B rows on one device
- `text_env`: TextEnv: one row
- `turns`: the environment's side of a conversation: replies, their tokens, and how a conversation ends
- `scorer`: decoding, stop strings and the terminal score of completions
- `actions`: actions with the policy's log-probabilities, and the KL penalty of a step
- `spaces`: the observation and action spaces, and the checks of the settings
- `infos`: the infos of episodes that begin and end
- `render`: episodes as text in the terminal
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Task": "task",
        "EnvSettings": "env_settings",
        "State": "transition",
        "initial_state": "transition",
        "TextVectorEnv": "vector_env",
        "TextEnv": "text_env",
    },
)
