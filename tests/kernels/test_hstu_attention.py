"""Against the row-by-row float64 reference: forward and every gradient, on awkward batches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.kernels import hstu_attention as module
from retrieval.kernels.hstu_attention import hstu_attention, hstu_attention_reference, plan_attention
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised outputs hold NaN, so that an element which is never written shows."""
    real = torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty_like", poisoned)


class Problem:
    """Random inputs for rows of the given lengths."""

    def __init__(self, lengths: list[int], heads: int = 2, qk: int = 5, v: int = 3, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        total, longest = int(self.offsets[-1]), max(lengths, default=0)
        rows = [torch.randint(0, 10**8, (n,), generator=g).sort().values for n in lengths]
        self.timestamps = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        self.query_times = self.timestamps + torch.randint(0, 10**6, (total,), generator=g)
        shapes = [(total, heads, qk), (total, heads, qk), (total, heads, v), (longest + 3,), (NUM_TIME_BUCKETS,)]
        self.leaves = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
        self.grad_out = torch.randn(total, heads, v, generator=g, dtype=torch.float64)

    def run(self, dtype: torch.dtype, *, reference: bool, norm: float | None, tables: str) -> list[Tensor]:
        """Output and gradients of q, k, v and of the tables in use."""
        leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in self.leaves]
        q, k, v, pos, time = leaves
        pos_table, time_table = pos if "p" in tables else None, time if "t" in tables else None
        where = (self.offsets, self.timestamps, self.query_times)
        if reference:
            out = hstu_attention_reference(q, k, v, *where, pos_table=pos_table, time_table=time_table, norm=norm)
        else:
            plan = plan_attention(*where)
            out = hstu_attention(q, k, v, plan, pos_table=pos_table, time_table=time_table, norm=norm)
        out.backward(self.grad_out.to(dtype))
        grads = [leaf.grad for leaf in (q, k, v, *(table for table in (pos_table, time_table) if table is not None))]
        return [out.detach(), *(grad for grad in grads if grad is not None)]


def check(problem: Problem, dtype: torch.dtype, norm: float | None = 7.0, tables: str = "pt") -> None:
    expected = problem.run(torch.float64, reference=True, norm=norm, tables=tables)
    actual = problem.run(dtype, reference=False, norm=norm, tables=tables)
    assert len(actual) == len(expected) == 4 + len(tables)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():
            assert_close(a, e, "hstu_attention", "forward" if index == 0 else "backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [7.0, None], ids=["constant", "visible-keys"])
@pytest.mark.parametrize("tables", ["pt", "p", "t", ""], ids=["both", "position", "time", "none"])
def test_output_and_gradients_equal_the_reference(dtype: torch.dtype, norm: float | None, tables: str) -> None:
    check(Problem([4, 0, 1, 9, 9, 2, 0]), dtype, norm, tables)


@pytest.mark.parametrize(
    "lengths", [[0], [0, 0], [1], [200, 1, 1, 1, 3], [17] * 40, list(range(30))], ids=lambda rows: f"B{len(rows)}"
)
def test_awkward_batches_equal_the_reference(lengths: list[int]) -> None:
    check(Problem(lengths), torch.float32)


def test_work_split_into_many_steps_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._SCORES_PER_STEP, "cpu", 300)
    check(Problem([20, 3, 3, 11, 10, 0, 30, 1, 1]), torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    heads=st.integers(1, 3),
    qk=st.integers(1, 9),
    v=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(lengths: list[int], heads: int, qk: int, v: int, seed: int) -> None:
    check(Problem(lengths, heads, qk, v, seed), torch.float64)


def test_gradients_of_the_reference_are_those_of_its_formula() -> None:
    problem = Problem([3, 1, 4])
    where = (problem.offsets, problem.timestamps, problem.query_times)
    leaves = tuple(leaf.requires_grad_() for leaf in problem.leaves)

    def f(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, time: Tensor) -> Tensor:
        return hstu_attention_reference(q, k, v, *where, pos_table=pos, time_table=time, norm=None)

    assert torch.autograd.gradcheck(f, leaves)


def test_one_row_by_hand() -> None:
    # Two tokens, one head of width 1; times 0 and 100, asked at 100 and 160.
    q, k, v = (torch.tensor(x).view(2, 1, 1) for x in ([1.0, 2.0], [3.0, -1.0], [10.0, 20.0]))
    pos = torch.tensor([0.5, 0.25])
    time = torch.zeros(NUM_TIME_BUCKETS)
    time[15], time[16], time[13] = 1.0, 2.0, 4.0  # ln 100/.301 = 15.3, ln 160/.301 = 16.9, ln 60/.301 = 13.6
    plan = plan_attention(torch.tensor([0, 2]), torch.tensor([0, 100]), torch.tensor([100, 160]))
    out = hstu_attention(q, k, v, plan, pos_table=pos, time_table=time, norm=4.0)

    def silu(x: float) -> float:
        return x * float(torch.sigmoid(torch.tensor(x)))

    first = silu(3.0 + 0.5 + 1.0) * 10 / 4
    second = (silu(6.0 + 0.25 + 2.0) * 10 + silu(-2.0 + 0.5 + 4.0) * 20) / 4
    torch.testing.assert_close(out.flatten(), torch.tensor([first, second]))


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    long, short = Problem([12], seed=3), Problem([12], seed=3)
    for leaf in long.leaves[:3]:
        leaf[8:] = 99.0
    outputs = [p.run(torch.float64, reference=False, norm=5.0, tables="pt")[0] for p in (long, short)]
    torch.testing.assert_close(outputs[0][:8], outputs[1][:8])
    assert not torch.allclose(outputs[0][8:], outputs[1][8:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": torch.zeros(5, 1, 2)}, "do not fit"),
        ({"v": torch.zeros(4, 1, 2)}, "do not fit"),
        ({"pos_table": torch.zeros(4)}, "too short for a row of 5"),
        ({"time_table": torch.zeros(128)}, "time_table"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    times = torch.arange(5)
    arguments: dict[str, Any] = dict.fromkeys("qkv", torch.zeros(5, 1, 3))
    arguments |= {"pos_table": None, "time_table": None} | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=sentence):
        hstu_attention(q, k, v, plan_attention(torch.tensor([0, 5]), times, times), norm=1.0, **arguments)
