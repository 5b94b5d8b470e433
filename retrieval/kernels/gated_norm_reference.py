"""`gated_norm` in plain differentiable torch, with Philox written out."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["EPS", "LANES", "drop_threshold", "gated_norm_reference", "keep_mask_reference"]

EPS = 1e-6
LANES = 16
"""Elements that share one Philox block: 4 words of 64 bits, 16 bits each."""

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_WORD = 2**64 - 1


def drop_threshold(p: float) -> tuple[int, float]:
    """Least signed 16-bit value that keeps its element, and the factor on what is kept."""
    dropped = min(round(p * 65536), 65535)
    return dropped - 32768, 65536 / (65536 - dropped)


def gated_norm_reference(x_TC: Tensor, u_TC: Tensor, *, p: float, seed: int) -> Tensor:
    """As `gated_norm.gated_norm`; any floating dtype, computed in it."""
    centred = x_TC - x_TC.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
    gated = u_TC * normed
    if p == 0:
        return gated
    keep = torch.from_numpy(keep_mask_reference(seed, x_TC.shape[0], x_TC.shape[1], p)).to(x_TC.device)
    return torch.where(keep, gated * drop_threshold(p)[1], 0)


def keep_mask_reference(seed: int, rows: int, columns: int, p: float) -> NDArray[np.bool_]:
    """True where dropout keeps an element, `[rows, columns]`."""
    blocks = -(-columns // LANES)
    words = _philox(seed & _WORD, np.arange(rows * blocks, dtype=np.uint64))
    parts = np.stack([(word >> np.uint64(16 * part)).astype(np.uint16) for word in words for part in range(4)], -1)
    bits = parts.view(np.int16).reshape(rows, blocks * LANES)[:, :columns]
    keep: NDArray[np.bool_] = bits >= drop_threshold(p)[0]
    return keep


def _philox(key: int, counter: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """The four words of Philox4x64-10 at (counter, 0, 0, 0) under (key, 0)."""
    c0, c1, c2, c3 = counter, *(np.zeros_like(counter) for _ in range(3))
    k0, k1 = key, 0
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def _multiply(a: int, b: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """High and low word of the 128-bit product, by halves of 32 bits."""
    half, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    a_high, a_low = np.uint64(a >> 32), np.uint64(a & 0xFFFFFFFF)
    b_high, b_low = b >> shift, b & half
    low = a_low * b_low
    middle = a_high * b_low + (low >> shift)
    other = a_low * b_high + (middle & half)
    high = a_high * b_high + (middle >> shift) + (other >> shift)
    return high, (other << shift) | (low & half)
