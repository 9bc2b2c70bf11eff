"""TRPO as sb3_contrib has it (Schulman et al. 2015, arXiv:1502.05477; sb3_contrib/trpo/trpo.py). Extra: sb3.

    maximise mean_t ratio_t A_t   subject to   mean_t KL(pi_t, pi_old,t) <= target_kl

by a natural gradient step: conjugate gradients on products with the Hessian of the KL, then a line search. The critic
is fitted after it, its head alone, since the trunk is the actor's. The loop and the losses are SB3's; see
textrl_gym/integrations/sb3_agent.py for what is around them.

`minibatches` are the critic's, and `learning_rate` is its own. Each update computes gradients of gradients, which fused
attention has not: it takes the plain one.

Departures from sb3_contrib: all gradients of the KL are taken in one pass, where it takes one a parameter, each with
a graph of its own to go through at every product (the same sums, several times as fast), and the critic's parameters
are told by their module, where it goes by names; fewer passes of the critic.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from textrl_gym import functional
from textrl_gym.core import Rollout
from textrl_gym.extras import install
from textrl_gym.integrations.sb3_agent import SB3Agent, SB3Config
from textrl_gym.models import onednn

try:
    from sb3_contrib import TRPO
except ImportError as error:
    raise ImportError(f"the agent sb3_trpo needs sb3-contrib: {install('sb3')}") from error


@dataclasses.dataclass(frozen=True)
class SB3TRPOConfig(SB3Config):
    """Settings of sb3_contrib's TRPO."""

    rollout_episodes: int = 16
    """Rows of the vector environment (SB3's n_envs). An update takes the gradient of a gradient over all tokens of a
    rollout a dozen times and keeps its graph: 768 tokens of the embedded model take 1.5 GiB."""
    learning_rate: float = 1e-3
    """Adam's step size for the critic's head; the actor's step has none."""
    minibatches: int = 4
    """Optimizer steps of the critic in each of its passes; divides the tokens of a rollout."""
    target_kl: Annotated[float, Gt(0)] = 0.01
    """An update moves the policy at most so many nats per token."""
    cg_max_steps: Annotated[int, Ge(1)] = 10
    """Steps of the conjugate gradients."""
    cg_damping: Annotated[float, Gt(0)] = 0.1
    """Added to the Hessian's diagonal."""
    critic_updates: Annotated[int, Ge(1)] = 2
    """Passes of the critic over each rollout."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs != 1:
            raise ValueError(f"TRPO takes one step a rollout, got epochs={self.epochs}")
        if self.max_grad_norm != 1.0:
            raise ValueError(f"a step's length comes from target_kl: leave max_grad_norm, got {self.max_grad_norm}")


class _OnePassTRPO(TRPO):
    # sb3_contrib takes the KL's gradient parameter by parameter, each with a graph of its own for every product with
    # the Hessian; one call for all is the same sums, 4 times as fast on CopyText-v0.
    def _compute_actor_grad(
        self, kl_div: Tensor, policy_objective: Tensor
    ) -> tuple[list[torch.nn.Parameter], Tensor, Tensor, list[tuple[int, ...]]]:
        """Actor parameters, the gradients of objective and KL as vectors, and the parameters' shapes."""
        actor = [
            p for name, p in self.policy.named_parameters() if p.requires_grad and not name.startswith("lm.value_head.")
        ]
        kl_grads = torch.autograd.grad(kl_div, actor, create_graph=True, allow_unused=True)
        used = [(p, grad) for p, grad in zip(actor, kl_grads, strict=True) if grad is not None]
        actor = [p for p, _ in used]
        grads = torch.autograd.grad(policy_objective, actor, retain_graph=True)
        kl_grad_X, grad_X = (torch.cat([g.reshape(-1) for g in of]) for of in ([g for _, g in used], grads))
        # TRPO moves the policy without an optimizer, whose hook would look.
        functional.require_finite("the gradient norm", grad_X.norm())
        return actor, grad_X, kl_grad_X, [p.shape for p in actor]


class SB3TRPO(SB3Agent):
    """sb3_contrib's TRPO; see the head of this file."""

    Config = SB3TRPOConfig
    config: SB3TRPOConfig

    def make_algorithm(self, **common: Any) -> TRPO:
        config = self.config
        return _OnePassTRPO(
            **common,
            batch_size=self.batch_steps // config.minibatches,
            cg_max_steps=config.cg_max_steps,
            cg_damping=config.cg_damping,
            n_critic_updates=config.critic_updates,
            normalize_advantage=config.whiten_advantages,
            target_kl=config.target_kl,
        )

    def update(self, rollout: Rollout) -> dict[str, float]:
        with onednn.twice_differentiable():
            return super().update(rollout)
