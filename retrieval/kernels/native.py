"""C++ parts of the CPU backend. Without them it computes the same in torch operations, which takes longer."""

import ctypes
from functools import cache
from pathlib import Path

from retrieval.native import compiled

__all__ = ["library"]

_FOLDER = Path(__file__).parent
_NAMES = ("gated_norm", "hstu_attention", "hstu_last", "softmax_loss")
_SOURCES = tuple(_FOLDER / f"{name}_native.cpp" for name in _NAMES)
_HEADERS = (_FOLDER / "hstu_attention_native.h", _FOLDER / "native_vectors.h")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be had or is not wanted."""
    return compiled(
        "kernels", _SOURCES, "kernels on the CPU run in torch operations, about twice as slow", headers=_HEADERS
    )
