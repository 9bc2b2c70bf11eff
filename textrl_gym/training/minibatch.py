"""One optimizer step: its minibatch of rows, the parts of them that fit in memory, and the optimizer with its checks.

The loss of a part is its share of the minibatch's loss: its sums are divided by counts of the whole minibatch, as
Minibatch.mean does. So the gradients of the parts add up to that of the minibatch, whether the mean is over tokens,
over sequences or over pairs, and `micro_batch_tokens` changes memory and nothing else. For the same reason the parts
may be dealt to several processes, whose gradients and metrics are summed. A mean over each part's own
tokens, averaged over the parts, would weigh the tokens of small parts more; and one weight for each part could not
serve a loss that has means over tokens and over sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from textrl_gym import functional, processes
from textrl_gym.core import Rollout
from textrl_gym.rollouts.batching import micro_batches
from textrl_gym.training.config import AgentConfig


@dataclasses.dataclass
class Minibatch(Rollout):
    """Rows of a rollout with the counts that means are divided by. What `with_` added are attributes too."""

    rows: int = 0
    """Rows of the whole minibatch."""
    tokens: int = 0
    """Tokens of the whole minibatch's completions."""
    micro_batch_tokens: int = 8_192
    """Prompt and response places of a part."""
    importance_cap: float | None = None
    """Largest importance weight; None: losses are not weighed."""

    @classmethod
    def of(cls, rollout: Rollout, micro_batch_tokens: int = 8_192, importance_cap: float | None = None) -> Minibatch:
        """All rows of a rollout as one minibatch."""
        counts = {"rows": len(rollout), "tokens": rollout.num_tokens, "micro_batch_tokens": micro_batch_tokens}
        return cls(**(vars(rollout) | counts | {"importance_cap": importance_cap}))

    def __getattr__(self, name: str) -> Tensor:
        # Called only for names that are no attribute. Not self.extra: copying asks before there is one.
        extra: dict[str, Tensor] = self.__dict__.get("extra", {})
        if name not in extra:
            raise AttributeError(f"no {name!r} in this minibatch; rollout.with_() gave it {sorted(extra)}")
        return extra[name]

    def micro_batches(self, whole_groups: bool = False) -> Iterator[Minibatch]:
        """Parts of at most micro_batch_tokens prompt and response places, each with the counts of the whole.

        Of several processes each gets its share of them, which may be none.

        Args:
            whole_groups: never part a group, for losses that compare its rows.
        """
        counts = {name: getattr(self, name) for name in ("rows", "tokens", "micro_batch_tokens", "importance_cap")}
        parts = micro_batches(self, self.micro_batch_tokens, whole_groups, multiple_of=processes.size())
        for rows in processes.deal(parts):
            yield Minibatch(**(vars(self.select(rows)) | counts))

    def weighted(self, x: Tensor) -> Tensor:
        """Terms of a policy's loss, times their truncated importance weights where a server has sampled.

        x_BT has a term for each token, x_B one for each completion, whose ratio is the geometric mean of its tokens'.

        The weights are of the training forward when the rollout was collected, not of the policy as it is now: they
        say which distribution the tokens are from, and the loss's own ratio what updates have changed since. As they
        are positive, they pass through a clipped surrogate as if they were part of the advantage.
        """
        if self.sampler_logp_BT is None or self.importance_cap is None:
            return x
        logps = (self.logp_BT, self.sampler_logp_BT)
        if x.ndim == 1:
            length_B = self.mask_BT.sum(1).clamp(min=1)
            logps = ((logps[0] * self.mask_BT).sum(1) / length_B, (logps[1] * self.mask_BT).sum(1) / length_B)
        return x * functional.importance_weights(*logps, self.importance_cap)

    def mean(self, x: Tensor, over: functional.Aggregation = "token") -> Tensor:
        """The part's share of the minibatch's mean of x_B over rows, or of x_BT over tokens. Scalar.

        Args:
            over: for x_BT: "token" weighs all tokens of the minibatch alike, "sequence" all completions.
        """
        if x.ndim == 1:
            assert x.shape == self.mask_BT.shape[:1], (x.shape, self.mask_BT.shape)
            # The whole minibatch's rows and not this part's, so that the parts' gradients add up to the mean's.
            return x.sum() / max(self.rows, 1)
        return functional.aggregate(x, self.mask_BT, over, self.rows, self.tokens)


def sum_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The metrics of a minibatch from those of its parts, each of which is the part's share; over all processes.

    Raises:
        NonFiniteError: one of them, the loss for one, is NaN or infinite: the step that follows would ruin the weights.
    """
    # A process may have no part of a minibatch.
    metrics = {name: sum(float(part[name]) for part in parts) for name in parts[0]} if parts else {}
    if processes.is_dealt():
        metrics = processes.total_of(metrics)
    functional.require_finite("the loss", metrics.get("loss", 0.0))  # the first to be named
    for name, value in metrics.items():
        functional.require_finite(f"the metric {name!r}", value)
    return metrics


def places_of_update(update: int, rows: int, size: int, seed: int, *, first_in_order: bool = False) -> list[int]:
    """The items of a fixed data set that an update learns from: passes over all of it, each in an order of its own.

    A function of its arguments, so that nothing of the order has to be saved, and a resumed run goes on with the next.

    Args:
        update: how many were before.
        rows: items of each update.
        size: of the data set.
        first_in_order: the first pass takes the items as they come.
    """
    orders = {}
    for number in range(update * rows // size, ((update + 1) * rows - 1) // size + 1):
        in_order = number == 0 and first_in_order
        orders[number] = np.arange(size) if in_order else np.random.default_rng([seed, number]).permutation(size)
    return [int(orders[place // size][place % size]) for place in range(update * rows, (update + 1) * rows)]


# -- the optimizer ----------------------------------------------------------------------------------------------------


def checked_adamw(policy: torch.nn.Module, config: AgentConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over what is trained of a policy, with checks around each step.

    Before it gradients are summed over processes, and it is not taken where one of them is NaN or infinite; after it
    the weights must be finite. A check that fails raises NonFiniteError.
    """
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad],
        lr=config.learning_rate,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        # One kernel for all parameters; on a CPU the plain loop, whose last digits earlier runs have.
        fused=device.type == "cuda",
    )
    # Hooks and not lines of step(): Stable-Baselines3 and agents of users call the optimizer themselves.
    optimizer.register_step_pre_hook(_add_gradients)
    optimizer.register_step_pre_hook(_require_finite_gradients)
    optimizer.register_step_post_hook(_require_finite_weights)
    return optimizer


def _add_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    processes.add_gradients(p for group in optimizer.param_groups for p in group["params"])


def _require_finite_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    functional.require_finite("the gradient norm", torch.nn.utils.get_total_norm(gradients))


def _require_finite_weights(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # A finite gradient is no guarantee: a learning rate of 1e30 takes the weights to infinity all the same.
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    functional.require_finite(
        "the norm of the weights after the optimizer step", torch.nn.utils.get_total_norm(weights)
    )
