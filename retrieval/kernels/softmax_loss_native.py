"""`softmax_loss` on a CPU in C++ (`softmax_loss_native.cpp`): bfloat16 products in the matrix unit (AMX)."""

import ctypes

import torch
from torch import Tensor

from retrieval.kernels.native import library

__all__ = ["available", "forward"]


class _Problem(ctypes.Structure):
    """`struct SoftmaxLoss` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("users", "items", "width")),
        *((name, ctypes.c_void_p) for name in ("u", "e", "positive", "bias", "weights", "first", "last")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("gradients", "threads")),
    )


def available() -> bool:
    """Whether the compiled library is here and the processor has the unit."""
    native = library()
    return native is not None and bool(native.softmax_loss_available())


def forward(
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
    """As `softmax_loss_cpu.forward_cpu`, of bfloat16 users and items."""
    native = library()
    assert native is not None
    assert users.dtype == items.dtype == torch.bfloat16
    users, items, positive, bias, weights = (x.contiguous() for x in (users, items, positive, bias, weights))
    first, last = first.to(torch.int32).contiguous(), last.to(torch.int32).contiguous()
    losses = torch.empty(len(users))
    mean, shares = (torch.empty(len(x) if with_gradients else 0, users.shape[1]) for x in (users, items))
    problem = _Problem(
        users=len(users),
        items=len(items),
        width=users.shape[1],
        u=users.data_ptr(),
        e=items.data_ptr(),
        positive=positive.data_ptr(),
        bias=bias.data_ptr() if bias.numel() else None,
        weights=weights.data_ptr(),
        first=first.data_ptr(),
        last=last.data_ptr(),
        scale=scale,
        gradients=int(with_gradients),
        threads=torch.get_num_threads(),
    )
    outputs = (ctypes.c_void_p(x.data_ptr()) for x in (losses, mean, shares))
    native.softmax_loss_forward(ctypes.byref(problem), *outputs)
    return losses, mean, shares
