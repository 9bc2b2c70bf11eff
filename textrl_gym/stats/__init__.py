"""Statistics on numpy arrays: no torch, no text.

- `estimates`: means and interquartile means with their intervals; paired differences
- `pairwise`: win rates, with length taken out; agreement; Bradley-Terry ratings
- `agreement`: kappa and alpha between annotators
- `annotators`: who errs how often, and what is most likely right
- `overoptimization`: gold score against KL, best of n, reward against length
- `suites`: agents over several tasks: one scale, ranks, differences by a pooled variance
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "Estimate": "estimates",
        "iqm": "estimates",
        "performance_profile": "estimates",
        "probability_of_improvement": "estimates",
        "difference_of_means": "estimates",
        "paired_difference": "estimates",
        "outcomes": "estimates",
        "win_rate": "pairwise",
        "length_controlled_win_rate": "pairwise",
        "bradley_terry": "pairwise",
        "cohen_kappa": "agreement",
        "fleiss_kappa": "agreement",
        "krippendorff_alpha": "agreement",
        "dawid_skene": "annotators",
        "crowd_bradley_terry": "annotators",
        "fit_gold_curve": "overoptimization",
        "best_of_n": "overoptimization",
        "reward_against_length": "overoptimization",
    },
)
