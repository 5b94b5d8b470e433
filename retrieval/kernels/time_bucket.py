"""Logarithmic buckets of time differences (field-standard for HSTU's time bias).

    bucket(Δ) = min(⌊ln(max(1, |Δ|)) / 0.301⌋, 128),  Δ in whole seconds

The constant is that of the public HSTU code: a bucket is a factor of e^0.301 ≈ 1.35 wide, so 68 of them cover 25
years. Buckets are exact for every int64 Δ but −2^63: they are decided by integer comparison, not by rounding a
logarithm, so that training, serving and every backend agree on them.
"""

import math
from functools import cache

import torch
from torch import Tensor

__all__ = ["NUM_TIME_BUCKETS", "bucket_edges", "time_bucket", "time_bucket_reference"]

NUM_TIME_BUCKETS = 129
_WIDTH = 0.301
_GREATEST = torch.iinfo(torch.int64).max - 1


def _first_second_of(bucket: int) -> int:
    return 0 if bucket == 0 else math.ceil(math.exp(_WIDTH * bucket))


@cache
def bucket_edges(device: torch.device) -> Tensor:
    """First Δ of each bucket, and an end that no Δ reaches, int64 `[130]`."""
    edges = [_first_second_of(bucket) for bucket in range(NUM_TIME_BUCKETS)]
    return torch.tensor([*edges, torch.iinfo(torch.int64).max], device=device)


def time_bucket(delta: Tensor) -> Tensor:
    """Bucket of each time difference.

    Args:
        delta: seconds, int64, any shape.

    Returns:
        Buckets in [0, 128], int32, same shape.
    """
    edges = bucket_edges(delta.device)
    size = delta.abs().clamp_(min=0, max=_GREATEST)
    # A float32 logarithm is at most one bucket off; two comparisons put it right.
    bucket = size.clamp(min=1).float().log_().div_(_WIDTH).int().clamp_(max=NUM_TIME_BUCKETS - 1).view(-1)
    size = size.view(-1)
    bucket -= (size < edges.index_select(0, bucket)).int()
    bucket += (size >= edges.index_select(0, bucket + 1)).int()
    return bucket.view(delta.shape)


def time_bucket_reference(delta: Tensor) -> Tensor:
    """As `time_bucket`, by bisection over the integer edges."""
    edges = bucket_edges(delta.device)
    return torch.bucketize(delta.abs(), edges[1:-1], right=True, out_int32=True)
