"""The processes of one training run (torch.distributed): who is which, and what they add up or hand to each other.

    join                a process group, as torchrun starts its processes
    size, rank, is_first
    share               a block of the units of work of a rollout, for this process
    deal, add_gradients parts of a minibatch, for this process, and the sum of their gradients over all processes
    whole, local        tensors of which each process has a part
    cut, joined         the same of a tensor that no pass needs for a while
    shard, like         a model of whose weights each process has a part, and tensors as its weights are
    take_weights        the whole weights of such a model
    total, gather, from_first, most

Without a group there is one process, and each of these functions gives back what it is given: a loss or a loop does not
ask how many processes there are. Loads torch only where it is used.

Every function but `size`, `rank`, `is_first` and `share` is collective: all processes call it, in the same order.
Objects go from process to process by torch.distributed's pickles; they come from this run's own processes and from no
file.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
BUCKET_NUMBERS = 2**24
"""Gradients that are summed in one message, as numbers: 64 MiB of float32."""
TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others: a checkpoint of a large model, or an evaluation by a slow judge, takes
minutes in which nobody hears of the process that does it."""


@dataclass
class _Group:
    """The group that this process has joined."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    dealt: bool = False
    """Whether gradients are of this process's parts alone, and have to be summed before a step."""
    in_step: bool = False
    """Whether all processes must go through as many parts: those of a sharded model gather each layer together."""


_group = _Group()


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def join(init_method: str = "env://") -> Iterator[None]:
    """Be one of the processes that the environment's RANK and WORLD_SIZE speak of; without these, do nothing.

    NCCL carries what is on GPUs, and gloo what is on CPUs. Each process takes the GPU of its LOCAL_RANK.

    Args:
        init_method: where the processes find each other, as of torch.distributed.init_process_group.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine.
    """
    if not launched() or _group.size > 1:  # the second time: a command within a command
        yield
        return
    import torch
    import torch.distributed as dist

    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
    if gpus:
        if local_rank >= gpus:
            raise ValueError(f"{gpus} GPU(s), and none for process {local_rank}: start as many processes")
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, init_method=init_method, world_size=size, rank=rank, timeout=TIMEOUT)
    _group.size, _group.rank, _group.local_rank, _group.dealt = size, rank, local_rank, False
    try:
        yield
    finally:
        _group.size, _group.rank, _group.local_rank = 1, 0, 0
        dist.destroy_process_group()


# -- who is which -----------------------------------------------------------------------------------------------------


def size() -> int:
    """How many processes there are."""
    return _group.size


def rank() -> int:
    """The number of this process, from 0."""
    return _group.rank


def local_rank() -> int:
    """The number of this process among those of its machine: the number of its GPU."""
    return _group.local_rank


def is_first() -> bool:
    """Whether this is process 0, which alone writes files and speaks to the terminal."""
    return _group.rank == 0


# -- work that is shared out ------------------------------------------------------------------------------------------


