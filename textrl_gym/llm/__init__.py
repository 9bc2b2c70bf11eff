"""Language models that are asked: which of two answers is better, or how good one is.

In reading order:
- `questions`: what is asked, in the one place where a judging prompt is written, and how replies are read
- `endpoint`: a client of OpenAI-compatible endpoints, by which judges and players ask
- `asking`: who answers such questions, and a model behind an endpoint that does, with a file of answers
- `local`: a causal LM of this machine that does, without a server
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Answered": "asking",
        "Answerer": "asking",
        "EndpointConfig": "asking",
        "EndpointError": "endpoint",
        "EndpointModel": "asking",
        "Form": "questions",
        "LocalModel": "local",
        "PAIR": "questions",
        "SCORE": "questions",
    },
)
