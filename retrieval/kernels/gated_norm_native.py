"""`gated_norm` on a CPU in C++ (`gated_norm_native.cpp`): float32 arithmetic, one pass over each row, mask included."""

import ctypes

import torch
from torch import Tensor

from retrieval.kernels.gated_norm_reference import EPS, drop_threshold
from retrieval.kernels.native import library

__all__ = ["available", "backward", "forward"]


class _Problem(ctypes.Structure):
    """`struct GatedNorm` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("x", "u", "dy")),
        *((name, ctypes.c_int64) for name in ("x_row", "u_row", "dy_row", "threads")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("dropped", "threshold")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
    )


def available(dtype: torch.dtype) -> bool:
    """Whether the compiled library is here and does this type."""
    return dtype != torch.float64 and library() is not None


def _rows(x: Tensor) -> Tensor:
    """Contiguous rows of float32."""
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _problem(x: Tensor, u: Tensor, dy: Tensor | None, seed: Tensor, p: float) -> _Problem:
    threshold, scale = drop_threshold(p) if p > 0 else (0, 1.0)
    return _Problem(
        rows=len(x),
        columns=x.shape[1],
        x=x.data_ptr(),
        u=u.data_ptr(),
        dy=None if dy is None else dy.data_ptr(),
        x_row=x.stride(0),
        u_row=u.stride(0),
        dy_row=0 if dy is None else dy.stride(0),
        threads=torch.get_num_threads(),
        seed=int(seed) % 2**64,
        dropped=int(p > 0),
        threshold=threshold,
        scale=scale,
        eps=EPS,
    )


def _run(name: str, problem: _Problem, *tensors: Tensor) -> None:
    native = library()
    assert native is not None
    getattr(native, name)(ctypes.byref(problem), *(ctypes.c_void_p(x.data_ptr()) for x in tensors))


def forward(x: Tensor, u: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[T, C]`, mean and 1/σ `[T, 1]`; see `gated_norm`."""
    out, mean, rstd = torch.empty(x.shape), torch.empty(len(x), 1), torch.empty(len(x), 1)
    rows, gates = _rows(x), _rows(u)
    _run("gated_norm_forward", _problem(rows, gates, None, seed, p), out, mean, rstd)
    return out.to(x.dtype), mean, rstd


def backward(
    dy: Tensor, x: Tensor, u: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and u `[T, C]`; see `gated_norm`."""
    dx, du = torch.empty(x.shape), torch.empty(x.shape)
    rows, gates, grads = _rows(x), _rows(u), _rows(dy)
    _run("gated_norm_backward", _problem(rows, gates, grads, seed, p), mean.contiguous(), rstd.contiguous(), dx, du)
    return dx.to(x.dtype), du.to(x.dtype)
