import math

import pytest
import torch

from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, time_bucket, time_bucket_reference


@pytest.mark.parametrize(
    ("delta", "bucket"),
    [
        (0, 0),
        (1, 0),
        (2, 2),  # ln 2 / 0.301 = 2.30
        (-2, 2),
        (60, 13),  # 13.60
        (86_400, 37),  # a day: 37.76
        (10**9, 68),  # about 32 years: 68.85
        (2**24 + 1, 55),
        (2**62, NUM_TIME_BUCKETS - 1),
    ],
)
def test_a_time_difference_falls_into_its_logarithmic_bucket(delta: int, bucket: int) -> None:
    assert time_bucket(torch.tensor([delta])).item() == bucket


def test_buckets_are_exact_at_every_edge_and_equal_to_bisection() -> None:
    edges = [math.ceil(math.exp(0.301 * bucket)) for bucket in range(1, NUM_TIME_BUCKETS)]
    around = torch.tensor([edge + offset for edge in edges for offset in (-1, 0, 1)])
    generator = torch.Generator().manual_seed(0)
    many = torch.cat([around, torch.arange(100_000), torch.randint(0, 2**62, (50_000,), generator=generator)])
    assert torch.equal(time_bucket(many), time_bucket_reference(many))
    assert torch.equal(time_bucket(-many), time_bucket(many))


def test_buckets_never_fall_as_time_passes() -> None:
    assert bool((time_bucket(torch.arange(0, 10**7, 13)).diff() >= 0).all())


def test_the_ends_of_int64_have_a_bucket() -> None:
    ends = torch.tensor([torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).max - 1, -torch.iinfo(torch.int64).max])
    assert time_bucket(ends).tolist() == time_bucket_reference(ends).tolist() == [NUM_TIME_BUCKETS - 1] * 3
