"""Your own agent: settings, an advantage and a loss as pure functions, and `update`. The base class does the rest."""

import dataclasses
from typing import Annotated, Any

from annotated_types import Ge, Lt
from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents import Agent, AgentConfig
from textrl_gym.core import Rollout
from textrl_gym.training.minibatch import Minibatch, sum_of


@dataclasses.dataclass(frozen=True)
class ReinforceConfig(AgentConfig):
    decay: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Weight of the past in the baseline."""


def advantages(reward_BT: Tensor, mask_BT: Tensor, baseline: float) -> Tensor:
    """What each token brought, less a number that knows nothing of it: sum_{k >= t} r_k - b. [B, T]"""
    return (functional.returns_to_go(reward_BT, mask_BT) - baseline) * mask_BT


def reinforce_loss(logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
    """-1/B sum_i sum_t A_it log pi(y_it | x_i, y_i<t); and what to log."""
    assert logp_BT.shape == part.mask_BT.shape
    loss = -part.mean((logp_BT * part.advantage_BT).sum(1))
    return loss, {"loss": loss.detach()}


class Reinforce(Agent):
    Config = ReinforceConfig
    baseline = 0.0

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Advantages; score and KL penalty are in the rewards.
        batch = rollout.with_(advantage_BT=advantages(rollout.reward_BT, rollout.mask_BT, self.baseline))

        # 2. A step for each minibatch, in micro-batches that fit in memory.
        steps = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = reinforce_loss(self.policy.logprobs(part), part)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})

        # 3. The baseline of the next rollout.
        self.baseline += (1 - self.config.decay) * (float(rollout.reward_BT.sum(1).mean()) - self.baseline)
        return functional.mean_of(steps) | {"baseline": self.baseline}

    def extra_state(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]
