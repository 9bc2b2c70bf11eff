"""REINFORCE: the policy gradient (Williams 1992, doi:10.1007/BF00992696), a token a step.

    G_t  = sum_{k >= t} r_k,    r_k = [k is last] score - beta KL_k               return-to-go, undiscounted
    L    = - mean_t (G_t - b) log pi(y_t | x, y_<t)

Its gradient is that of -E[sum_t r_t] but for the division by the number of tokens, for any baseline b that does not
depend on the action.

Departures from the paper, each a setting:

- baseline="running" (default) is an exponential mean of past batches' returns, as the paper's reinforcement
  comparison; "batch" is the mean of this batch's own, which biases the gradient by 1 / tokens; "none" is none.
- One step a rollout, so that no ratio is needed: the samples are the policy's own.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.config import AgentConfig
from textrl_gym.training.minibatch import Minibatch, sum_of


@dataclasses.dataclass(frozen=True)
class ReinforceConfig(AgentConfig):
    """Settings of REINFORCE."""

    group_size: int = 8
    """Completions of each prompt. REINFORCE needs no groups; they share the cost of their prompt."""
    baseline: Literal["none", "batch", "running"] = "running"
    """What is taken off every return: nothing, the batch's mean, or an exponential mean of the batches before."""
    baseline_decay: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Weight of the past in the running baseline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs * self.minibatches != 1:
            raise ValueError(f"REINFORCE takes one step a rollout, got {self.epochs} epochs x {self.minibatches}")


def reinforce_loss(logp_BT: Tensor, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
    """- mean over tokens of A_t log pi_t, A being part.advantage_BT."""
    assert logp_BT.shape == part.mask_BT.shape, (logp_BT.shape, part.mask_BT.shape)
    loss = part.mean(part.weighted(-part.advantage_BT * logp_BT))
    return loss, {"loss": loss.detach()}


class Reinforce(Agent):
    """REINFORCE with a scalar baseline; see the head of this file."""

    Config = ReinforceConfig
    config: ReinforceConfig
    running: float | None = None
    """The running baseline; None before the first batch."""

    def estimates(self, rollout: Rollout) -> tuple[Tensor, float, float]:
        """Returns-to-go less a baseline that knows nothing of the actions, this baseline, and the mean return."""
        return_BT = functional.returns_to_go(rollout.reward_BT, rollout.mask_BT)
        mean = float(functional.masked_mean(return_BT, rollout.mask_BT))
        baselines = {"none": 0.0, "batch": mean, "running": mean if self.running is None else self.running}
        baseline = baselines[self.config.baseline]
        return (return_BT - baseline) * rollout.mask_BT, baseline, mean

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.estimates(rollout)[0]

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. Advantages, and the baseline of the next rollout.
        advantage_BT, baseline, mean = self.estimates(rollout)
        # After the advantages: a baseline with this rollout's returns in it would depend on the actions, and bias the
        # gradient.
        past = self.config.baseline_decay if self.running is not None else 0.0
        self.running = past * (self.running or 0.0) + (1 - past) * mean

        # 2. One step.
        steps = []
        for minibatch in self.minibatches(rollout.with_(advantage_BT=advantage_BT)):
            parts = []
            for part in minibatch.micro_batches():
                loss, metrics = reinforce_loss(self.policy.logprobs(part), part)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
        return functional.mean_of(steps) | {"baseline": baseline}

    def extra_state(self) -> dict[str, Any]:
        return {"running": self.running}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.running = state["running"]
