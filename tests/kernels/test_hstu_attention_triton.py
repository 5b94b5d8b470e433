"""Triton's HSTU attention against the reference: in the interpreter at toy sizes, on a GPU at real ones."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from retrieval.kernels import hstu_attention_bwd_triton, hstu_attention_positions_triton, hstu_attention_triton
from retrieval.kernels.hstu_attention import hstu_attention
from retrieval.kernels.launch import LaunchConfig
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS, bucket_edges
from tests.kernels.attention_problem import Problem, poison
from tests.kernels.device import DEVICE
from tests.tolerances import assert_close_by_rule

SMALL = LaunchConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in short rows."""
    for module in (hstu_attention_triton, hstu_attention_bwd_triton, hstu_attention_positions_triton):
        monkeypatch.setattr(module, "launch_config", lambda *_: SMALL)


def check(problem: Problem, dtype: torch.dtype, tables: str = "pt", **options: Any) -> None:
    exact = problem.run(torch.float64, "reference", tables=tables, **options)
    same = problem.run(dtype, "reference", tables=tables, **options)
    actual = problem.run(dtype, "triton", DEVICE, tables=tables, **options)
    for index, results in enumerate(zip(actual, same, exact, strict=True)):
        assert_close_by_rule(*results, "hstu_attention", "forward" if index == 0 else "backward")


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("lengths", "dtype", "tables", "options"),
    [
        ([20, 0, 1, 33], torch.float32, "pt", {}),
        ([20, 0, 1, 33], torch.float32, "pt", {"deterministic": False, "norm": None}),
        ([18, 3], torch.bfloat16, "pt", {"norm": None}),
        ([18, 3], torch.float16, "pt", {"alpha": 0.5}),
        ([17, 2], torch.float32, "p", {}),
        ([17, 2], torch.float32, "t", {}),
        ([17, 2], torch.float32, "", {}),
        ([0, 0], torch.float32, "pt", {}),
    ],
    ids=["float32", "atomics", "bfloat16", "float16", "position", "time", "no-bias", "empty"],
)
def test_output_and_gradients_equal_the_reference(
    lengths: list[int], dtype: torch.dtype, tables: str, options: dict[str, Any]
) -> None:
    check(Problem(lengths), dtype, tables, **options)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(("window", "contextual", "targets"), [(6, 0, False), (None, 20, False), (20, 5, True)])
def test_gradients_through_every_mask_equal_the_reference(window: int | None, contextual: int, targets: bool) -> None:
    problem = Problem([40, 1, 5], heads=1, targets=targets, seed=2)
    check(problem, torch.float32, norm=None, window=window, contextual=contextual)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("norm", [7.0, None], ids=["constant", "visible-keys"])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("contextual", [0, 1, 20])
def test_outputs_under_every_mask_equal_the_reference(norm: float | None, window: int | None, contextual: int) -> None:
    problem = Problem([0, 70, 5], heads=1, targets=True, seed=contextual)
    check(problem, torch.float32, norm=norm, window=window, contextual=contextual, backward=False)


@pytest.mark.parametrize(("qk", "v"), [(8, 25), (50, 16), (25, 50), (130, 3)])
def test_heads_of_any_width_run_at_the_default_configuration(qk: int, v: int) -> None:
    check(Problem([37, 2], heads=1, qk=qk, v=v), torch.float32)


def test_views_with_any_strides_are_read_in_place() -> None:
    problem = Problem([9, 4], heads=2, qk=4, v=4)
    together = torch.cat(problem.leaves[:3], dim=2).float().to(DEVICE)
    q, k, v = together.split(4, dim=2)
    where = [x.to(DEVICE) for x in (problem.offsets, problem.timestamps, problem.query_times)]
    options: dict[str, Any] = {"pos_table": None, "time_table": None, "norm": 2.0, "backend": "triton"}
    out = hstu_attention(q, k, v, *where, **options)
    copied = hstu_attention(q.contiguous(), k.contiguous(), v.contiguous(), *where, **options)
    assert torch.equal(out, copied)


@pytest.mark.parametrize("base", [0, 2**55])
def test_buckets_are_exact_at_every_edge(base: int) -> None:
    edges = bucket_edges(torch.device("cpu"))[1:125:2]
    ages = torch.cat([edges - 1, edges]).unique().flip(0)
    ages = ages[ages <= max(base, 2**40)]
    n = len(ages)
    # One query, the last token, at a time that is each of the ages after a key's; values are one-hot by key.
    query = torch.zeros(n, 1, 1)
    values = torch.eye(n).unsqueeze(1)[:, :, -256:]
    now = base + 1000
    where = (torch.tensor([0, n]), now - ages, torch.full((n,), now))
    table = torch.arange(1.0, NUM_TIME_BUCKETS + 1) + 50  # SiLU is the identity there
    options: dict[str, Any] = {"pos_table": None, "norm": 1.0}
    moved = (x.to(DEVICE) for x in (query, query, values, *where))
    out = hstu_attention(*moved, time_table=table.to(DEVICE), backend="triton", **options)
    expected = hstu_attention(query, query, values, *where, time_table=table, backend="reference", **options)
    torch.testing.assert_close(out[-1].cpu(), expected[-1])


def test_times_in_any_order_are_accepted() -> None:
    problem = Problem([40], heads=1)
    problem.timestamps = problem.timestamps[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    check(problem, torch.float32, backward=False)


def test_what_the_kernels_do_not_do_is_refused() -> None:
    problem = Problem([3], qk=300)
    with pytest.raises(ValueError, match="wider than 256"):
        problem.run(torch.float32, "triton", DEVICE)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        Problem([3]).run(torch.float64, "triton", DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [8, 25, 50, 64, 128, 256])
def test_real_sizes_equal_the_reference(dim: int, dtype: torch.dtype) -> None:
    check(Problem([200, 0, 1, 1000, 77], qk=dim, v=dim), dtype)


@pytest.mark.gpu
def test_one_row_of_16k_among_short_ones_equals_the_reference() -> None:
    check(Problem([16_384, 3, 0, 200], heads=1, qk=64, v=32), torch.bfloat16)


@pytest.mark.gpu
def test_deterministic_gradients_have_the_same_bits_on_every_run() -> None:
    problem = Problem([300] * 20, qk=50, v=50)
    runs = [problem.run(torch.bfloat16, "triton", DEVICE) for _ in range(5)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
