"""CPU implementation and reference of HSTU attention: forward and every gradient, on awkward batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.kernels import hstu_attention_cpu as module
from retrieval.kernels import hstu_attention_native, native
from retrieval.kernels.hstu_attention import hstu_attention, hstu_attention_reference, plan_attention
from retrieval.kernels.hstu_attention_reference import UNBOUNDED, visible, visible_counts
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS
from tests.kernels.attention_problem import Problem, poison
from tests.tolerances import assert_close, assert_close_by_rule


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch":
        monkeypatch.setenv("RETRIEVAL_NATIVE", "0")
    native.library.cache_clear()
    if request.param == "compiled" and not hstu_attention_native.available():
        pytest.skip("no C++ compiler")
    yield
    native.library.cache_clear()


def check(problem: Problem, dtype: torch.dtype, tables: str = "pt", **options: Any) -> None:
    expected = problem.run(torch.float64, "reference", tables=tables, **options)
    actual = problem.run(dtype, "cpu", tables=tables, **options)
    assert len(actual) == len(expected) == 4 + len(tables)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():
            assert_close(a, e, "hstu_attention", "forward" if index == 0 else "backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [7.0, None], ids=["constant", "visible-keys"])
@pytest.mark.parametrize("tables", ["pt", "p", "t", ""], ids=["both", "position", "time", "none"])
def test_output_and_gradients_equal_the_reference(dtype: torch.dtype, norm: float | None, tables: str) -> None:
    check(Problem([4, 0, 1, 9, 9, 2, 0]), dtype, tables, norm=norm)


@pytest.mark.parametrize(
    "lengths", [[0], [0, 0], [1], [200, 1, 1, 1, 3], [17] * 40, list(range(30))], ids=lambda rows: f"B{len(rows)}"
)
def test_awkward_batches_equal_the_reference(lengths: list[int]) -> None:
    check(Problem(lengths), torch.float32)


def test_work_split_into_many_steps_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCORES_PER_STEP", 300)
    monkeypatch.setattr(module, "_QUERIES_PER_STEP", 16)
    check(Problem([20, 3, 3, 11, 10, 0, 30, 1, 1]), torch.float64)
    check(Problem([20, 3, 3, 11, 10, 0, 30, 1, 1], targets=True), torch.float64, window=7, contextual=2)


@pytest.mark.parametrize("norm", [7.0, None], ids=["constant", "visible-keys"])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("contextual", [0, 1, 5, 50])
@pytest.mark.parametrize("targets", [False, True])
def test_every_mask_equals_the_reference(
    norm: float | None, window: int | None, contextual: int, targets: bool
) -> None:
    problem = Problem([4, 0, 1, 40, 9, 33, 0], targets=targets)
    check(problem, torch.float64, norm=norm, window=window, contextual=contextual, alpha=0.5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kept", [1 << 25, 0], ids=["kept", "computed-again"])
def test_prepared_buckets_change_nothing(monkeypatch: pytest.MonkeyPatch, window: int | None, kept: int) -> None:
    monkeypatch.setattr(module, "_MOST_BUCKETS", kept)
    problem = Problem([20, 3, 70, 0])
    plan = plan_attention(problem.offsets, problem.timestamps, problem.query_times)
    assert plan.prepared is not None
    assert (len(plan.prepared) > 0) == (kept > 0)
    with_plan = problem.run(torch.float32, "cpu", prepared=plan.prepared, window=window)
    for a, b in zip(with_plan, problem.run(torch.float32, "cpu", window=window), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    problem = Problem([40, 3, 17])
    exact, same, actual = (
        problem.run(t, backend) for t, backend in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "cpu"))
    )
    for index, results in enumerate(zip(actual, same, exact, strict=True)):
        assert_close_by_rule(*results, "hstu_attention", "forward" if index == 0 else "backward")


def test_masks_by_hand() -> None:
    # Two contextual tokens, three of history, two targets; window 2.
    place = torch.arange(7)
    drawn = ["xxxxx..", "xxxxx..", "xxx....", "..xx...", "...xx..", "....xx.", "....x.x"]
    expected = torch.tensor([[mark == "x" for mark in line] for line in drawn])
    seen = visible(place.unsqueeze(1), place, torch.tensor(5), 2, 2)
    assert torch.equal(seen, expected)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 20), targets=st.integers(0, 20), window=st.integers(1, 22), contextual=st.integers(0, 22))
def test_counts_of_visible_keys_are_those_of_the_masks(length: int, targets: int, window: int, contextual: int) -> None:
    place, history = torch.arange(length), torch.tensor(max(0, length - targets))
    for w in (window, UNBOUNDED):
        seen = visible(place.unsqueeze(1), place, history, w, contextual)
        assert torch.equal(seen.sum(1), visible_counts(place, history, w, contextual))


def test_a_targets_output_does_not_depend_on_the_other_targets() -> None:
    problem = Problem([12])
    q, k, v, pos, time = problem.leaves
    where = (problem.timestamps, problem.query_times)
    options: dict[str, Any] = {"pos_table": pos, "time_table": time, "norm": None}
    together = hstu_attention(q, k, v, problem.offsets, *where, num_targets=torch.tensor([4]), **options)
    for target in range(8, 12):
        kept = torch.tensor([*range(8), target])
        times, asked = (x[kept] for x in where)
        offsets = torch.tensor([0, 9])
        one = {"num_targets": torch.tensor([1])} | options
        alone = hstu_attention(q[kept], k[kept], v[kept], offsets, times, asked, **one)
        torch.testing.assert_close(alone[-1], together[target])


def _operator_arguments(problem: Problem, *, prepared: bool) -> tuple[Any, ...]:
    leaves = [leaf.float().requires_grad_() for leaf in problem.leaves]
    where = (problem.offsets, problem.timestamps, problem.query_times)
    buckets = plan_attention(*where).prepared if prepared else None
    return (*leaves, *where, problem.num_targets, buckets, 7.0, 1.0, UNBOUNDED, 0, True, "cpu")


@pytest.mark.parametrize("prepared", [False, True])
def test_the_operator_keeps_torchs_contract(monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    monkeypatch.undo()
    problem = Problem([5, 0, 3], targets=not prepared)
    torch.library.opcheck(torch.ops.retrieval.hstu_attention.default, _operator_arguments(problem, prepared=prepared))
    where = (problem.offsets, problem.timestamps, problem.query_times)
    torch.library.opcheck(torch.ops.retrieval.hstu_attention_prepare.default, where)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_graph_holds_the_operator(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.undo()
    problem = Problem([5, 0, 3])
    q, k, v, pos, time = (leaf.float().requires_grad_() for leaf in problem.leaves)

    def f(q: Tensor, k: Tensor, v: Tensor, *where: Tensor) -> Tensor:
        plan = plan_attention(*where)
        attended = hstu_attention(
            q, k, v, *plan.where, prepared=plan.prepared, pos_table=pos, time_table=time, norm=3.0
        )
        return attended * 2

    where = (problem.offsets, problem.timestamps, problem.query_times)
    out = torch.compile(f, fullgraph=True, backend=backend)(q, k, v, *where)
    torch.testing.assert_close(out, f(q, k, v, *where))
    grads = torch.autograd.grad(out.sum(), (q, k, v, pos, time))
    for a, b in zip(grads, torch.autograd.grad(f(q, k, v, *where).sum(), (q, k, v, pos, time)), strict=True):
        torch.testing.assert_close(a, b)


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
    problem = Problem([3, 1, 5], targets=True)
    where = (problem.offsets, problem.timestamps, problem.query_times)
    leaves = tuple(leaf.requires_grad_() for leaf in problem.leaves)

    def f(q: Tensor, k: Tensor, v: Tensor, pos: Tensor, time: Tensor) -> Tensor:
        options: dict[str, Any] = {"norm": None, "window": 3, "contextual": 2, "num_targets": problem.num_targets}
        return hstu_attention_reference(q, k, v, *where, pos_table=pos, time_table=time, **options)

    assert torch.autograd.gradcheck(f, leaves)


def test_one_row_by_hand() -> None:
    # Two tokens, one head of width 1; times 0 and 100, asked at 100 and 160.
    q, k, v = (torch.tensor(x).view(2, 1, 1) for x in ([1.0, 2.0], [3.0, -1.0], [10.0, 20.0]))
    pos = torch.tensor([0.5, 0.25])
    time = torch.zeros(NUM_TIME_BUCKETS)
    time[15], time[16], time[13] = 1.0, 2.0, 4.0  # ln 100/.301 = 15.3, ln 160/.301 = 16.9, ln 60/.301 = 13.6
    where = (torch.tensor([0, 2]), torch.tensor([0, 100]), torch.tensor([100, 160]))
    out = hstu_attention(q, k, v, *where, pos_table=pos, time_table=time, norm=4.0)

    def silu(x: float) -> float:
        return x * float(torch.sigmoid(torch.tensor(x)))

    first = silu(3.0 + 0.5 + 1.0) * 10 / 4
    second = (silu(6.0 + 0.25 + 2.0) * 10 + silu(-2.0 + 0.5 + 4.0) * 20) / 4
    torch.testing.assert_close(out.flatten(), torch.tensor([first, second]))


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    long, short = Problem([12], seed=3), Problem([12], seed=3)
    for leaf in long.leaves[:3]:
        leaf[8:] = 99.0
    outputs = [p.run(torch.float64, "cpu", norm=5.0)[0] for p in (long, short)]
    torch.testing.assert_close(outputs[0][:8], outputs[1][:8])
    assert not torch.allclose(outputs[0][8:], outputs[1][8:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k_THD": torch.zeros(5, 1, 2)}, "do not fit"),
        ({"v_THV": torch.zeros(4, 1, 2)}, "do not fit"),
        ({"v_THV": torch.zeros(5, 1, 2, dtype=torch.float64)}, "not one floating dtype"),
        ({"offsets": torch.tensor([0, 4])}, "do not fit offsets that end at 4"),
        ({"offsets": torch.tensor([0, 5], dtype=torch.int32)}, "not int64"),
        ({"timestamps": torch.zeros(5)}, "not int64"),
        ({"num_targets": torch.zeros(2, dtype=torch.int64)}, "num_targets"),
        ({"pos_table": torch.zeros(4)}, "too short for a row of 5"),
        ({"pos_table": torch.zeros(4), "max_length": 6}, "too short for a row of 6"),
        ({"time_table": torch.zeros(128)}, "time_table"),
        ({"window": 0}, "out of range"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("q_THD", "k_THD", "v_THV"), torch.zeros(5, 1, 3))
    arguments |= {"offsets": torch.tensor([0, 5]), "timestamps": torch.arange(5), "query_times": torch.arange(5)}
    arguments |= {"pos_table": None, "time_table": None, "norm": 1.0} | change
    with pytest.raises(ValueError, match=sentence):
        hstu_attention(**arguments)
