"""Numbers, sentences and charts of comparisons, from finished runs.

- `analysis`: the numbers and sentences of a comparison
- `comparison`: its charts
- `training_curves`: its charts of training and of length
- `plotting`: colours, symbols and numbers in words
- `export_figures`: the charts as PNG and SVG
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(__name__, {"comparison_figures": "export_figures"})
