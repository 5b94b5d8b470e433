"""`softmax_loss` as two Triton kernels: losses with the users' gradient, and the items' gradient.

Users: a program owns a tile of users and runs over all tiles of items, as flash attention does over keys; here the
keys are the values too, so that one tile in shared memory serves both products. What it accumulates, Σ_r p_tr e_r,
is the users' gradient but for a factor. It keeps a running maximum and sum (Milakov, Gimelshein: "Online normalizer
calculation for softmax", arXiv 1805.02867).

Items: a program owns a tile of items and runs over the users, computing the logits again. Few items (sampled
negatives) would leave most of a GPU idle, so the users are split into parts whose sums go to a buffer of their own and
are added up afterwards. No atomics: the same inputs give the same bits, on the same GPU model.

Widths are padded outside, with zeros, to the power of two that a tile has anyway: rows of 50 bfloat16 are neither
aligned for 16-byte copies nor free of masks. Logits are in units of log 2. Launch configurations are unmeasured on
GPUs.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.backend import interpreting

__all__ = ["aot_cases", "forward_triton", "launch_config", "user_parts"]

_LOG2E = math.log2(math.e)
# Rows of the tile that stays (users, or items) and of the one that moves, warps and stages; by kind of
# product and padded width, 64 standing for the smaller ones. Chosen by what compiles without spills for sm_80: the tile
# that stays is large, since all the others are read again for each, and float32 without tensor cores keeps its operands
# in registers.
_TILES = {
    "half": {64: (128, 64, 8, 3), 128: (128, 32, 8, 2), 256: (64, 32, 4, 2)},
    "tf32": {64: (128, 32, 8, 2), 128: (64, 32, 8, 2), 256: (64, 16, 8, 2)},
    "ieee": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
}
_PRECISION = {"half": "ieee", "tf32": "tf32", "ieee": "ieee"}
# Where a GPU's number of multiprocessors is not to be had, under the interpreter.
_PROCESSORS_ELSEWHERE = 2


@triton.jit
def _load_rows(base, start, end, ROWS: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows from `start`, zeros from `end`. Only the tile's start needs 64 bits: addresses in it are a constant away."""
    row = tl.arange(0, ROWS)[:, None]
    tile = base + tl.cast(start, tl.int64) * BD
    return tl.load(tile + (row * BD + tl.arange(0, BD)[None, :]), mask=row < end - start, other=0.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """a·b + acc. The interpreter cannot multiply bfloat16; in float32 the products are the same."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _users_kernel(  # type: ignore[no-untyped-def]
    users_ptr,
    items_ptr,
    positive_ptr,
    bias_ptr,
    first_ptr,
    last_ptr,
    excess_ptr,
    mean_ptr,
    num_users,
    num_items,
    scale,
    WITH_MEAN: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    real = t < num_users
    u = _load_rows(users_ptr, tl.program_id(0) * BT, num_users, BT, BD)
    first = tl.load(first_ptr + t, mask=real, other=0)
    last = tl.load(last_ptr + t, mask=real, other=0)
    # Finite, so that a position that leaves out all of the first tiles subtracts no infinity from another. The
    # positive comes last: beside a large one small probabilities would be lost to float16.
    top = tl.full([BT], -1e30, tl.float32)
    total = tl.zeros([BT], tl.float32)
    acc = tl.zeros([BT, BD], tl.float32)

    for start in range(0, num_items, BR):
        column = start + tl.arange(0, BR)
        inside = column < num_items
        e = _load_rows(items_ptr, start, num_items, BR, BD)
        s = _dot(u, tl.trans(e), tl.zeros([BT, BR], tl.float32), PRECISION, INTERPRETED) * scale
        left_out = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
        if WITH_BIAS:
            s += tl.load(bias_ptr + column, mask=inside, other=0.0)[None, :]
        s = tl.where(inside[None, :] & (left_out == 0), s, float("-inf"))
        risen = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - risen)
        p = tl.exp2(s - risen[:, None])
        total = total * decay + tl.sum(p, 1)
        if WITH_MEAN:
            acc = _dot(p.to(e.dtype), e, acc * decay[:, None], PRECISION, INTERPRETED)
        top = risen

    positive = tl.load(positive_ptr + t, mask=real, other=0.0)
    # With nothing to sum, `top` alone is what minus infinity should be.
    excess = top - positive + tl.log2(tl.maximum(total, 1e-30))
    tl.store(excess_ptr + t, excess, mask=real)
    if WITH_MEAN:
        loss = tl.maximum(excess, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(excess)))
        mean = (acc * tl.exp2(top - positive - loss)[:, None]).to(mean_ptr.dtype.element_ty)
        at = t[:, None].to(tl.int64) * BD + tl.arange(0, BD)[None, :]
        tl.store(mean_ptr + at, mean, mask=real[:, None])


@triton.jit
def _items_kernel(  # type: ignore[no-untyped-def]
    users_ptr,
    items_ptr,
    weight_ptr,
    lse_ptr,
    bias_ptr,
    first_ptr,
    last_ptr,
    partial_ptr,
    num_users,
    num_items,
    users_per_part,
    scale,
    WITH_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    column = tl.program_id(0) * BR + tl.arange(0, BR)
    part = tl.program_id(1)
    inside = column < num_items
    e = _load_rows(items_ptr, tl.program_id(0) * BR, num_items, BR, BD)
    acc = tl.zeros([BR, BD], tl.float32)
    if WITH_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0)

    begin = part * users_per_part
    end = tl.minimum(begin + users_per_part, num_users)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        real = t < end
        u = _load_rows(users_ptr, start, end, BT, BD)
        lse = tl.load(lse_ptr + t, mask=real, other=0.0)
        # Zero past the end: such users, whose logits are 0, add nothing.
        weight = tl.load(weight_ptr + t, mask=real, other=0.0)
        first = tl.load(first_ptr + t, mask=real, other=0)
        last = tl.load(last_ptr + t, mask=real, other=0)
        s = _dot(e, tl.trans(u), tl.zeros([BR, BT], tl.float32), PRECISION, INTERPRETED) * scale
        left_out = (column[:, None] >= first[None, :]) & (column[:, None] < last[None, :])
        if WITH_BIAS:
            s += bias[:, None]
        s = tl.where(inside[:, None] & (left_out == 0), s - lse[None, :], float("-inf"))
        p = tl.exp2(s) * weight[None, :]
        acc = _dot(p.to(u.dtype), u, acc, PRECISION, INTERPRETED)

    row = part.to(tl.int64) * num_items + column
    tl.store(partial_ptr + row[:, None] * BD + tl.arange(0, BD)[None, :], acc, mask=inside[:, None])


def launch_config(width: int, product: str, *, of_items: bool) -> tuple[int, int, int, int]:
    """Users per tile, items per tile, warps and stages of loads in flight, for a padded width. Unmeasured on GPUs."""
    kept, moving, warps, stages = _TILES[product][max(64, width)]
    return (moving, kept, warps, stages) if of_items else (kept, moving, warps, stages)


def user_parts(users: int, items: int, users_per_tile: int, items_per_tile: int, processors: int) -> tuple[int, int]:
    """Parts that the items' kernel splits the users into, and users of a part: two programs per multiprocessor."""
    tiles = -(-users // users_per_tile)
    wanted = max(1, 2 * processors // -(-items // items_per_tile))
    tiles_per_part = -(-tiles // min(wanted, tiles))
    return -(-tiles // tiles_per_part), tiles_per_part * users_per_tile


def forward_triton(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    bias: Tensor,
    first: Tensor,
    last: Tensor,
    weights: Tensor,
    scale: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[T]`, Σ_r p_tr e_r `[T, D]` and Σ_t w_t p_tr u_t `[R, D]`; see `softmax_loss`."""
    width = users.shape[1]
    u, e, bias, first, last = _padded(users), _padded(items), bias * _LOG2E, first.contiguous(), last.contiguous()
    bt, br, warps, stages = launch_config(u.shape[1], product := _product(users.dtype), of_items=False)
    # How far the negatives' log-sum-exp is above the positive, in units of log 2.
    excess = torch.empty(len(u), dtype=torch.float32, device=users.device)
    mean = torch.empty(len(u) if with_gradients else 0, u.shape[1], dtype=torch.float32, device=users.device)
    if len(u):
        _users_kernel[(triton.cdiv(len(u), bt),)](
            u, e, positive * _LOG2E, bias, first, last, excess, mean,
            len(u), len(e), scale * _LOG2E, WITH_MEAN=with_gradients, WITH_BIAS=bool(bias.numel()),
            PRECISION=_PRECISION[product], INTERPRETED=interpreting(),
            BT=bt, BR=br, BD=u.shape[1], num_warps=warps, num_stages=stages,
        )  # fmt: skip
    losses = torch.logaddexp(excess / _LOG2E, torch.zeros_like(excess))
    shares = mean[:0]
    if with_gradients:
        shares = _shares(u, e, positive + losses, bias, first, last, weights, scale)
    return losses, mean[:, :width].contiguous(), shares[:, :width].contiguous()


def _shares(
    u: Tensor, e: Tensor, lse: Tensor, bias: Tensor, first: Tensor, last: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """Σ_t w_t p_tr u_t of padded users, `[R, D]`; `bias` is in units of log 2."""
    if not len(u) or not len(e):
        return torch.zeros_like(e, dtype=torch.float32)
    bt, br, warps, stages = launch_config(u.shape[1], product := _product(u.dtype), of_items=True)
    parts, users_per_part = user_parts(len(u), len(e), bt, br, _processors(u.device))
    partial = torch.empty(parts, *e.shape, dtype=torch.float32, device=u.device)
    # The products p·weight are rounded to the inputs' dtype: weights of a mean (1/T) and small probabilities would
    # fall below what float16 can hold. Both are lifted here, p by 2¹⁰ to at most 1024, and put back afterwards.
    lift = 10.0 if u.dtype == torch.float16 else 0.0
    largest = weights.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    _items_kernel[(triton.cdiv(len(e), br), parts)](
        u, e, weights / largest, lse * _LOG2E - lift, bias, first, last, partial,
        len(u), len(e), users_per_part, scale * _LOG2E, WITH_BIAS=bool(bias.numel()),
        PRECISION=_PRECISION[product], INTERPRETED=interpreting(),
        BT=bt, BR=br, BD=u.shape[1], num_warps=warps, num_stages=stages,
    )  # fmt: skip
    total = partial.sum(0) if parts > 1 else partial[0]
    return total * (largest * 2.0**-lift)


def _padded(x: Tensor) -> Tensor:
    """Contiguous rows, of a power of two of at least 16 elements."""
    width = max(16, triton.next_power_of_2(x.shape[1]))
    return functional.pad(x, (0, width - x.shape[1])) if width > x.shape[1] else x.contiguous()


def _product(dtype: torch.dtype) -> str:
    """Kind of product: float32 does as torch's own matrix products are told to."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS_ELSEWHERE
    return torch.cuda.get_device_properties(device).multi_processor_count


def aot_cases() -> list[AotCase]:
    """Both kernels at every width that differs in its configuration, with and without TF32."""
    cases = []
    for width, product in [(32, "half"), *((width, kind) for kind, tiles in _TILES.items() for width in tiles)]:
        dtype = "bf16" if product == "half" else "fp32"
        for kernel, of_items in ((_users_kernel, False), (_items_kernel, True)):
            bt, br, warps, stages = launch_config(width, product, of_items=of_items)
            constexprs = {"PRECISION": _PRECISION[product], "INTERPRETED": False, "BT": bt, "BR": br, "BD": width}
            constexprs["WITH_BIAS"] = True
            if not of_items:
                constexprs["WITH_MEAN"] = True
            types = {name: _argument_type(name, dtype, constexprs) for name in kernel.arg_names}
            name = f"{kernel.__name__.strip('_')} D{width} {dtype} {product}"
            options = {"num_warps": warps, "num_stages": stages}
            cases.append(AotCase(name=name, kernel=kernel, signature=types, constexprs=constexprs, **options))
    return cases


def _argument_type(name: str, dtype: str, constexprs: dict[str, object]) -> str:
    if name in constexprs:
        return "constexpr"
    if name in ("users_ptr", "items_ptr"):
        return f"*{dtype}"
    if name in ("first_ptr", "last_ptr"):
        return "*i32"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name == "scale" else "i32"
