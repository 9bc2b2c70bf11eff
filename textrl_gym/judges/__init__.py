"""Judges: which of two completions of a prompt is better.

In reading order:
- `judge`: the protocol, and any reward as a judge
- `llm_judge`: a language model, behind an endpoint or of this machine, in both orders
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
        "Comparisons": "judge",
        "Judge": "judge",
        "LanguageJudge": "llm_judge",
        "Noisy": "judge",
        "Pointwise": "judge",
        "load_judge": "judge",
        "load_language_judge": "llm_judge",
        "load_scorer": "judge",
    },
)
