"""`gated_norm` on a CPU: the compiled kernel if there is one, else (and for float64) a few passes of torch.

The mask of either is that of `dropout.scaled_mask`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from retrieval.kernels import gated_norm_native as native
from retrieval.kernels.dropout import scaled_mask
from retrieval.kernels.gated_norm_reference import EPS

__all__ = ["backward_cpu", "forward_cpu"]

_ELEMENTS_PER_STEP = 1 << 16


def forward_cpu(x: Tensor, u: Tensor, seed: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and 1/σ; see `gated_norm`."""
    if native.available(x.dtype):
        return native.forward(x, u, seed, p)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if p == 0:
        normed, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[1:], None, None, EPS)
        return normed.mul_(u).to(x.dtype), mean, rstd
    out = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = torch.empty(len(x), 1, dtype=wide), torch.empty(len(x), 1, dtype=wide)
    for part in _steps(x.shape):
        normed, mean[part], rstd[part] = torch.native_layer_norm(x[part].to(wide), x.shape[1:], None, None, EPS)
        normed.mul_(scaled_mask(int(seed), part, x.shape[1], p, wide))
        torch.mul(normed, u[part], out=out[part])
    return out, mean, rstd


def backward_cpu(
    dy: Tensor, x: Tensor, u: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and u; see `gated_norm`."""
    if native.available(x.dtype):
        return native.backward(dy, x, u, mean, rstd, seed, p)
    wide = mean.dtype
    dx, du = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    for part in _steps(x.shape):
        rows, grad = x[part].to(wide), dy[part].to(wide)
        if p > 0:
            grad = grad * scaled_mask(int(seed), part, x.shape[1], p, wide)
        dx[part] = torch.ops.aten.native_layer_norm_backward(
            grad * u[part], rows, x.shape[1:], mean[part], rstd[part], None, None, [True, False, False]
        )[0]
        torch.mul(torch.sub(rows, mean[part]).mul_(rstd[part]), grad, out=du[part])
    return dx, du


def _steps(shape: torch.Size) -> Iterator[slice]:
    """Rows in steps whose temporaries stay in the cache."""
    rows = max(1, _ELEMENTS_PER_STEP // shape[1])
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
