"""Judges: which of two completions of a prompt is better.

- `judge`: the protocol, and any reward as a judge
- `llm_judge`: a language model behind an OpenAI-compatible endpoint
- `annotators`: simulated annotators with noise and biases
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Judge": "judge",
        "load_judge": "judge",
        "Noisy": "judge",
        "Endpoint": "llm_judge",
        "EndpointConfig": "llm_judge",
        "Annotators": "annotators",
    },
)
