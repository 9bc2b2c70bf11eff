"""Judges: which of two completions of a prompt is better.

In reading order:
- `judge`: the protocol, and any reward as a judge
- `endpoint`: a client of OpenAI-compatible endpoints, by which judges and players ask
- `llm_judge`: a language model behind an OpenAI-compatible endpoint
- `annotators`: simulated annotators with noise and biases
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Annotators": "annotators",
        "Answer": "judge",
        "Endpoint": "llm_judge",
        "EndpointConfig": "llm_judge",
        "EndpointError": "endpoint",
        "Judge": "judge",
        "Noisy": "judge",
        "Pointwise": "judge",
        "load_judge": "judge",
        "load_scorer": "judge",
    },
)
