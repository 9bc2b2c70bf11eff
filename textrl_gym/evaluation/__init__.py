"""Evaluation: how good a policy is on held-out prompts, and whether a run is sound.

- `evaluator`: evaluate(): scores, gold scores, win rates and KL on held-out prompts
- `metrics`: the registry of metrics: key, words, unit, decimals
- `text_metrics`: metrics read off the texts alone
- `health`: the health card before the first update
- `reward_hacking`: rules for the signs of reward hacking
- `token_credit`: advantage, value and KL of each token of given texts
- `reward_accuracy`: the accuracy of an existing reward model on published preferences
- `check_env`: check_env(): the rules of Gymnasium and of the token MDP
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Evaluator": "evaluator",
        "evaluate": "evaluator",
        "METRICS": "metrics",
        "HealthError": "health",
        "AlarmBounds": "reward_hacking",
    },
)
