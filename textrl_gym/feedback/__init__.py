"""Feedback of annotators: what they are asked, what they answer, and what the answers are worth.

In reading order:
- `questions`: completions to be ranked, from an environment, a run or a file
- `answers`: the file of labels as it grows, and who is asked what next
- `judged`: a language model or a reward in the place of people
- `constitution`: principles that answers are held to, from a file
- `speakers`: chat models that reply to single questions, here or behind an endpoint
- `critics`: who criticises, revises and compares answers by a principle
- `request_critic`: the rule-based critic of the world of requests
- `selection`: which questions to ask, out of more than can be answered
- `simulated`: annotators that answer by the gold score, with the noise of people
- `agreement`: what annotators agree on, and how each of them answers
- `formats`: labels as other tools write and read them
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "AnnotateConfig": "questions",
        "Session": "answers",
        "export_labels": "formats",
        "import_labels": "formats",
        "label_agreement": "agreement",
    },
)
