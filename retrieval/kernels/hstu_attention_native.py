"""HSTU attention on a CPU in C++ (`hstu_attention_native.cpp`): causal and windowed rows, float32 arithmetic.

Nothing is padded: work is proportional to the pairs that causality and the window leave. Keys before the first and
after the last that a block of 16 queries sees are not touched.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from retrieval.kernels.native import library
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, bucket_edges

__all__ = ["available", "backward", "forward", "time_buckets"]


class _Problem(ctypes.Structure):
    """`struct Problem` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "width", "value_width")),
        *((name, ctypes.c_void_p) for name in ("offsets", "q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_void_p) for name in ("pos", "time", "buckets", "times", "query_times", "edges")),
        *((name, ctypes.c_int64) for name in ("window", "threads")),
        *((name, ctypes.c_float) for name in ("norm", "alpha")),
    )


def available() -> bool:
    """Whether this machine has the compiled library."""
    return library() is not None


@dataclass(frozen=True, slots=True)
class _Call:
    """A problem and the tensors that its pointers point into, which must live as long as it does."""

    problem: _Problem
    tensors: tuple[Tensor | None, ...]


def _call(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None] = (None, None),
    buckets: Tensor | None = None,
    norm: float | None = None,
    alpha: float = 1.0,
    window: int = 1,
) -> _Call:
    q, k, v = (None if x is None else _rows_of_floats(x) for x in (q, k, v))
    pos, time = (None if table is None else table.detach().float().contiguous() for table in tables)
    offsets, times, query_times = (x.cpu().contiguous() for x in where)
    edges = bucket_edges(torch.device("cpu"))
    tensors = {"offsets": offsets, "q": q, "k": k, "v": v, "pos": pos, "time": time, "buckets": buckets}
    tensors |= {"times": times, "query_times": query_times, "edges": edges}
    strides = {
        f"{name}_{what}": x.stride(place)
        for name, x in (("q", q), ("k", k), ("v", v))
        if x is not None
        for place, what in enumerate(("token", "head"))
    }
    problem = _Problem(
        rows=len(offsets) - 1,
        heads=1 if q is None else q.shape[1],
        width=0 if q is None else q.shape[2],
        value_width=0 if v is None else v.shape[2],
        window=window,
        threads=torch.get_num_threads(),
        norm=norm or 0.0,
        alpha=alpha,
        **{name: None if x is None else x.data_ptr() for name, x in tensors.items()},
        **strides,
    )
    return _Call(problem, tuple(tensors.values()))


def _rows_of_floats(x: Tensor) -> Tensor:
    x = x.detach().float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(name: str, call: _Call, *outputs: Tensor | None, longest: int | None = None) -> None:
    native = library()
    assert native is not None
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in outputs]
    lengths = [] if longest is None else [ctypes.c_int64(longest)]
    getattr(native, name)(ctypes.byref(call.problem), *pointers, *lengths)


def time_buckets(where: tuple[Tensor, Tensor, Tensor], pairs: int) -> Tensor:
    """Buckets of all causal pairs, uint8 `[pairs]`: row after row, of each query those of the keys up to itself."""
    out = torch.empty(pairs, dtype=torch.uint8)
    _run("hstu_buckets", _call(None, None, None, where), out)
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    buckets: Tensor | None,
    *,
    norm: float | None,
    alpha: float,
    window: int,
) -> Tensor:
    """`hstu_attention` `[T, H, V]`; `where` is offsets, timestamps and query times, `tables` position and time."""
    out = torch.empty(v.shape, dtype=torch.float32)
    _run("hstu_forward", _call(q, k, v, where, tables, buckets, norm, alpha, window), out)
    return out.to(v.dtype)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None],
    buckets: Tensor | None,
    *,
    norm: float | None,
    alpha: float,
    window: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and of both tables; scores are computed again."""
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    pos, time = tables
    dpos = None if pos is None else torch.zeros(len(pos), dtype=torch.float32)
    dtime = None if time is None else torch.zeros(NUM_TIME_BUCKETS, dtype=torch.float32)
    call = _call(q, k, v, where, tables, buckets, norm, alpha, window)
    _run("hstu_backward", call, dout.float().contiguous(), dq, dk, dv, dpos, dtime, longest=longest)
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        None if dpos is None or pos is None else dpos.to(pos.dtype),
        None if dtime is None or time is None else dtime.to(time.dtype),
    )
