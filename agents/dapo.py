"""DAPO: decoupled clip and dynamic sampling policy optimization (Yu et al. 2025, arXiv:2503.14476, section 3).

GRPO with four changes:
    1. clip-higher: the ratio is clipped to [1 - 0.2, 1 + 0.28], so that unlikely tokens may become likely (3.1).
    2. dynamic sampling: groups whose completions all score the same have no gradient; prompts are drawn again until
       rollout_episodes rows have spread (3.2). What was generated and dropped counts as timesteps.
    3. the loss is a mean over all tokens of the batch (3.3), as this project's GRPO has it too.
    4. overlong shaping: the last `overlong_share` of the token budget costs up to `overlong_penalty` (equation 13).

Departures: the paper has no KL penalty; here kl_coef keeps this project's meaning (0 is the paper's), so that curves
can be compared. Sampling again stops after `most_draws` rollouts, and what spread there is then is used.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents.grpo import GRPO, GRPOConfig, group_advantages
from textrl_gym.core import Rollout


@dataclasses.dataclass(frozen=True)
class DAPOConfig(GRPOConfig):
    """Settings of DAPO."""

    minibatches: int = 2
    """Optimizer steps in each pass."""
    clip_high: float = 0.28
    """The ratio is clipped to at most 1 + clip_high."""
    most_draws: Annotated[int, Ge(1)] = 4
    """Rollouts that are drawn at most for one update."""
    overlong_share: Annotated[float, Ge(0), Le(1)] = 0.2
    """Completions that end in this last share of the token budget are penalised (a fifth in the paper); 0: none."""
    overlong_penalty: Annotated[float, Ge(0)] = 1.0
    """Taken off the score of a completion that uses the whole budget; nearer to the start of the zone, less."""


def overlong(length_B: Tensor, budget: int, share: float, penalty: float) -> Tensor:
    """Equation 13 times `penalty`: 0 up to (1 - share) budget tokens, then down in a line to -penalty. [B]."""
    if share == 0:
        return torch.zeros(length_B.shape, device=length_B.device)
    return -penalty * ((length_B / budget - (1 - share)) / share).clamp(0, 1)


def with_spread(rollout: Rollout) -> Tensor:
    """bool [B]: the rows whose group has more than one return."""
    _, flat_B = group_advantages(rollout.reward_BT.sum(1), rollout.group_B, scale_by_std=False, std_eps=0.0)
    return ~flat_B


class DAPO(GRPO):
    """GRPO with clip-higher, dynamic sampling and overlong shaping; see the head of this file."""

    Config = DAPOConfig
    config: DAPOConfig

    def collect(self) -> Rollout:
        """Rollouts until enough rows have groups with spread."""
        num_rows, rollouts, generated = self.env.num_envs, [], 0
        for _ in range(self.config.most_draws):
            drawn = super().collect()
            generated += drawn.num_tokens
            drawn = self.shaped(drawn)
            spread_B = with_spread(drawn)
            if spread_B.any():
                rollouts.append(drawn.select(spread_B))
            if sum(map(len, rollouts)) >= num_rows:
                break
        rollout = Rollout.cat(rollouts) if rollouts else drawn
        rollout = rollout.select(torch.arange(min(num_rows, len(rollout)), device=self.device))
        self.dropped_tokens = generated - rollout.num_tokens
        return rollout

    def shaped(self, rollout: Rollout) -> Rollout:
        # The budget counts all tokens of a conversation.
        config, length_B = self.config, rollout.present_BT.sum(1)
        shaping_B = overlong(length_B, self.env.max_new_tokens, config.overlong_share, config.overlong_penalty)
        last_B1 = functional.last_places(rollout.mask_BT)[:, None]
        reward_BT = rollout.reward_BT.scatter_add(1, last_B1, shaping_B[:, None].to(rollout.reward_BT))
        return dataclasses.replace(rollout, reward_BT=reward_BT)
