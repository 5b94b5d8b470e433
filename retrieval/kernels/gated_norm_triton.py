# mypy: disable-error-code="no-untyped-def"
"""`gated_norm` as two Triton kernels: one program per few whole rows, each element read once.

Rows are tiles `[R, G, 16]`: the last axis is the 16 elements that share a Philox block, so that the generator runs
once per block (times the threads that the 16 elements are spread over), not once per element. No atomics: every
gradient belongs to one row. Launch configurations are unmeasured on GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase
from retrieval.kernels.gated_norm_reference import EPS, LANES, drop_threshold

__all__ = ["aot_cases", "backward_triton", "forward_triton", "launch_config"]

_ELEMENTS_PER_PROGRAM = 1024


@triton.jit
def _philox(key, block):
    """The four words of Philox4x64-10 at (block, 0, 0, 0) under (key, 0), uint64."""
    c0 = block.to(tl.uint64)
    c1 = c0 * 0
    c2 = c1
    c3 = c1
    k0 = key.to(tl.uint64)
    k1 = k0 * 0
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2E7470EE14C6C93)
        low0 = tl.mul(c0, 0xD2E7470EE14C6C93, sanitize_overflow=False)
        high1 = tl.umulhi(c2, 0xCA5A826395121157)
        low1 = tl.mul(c2, 0xCA5A826395121157, sanitize_overflow=False)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B97F4A7C15, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE8584CAA73B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _keep(seed, row, blocks_per_row, threshold, G: tl.constexpr):
    """True where dropout keeps an element of the tile `[R, G, 16]`."""
    block = row[:, None] * blocks_per_row + tl.arange(0, G)[None, :]
    w0, w1, w2, w3 = _philox(seed, block)
    lane = tl.arange(0, 16)[None, None, :]
    word = lane // 4
    low = tl.where(word == 0, w0[:, :, None], w1[:, :, None])
    high = tl.where(word == 2, w2[:, :, None], w3[:, :, None])
    bits = tl.where(word < 2, low, high) >> ((lane % 4) * 16).to(tl.uint64)
    return bits.to(tl.int16).to(tl.int32) >= threshold


@triton.jit
def _forward_kernel(
    x_ptr,
    u_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    x_stride,
    u_stride,
    threshold,
    scale,
    eps,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, G)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    row_3d = row[:, None, None]
    inside = (row_3d < rows) & (column < columns)
    x = tl.load(x_ptr + row_3d * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row_3d * u_stride + column, mask=inside, other=0.0).to(tl.float32)

    mean = tl.sum(tl.sum(x, 2), 1) / columns
    centred = tl.where(inside, x - mean[:, None, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 2), 1) / columns + eps)
    y = u * centred * rstd[:, None, None]
    if DROPOUT:
        blocks_per_row = (columns + 15) // 16
        y = tl.where(_keep(tl.load(seed_ptr), row, blocks_per_row, threshold, G), y * scale, 0.0)

    tl.store(y_ptr + row_3d * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    u_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    dx_ptr,
    du_ptr,
    rows,
    columns,
    dy_stride,
    x_stride,
    u_stride,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, G)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    row_3d = row[:, None, None]
    inside = (row_3d < rows) & (column < columns)
    grad = tl.load(dy_ptr + row_3d * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        blocks_per_row = (columns + 15) // 16
        grad = tl.where(_keep(tl.load(seed_ptr), row, blocks_per_row, threshold, G), grad * scale, 0.0)
    x = tl.load(x_ptr + row_3d * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row_3d * u_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None, None]
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None, None]

    normed = tl.where(inside, (x - mean) * rstd, 0.0)
    tl.store(du_ptr + row_3d * columns + column, (grad * normed).to(du_ptr.dtype.element_ty), mask=inside)
    h = grad * u
    along_mean = (tl.sum(tl.sum(h, 2), 1) / columns)[:, None, None]
    along_normed = (tl.sum(tl.sum(h * normed, 2), 1) / columns)[:, None, None]
    dx = rstd * (h - along_mean - normed * along_normed)
    tl.store(dx_ptr + row_3d * columns + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def launch_config(columns: int) -> tuple[int, int, int]:
    """Rows per program, blocks of 16 columns (a power of two), and warps. Unmeasured on GPUs."""
    groups = triton.next_power_of_2(-(-columns // LANES))
    width = groups * LANES
    rows = max(1, _ELEMENTS_PER_PROGRAM // width)
    return rows, groups, min(8, max(4, width // 256))


def forward_triton(x: Tensor, u: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1/σ; see `gated_norm`."""
    x, u, seed = _rows_contiguous(x), _rows_contiguous(u), seed.to(x.device)
    rows, columns = x.shape
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    mean = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if rows:
        r, g, warps = launch_config(columns)
        threshold, scale = drop_threshold(p)
        _forward_kernel[(triton.cdiv(rows, r),)](
            x, u, seed, y, mean, rstd,
            rows, columns, x.stride(0), u.stride(0), threshold, scale, EPS,
            DROPOUT=p > 0, R=r, G=g, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd


def backward_triton(
    dy: Tensor, x: Tensor, u: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and u; see `gated_norm`."""
    dy, x, u, seed = _rows_contiguous(dy), _rows_contiguous(x), _rows_contiguous(u), seed.to(x.device)
    rows, columns = x.shape
    dx = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    du = torch.empty_like(dx)
    if rows:
        r, g, warps = launch_config(columns)
        threshold, scale = drop_threshold(p)
        _backward_kernel[(triton.cdiv(rows, r),)](
            dy, x, u, mean, rstd, seed, dx, du,
            rows, columns, dy.stride(0), x.stride(0), u.stride(0), threshold, scale,
            DROPOUT=p > 0, R=r, G=g, num_warps=warps,
        )  # fmt: skip
    return dx, du


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def aot_cases() -> list[AotCase]:
    """Both kernels at narrow, odd and wide rows."""
    cases = []
    shapes = ((50, "bf16", True), (100, "fp32", True), (64, "fp32", False), (1024, "bf16", True), (4096, "bf16", True))
    for columns, dtype, dropout in shapes:
        rows, groups, warps = launch_config(columns)
        constexprs = {"DROPOUT": dropout, "R": rows, "G": groups}
        for kernel in (_forward_kernel, _backward_kernel):
            types = {name: _argument_type(name, dtype) for name in kernel.arg_names}
            name = f"{kernel.__name__.strip('_')} C{columns} {dtype}{' dropout' if dropout else ''}"
            cases.append(AotCase(name=name, kernel=kernel, signature=types, constexprs=constexprs, num_warps=warps))
    return cases


def _argument_type(name: str, dtype: str) -> str:
    if name in ("DROPOUT", "R", "G"):
        return "constexpr"
    if name == "seed_ptr":
        return "*i64"
    if name in ("mean_ptr", "rstd_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name in ("scale", "eps") else "i32"
