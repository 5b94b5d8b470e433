"""HSTU's gate: layer norm, product with U and dropout, fused.

    y = m / (1 − p) ⊙ u ⊙ x̂,   x̂ = (x − mean(x)) / √(var(x) + 1e-6)   over the last axis, without learned scale

with m the dropout mask. Source: "Actions Speak Louder than Words", arXiv 2402.17152, equation 3, where x is the
attention's output. With g = dy ⊙ m / (1 − p) the gradients are

    du = g ⊙ x̂;   dx = rstd · (h − mean(h) − x̂ · mean(h ⊙ x̂)),   h = g ⊙ u

The mask is a function of (seed, row, column) and of nothing else, so that it is the same on every device, by every
backend and in the backward pass, which draws it again: element (t, c) reads 16 bits of the Philox4x64-10 block
number t·⌈C/16⌉ + ⌊c/16⌋ under the key `seed` (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
16 bits make p a multiple of 2⁻¹⁶; the scale is that of the rounded p, so that y is without bias.

Legend: T tokens, C channels (heads × value width).
"""

from typing import Any

import torch
from torch import Tensor

from retrieval.kernels.backend import Backend, resolve_backend
from retrieval.kernels.gated_norm_cpu import backward_cpu, forward_cpu
from retrieval.kernels.gated_norm_reference import gated_norm_reference

__all__ = ["gated_norm"]

# What the Triton kernels hold in registers; the same on the CPU, so that nothing trains there that a GPU refuses.
_MAX_CHANNELS = 1 << 12
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def gated_norm(
    x_TC: Tensor, u_TC: Tensor, *, p: float = 0.0, seed: int | Tensor = 0, backend: Backend = "auto"
) -> Tensor:
    """Dropout of `u ⊙ LayerNorm(x)` (formula above); differentiable in x and u.

    Args:
        x_TC: what is normalised, `[T, C]` with C ≤ 4096; bfloat16, float16 or float32, computed in float32 (float64 in
            itself, not by Triton).
        u_TC: the gate, of the same shape and dtype; rows may be strided.
        p: probability of dropping an element, 0 ≤ p < 1; 0 outside training.
        seed: key of the mask, in int64, as a number or a tensor of one element. A tensor on a GPU keeps the
            launch free of synchronisation, and a captured graph free of a constant seed. Unused where p is 0.
        backend: see `kernels.backend`.

    Returns:
        `[T, C]` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or p are not as above.
    """
    _check(x_TC, u_TC, p, seed)
    chosen = resolve_backend(backend, x_TC.device)
    if chosen == "triton" and x_TC.dtype == torch.float64:
        raise ValueError("gated_norm: backend 'triton' does not take float64")
    if isinstance(seed, int):
        seed = torch.full((), seed, dtype=torch.int64, device=x_TC.device)
    if chosen == "reference":
        return gated_norm_reference(x_TC, u_TC, p=p, seed=int(seed))
    out: Tensor = _forward(x_TC, u_TC, seed, p, chosen)[0]
    return out


@torch.library.custom_op("retrieval::gated_norm", mutates_args=())
def _forward(x: Tensor, u: Tensor, seed: Tensor, p: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and mean and 1/σ of each row, `[T, 1]`, for the backward pass."""
    if backend == "triton":
        from retrieval.kernels.gated_norm_triton import forward_triton

        return forward_triton(x, u, seed, p)
    return forward_cpu(x, u, seed, p)


@_forward.register_fake
def _(x: Tensor, u: Tensor, seed: Tensor, p: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows, 1, dtype=dtype), x.new_empty(rows, 1, dtype=dtype)


@torch.library.custom_op("retrieval::gated_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, u: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor, p: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and u."""
    if backend == "triton":
        from retrieval.kernels.gated_norm_triton import backward_triton

        return backward_triton(dy, x, u, mean, rstd, seed, p)
    return backward_cpu(dy, x, u, mean, rstd, seed, p)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, u: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor, p: float, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, u, seed, ctx.p, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, u, mean, rstd, seed)


def _differentiate(ctx: Any, dy: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    dx, du = _backward(dy, *ctx.saved_tensors, ctx.p, ctx.backend)
    return dx, du, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _check(x: Tensor, u: Tensor, p: float, seed: int | Tensor) -> None:
    if x.ndim != 2 or x.shape != u.shape or x.dtype != u.dtype or x.dtype not in _DTYPES:
        described = f"x {tuple(x.shape)} {x.dtype}, u {tuple(u.shape)} {u.dtype}"
        raise ValueError(f"gated_norm: {described} are not two [T, C] of one floating dtype")
    if not 1 <= x.shape[1] <= _MAX_CHANNELS:
        raise ValueError(f"gated_norm: {x.shape[1]} channels are not in 1 … {_MAX_CHANNELS}")
    if not 0 <= p < 1:
        raise ValueError(f"gated_norm: p {p} is not in [0, 1)")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(f"gated_norm: seed {tuple(seed.shape)} {seed.dtype} is not one int64")
