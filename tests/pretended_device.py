"""A pretended CUDA device: tensors that compute on the CPU, and that go where tensors of a GPU could go.

A tensor that says it is on "cuda" holds a tensor of the CPU, with which everything is computed. Mixing it with a tensor
of the CPU raises the error that a GPU raises, and what would make the host wait for a GPU is counted: reading a number
(item, bool, tolist), operations whose output's size depends on numbers (nonzero, masks as indices, unique, bincount),
and copies between the two. torch's own FakeTensorMode has no numbers, so that no decode loop could be run with it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)

aten: Any = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operations for which a GPU's host waits, whatever the arguments."""
TAKES_MASKS = {aten.index.Tensor: 1, aten.index_put.default: 1, aten.index_put_.default: 1}
"""Operations that wait where one of the indices, at this place of the arguments, is a bool mask."""

waits: Counter[str] = Counter()
"""How often the host would have waited, by reason, since `watching` began."""


class PretendedTensor(Tensor):
    """A tensor that says it is on CUDA."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> PretendedTensor:
        assert type(real) is Tensor, type(real)
        made = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=real.device,
            requires_grad=False,
        )
        made.held = real
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    is_cuda = True
    is_cpu = False

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        _check_devices(func, args, kwargs)
        _count_waits(func, args)
        inner = tree_map_only(PretendedTensor, lambda tensor: tensor.held, (args, kwargs))
        # As in tensors' own printing and fake tensors: what was made of device tensors is on the device.
        out = tree_map_only(Tensor, PretendedTensor, func(*inner[0], **inner[1]))
        return return_and_correct_aliasing(func, args, kwargs, out)


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    leaves = tree_leaves((args, kwargs))
    if func in TAKES_MASKS or func is aten.copy_.default:
        # A GPU takes indices from the CPU, and copies from there: counted and not refused.
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is Tensor and leaf.ndim]
        waits["copy to the device"] += len(found)
        return
    for leaf in leaves:
        # A single number of the CPU is taken along by value, as on a GPU.
        if isinstance(leaf, Tensor) and not isinstance(leaf, PretendedTensor) and leaf.ndim:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {CUDA} and cpu in {func} "
                f"(a {list(leaf.shape)} of {leaf.dtype} is on the CPU)"
            )


def _count_waits(func: Any, args: Any) -> None:
    if func in WAITS:
        waits[WAITS[func]] += 1
    if func in TAKES_MASKS:
        indices = args[TAKES_MASKS[func]]
        if any(index is not None and index.dtype == torch.bool for index in indices):
            waits["mask as index"] += 1


class _InBackward(TorchDispatchMode):
    """Puts the zeros that autograd makes in place of gradients that are not there where a GPU would have them.

    Autograd makes them in C++, by the device that it believes a tensor to be on: that of the tensor it holds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made_of_none = not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        return PretendedTensor(out) if made_of_none and type(out) is Tensor and out.ndim else out


class _Placing(TorchFunctionMode):
    """Makes what is made with device="cuda" a pretended tensor, and moves tensors between the two.

    On a level above the dispatcher, where a build of PyTorch without CUDA would refuse the device's name.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], PretendedTensor):
            waits["tolist"] += 1
            return args[0].held.tolist()
        if func is Tensor.cuda:
            return to_device(args[0])
        if func is Tensor.cpu:
            return to_cpu(args[0])
        if func is Tensor.numpy and isinstance(args[0], PretendedTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.backward:
            with _InBackward():
                return func(*args, **kwargs)
        wanted, args = _take_device(func, args, kwargs)
        if wanted is None:
            return func(*args, **kwargs)
        if func is Tensor.to:
            moved = to_device(args[0]) if wanted.type == "cuda" else to_cpu(args[0])
            return func(moved, *args[1:], **kwargs) if args[1:] or kwargs else moved
        if func in (torch.tensor, torch.as_tensor) and wanted.type == "cuda":
            if args and isinstance(args[0], PretendedTensor):
                return func(*args, **kwargs)
            waits["copy to the device"] += 1
        first = args[0] if args else None
        made = func(*tree_map_only(PretendedTensor, lambda tensor: tensor.held, args), **kwargs, device="cpu")
        stays = wanted.type == "cuda" or (isinstance(first, PretendedTensor) and wanted.type == "cuda")
        return PretendedTensor(made.detach()) if stays and type(made) is Tensor else made


def _take_device(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[torch.device | None, Any]:
    """The device that is asked for, taken out of the arguments."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs.pop("device")), args
    kwargs.pop("device", None)
    if func is Tensor.to and len(args) > 1:
        asked = args[1]
        if isinstance(asked, str | torch.device):
            return torch.device(asked), (args[0], *args[2:])
        if isinstance(asked, Tensor):
            return asked.device, (args[0], asked.dtype, *args[2:])
    return None, args


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return PretendedTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.held if isinstance(grad, PretendedTensor) else grad


def to_device(tensor: Tensor) -> Tensor:
    """The tensor on the pretended device."""
    if isinstance(tensor, PretendedTensor):
        return tensor
    waits["copy to the device"] += 1
    return _ToDevice.apply(tensor) if tensor.requires_grad else PretendedTensor(tensor.detach().clone())


def to_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU."""
    if not isinstance(tensor, PretendedTensor):
        return tensor
    waits["copy to the host"] += 1
    return tensor.held.clone()


def pretend_(module: nn.Module) -> None:
    """Move a module's parameters and buffers to the pretended device; who holds them goes on holding them."""
    for parameter in module.parameters():
        moved = nn.Parameter(PretendedTensor(parameter.data), requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, moved)
    for buffer in module.buffers():
        if not isinstance(buffer, PretendedTensor):
            torch.utils.swap_tensors(buffer, PretendedTensor(buffer.data))


@contextlib.contextmanager
def watching() -> Iterator[Counter[str]]:
    """Inside, "cuda" is the pretended device; gives what the host would have waited for so far."""
    waits.clear()
    generator = torch.Generator

    def on_cpu(device: object = None) -> torch.Generator:
        return generator()

    # A build of PyTorch without CUDA makes no generator there; the numbers are drawn on the CPU in any case.
    with _Placing(), mock.patch.object(torch, "Generator", on_cpu):
        yield waits


def all_pretended(tensors: Iterable[object]) -> bool:
    """Whether every tensor among the objects is on the pretended device."""
    return all(isinstance(tensor, PretendedTensor) for tensor in tensors if isinstance(tensor, Tensor))
