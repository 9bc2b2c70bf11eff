"""Your own agent: a config, a loss that is a pure function, and `update`. The base class collects, logs and saves.

From a shell, in the folder above:
    textrl-gym train examples.custom_agent:Reinforce CopyText-v0 --total-timesteps 20000 --seed 0 --out runs/mine
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from textrl_gym.agents import Agent, AgentConfig
from textrl_gym.core import Rollout


@dataclasses.dataclass(frozen=True)
class ReinforceConfig(AgentConfig):
    """Settings of REINFORCE."""

    baseline: Literal["mean", "none"] = "mean"
    """What is taken off each return: the batch's mean, or nothing."""


def reinforce_loss(logp_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor, rows: int) -> Tensor:
    """-1/B sum_i A_i sum_t log pi(y_it | x_i, y_i<t)  (Williams 1992), over a micro-batch of the B rows."""
    assert logp_BT.shape == mask_BT.shape
    assert advantage_B.shape == logp_BT.shape[:1]
    return -(logp_BT * mask_BT * advantage_B[:, None]).sum() / rows


class Reinforce(Agent):
    """REINFORCE with an optional baseline: one step on each rollout."""

    Config = ReinforceConfig
    config: ReinforceConfig

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. One advantage for each text; the KL penalty is in the rewards.
        advantage_B = rollout.reward_BT.sum(1)
        if self.config.baseline == "mean":
            advantage_B = advantage_B - advantage_B.mean()
        advantage_BT = advantage_B[:, None].expand_as(rollout.logp_BT)

        # 2. One step for each minibatch, in micro-batches that fit in memory.
        def loss(part: Rollout, pick: Callable[[Tensor], Tensor], rows: int, tokens: int) -> tuple[Tensor, dict]:
            value = reinforce_loss(self.policy.logprobs(part), pick(advantage_BT)[:, 0], part.mask_BT, rows)
            return value, {"loss": value.detach()}

        return [self.minimise(rollout, rows, loss) for rows in self.shuffled(rollout)][-1]


def main(env_id: str = "CopyText-v0", tokens: str = "20000", out: str = "runs/reinforce") -> None:
    Reinforce(env_id, seed=0, out=out, learning_rate=1e-3).learn(total_timesteps=int(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
