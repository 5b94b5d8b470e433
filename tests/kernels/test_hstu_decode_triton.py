"""The Triton kernels of decoding against the reference, in the interpreter or on a GPU."""

from typing import Any

import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.test_hstu_decode import Problem
from tests.tolerances import assert_close_by_rule

triton_module = pytest.importorskip("retrieval.kernels.hstu_decode_triton")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def check(problem: Problem, dtype: torch.dtype, **options: Any) -> None:
    options = dict[str, Any](norm=7.0, device=DEVICE.type) | options
    # The inputs are what the dtype can hold: its rounding of them is nobody's error.
    problem.floats = [value.to(dtype).double() for value in problem.floats]
    exact = problem.run(torch.float64, "reference", **options)
    plain = problem.run(dtype, "reference", **options)
    assert_close_by_rule(problem.run(dtype, "triton", **options), plain, exact, "hstu_decode", "forward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [7.0, None], ids=["constant", "visible-keys"])
@pytest.mark.parametrize("queries", [1, 3, 5])
def test_output_is_as_exact_as_torch(queries: int, norm: float | None, dtype: torch.dtype) -> None:
    check(Problem([4, 0, 1, 90, 64, 2, 0], queries, d=25, v=17), dtype, norm=norm, alpha=0.7)


@pytest.mark.parametrize("tables", ["p", "t", ""], ids=["position", "time", "none"])
@pytest.mark.parametrize("queries", [1, 4])
def test_each_table_may_be_missing(queries: int, tables: str) -> None:
    check(Problem([5, 3], queries), torch.float32, tables=tables)


@pytest.mark.parametrize("lengths", [[0], [1, 1], [70, 1, 40, 3], [17] * 9], ids=lambda rows: f"B{len(rows)}")
@pytest.mark.parametrize(("d", "v"), [(50, 50), (64, 8), (1, 1)])
def test_awkward_batches_are_as_exact_as_torch(lengths: list[int], d: int, v: int) -> None:
    check(Problem(lengths, heads=3, d=d, v=v), torch.float32)


def test_more_queries_than_one_tile() -> None:
    check(Problem([40, 7], queries=37, heads=1), torch.float32)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("norm", [7.0, None])
def test_rows_longer_than_a_split_are_summed_in_order(
    monkeypatch: pytest.MonkeyPatch, queries: int, norm: float | None
) -> None:
    problem = Problem([100, 0, 33, 32, 1], queries)
    monkeypatch.setattr(triton_module, "SPLIT", 32)
    check(problem, torch.float32, norm=norm)
    # A bound above the longest row changes nothing.
    loose = problem.run(torch.float32, "triton", DEVICE.type, norm=norm, max_length=500)
    assert torch.equal(loose, problem.run(torch.float32, "triton", DEVICE.type, norm=norm))


def test_a_row_does_not_depend_on_who_shares_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module, "SPLIT", 32)
    problem = Problem([20, 90])
    together = problem.run(torch.float32, "triton", DEVICE.type, norm=7.0)
    problem.offsets = torch.tensor([0, 20])
    problem.timestamps = problem.timestamps[:20]
    problem.query_times, problem.query_positions = problem.query_times[:1], problem.query_positions[:1]
    q, k, v, *tables = problem.floats
    problem.floats = [q[:1], k[:20], v[:20], *tables]
    assert torch.equal(problem.run(torch.float32, "triton", DEVICE.type, norm=7.0), together[:1])


@pytest.mark.parametrize("queries", [1, 4])
def test_a_position_outside_the_table_gives_nan(queries: int) -> None:
    problem = Problem([3, 4], queries)
    problem.query_positions[:] = 2
    problem.query_positions[0, 0] = 6
    out = problem.run(torch.float32, "triton", DEVICE.type, norm=1.0)
    assert bool(out[0, 0].isnan().all())
    assert not bool(out[1].isnan().any())


def test_it_is_a_well_formed_torch_operation() -> None:
    problem = Problem([3, 0, 5])
    q, k, v, pos, time = (value.float().to(DEVICE) for value in problem.floats)
    where = (problem.timestamps, problem.query_times, problem.query_positions)
    whole = (problem.offsets, *(value.to(DEVICE) for value in where))
    arguments = (q, k[:, 2:], v[:, :2], *whole, pos, time, 7.0, 1.0, None, "triton")
    torch.library.opcheck(torch.ops.retrieval.hstu_decode.default, arguments)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        Problem([3]).run(torch.float64, "triton", DEVICE.type, norm=1.0)
