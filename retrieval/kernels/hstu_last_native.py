"""`hstu_last` on a CPU in C++ (`hstu_last_native.cpp`): float32 arithmetic, one row through all layers at a time."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from retrieval.kernels.gated_norm_reference import EPS
from retrieval.kernels.hstu_last_reference import LayerWeights
from retrieval.kernels.native import library
from retrieval.kernels.time_bucket import bucket_edges

__all__ = ["available", "hstu_last_native"]


class _Layer(ctypes.Structure):
    """`struct Layer` of the C++ source."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("uvqk", "weight", "bias", "pos", "time"))


class _Stack(ctypes.Structure):
    """`struct Stack` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "heads", "query_width", "value_width", "layers")),
        *((name, ctypes.c_void_p) for name in ("layer", "offsets", "x", "times", "query_times", "edges")),
        ("threads", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("norm", "eps")),
    )


def available() -> bool:
    """Whether this machine has the compiled library."""
    return library() is not None


def hstu_last_native(
    x_TD: Tensor,
    layers: Sequence[LayerWeights],
    where: tuple[Tensor, Tensor, Tensor],
    *,
    heads: int,
    qk_dim: int,
    v_dim: int,
    norm: float | None,
) -> Tensor:
    """See `hstu_last`; float32 tensors on the CPU."""
    native = library()
    assert native is not None
    edges = bucket_edges(torch.device("cpu"))
    inputs = [x.contiguous() for x in (x_TD, *where)]
    weights = [[None if x is None else x.detach().contiguous() for x in layer] for layer in layers]
    pointers = (_Layer * len(weights))(
        *(_Layer(*(None if x is None else x.data_ptr() for x in layer)) for layer in weights)
    )
    x, offsets, times, query_times = (tensor.data_ptr() for tensor in inputs)
    stack = _Stack(
        rows=len(where[0]) - 1,
        width=x_TD.shape[1],
        heads=heads,
        query_width=qk_dim,
        value_width=v_dim,
        layers=len(weights),
        layer=ctypes.addressof(pointers),
        offsets=offsets,
        x=x,
        times=times,
        query_times=query_times,
        edges=edges.data_ptr(),
        threads=torch.get_num_threads(),
        norm=norm or 0.0,
        eps=EPS,
    )
    out = torch.empty(stack.rows, stack.width)
    native.hstu_last(ctypes.byref(stack), ctypes.c_void_p(out.data_ptr()))
    return out
