"""Dropout with a mask that is cheap to draw on a CPU."""

import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retrieval.kernels.gated_norm_reference import LANES, drop_threshold

__all__ = ["dropout", "scaled_mask"]

_WORDS = 4  # of 64 bits in a Philox block


def dropout(x_TD: Tensor, p: float, *, training: bool) -> Tensor:
    """Each element of `[T, D]` is set to 0 with probability p, else divided by 1 − p; unchanged outside training.

    On a CPU p is rounded to a multiple of 2⁻¹⁶ and the mask is numpy's Philox under a key that torch's generator gives:
    torch's own mask is drawn one element after another and costs several times as much.
    """
    if not training or p == 0:
        return x_TD
    if x_TD.device.type != "cpu":
        return functional.dropout(x_TD, p)
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    mask = scaled_mask(int(torch.randint(2**62, ())), slice(0, x_TD.shape[0]), x_TD.shape[1], p, wide)
    return x_TD * mask.to(x_TD.dtype)


def scaled_mask(seed: int, rows: slice, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """1/(1 − p) where an element is kept, else 0, for some rows of a mask `[T, columns]`; float32 or float64.

    Row t of a seed's mask does not depend on which rows are asked for. Numpy's Philox4x64-10 takes a quarter of the
    time of torch's Mersenne Twister and numbers its blocks, which is what lets a GPU draw the same mask; its stream is
    fixed by numpy's policy (NEP 19).
    """
    blocks = -(-columns // LANES)
    before = (rows.start * blocks - 1) % 2**256  # numpy steps its counter before it draws
    count = rows.stop - rows.start
    words = np.random.Philox(key=seed % 2**64, counter=before).random_raw(count * blocks * _WORDS)
    if sys.byteorder == "big":
        words = words.astype("<u8")
    threshold, scale = drop_threshold(p)
    keep = words.view("<i2").reshape(count, blocks * LANES) >= threshold
    # Numpy widens booleans several times faster than torch.
    factor = np.multiply(keep, np.float64(scale) if dtype == torch.float64 else np.float32(scale))
    return torch.from_numpy(factor)[:, :columns]
