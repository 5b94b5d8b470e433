"""Which implementation of an operation runs.

reference: plain differentiable torch, any floating dtype, any device; slow and readable.
cpu: torch operations in cache-sized steps; what the encoder uses where there is no GPU.
triton: fused kernels; on a CUDA device, or anywhere under Triton's interpreter (TRITON_INTERPRET=1).

The default goes by the device alone. A backend that fails raises: nothing falls back to another one behind the
caller's back.
"""

import os
from typing import Literal

import torch

from retrieval.errors import ConfigError

__all__ = ["Backend", "interpreting", "resolve_backend"]

Backend = Literal["auto", "reference", "cpu", "triton"]


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def resolve_backend(backend: Backend, device: torch.device) -> Literal["reference", "cpu", "triton"]:
    """Name of the implementation to run for tensors on `device`.

    Raises:
        ConfigError: the backend does not exist, or cannot run on this device.
    """
    if backend == "auto":
        return "triton" if device.type == "cuda" else "cpu"
    if backend not in ("reference", "cpu", "triton"):
        raise ConfigError(f"backend {backend!r} is none of auto, reference, cpu, triton")
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise ConfigError(f"backend 'triton' needs tensors on a CUDA device, not on {device.type}")
    return backend
