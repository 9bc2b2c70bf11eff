"""What precedes RL: supervised fine-tuning, preferences and reward models.

- `sft`: supervised fine-tuning on prompt and completion pairs
- `sample_preferences`: preference pairs sampled from policies and labelled
- `simulated_comparisons`: completions compared by simulated annotators
- `reward_model`: training a Bradley-Terry reward model
- `reward_report`: accuracy and calibration as tables
- `reward_ensemble`: an ensemble of reward models
- `reward_metrics`: accuracy and calibration of a reward model
- `replaced_tokens`: replaced-token detection before the comparisons
- `induction`: an initialisation for tiny models that can copy
- `build_assets`: rebuilding the bundled files of TLDRSummarize-v0
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "SFTConfig": "sft",
        "PreferenceConfig": "sample_preferences",
        "make_preferences": "sample_preferences",
        "train_reward_model": "reward_model",
        "train_ensemble": "reward_ensemble",
    },
)
