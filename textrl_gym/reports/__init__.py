"""Pages of runs, comparisons and lessons, from files only.

- `run_page`: one run as one HTML file
- `comparison_page`: a comparison as one HTML file
- `analysis`: the numbers and sentences of a comparison's page
- `charts`: its charts
- `training_curves`: its charts of training and of length
- `credit_section`: its section on the credit of tokens
- `plotting`: colours, symbols and numbers in words
- `export_figures`: the charts as PNG and SVG
- `suite_page`: a comparison over tasks
- `lesson_page`: a lesson: its findings, numbers and samples
- `labels_page`: labels of annotators: agreement, habits, disagreements
- `sizes_page`: models by size against the reference texts
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "report": "run_page",
        "comparison_report": "comparison_page",
        "comparison_figures": "export_figures",
        "labels_report": "labels_page",
    },
)
