"""torch.compile of a model's body: in teacher-forced passes, in the decode step, or in both.

What is compiled is the body with this project's attention inside, as one graph. It is compiled at the first pass, for
tens of seconds, and again when shapes turn out to vary. The numbers are those of the same sums in another order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

Compile = Literal["none", "update", "decode", "all"]
"""Which passes are compiled: those of the update, the decode step, or both."""
BACKEND = "inductor"


def of_update(which: Compile) -> bool:
    """Whether the passes of the update are compiled."""
    return which in ("update", "all")


def of_decode(which: Compile) -> bool:
    """Whether the decode step is compiled."""
    return which in ("decode", "all")


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled when it is first called."""
    compiled_function = torch.compile(function, backend=BACKEND)

    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # PyTorch looks at .grad of all that it is given, also of what has none: keys that were just computed.
            warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf Tensor")
            return compiled_function(*args, **kwargs)

    return run


@functools.cache
def require_compiler(device: str) -> None:
    """Compile something small, so that a missing compiler is found before long work.

    Args:
        device: its type, "cpu" or "cuda".

    Raises:
        ValueError: it failed, with the reason and what is needed.
    """
    needed = "a C++ compiler (g++, or CXX names one)" if device == "cpu" else "Triton and a C compiler"
    try:
        torch.compile(_small, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:
        # Whatever a compiler raises. Its words are long: the first lines say what failed.
        reason = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        raise ValueError(
            f"compile needs {needed} on the device {device!r}, and a first try failed: {reason}; "
            'compile="none" does without'
        ) from error


def _small(x: torch.Tensor) -> torch.Tensor:
    return (2 * x).relu()
