"""Online DPO: DPO whose pairs are the policy's own completions, labelled as they come (Guo et al. 2024,
arXiv:2402.04792).

For each prompt G completions are sampled from the policy as it is now. By the environment's reward the best and the
worst become a pair (y_w, y_l), and DPO's loss is minimised on it:

    L = - log sigmoid(beta log pi(y_w | x) / pi_ref(y_w | x) - beta log pi(y_l | x) / pi_ref(y_l | x)),   beta = kl_coef

No gradient flows through the sampling. labels="bradley_terry" draws each label from the difference of the rewards: the
expected gradient is 0 at pi_ref exp(R / beta) / Z, the optimum of reward less KL, then. "best" makes labels
surer than the rewards are, and the policy goes further.

Departures: the paper has G = 2 and a language model for the annotator; with more completions than two the extremes are
compared, and what was sampled beside them counts as timesteps too. A group without spread makes no pair.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Ge

from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.preference_pairs import BETA, PairConfig, as_pairs, label_pairs, learn_pairs


@dataclasses.dataclass(frozen=True)
class OnlineDPOConfig(PairConfig):
    """Settings of online DPO."""

    group_size: Annotated[int, Ge(2)] = 8
    """G, completions of each prompt, at least 2."""


class OnlineDPO(Agent):
    """DPO on the policy's own completions; see the head of this file."""

    Config = OnlineDPOConfig
    config: OnlineDPOConfig
    needs_groups = True
    kl_where = "loss"
    kl_coef_of_none = BETA

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Pairs of each group, by the reward (and what a missing EOS costs).
        row_N2 = label_pairs(rollout.reward_BT.sum(1), rollout.group_B, self.config.labels, self.generator)
        metrics = {"pairs": float(len(row_N2))}
        if len(row_N2) == 0:
            return metrics

        # 2. DPO's loss on them.
        return learn_pairs(self, as_pairs(rollout, row_N2)) | metrics
