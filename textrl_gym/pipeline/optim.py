"""Optimisation shared by the training loops of this wing: AdamW, the learning-rate schedule, the loss shown."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from annotated_types import Ge, Gt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from textrl_gym import processes
from textrl_gym.console import time_columns
from textrl_gym.functional import require_finite
from textrl_gym.models import loading, lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How a model is trained, whatever it learns: the base of the settings of supervised training."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes; weights and moments stay float32."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Train a LoRA of this rank (needs peft), which is merged into the model that is saved; 0: all weights."""
    lora_alpha: Annotated[int, Gt(0)] = 32
    """A LoRA's change is scaled by lora_alpha / lora_rank."""
    gradient_checkpointing: bool = False
    """Keep the layers' inputs alone for the backward pass, and compute the rest again: less memory, a third slower."""
    micro_batch_tokens: Annotated[int, Ge(1)] = 32_768
    """Positions in one forward and backward pass, padding included: memory, not result."""
    shard: bool = False
    """Of several processes (torchrun): each holds a part of what is trained, its gradients and moments, by fully_shard;
    weights are gathered to measure and to save. False: each holds all, which is faster where there is room. See
    docs/distributed.md."""
    eval_every: Annotated[int, Ge(0)] = 200
    """Updates between two measurements on held-out data; 0: only at the end."""


class Twin(nn.Module):
    """A sharded copy of a model (FSDP2): each process holds a part of its weights, gradients and moments.

    Args:
        model: the copy begins with its weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        processes.shard(self)

    def forward(self, work: Callable[[PreTrainedModel], T]) -> T:
        """What work computes by the model.

        As a pass of this module: its hooks gather what is in no layer, though the work calls parts of the model.
        """
        return work(self.model)


class TunedModel:
    """A model in training: on its device, with a LoRA where the settings say so.

    Args:
        model: a language model, or a classifier whose head `score` is trained besides a LoRA.

    Raises:
        ValueError: it is an encoder-decoder, and to be sharded.
    """

    ADAPTER = "adapter.safetensors"
    """What is trained, in a checkpoint, where it is not the whole model."""

    def __init__(self, model: PreTrainedModel, config: FineTuning, seed: int) -> None:
        self.config = config
        self.twin: Twin | None = None
        """What updates train in the model's place, where they are sharded."""
        if config.shard and processes.size() > 1 and model.config.is_encoder_decoder:
            name = type(model).__name__
            raise ValueError(f"{name} is an encoder-decoder, which cannot be sharded yet: leave shard out")
        untyped: Any = model  # transformers' own type of .to() knows no devices
        untyped.to(loading.resolve_device(config.device))
        self.model = model.eval()  # no dropout: the function that is sampled from is trained
        self.adapted: nn.Module | None = None
        if config.lora_rank:
            head = getattr(self.model, "score", None)
            self.adapted = lora.add_lora(self.model, config.lora_rank, config.lora_alpha, seed)
            if isinstance(head, nn.Linear):
                self.model.score = head.requires_grad_()
        if config.gradient_checkpointing:
            self._checkpoint_gradients()

    def _checkpoint_gradients(self) -> None:
        model: Any = self.model
        # Its name from transformers 5.18 on, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
        self.model.enable_input_require_grads()
        self.model.train()  # transformers checkpoints in this mode only, which must not switch dropout on
        for module in self.model.modules():
            for name in ("p", "attention_dropout", "dropout", "hidden_dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """Forward passes inside it are in the settings' dtype."""
        if self.config.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

    def shard(self) -> nn.Module:
        """What updates train from now on: a sharded twin of the model, or the model itself."""
        if self.config.shard and processes.size() > 1:
            self.twin = Twin(self.model)
        return self.model if self.twin is None else self.twin

    def gather(self) -> None:
        """Give the twin's weights to the model, before it is measured or saved; all processes together."""
        if self.twin is not None:
            processes.take_weights(self.model, self.twin)

    def run(self, work: Callable[[PreTrainedModel], T]) -> T:
        """What work computes for an update, by the model that is trained, in the settings' dtype."""
        with self.precision():
            return work(self.model) if self.twin is None else self.twin(work)

    def deal(self, parts: Sequence[T]) -> Sequence[tuple[T, float]]:
        """This process's parts of an update, each with its weight.

        Sharded, all processes make as many passes: one without a part repeats another's with the weight 0.
        """
        weighed = [(part, 1.0) for part in parts]
        if self.twin is not None:
            weighed += [(parts[-1], 0.0)] * (-len(parts) % processes.size())
        return processes.deal(weighed)

    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write what is trained into a checkpoint: the model, or the LoRA alone."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapted is not None:
            save_file({name: p.detach().contiguous() for name, p in self.trained().items()}, folder / self.ADAPTER)
            return
        with loading.no_bars():
            self.model.save_pretrained(folder)

    @torch.no_grad()
    def load_adapter(self, folder: Path) -> None:
        """Put the LoRA that `save` wrote into this model."""
        saved = load_file(folder / self.ADAPTER)
        trained = self.trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{str(folder / self.ADAPTER)!r} is of another model")
        for name, p in trained.items():
            p.copy_(saved[name])

    def merged(self) -> PreTrainedModel:
        """The model itself, a LoRA merged into it; it is trained no more after this."""
        if self.adapted is None:
            return self.model
        adapted: Any = self.adapted
        head = getattr(self.model, "score", None)
        merged: PreTrainedModel = adapted.merge_and_unload()
        if isinstance(head, nn.Linear):
            merged.score = head
        return merged


def adamw(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained."""
    # beta_2 = 0.95 as is usual for language models (Brown et al. 2020, arXiv:2005.14165, appendix B): the second moment
    # forgets within some 20 updates, where PyTorch's 0.999 takes 1,000, more than most of these runs have.
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)


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
            step is taken. Of several processes each has its share of them, where they were dealt (processes.deal).
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
    processes.forget_parts()
    total: Tensor | None = None
    for loss in losses:
        require_finite(f"update {update}: the loss", loss.detach())
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    if processes.is_dealt():
        total = _total_of_all(total)
    if total is None:
        return None, 0.0
    processes.add_gradients(model.parameters())
    norm = processes.whole(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    require_finite(f"update {update}: the gradient norm", norm)
    before_step()
    optimizer.step()
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    require_finite(f"update {update}: the norm of the weights after it", nn.utils.get_total_norm(weights))
    return total.item(), norm.item()


def _total_of_all(loss: Tensor | None) -> Tensor | None:
    """The sum of all processes' parts of a loss; None where none has any."""
    numbers = [number for number in processes.gather(None if loss is None else loss.item()) if number is not None]
    return torch.tensor(sum(numbers)) if numbers else None


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
        *time_columns(),
        disable=not processes.is_first(),
    )
