"""Few queries against many keys: against the reference, and against the rows of full attention."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.kernels import hstu_decode_cpu
from retrieval.kernels.backend import Backend
from retrieval.kernels.hstu_attention import hstu_attention_reference
from retrieval.kernels.hstu_decode import hstu_decode
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS
from tests.tolerances import assert_close


class Problem:
    """Random inputs in float64 for rows of the given lengths; keys and values are slices of wider tokens."""

    def __init__(
        self, lengths: list[int], queries: int = 1, heads: int = 2, d: int = 5, v: int = 3, seed: int = 0
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        rows, longest = len(lengths), max(lengths, default=0)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        total = int(self.offsets[-1])
        self.timestamps = torch.randint(0, 10**8, (total,), generator=g)
        self.query_times = torch.randint(0, 10**9, (rows, queries), generator=g)
        # From before the first key to behind the last.
        self.query_positions = torch.randint(-1, longest + 2, (rows, queries), generator=g)
        shapes = [(rows, queries, heads, d), (total, 2 * heads, d), (total, 2 * heads, v), (longest + 2,)]
        self.floats = [
            torch.randn(*shape, generator=g, dtype=torch.float64) for shape in (*shapes, (NUM_TIME_BUCKETS,))
        ]
        self.heads = heads

    def run(
        self, dtype: torch.dtype, backend: Backend, device: str = "cpu", tables: str = "pt", **options: Any
    ) -> Tensor:
        q, k, v, pos, time = (value.to(device, dtype) for value in self.floats)
        k, v = k[:, self.heads :], v[:, : self.heads]
        where = (self.offsets, *(x.to(device) for x in (self.timestamps, self.query_times, self.query_positions)))
        pos_table, time_table = pos if "p" in tables else None, time if "t" in tables else None
        return hstu_decode(q, k, v, *where, pos_table=pos_table, time_table=time_table, backend=backend, **options)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def check(problem: Problem, dtype: torch.dtype, **options: Any) -> None:
    options = {"norm": 7.0} | options
    expected = problem.run(torch.float64, "reference", **options)
    actual = problem.run(dtype, "cpu", **options)
    assert actual.shape == expected.shape
    if expected.numel():
        assert_close(actual, expected, "hstu_decode", "forward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [7.0, None], ids=["constant", "visible-keys"])
@pytest.mark.parametrize("tables", ["pt", "p", "t", ""], ids=["both", "position", "time", "none"])
@pytest.mark.parametrize("queries", [1, 3])
def test_output_equals_the_reference(queries: int, tables: str, norm: float | None, dtype: torch.dtype) -> None:
    check(Problem([4, 0, 1, 9, 9, 2, 0], queries), dtype, norm=norm, tables=tables, alpha=0.7)


@pytest.mark.parametrize(
    "lengths", [[0], [0, 0], [1], [300, 1, 1, 1, 3], [17] * 40, []], ids=lambda rows: f"B{len(rows)}"
)
def test_awkward_batches_equal_the_reference(lengths: list[int]) -> None:
    check(Problem(lengths), torch.float32)
    check(Problem(lengths, queries=0), torch.float32)


@pytest.mark.parametrize(("step", "long"), [(60, 1 << 15), (1, 1 << 15), (1 << 18, 1)], ids=["steps", "rows", "long"])
def test_every_way_of_working_equals_the_reference(monkeypatch: pytest.MonkeyPatch, step: int, long: int) -> None:
    monkeypatch.setattr(hstu_decode_cpu, "_ELEMENTS_PER_STEP", step)
    monkeypatch.setattr(hstu_decode_cpu, "_LONG_ROW", long)
    check(Problem([0, 4, 0, 1, 9, 30, 2, 0]), torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    queries=st.integers(1, 4),
    heads=st.integers(1, 3),
    d=st.integers(1, 9),
    v=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_shape_equals_the_reference(
    lengths: list[int], queries: int, heads: int, d: int, v: int, seed: int
) -> None:
    check(Problem(lengths, queries, heads, d, v, seed), torch.float64)


@pytest.mark.parametrize("norm", [7.0, None])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_query_gives_its_row_of_full_attention(backend: Backend, norm: float | None) -> None:
    problem = Problem([6, 1, 11])
    _, k, v, pos, time = problem.floats
    k, v = k[:, 2:], v[:, :2]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(k.shape, generator=generator, dtype=torch.float64)
    query_times = problem.timestamps + 1000
    biases: dict[str, Any] = {"pos_table": pos, "time_table": time, "norm": norm}
    full = hstu_attention_reference(q, k, v, problem.offsets, problem.timestamps, query_times, **biases)
    for place in (0, 3, -1):
        positions = torch.tensor([min(place, n - 1) if place >= 0 else n - 1 for n in (6, 1, 11)])
        at = problem.offsets[:-1] + positions
        where = (problem.offsets, problem.timestamps, query_times[at].unsqueeze(1), positions.unsqueeze(1))
        out = hstu_decode(q[at].unsqueeze(1), k, v, *where, **biases, backend=backend)
        assert_close(out.squeeze(1), full[at], "hstu_decode", "forward")


def test_one_target_behind_its_keys_by_hand() -> None:
    # Keys 3 and −1 at times 0 and 100; the query 2 stands at position 2, at time 160.
    k, v = (torch.tensor(x).view(2, 1, 1) for x in ([3.0, -1.0], [10.0, 20.0]))
    pos = torch.tensor([9.0, 0.5, 0.25])
    time = torch.zeros(NUM_TIME_BUCKETS)
    time[16], time[13] = 2.0, 4.0  # ln 160/.301 = 16.9, ln 60/.301 = 13.6
    where = (torch.tensor([0, 2]), torch.tensor([0, 100]), torch.tensor([[160]]), torch.tensor([[2]]))
    q = torch.full((1, 1, 1, 1), 2.0)
    out = hstu_decode(q, k, v, *where, pos_table=pos, time_table=time, norm=None)
    first, second = 6.0 + 0.25 + 2.0, -2.0 + 0.5 + 4.0
    expected = sum(s * float(torch.sigmoid(torch.tensor(s))) * w for s, w in ((first, 10), (second, 20))) / 2
    torch.testing.assert_close(float(out), expected, rtol=1e-6, atol=0)


def test_half_precision_is_computed_in_float32() -> None:
    problem = Problem([5, 9], queries=2)
    problem.floats = [value.bfloat16().double() for value in problem.floats]
    rounded = problem.run(torch.float32, "cpu", norm=7.0).bfloat16()
    assert torch.equal(problem.run(torch.bfloat16, "cpu", norm=7.0), rounded)


def test_it_is_a_well_formed_torch_operation() -> None:
    problem = Problem([3, 0, 5])
    q, k, v, pos, time = (value.float() for value in problem.floats)
    where = (problem.offsets, problem.timestamps, problem.query_times, problem.query_positions)
    arguments = (q, k[:, 2:], v[:, :2], *where, pos, time, 7.0, 1.0, None, "cpu")
    torch.library.opcheck(torch.ops.retrieval.hstu_decode.default, arguments)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_it_compiles_without_graph_breaks(mode: str) -> None:
    problem = Problem([3, 0, 5])
    compiled = torch.compile(lambda: problem.run(torch.float32, "cpu", norm=None), fullgraph=True, backend=mode)
    assert torch.equal(compiled(), problem.run(torch.float32, "cpu", norm=None))


def test_inputs_that_want_a_gradient_are_refused() -> None:
    problem = Problem([3])
    problem.floats[3].requires_grad_()
    with pytest.raises(ValueError, match="has no gradient"):
        problem.run(torch.float64, "cpu", norm=1.0)
    with torch.no_grad():
        problem.run(torch.float64, "cpu", norm=1.0)


def test_a_position_outside_the_table_is_refused() -> None:
    problem = Problem([3])
    problem.query_positions[0, 0] = 5
    with pytest.raises(ValueError, match="position 5 is outside a table of 5"):
        problem.run(torch.float64, "cpu", norm=1.0)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("q", torch.zeros(1, 1, 2, 4), "do not fit"),
        ("v", torch.zeros(4, 1, 3), "do not fit"),
        ("v", torch.zeros(5, 1, 3).double(), "one floating dtype"),
        ("offsets", torch.tensor([0, 2, 5]), "offsets"),
        ("timestamps", torch.zeros(5, dtype=torch.int32), "timestamps"),
        ("query_times", torch.zeros(1, 2, dtype=torch.int64), "query_times"),
        ("query_positions", torch.zeros(1, dtype=torch.int64), "query_positions"),
        ("pos_table", torch.zeros(1, 9), "pos_table"),
        ("time_table", torch.zeros(128), "time_table"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, value: Tensor, sentence: str) -> None:
    whole = torch.zeros(1, 1, dtype=torch.int64)
    arguments: dict[str, Any] = {"q": torch.zeros(1, 1, 1, 3), "k": torch.zeros(5, 1, 3), "v": torch.zeros(5, 1, 2)}
    arguments |= {"offsets": torch.tensor([0, 5]), "timestamps": torch.zeros(5, dtype=torch.int64)}
    arguments |= {"query_times": whole, "query_positions": whole, "pos_table": None, "time_table": None}
    arguments[name] = value
    tables = {key: arguments.pop(key) for key in ("pos_table", "time_table")}
    with pytest.raises(ValueError, match=sentence):
        hstu_decode(*arguments.values(), **tables, norm=1.0)
