"""AWR: advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177), on given trajectories: offline RL.

Supervised learning in which each action weighs as much as it was better than expected. With the return G_t that
followed action a_t, the critic V and beta = kl_coef,

    V  = argmin E_D[ (G_t - V(s_t))^2 ]                                                   (line 4 of algorithm 1)
    pi = argmax E_D[ log pi(a_t | s_t) exp((G_t - V(s_t)) / beta) ]                       (line 5, equation 10)

It is the solution of maximising the expected improvement over the policy mu that wrote the data, within a KL of it. In
the token MDP, which is deterministic where replies are, that can be said of whole completions. V(s_t) is the same for
all actions in s_t and cancels, and E[exp(G / beta) | s, a] is a product that telescopes, so that with enough data

    pi*(y | x) = mu(y | x) exp(R(x, y) / beta) / Z(x)

which is the KL-regularised optimum that PPO and DPO look for, with mu as the reference: a test holds it.

Both steps are one here: the loss is

    L = - 1/tokens sum_t min(exp((G_t - V(s_t)) / beta), max_weight) log pi(a_t | s_t) + vf_coef / 2 (V(s_t) - G_t)^2

The data are those of filtered_bc.py, of which this is the soft form: all trajectories are learnt, by their advantages.

Departures: the paper alternates many steps on V with many on pi and adds what pi does to its data; here both learn side
by side on data that stay. Its targets of V are TD(lambda) returns; here lambda is 1, Monte Carlo returns, without which
the equation above would not be exact. The critic is a head on the policy's trunk.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import Tensor

from textrl_gym import functional
from textrl_gym.agents.filtered_bc import FilteredBC, FilteredBCConfig
from textrl_gym.core import Rollout
from textrl_gym.training.minibatch import Minibatch, sum_of
from textrl_gym.training.preference_pairs import BETA


@dataclasses.dataclass(frozen=True)
class AWRConfig(FilteredBCConfig):
    """Settings of AWR; kl_coef is beta."""

    share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Of the trajectories, those with the best returns, which are learnt."""
    max_weight: Annotated[float, Gt(0)] = 20.0
    """Weights are clipped to this, which bounds what one lucky action can do."""
    vf_coef: Annotated[float, Ge(0)] = 0.1
    """Weight of the value loss. The critic shares the policy's trunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_coef == 0:
            raise ValueError("kl_coef is beta, by which advantages become weights: it must be > 0, got 0")


def awr_loss(
    logp_BT: Tensor, value_BT: Tensor, part: Minibatch, config: AWRConfig, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss at the head of this file, with part.return_BT."""
    assert logp_BT.shape == value_BT.shape == part.mask_BT.shape, (logp_BT.shape, value_BT.shape, part.mask_BT.shape)
    # The weights are data: no gradient goes through them into the critic. exp of more than 80 would be infinite.
    raw_BT = ((part.return_BT - value_BT.detach()) / beta).clamp(max=80).exp()
    policy_loss = part.mean(-raw_BT.clamp(max=config.max_weight) * logp_BT)
    value_loss = 0.5 * part.mean((value_BT - part.return_BT) ** 2)
    loss = policy_loss + config.vf_coef * value_loss
    return loss, {
        "loss": loss.detach(),
        "policy_loss": policy_loss.detach(),
        "value_loss": value_loss.detach(),
        "weight": part.mean(raw_BT.clamp(max=config.max_weight)),
        "clipped_weights": part.mean((raw_BT > config.max_weight).float()),
    }


class AWR(FilteredBC):
    """Advantage-weighted regression; see the head of this file."""

    Config = AWRConfig
    config: AWRConfig
    uses_value = True
    kl_coef_of_none = BETA

    def advantages(self, rollout: Rollout) -> Tensor:
        return_BT = functional.returns_to_go(rollout.reward_BT, rollout.mask_BT)
        return (return_BT - rollout.value_BT) * rollout.mask_BT

    def update(self, rollout: Rollout) -> dict[str, float]:
        # 1. What followed each action.
        batch = rollout.with_(return_BT=functional.returns_to_go(rollout.reward_BT, rollout.mask_BT))

        # 2. Weighted supervised steps, and the critic's.
        steps = []
        for minibatch in self.minibatches(batch):
            parts = []
            for part in minibatch.micro_batches():
                now = self.policy.response(part)
                loss, metrics = awr_loss(now.logp_BT, now.value_BT, part, self.config, self.kl.coef)
                loss.backward()
                parts.append(metrics)
            steps.append(sum_of(parts) | {"grad_norm": self.step()})
        return functional.mean_of(steps)
