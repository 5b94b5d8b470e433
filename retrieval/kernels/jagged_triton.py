"""`jagged` as two Triton kernels that copy tiles of one row. Launch configurations are unmeasured on GPUs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrieval.kernels.aot_case import AotCase

__all__ = ["aot_cases", "jagged_to_padded_triton", "launch_config", "padded_to_jagged_triton"]

_ELEMENTS_PER_PROGRAM = 4096
_WARPS = 4


@triton.jit
def _pad_kernel(  # type: ignore[no-untyped-def]
    values_ptr, offsets_ptr, padded_ptr, max_length, channels, fill, BN: tl.constexpr, BC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    channel = tl.program_id(2) * BC + tl.arange(0, BC)[None, :]
    start = tl.load(offsets_ptr + row)
    length = tl.load(offsets_ptr + row + 1) - start
    wanted = (place < max_length) & (channel < channels)
    # `fill` has been rounded to the values' type, which float32 holds exactly.
    other = tl.full([BN, BC], fill, tl.float32).to(values_ptr.dtype.element_ty)
    x = tl.load(values_ptr + (start + place) * channels + channel, mask=wanted & (place < length), other=0.0)
    x = tl.where(place < length, x, other)
    tl.store(padded_ptr + (row * max_length + place) * channels + channel, x, mask=wanted)


@triton.jit
def _unpad_kernel(  # type: ignore[no-untyped-def]
    padded_ptr, offsets_ptr, values_ptr, max_length, channels, BN: tl.constexpr, BC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BN + tl.arange(0, BN)[:, None]
    channel = tl.program_id(2) * BC + tl.arange(0, BC)[None, :]
    start = tl.load(offsets_ptr + row)
    length = tl.load(offsets_ptr + row + 1) - start
    wanted = (place < max_length) & (place < length) & (channel < channels)
    x = tl.load(padded_ptr + (row * max_length + place) * channels + channel, mask=wanted)
    tl.store(values_ptr + (start + place) * channels + channel, x, mask=wanted)


def launch_config(channels: int) -> tuple[int, int]:
    """Places and channels of a tile, powers of two. Unmeasured on GPUs."""
    width = min(256, triton.next_power_of_2(channels))
    return _ELEMENTS_PER_PROGRAM // width, width


def jagged_to_padded_triton(values_TC: Tensor, offsets: Tensor, max_length: int, fill: float) -> Tensor:
    """See `jagged.jagged_to_padded`; one axis of channels."""
    rows, channels = len(offsets) - 1, values_TC.shape[1]
    padded = torch.empty(rows, max_length, channels, dtype=values_TC.dtype, device=values_TC.device)
    if padded.numel():
        places, width = launch_config(channels)
        grid = (rows, triton.cdiv(max_length, places), triton.cdiv(channels, width))
        _pad_kernel[grid](
            values_TC.contiguous(), offsets.contiguous(), padded, max_length, channels, float(fill),
            BN=places, BC=width, num_warps=_WARPS,
        )  # fmt: skip
    return padded


def padded_to_jagged_triton(padded_BNC: Tensor, offsets: Tensor, total: int) -> Tensor:
    """See `jagged.padded_to_jagged`; one axis of channels."""
    rows, longest, channels = padded_BNC.shape
    # Zeros, since tokens past the padded length have nothing to copy.
    values = torch.zeros(total, channels, dtype=padded_BNC.dtype, device=padded_BNC.device)
    if padded_BNC.numel() and total:
        places, width = launch_config(channels)
        grid = (rows, triton.cdiv(longest, places), triton.cdiv(channels, width))
        _unpad_kernel[grid](
            padded_BNC.contiguous(), offsets.contiguous(), values, longest, channels,
            BN=places, BC=width, num_warps=_WARPS,
        )  # fmt: skip
    return values


def aot_cases() -> list[AotCase]:
    """Both kernels at narrow, odd and wide rows."""
    cases = []
    for channels, dtype in ((1, "fp32"), (50, "bf16"), (512, "fp32")):
        places, width = launch_config(channels)
        for kernel in (_pad_kernel, _unpad_kernel):
            known = {"offsets_ptr": "*i64", "fill": "fp32", "BN": "constexpr", "BC": "constexpr"}
            types = {n: known.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
            name = f"{kernel.__name__.strip('_')} C{channels} {dtype}"
            constexprs = {"BN": places, "BC": width}
            cases.append(AotCase(name=name, kernel=kernel, signature=types, constexprs=constexprs, num_warps=_WARPS))
    return cases
