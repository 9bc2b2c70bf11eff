"""The pipeline before RL: supervised fine-tuning, preference data, reward models.

In reading order:
- `sft`: supervised fine-tuning on prompts and completions
- `induction`: an initialisation and a curriculum for tiny models trained from scratch
- `optim`: AdamW, the learning-rate schedule and the progress bar of supervised training
- `trainer`: supervised training in a folder: phases of updates, logs, checkpoints
- `sample_preferences`: preference pairs, sampled from policies and labelled
- `simulated_comparisons`: completions of a task, compared by simulated annotators
- `reward_data`: the settings and the data of reward-model training
- `replaced_tokens`: replaced-token detection, the pretraining of a reward model's body
- `reward_model`: training a Bradley-Terry reward model
- `reward_metrics`: accuracy and calibration of a reward model
- `reward_ensemble`: training and measuring an ensemble of reward models
- `build_assets`: rebuilding the bundled files of TLDRSummarize-v0
"""

from __future__ import annotations

from textrl_gym.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "PreferenceConfig": "sample_preferences",
        "RewardModelConfig": "reward_data",
        "SFTConfig": "sft",
        "make_preferences": "sample_preferences",
        "train_ensemble": "reward_ensemble",
        "train_reward_model": "reward_model",
    },
)
