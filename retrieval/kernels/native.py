"""C++ parts of the CPU backend. Without them it computes the same in torch operations, which takes longer."""

import ctypes
from functools import cache
from pathlib import Path

from retrieval.native import compiled

__all__ = ["library"]

_SOURCES = tuple(
    Path(__file__).parent / f"{name}_native.cpp" for name in ("gated_norm", "hstu_attention", "softmax_loss")
)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be had or is not wanted."""
    return compiled("kernels", _SOURCES, "kernels on the CPU run in torch operations, about twice as slow")