def share(units: int) -> slice:
    """This process's block of so many units: neighbours, the blocks of all processes of about one size in their order.

    With fewer units than processes some blocks are empty.
    """
    return slice(units * _group.rank // _group.size, units * (_group.rank + 1) // _group.size)


def deal(parts: Sequence[T]) -> Sequence[T]:
    """This process's parts of an optimizer step's work, whose gradients are summed before the step."""
    _group.dealt = _group.size > 1
    return own(parts)


def own(parts: Sequence[T]) -> Sequence[T]:
    """This process's parts of work whose results are added up otherwise.

    Raises:
        ValueError: inside `in_step`, they cannot be shared out evenly.
    """
    if _group.size == 1:
        return parts
    if _group.in_step and len(parts) % _group.size:
        raise ValueError(
            f"a minibatch of {len(parts)} rows or groups cannot be shared out evenly to {_group.size} processes, as "
            "sharding needs it: take larger or fewer minibatches, or do not shard"
        )
    return parts[_group.rank :: _group.size]


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Inside, `deal` gives each process as many parts, or raises ValueError."""
    before, _group.in_step = _group.in_step, True
    try:
        yield
    finally:
        _group.in_step = before


def is_dealt() -> bool:
    """Whether what was computed since the last optimizer step is of this process's parts alone."""
    return _group.dealt


def forget_parts() -> None:
    """Begin an optimizer step anew: what was dealt before it counts no more."""
    _group.dealt = False


def add_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of the parts that were dealt over all processes, in place; once for each optimizer step.

    Where nothing was dealt every process has gone through all of the work, and has the sum already.
    """
    if not _group.dealt:
        return
    _group.dealt = False
    import torch
    import torch.distributed as dist

    trained = [p for p in parameters if p.requires_grad]
    for p in trained:
        if is_sharded(p) and p.grad is not None:
            local(p.grad).mul_(_group.size)  # fully_shard has averaged the parts' gradients over the processes
    trained = [p for p in trained if not is_sharded(p)]
    # A process without parts has no gradients; a parameter that no process has used keeps none, as AdamW would move
    # one with a gradient of 0 by its momentum.
    used = [False] * len(trained)
    for flags in gather([p.grad is not None for p in trained]):
        used = [before or flag for before, flag in zip(used, flags, strict=True)]
    for bucket in _buckets([p for p, there in zip(trained, used, strict=True) if there]):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for p, gradient, summed in zip(bucket, gradients, flat.split([p.numel() for p in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))
            p.grad = gradient


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one type and device, up to BUCKET_NUMBERS numbers each: one message for many small tensors."""
    bucket: list[torch.nn.Parameter] = []
    for p in parameters:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (p.dtype, p.device)
        if bucket and not (alike and sum(b.numel() for b in bucket) + p.numel() <= BUCKET_NUMBERS):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


# -- tensors of which each process has a part -------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has a part of the tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")  # by name: importing its class takes a tenth of a second


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whose parts all processes give."""
    untyped: Any = tensor
    return untyped.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    untyped: Any = tensor
    return untyped.to_local() if is_sharded(tensor) else tensor


def cut(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that every process has: as long in each, 0 where the tensor has ended. [n]"""
    import torch

    length = -(-tensor.numel() // _group.size)
    part = torch.zeros(length, dtype=tensor.dtype, device=tensor.device)
    own_part = tensor.flatten()[_group.rank * length : (_group.rank + 1) * length]
    part[: len(own_part)] = own_part
    return part


def joined(part: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of a shape that all processes have `cut`."""
    import torch
    import torch.distributed as dist

    parts = [torch.empty_like(part) for _ in range(_group.size)]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: math.prod(shape)].view(*shape)


# -- a model of which each process has a part -------------------------------------------------------------------------


def shard(model: torch.nn.Module) -> None:
    """Shard a model's weights, and the gradients and moments that it will have, by fully_shard (FSDP2), layer by layer.

    All processes must make as many passes of it from then on, as they gather a layer together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (_group.size,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    # What is left (embeddings, heads) is one group: whole from the beginning of a pass to the end of its backward pass,
    # as a head is called for a few positions at a time.
    fully_shard(model, mesh=mesh)


def _layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The transformer layers: the items of the outermost lists of modules."""
    from torch import nn

    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor that every process has: whole, or this process's part of it, as a parameter is."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    untyped: Any = parameter
    # Every process has the whole: nothing is sent.
    return distribute_tensor(value, untyped.device_mesh, untyped.placements, src_data_rank=None)


def take_weights(model: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Give the trained weights of a sharded copy of a model to the model."""
    import torch

    with torch.no_grad():
        for own_weight, sharded in zip(model.parameters(), twin.parameters(), strict=True):
            if own_weight.requires_grad:
                own_weight.copy_(whole(sharded.detach()))


# -- sums, and what one process tells the others ----------------------------------------------------------------------


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes."""
    if _group.size == 1:
        return tensor
    import torch.distributed as dist

    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def total_of(numbers: Mapping[str, float]) -> dict[str, float]:
    """The sum of each number over the processes; a process without parts has none."""
    sums: dict[str, float] = {}
    for each in gather(dict(numbers)):
        for name, value in each.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def gather(value: T) -> list[T]:
    """What each process gives, in the order of the processes. Tensors in it must be on the CPU."""
    if _group.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _group.size
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """What the first process computes, told to all: of clocks and files, which two processes may see differently."""
    if _group.size == 1:
        return work()
    import torch.distributed as dist

    values: list[Any] = [work() if is_first() else None]
    dist.broadcast_object_list(values)
    return values[0]


def of_first(value: T) -> T:
    """The value that the first process has."""
    return from_first(lambda: value)


def require_equal(name: str, value: object) -> None:
    """Hold that a value is the same in every process.

    Raises:
        RuntimeError: with the name, and what each process has.
    """
    values = gather(value)
    if any(other != values[0] for other in values):
        raise RuntimeError(f"{name} must be the same in every process, and differs: {values}")


def most(number: int) -> int:
    """The greatest of the processes' numbers."""
    return max(gather(number))


def wait() -> None:
    """Go on when all processes have come here."""
    gather(None)
