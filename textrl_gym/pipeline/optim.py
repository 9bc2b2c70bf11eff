"""Optimisation shared by the training loops of this wing: AdamW, the learning-rate schedule, the loss shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from textrl_gym.functional import require_finite


def adamw(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over all parameters."""
    # beta_2 = 0.95 as is usual for language models (Brown et al. 2020, arXiv:2005.14165, appendix B): the second moment
    # forgets within some 20 updates, where PyTorch's 0.999 takes 1,000, more than most of these runs have.
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Tensor],
    rate: float,
    max_norm: float = 1.0,
    update: int = 1,
    before_step: Callable[[], object] = lambda: None,
) -> tuple[float | None, float]:
    """Take one optimiser step on a loss: gradients clipped to a global norm, at the given learning rate.

    Args:
        losses: parts of the loss, which add up to it; each is gone through before the next is computed. Without any no
            step is taken.
        update: its number, for errors.
        before_step: called when the gradients are ready.

    Returns:
        The loss, None where there was none, and the gradients' norm before it was clipped.

    Raises:
        NonFiniteError: the loss or the gradient norm is NaN or infinite, and no step is taken; or the weights after it.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    total: Tensor | None = None
    for loss in losses:
        require_finite(f"update {update}: the loss", loss.detach())
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        return None, 0.0
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    require_finite(f"update {update}: the gradient norm", norm)
    before_step()
    optimizer.step()
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    require_finite(f"update {update}: the norm of the weights after it", nn.utils.get_total_norm(weights))
    return total.item(), norm.item()


def cosine(step: int, steps: int, warmup: int) -> float:
    """The cosine schedule: the share of the peak learning rate at update `step` (from 0) of `steps`.

    A linear warm-up, then half a cosine from 1 to 0.05.
    """
    if step < warmup:
        return (step + 1) / warmup
    # It ends at a twentieth, not at 0: the last updates would teach nothing.
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


class RunningMean:
    """An exponential running mean, nan before the first value and equal to it after it."""

    def __init__(self, share: float = 0.05, value: float = math.nan) -> None:
        """share: the weight of a new value; value: to go on from."""
        self.share, self.value = share, value

    def update(self, value: float) -> float:
        """Add a value; returns the new mean."""
        # Starting from 0 instead would show a loss that rises from 0 for the first 1 / share updates.
        self.value = value if math.isnan(self.value) else (1 - self.share) * self.value + self.share * value
        return self.value


def progress_bar() -> Progress:
    """A progress bar: steps done of all, a note such as the loss, the elapsed and the remaining time."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
