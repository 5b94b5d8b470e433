"""HSTU's attention for few queries against many keys: the last position at inference, targets against a cached prefix.

    out_m = 1/c_m · Σ_{j < L, j ≤ i_m} SiLU(α q_m·k_j + pos[i_m − j] + time[bucket(tq_m − t_j)]) · v_j

within each row of the batch. i_m is the position of query m in its row; it may lie behind the row's L keys, as that
of a target whose own key is not in the cache. c_m is a constant, or the number of visible keys. A row of
`hstu_attention` is the query with i_m its own position (arXiv 2402.17152, equation 2 and section 3.2).

Legend: B rows, M queries per row, T keys in the batch, L keys of a row, H heads, D query/key width, V value width,
P positions of the table.
"""

import torch
from torch import Tensor

from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.hstu_decode_cpu import decode_cpu
from retrieval.kernels.hstu_decode_reference import hstu_decode_reference
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS

__all__ = ["hstu_decode"]


def hstu_decode(
    q_BMHD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times_BM: Tensor,
    query_positions_BM: Tensor,
    *,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    norm: float | None,
    alpha: float = 1.0,
    max_length: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of every query to the keys of its row (formula above). Inference only.

    Args:
        q_BMHD: queries `[B, M, H, D]`; bfloat16, float16 or float32, computed in float32 (float64 in itself, not by
            Triton).
        k_THD: keys `[T, H, D]`; tokens may be strided, as a slice of a wider projection is.
        v_THV: values `[T, H, V]`, likewise.
        offsets: row b holds keys `offsets[b]:offsets[b + 1]`, int64 `[B + 1]`.
        timestamps: time of each key in seconds, int64 `[T]`.
        query_times_BM: time of each query in seconds, int64 `[B, M]`.
        query_positions_BM: position of each query in its row, int64 `[B, M]`; below P where there is a position table.
        pos_table: bias of distance i − j, `[P]`, shared by heads; None for no such bias.
        time_table: bias of time bucket, `[129]`, shared by heads; None for no such bias.
        norm: the constant c; None divides by the number of visible keys.
        alpha: factor on q·k.
        max_length: length of the longest row, or more, for Triton's grid. None reads it from the offsets, which waits
            for a GPU unless they are on the CPU.
        backend: see `kernels.backend`.

    Returns:
        `[B, M, H, V]`; zero for a query without visible keys.

    Raises:
        ValueError: shapes or dtypes do not fit each other, an input wants a gradient, or (on the CPU) a position lies
            outside the table. On a GPU such a query's output is NaN, since a check would have to wait for it.
    """
    tensors = (q_BMHD, k_THD, v_THV, offsets, timestamps, query_times_BM, query_positions_BM, pos_table, time_table)
    _check(*tensors)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError("hstu_decode: has no gradient; call it under torch.no_grad() or torch.inference_mode()")
    chosen = resolve_backend(backend, q_BMHD.device)
    if chosen == "triton" and q_BMHD.dtype == torch.float64:
        raise ValueError("hstu_decode: backend 'triton' does not take float64")
    if chosen == "reference":
        return hstu_decode_reference(*tensors, norm=norm, alpha=alpha)
    out: Tensor = _decode(*tensors, norm, alpha, max_length, chosen)
    return out


@torch.library.custom_op("retrieval::hstu_decode", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    query_positions: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    norm: float | None,
    alpha: float,
    max_length: int | None,
    backend: str,
) -> Tensor:
    tensors = (q, k, v, offsets, timestamps, query_times, query_positions, pos_table, time_table)
    if backend == "triton":
        from retrieval.kernels.hstu_decode_triton import decode_triton

        return decode_triton(*tensors, norm=norm, alpha=alpha, max_length=max_length)
    if pos_table is not None and query_positions.numel() and int(query_positions.max()) >= pos_table.shape[0]:
        raise ValueError(
            f"hstu_decode: position {int(query_positions.max())} is outside a table of {pos_table.shape[0]}"
        )
    return decode_cpu(*tensors, norm=norm, alpha=alpha)


@_decode.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    query_positions: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
    norm: float | None,
    alpha: float,
    max_length: int | None,
    backend: str,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[2])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    timestamps: Tensor,
    query_times: Tensor,
    query_positions: Tensor,
    pos_table: Tensor | None,
    time_table: Tensor | None,
) -> None:
    if q.ndim != 4 or k.ndim != 3 or v.ndim != 3 or k.shape[1:] != q.shape[2:] or v.shape[:2] != k.shape[:2]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"hstu_decode: {shapes} do not fit each other")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"hstu_decode: q {q.dtype}, k {k.dtype}, v {v.dtype} are not of one floating dtype")
    whole: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "offsets": (offsets, (q.shape[0] + 1,)),
        "timestamps": (timestamps, (k.shape[0],)),
    }
    whole |= {"query_times": (query_times, q.shape[:2]), "query_positions": (query_positions, q.shape[:2])}
    for name, (tensor, shape) in whole.items():
        if tensor.shape != shape or tensor.dtype != torch.int64:
            raise ValueError(f"hstu_decode: {name} {tuple(tensor.shape)} {tensor.dtype} is not {tuple(shape)} int64")
    if pos_table is not None and (pos_table.ndim != 1 or pos_table.shape[0] == 0):
        raise ValueError(f"hstu_decode: pos_table {tuple(pos_table.shape)} is not one row of biases")
    if time_table is not None and time_table.shape != (NUM_TIME_BUCKETS,):
        raise ValueError(f"hstu_decode: time_table {tuple(time_table.shape)} is not ({NUM_TIME_BUCKETS},)")
