# mypy: disable-error-code="no-untyped-def"
"""Parts that the Triton kernels of HSTU attention share: finding a program's row, ranges of blocks, one tile's scores.

Programs are laid out without padding and without a look at the lengths on the host: row b owns the block numbers from
`offsets[b] // BLOCK + b` up to the next row's, which are at least ⌈N_b / BLOCK⌉ and at most one more. T // BLOCK + B
programs therefore cover every batch, one row of 16k among short ones as well as any other.

A tile is BLOCK_M queries by BLOCK_N keys. Indices past a row's end are clamped to its last token, so that loads need
no masks but for the width; what is past the end is masked in the scores.

Legend: M queries and N keys of a tile, D query/key width, V value width.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retrieval.kernels.backend import interpreting

__all__ = [
    "Batch",
    "Heads",
    "bucket_of",
    "find_block",
    "history_of",
    "key_ranges",
    "load_block",
    "load_times",
    "product",
    "query_ranges",
    "row_scale",
    "store_block",
    "tile_scores",
    "tile_slopes",
    "tile_visible",
]

# 1 / (0.301 · log2 e): buckets per factor of two.
_BUCKETS_PER_OCTAVE = tl.constexpr(2.302814553355632)
_LAST_BUCKET = tl.constexpr(128)
# The interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same.
_WIDEN = tl.constexpr(interpreting())


class Batch(NamedTuple):
    """What every kernel is told of the batch; see `hstu_attention` for the tensors.

    A table that is absent, and `num_targets` where there are none, are pointers that no kernel follows.
    """

    pos_table: Any
    time_table: Any
    edges: Any
    offsets: Any
    timestamps: Any
    query_times: Any
    num_targets: Any
    num_rows: Any
    num_positions: Any
    alpha: Any
    inverse_norm: Any
    window: Any
    contextual: Any


class Heads(NamedTuple):
    """A tensor `[T, H, width]` with its strides over tokens and over heads; that over the width is 1."""

    data: Any
    token: Any
    head: Any


@triton.jit
def find_block(batch, program, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr):
    """The program's row, the row's first token and length, and the first place of the program's block in it."""
    row = -1
    for b0 in range(0, batch.num_rows, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        owned = tl.load(batch.offsets + b, mask=b < batch.num_rows, other=0) // BLOCK + b
        row += tl.sum(((owned <= program) & (b < batch.num_rows)).to(tl.int32), 0)
    start = tl.load(batch.offsets + row)
    length = (tl.load(batch.offsets + row + 1) - start).to(tl.int32)
    place = (program - (start // BLOCK + row)).to(tl.int32) * BLOCK
    return row, start, length, place


@triton.jit
def history_of(batch, row, length, TARGETS: tl.constexpr):
    """Tokens of a row before its targets."""
    history = length
    if TARGETS:
        history = (length - tl.load(batch.num_targets + row)).to(tl.int32)
    return history


@triton.jit
def product(a, b):
    """Matrix product with float32 sums; float32 operands are multiplied as such, not as TF32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_block(x, head, start, place, length, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`[SIZE, BLOCK]` of one of the `Heads` from a row's place on: zero past WIDTH, the last token past the end.

    Only the block's base is a 64-bit sum: offsets within a block are small, and cost half the registers.
    """
    token = tl.minimum(tl.arange(0, SIZE), length - 1 - place)
    d = tl.arange(0, BLOCK)
    base = (x.data + head * x.head) + (start + place) * x.token
    return tl.load(base + (token[:, None] * x.token + d[None, :]), mask=d[None, :] < WIDTH, other=0.0)


@triton.jit
def load_times(x, start, place, length, SIZE: tl.constexpr):
    """Times of the same tokens as `load_block`, int64 `[SIZE]`."""
    return tl.load(x + (start + place) + tl.minimum(tl.arange(0, SIZE), length - 1 - place))


@triton.jit
def key_ranges(batch, m0, length, history, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that queries m0 … m0 + BLOCK_M − 1 may see, as two runs of blocks: a place and a count each."""
    prefix = tl.minimum(batch.contextual, history)
    shift = tl.maximum(prefix - 1, 0)
    place = tl.minimum(m0, history)
    low = tl.where(place - shift < batch.window, 0, place - batch.window + 1) // BLOCK_N * BLOCK_N
    high = tl.minimum(m0 + BLOCK_M, length)
    high = tl.where(m0 < prefix, tl.maximum(high, history), high)
    # Targets before this block are seen by none of it.
    first_end = tl.where(m0 >= history, tl.minimum(history, high), high)
    first = tl.maximum(tl.cdiv(first_end - low, BLOCK_N), 0)
    own = tl.maximum(m0 // BLOCK_N * BLOCK_N, low + first * BLOCK_N)
    second = tl.where(m0 >= history, tl.maximum(tl.cdiv(high - own, BLOCK_N), 0), 0)
    return low, first, own, second


@triton.jit
def query_ranges(batch, n0, length, history, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries that may see keys n0 … n0 + BLOCK_N − 1, as two runs of blocks, as `key_ranges`."""
    prefix = tl.minimum(batch.contextual, history)
    shift = tl.maximum(prefix - 1, 0)
    # The prefix sees the whole history.
    first = tl.where(n0 < history, tl.cdiv(prefix, BLOCK_M), 0)
    own = tl.maximum(n0 // BLOCK_M * BLOCK_M, first * BLOCK_M)
    bound = n0 + BLOCK_N - 1 + batch.window
    bound = tl.where(n0 < prefix, tl.maximum(bound, batch.window + shift), bound)
    high = tl.where(bound > history, length, bound)
    high = tl.where(n0 >= history, tl.minimum(n0 + BLOCK_N, length), high)
    second = tl.maximum(tl.cdiv(tl.minimum(high, length) - own, BLOCK_M), 0)
    return 0, first, own, second


@triton.jit
def tile_visible(batch, m, n, length, history):
    """Whether queries at places m see keys at places n, bool `[M, N]`; nothing past the row's end."""
    prefix = tl.minimum(batch.contextual, history)
    shift = tl.maximum(prefix - 1, 0)
    rank_m = tl.maximum(tl.minimum(m, history) - shift, 0)
    rank_n = tl.maximum(tl.minimum(n, history) - shift, 0)
    gap = rank_m[:, None] - rank_n[None, :]
    seen = ((gap > 0) & (gap < batch.window)) | (m[:, None] == n[None, :])
    seen = seen | ((m < prefix)[:, None] & (n < history)[None, :])
    return seen & (m < length)[:, None] & (n < length)[None, :]


@triton.jit
def visible_counts(batch, m, history):
    """How many keys the places m see; `visible_counts` of the reference."""
    prefix = tl.minimum(batch.contextual, history)
    place = tl.minimum(m, history)
    plain = tl.minimum(place - prefix + 1, batch.window)
    count = plain + tl.where(place - tl.maximum(prefix - 1, 0) < batch.window, prefix, 0)
    return tl.where(m < prefix, history, count)


@triton.jit
def row_scale(batch, m, history, COUNT: tl.constexpr):
    """1/c of the places m, float32 `[M]`."""
    if COUNT:
        return 1.0 / visible_counts(batch, m, history).to(tl.float32)
    else:
        return tl.zeros_like(m).to(tl.float32) + batch.inverse_norm


@triton.jit
def bucket_of(size, edges):
    """`time_bucket` of non-negative int64 seconds.

    A float32 logarithm, made a little too small, is right or one too low; one integer comparison settles which.
    """
    octaves = tl.log2(tl.maximum(size, 1).to(tl.float32))
    bucket = tl.minimum((octaves * _BUCKETS_PER_OCTAVE - 0.01).to(tl.int32), _LAST_BUCKET - 1)
    return bucket + (size >= tl.load(edges + bucket + 1)).to(tl.int32)


@triton.jit
def tile_buckets(batch, tq_M, t_N):
    """Exact time bucket of each pair, int32 `[M, N]`, with the least and the greatest of the tile.

    Where times are sorted, most tiles away from the diagonal give each query one bucket for all keys: that of its
    nearest and of its farthest key. Only other tiles take a logarithm per pair. Right for times in any order.
    """
    earliest, latest = tl.min(t_N, 0), tl.max(t_N, 0)
    to_latest, to_earliest = tq_M - latest, tq_M - earliest
    nearest = tl.where(to_latest > 0, to_latest, tl.where(to_earliest < 0, -to_earliest, 0))
    first_M = bucket_of(nearest, batch.edges)
    last_M = bucket_of(tl.maximum(tl.abs(to_latest), tl.abs(to_earliest)), batch.edges)
    bucket_MN = tl.zeros([tq_M.shape[0], t_N.shape[0]], tl.int32) + first_M[:, None]
    if tl.max(last_M - first_M, 0) > 0:
        bucket_MN = bucket_of(tl.abs(tq_M[:, None] - t_N[None, :]), batch.edges)
    return bucket_MN, tl.min(first_M, 0), tl.max(last_M, 0)


@triton.jit
def tile_scores(batch, q_MD, k_ND, m, n, tq_M, t_N, history, POS: tl.constexpr, TIME: tl.constexpr):
    """Scores with both biases, float32, the time buckets, both `[M, N]`, and the tile's least and greatest bucket."""
    score_MN = product(q_MD, tl.trans(k_ND)) * batch.alpha
    bucket_MN = tl.zeros_like(score_MN).to(tl.int32)
    low = 0
    high = -1
    if POS:
        distance = tl.abs(tl.minimum(m, history)[:, None] - tl.minimum(n, history)[None, :])
        score_MN += tl.load(batch.pos_table + tl.minimum(distance, batch.num_positions - 1)).to(tl.float32)
    if TIME:
        # Looked up per pair: a bias taken inside the branch of `tile_buckets` costs registers, and spills.
        bucket_MN, low, high = tile_buckets(batch, tq_M, t_N)
        score_MN += tl.load(batch.time_table + bucket_MN).to(tl.float32)
    return score_MN, bucket_MN, low, high


@triton.jit
def tile_slopes(score_MN, dvalue_MN, scale_M, seen_MN):
    """Backward of a tile: the scores' gradients, and the attention that values are weighted with, float32 `[M, N]`.

    With A = SiLU(s) / c: dL/ds = dL/dA · 1/c · σ(s)·(1 + s·(1 − σ(s))).
    """
    gate_MN = tl.sigmoid(score_MN)
    value_MN = score_MN * gate_MN
    slope_MN = gate_MN + value_MN * (1.0 - gate_MN)
    dscore_MN = tl.where(seen_MN, dvalue_MN * scale_M[:, None] * slope_MN, 0.0)
    return dscore_MN, tl.where(seen_MN, value_MN * scale_M[:, None], 0.0)


@triton.jit
def store_block(
    x, value, start, place, length, token_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Counterpart of `load_block`; nothing past the row's end is written."""
    token = tl.arange(0, SIZE)
    d = tl.arange(0, BLOCK)
    base = x + (start + place) * token_stride
    inside = (place + token < length)[:, None] & (d < WIDTH)[None, :]
    tl.store(base + (token[:, None] * token_stride + d[None, :]), value.to(x.dtype.element_ty), mask=inside)
