"""A minibatch of the tensors that a loss reads, and the gradient that an update's last step was taken by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from textrl_gym.core import Rollout
from textrl_gym.training.agent import Agent
from textrl_gym.training.minibatch import Minibatch


def minibatch(mask_BT: Tensor, rows: int | None = None, tokens: int | None = None, **tensors: Tensor) -> Minibatch:
    """Completions under mask_BT: fields of a rollout by name, 0 where not given, and what an update adds to them.

    Args:
        rows, tokens: of the whole minibatch, where this is a part of it.
    """
    zero_BT, zero_B = torch.zeros(mask_BT.shape), torch.zeros(len(mask_BT))
    fields = {f"{name}_BT": zero_BT for name in ("token", "logp", "ref_logp", "kl", "value", "reward")}
    fields |= {"mask_BT": mask_BT, "prompt_BP": zero_BT, "prompt_mask_BP": mask_BT}
    fields |= {"score_B": zero_B, "stop_B": zero_B, "group_B": zero_B}
    given = {name: tensor for name, tensor in tensors.items() if name in fields}
    added = {name: tensor for name, tensor in tensors.items() if name not in fields}
    found = Minibatch.of(Rollout(**(fields | given)).with_(**added))  # type: ignore[arg-type]
    found.rows, found.tokens = rows or found.rows, tokens or found.tokens
    return found


@contextmanager
def last_gradient(agent: Agent) -> Iterator[list[Tensor]]:
    """A list that gets the gradient of each optimizer step, before which it was clipped."""
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        found.append(torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None]))

    hook = agent.optimizer.register_step_pre_hook(keep)
    yield found
    hook.remove()
