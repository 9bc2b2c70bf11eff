"""Pages of runs, comparisons and lessons, from files only.

- `frame`: what the hand-written pages have in common
- `run_page`: one run as one HTML file
- `comparison_page`: a comparison as one HTML file
- `credit_section`: its section on the credit of tokens
- `suite_page`: a comparison over tasks
- `lesson_page`: a lesson: its findings, numbers and samples
- `labels_page`: labels of annotators: agreement, habits, disagreements
- `sizes_page`: models by size against the reference texts
- `rounds_page`: iterated RLHF: its rounds, and what the policies write
- `constitutional_page`: Constitutional AI: its stages, critiques and revisions
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "report": "run_page",
        "comparison_report": "comparison_page",
        "labels_report": "labels_page",
    },
)
