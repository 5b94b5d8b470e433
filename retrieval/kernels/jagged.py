"""Between jagged batches, rows one after another, and padded ones.

    padded[b, n] = values[offsets[b] + n]  for n < length of row b, else the fill

Each of the two operations is, but for the fill, the other's adjoint, and so computes its gradient. Rows longer than
the padded length are cut; the way back gives zeros for what was cut.

Legend: B rows, T tokens of all rows, N padded length, X any further axes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.jagged_cpu import jagged_to_padded_cpu, padded_to_jagged_cpu
from retrieval.kernels.jagged_reference import jagged_to_padded_reference, padded_to_jagged_reference

__all__ = ["jagged_to_padded", "padded_to_jagged"]


def jagged_to_padded(
    values_TX: Tensor, offsets: Tensor, max_length: int, fill: float = 0.0, *, backend: Backend = "auto"
) -> Tensor:
    """Pad the rows of a jagged batch (formula above); differentiable.

    Args:
        values_TX: `[T, ...]`, floating.
        offsets: row b holds tokens `offsets[b]:offsets[b + 1]`, int64 `[B + 1]`.
        max_length: N; longer rows lose their ends.
        fill: what stands where a row has no token.
        backend: see `kernels.backend`.

    Returns:
        `[B, N, ...]` in the dtype of the values.

    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    _check("jagged_to_padded", values_TX, 1, offsets)
    if max_length < 0:
        raise ValueError(f"jagged_to_padded: max_length {max_length} is negative")
    chosen = resolve_backend(backend, values_TX.device)
    if chosen == "reference":
        return jagged_to_padded_reference(values_TX, offsets, max_length, fill)
    channels = values_TX.shape[1:]
    flat = values_TX.reshape(values_TX.shape[0], math.prod(channels))
    out: Tensor = _pad(flat, offsets.to(flat.device), max_length, fill, chosen)
    return out.view(offsets.shape[0] - 1, max_length, *channels)


def padded_to_jagged(
    padded_BNX: Tensor, offsets: Tensor, *, total: int | None = None, backend: Backend = "auto"
) -> Tensor:
    """Take the rows out of a padded batch (formula above, from left to right); differentiable.

    Args:
        padded_BNX: `[B, N, ...]`, floating.
        offsets: row b is to hold tokens `offsets[b]:offsets[b + 1]`, int64 `[B + 1]`.
        total: T. None reads it from the offsets, which waits for a GPU unless they are on the CPU, and which
            `torch.compile` cannot do.
        backend: see `kernels.backend`.

    Returns:
        `[T, ...]` in the dtype of the input; zero for tokens past the padded length.

    Raises:
        ValueError: shapes or dtypes are not as above.
    """
    _check("padded_to_jagged", padded_BNX, 2, offsets)
    if padded_BNX.shape[0] != offsets.shape[0] - 1:
        raise ValueError(f"padded_to_jagged: offsets of {offsets.shape[0] - 1} rows for {padded_BNX.shape[0]}")
    chosen = resolve_backend(backend, padded_BNX.device)
    if chosen == "reference":
        return padded_to_jagged_reference(padded_BNX, offsets)
    if total is None:
        total = int(offsets[-1])
    channels = padded_BNX.shape[2:]
    flat = padded_BNX.reshape(*padded_BNX.shape[:2], math.prod(channels))
    out: Tensor = _unpad(flat, offsets.to(flat.device), total, chosen)
    return out.view(total, *channels)


@torch.library.custom_op("retrieval::jagged_to_padded", mutates_args=())
def _pad(values: Tensor, offsets: Tensor, max_length: int, fill: float, backend: str) -> Tensor:
    if backend == "triton":
        from retrieval.kernels.jagged_triton import jagged_to_padded_triton

        return jagged_to_padded_triton(values, offsets, max_length, fill)
    return jagged_to_padded_cpu(values, offsets, max_length, fill)


@_pad.register_fake
def _(values: Tensor, offsets: Tensor, max_length: int, fill: float, backend: str) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, max_length, values.shape[1])


@torch.library.custom_op("retrieval::padded_to_jagged", mutates_args=())
def _unpad(padded: Tensor, offsets: Tensor, total: int, backend: str) -> Tensor:
    if backend == "triton":
        from retrieval.kernels.jagged_triton import padded_to_jagged_triton

        return padded_to_jagged_triton(padded, offsets, total)
    return padded_to_jagged_cpu(padded, offsets, total)


@_unpad.register_fake
def _(padded: Tensor, offsets: Tensor, total: int, backend: str) -> Tensor:
    return padded.new_empty(total, padded.shape[2])


def _setup_pad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, _, _, ctx.backend = inputs
    ctx.save_for_backward(offsets)
    ctx.total = values.shape[0]


def _differentiate_pad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpad(grad, ctx.saved_tensors[0], ctx.total, ctx.backend), None, None, None, None


def _setup_unpad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    padded, offsets, _, ctx.backend = inputs
    ctx.save_for_backward(offsets)
    ctx.max_length = padded.shape[1]


def _differentiate_unpad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _pad(grad, ctx.saved_tensors[0], ctx.max_length, 0.0, ctx.backend), None, None, None


_pad.register_autograd(_differentiate_pad, setup_context=_setup_pad)
_unpad.register_autograd(_differentiate_unpad, setup_context=_setup_unpad)


def _check(name: str, x: Tensor, least: int, offsets: Tensor) -> None:
    if x.ndim < least or not x.is_floating_point():
        raise ValueError(f"{name}: {tuple(x.shape)} {x.dtype} has too few axes or is not floating")
    if offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype != torch.int64:
        raise ValueError(f"{name}: offsets {offsets.dtype} {tuple(offsets.shape)} are not int64 [B + 1]")
