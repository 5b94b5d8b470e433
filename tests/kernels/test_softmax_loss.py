"""Against the reference with all logits in memory: the loss and every gradient, on awkward inputs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval.kernels import softmax_loss_cpu, softmax_loss_native, softmax_loss_rows
from retrieval.kernels.backend import Backend
from retrieval.kernels.softmax_loss import softmax_loss
from retrieval.kernels.softmax_loss_reference import softmax_loss_reference
from tests.tolerances import RULE, assert_close, assert_close_by_rule


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that an element which is never written shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(real: Any) -> Any:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return empty


class Problem:
    """Random inputs; `negatives` None is the full softmax, `own` gives each position its own, `biased` adds biases."""

    def __init__(
        self,
        users: int,
        items: int,
        width: int,
        negatives: int | None,
        seed: int = 0,
        *,
        own: bool = False,
        biased: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        unit = torch.nn.functional.normalize(torch.randn(users, width, generator=g, dtype=torch.float64), dim=1)
        # In bfloat16, so that every dtype computes from the same numbers.
        self.users = unit.bfloat16().double()
        self.table = torch.randn(items, width, generator=g, dtype=torch.float64).bfloat16().double()
        self.targets = torch.randint(items, (users,), generator=g)
        self.negatives = None
        if negatives is not None:
            self.negatives = torch.randint(items, (users, negatives) if own else (negatives,), generator=g)
        self.constants = {"weights": torch.rand(users, generator=g, dtype=torch.float64) + 0.1}
        if biased:
            self.constants["positive_bias"] = torch.randn(users, generator=g, dtype=torch.float64)
            if self.negatives is not None:
                self.constants["negative_bias"] = torch.randn(self.negatives.shape, generator=g, dtype=torch.float64)

    def run(
        self, dtype: torch.dtype, backend: Backend, temperature: float = 0.05, device: torch.device | None = None
    ) -> list[Tensor]:
        """Loss, and gradients of users and table."""
        users, table = (x.to(device, dtype, copy=True).requires_grad_() for x in (self.users, self.table))
        negatives = None if self.negatives is None else self.negatives.to(device)
        targets = self.targets.to(device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        constants = {name: x.to(device, wide) for name, x in self.constants.items()}
        loss = softmax_loss(users, targets, table, negatives, temperature=temperature, backend=backend, **constants)
        # A factor, so that one that the gradients forget shows.
        (3 * loss).backward()
        assert users.grad is not None
        assert table.grad is not None
        return [loss.detach(), users.grad, table.grad]


def check(problem: Problem, dtype: torch.dtype, temperature: float = 0.05) -> None:
    expected = problem.run(torch.float64, "reference", temperature)
    actual = problem.run(dtype, "cpu", temperature)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():
            assert_close(a, e, "softmax_loss", "forward" if index == 0 else "backward")


def check_by_rule(
    problem: Problem,
    dtype: torch.dtype,
    backend: Backend,
    temperature: float = 0.05,
    device: torch.device | None = None,
) -> None:
    """By the error of plain torch in the same dtype."""
    exact = problem.run(torch.float64, "reference", temperature, device)
    torchs = problem.run(dtype, "reference", temperature, device)
    loss, *gradients = problem.run(dtype, backend, temperature, device)
    # A sum of many roundings, of which torch's may cancel by luck: one of the inputs' dtype is always granted.
    error, torchs_error = float((loss - exact[0]).abs()), float((torchs[0] - exact[0]).abs())
    assert error <= max(RULE["forward"] * torchs_error, torch.finfo(dtype).eps * float(exact[0]))
    for a, t, e in zip(gradients, torchs[1:], exact[1:], strict=True):
        assert_close_by_rule(a, t, e, "softmax_loss", "backward")


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("negatives", [None, 40, 1, 0, 700], ids=lambda r: "full" if r is None else f"R{r}")
def test_loss_and_gradients_equal_the_reference(
    dtype: torch.dtype, negatives: int | None, biased: bool, own: bool
) -> None:
    check(Problem(70, 90, 13, negatives, own=own, biased=biased), dtype)


@pytest.mark.parametrize(("negatives", "own"), [(None, False), (40, False), (40, True)])
@pytest.mark.parametrize("temperature", [1e-3, 0.05, 10.0])
def test_any_temperature_is_stable(negatives: int | None, own: bool, temperature: float) -> None:
    check(Problem(30, 60, 8, negatives, own=own), torch.float64, temperature)


@settings(max_examples=40, deadline=None)
@given(
    users=st.integers(0, 20),
    items=st.integers(1, 20),
    width=st.integers(2, 9),
    negatives=st.none() | st.integers(0, 20),
    own=st.booleans(),
    biased=st.booleans(),
    step=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_steps_equals_the_reference(
    users: int, items: int, width: int, negatives: int | None, own: bool, biased: bool, step: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_loss_cpu, "_LOGITS_PER_STEP", step)
        patch.setattr(softmax_loss_cpu, "_LEAST_USERS", 1)
        patch.setattr(softmax_loss_rows, "_PAIRS_PER_STEP", step)
        # A temperature at which no loss is so small that the reference has lost its digits.
        check(Problem(users, items, width, negatives, seed, own=own, biased=biased), torch.float64, 0.5)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the matrix unit where the processor has one, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(softmax_loss_native, "available", lambda: False)
    elif not softmax_loss_native.available():
        pytest.skip("needs a C++ compiler and a processor with AMX")
    return str(request.param)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("negatives", [None, 400, 1, 0])
@pytest.mark.parametrize("width", [50, 64, 70])
def test_bfloat16_over_many_blocks_is_as_exact_as_torch(
    path: str, width: int, negatives: int | None, biased: bool
) -> None:
    # 90 items: of 400 negatives most are repeats, so that many are left out.
    problem = Problem(300, 700 if negatives is None else 90, width, negatives, biased=biased)
    for temperature in (1e-2, 0.05, 10.0):
        check_by_rule(problem, torch.bfloat16, "cpu", temperature)


@pytest.mark.parametrize("path", ["compiled"], indirect=True)
def test_the_matrix_unit_gives_the_same_bits_on_any_number_of_threads(path: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(Problem(400, 600, 50, None).run(torch.bfloat16, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("negatives", "own"), [(None, False), (40, False), (40, True)])
def test_half_precision_is_as_exact_as_torch(dtype: torch.dtype, negatives: int | None, own: bool) -> None:
    check_by_rule(Problem(70, 90, 13, negatives, own=own, biased=True), dtype, "cpu")


def test_small_losses_keep_their_digits() -> None:
    # Far below the resolution of float32 beside a logit of 20.
    users, table = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = softmax_loss(users, torch.tensor([0]), table, temperature=0.05, backend="cpu")
    assert float(loss) == pytest.approx(2.0611536e-9, rel=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_a_position_with_nothing_to_contrast_has_no_loss(own: bool) -> None:
    for result in Problem(5, 1, 4, 3, own=own).run(torch.float32, "cpu"):
        assert not result.any()


@pytest.mark.parametrize("negatives", [None, 3])
def test_no_positions_have_no_loss(negatives: int | None) -> None:
    for own in (False, True):
        for result in Problem(0, 6, 4, negatives, own=own).run(torch.float32, "cpu"):
            assert not result.any()


def test_own_negatives_that_all_positions_have_are_shared_ones() -> None:
    shared, own = Problem(9, 12, 4, 7, biased=True), Problem(9, 12, 4, 7, biased=True)
    assert own.negatives is not None
    own.negatives = own.negatives.expand(9, 7)
    own.constants["negative_bias"] = own.constants["negative_bias"].expand(9, 7)
    for a, b in zip(shared.run(torch.float64, "cpu"), own.run(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_whole_table_as_negatives_is_the_full_softmax() -> None:
    full, sampled = Problem(9, 12, 4, None), Problem(9, 12, 4, None)
    sampled.negatives = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for a, b in zip(full.run(torch.float64, "cpu"), sampled.run(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_reference_has_the_gradient_of_its_values() -> None:
    problem = Problem(4, 6, 3, 5, biased=True)
    leaves = [problem.users.requires_grad_(), problem.table.requires_grad_()]

    def loss(users: Tensor, table: Tensor) -> Tensor:
        rows, constants = problem.negatives, problem.constants
        return softmax_loss_reference(users, problem.targets, table, rows, temperature=0.5, **constants)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("wanted", ["users", "table", "neither"])
def test_gradients_that_nobody_wants_are_not_needed(wanted: str) -> None:
    problem = Problem(5, 7, 3, 4)
    expected = problem.run(torch.float64, "reference")
    users, table = problem.users.requires_grad_(wanted == "users"), problem.table.requires_grad_(wanted == "table")
    rows, constants = problem.negatives, problem.constants
    loss = softmax_loss(users, problem.targets, table, rows, temperature=0.05, backend="cpu", **constants)
    torch.testing.assert_close(loss.detach(), expected[0])
    if wanted != "neither":
        (3 * loss).backward()
        torch.testing.assert_close(users.grad if wanted == "users" else table.grad, expected[1 + (wanted == "table")])


@pytest.mark.parametrize("kind", ["cpu", "rows"])
def test_the_operator_is_registered_as_torch_wants(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 3, generator=g, requires_grad=True) for n in (5, 7))
    positive, weights = torch.randn(5, generator=g, requires_grad=True), torch.randn(5, generator=g)
    bias = torch.randn(7 if kind == "cpu" else (5, 4), generator=g)
    first = torch.tensor([0, 1, 2, 7, 3], dtype=torch.int32)
    last = torch.tensor([0, 3, 3, 7, 4], dtype=torch.int32)
    where = (first, last) if kind == "cpu" else (torch.randint(7, (5, 4), generator=g), torch.randint(7, (5,)))
    for with_gradients in (True, False):
        given: tuple[Any, ...] = (users, items, positive, bias, *where, weights, 2.0, with_gradients, kind)
        if not with_gradients:
            given = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
        torch.library.opcheck(torch.ops.retrieval.softmax_loss, given)


@pytest.mark.parametrize(("negatives", "own"), [(None, False), (4, False), (4, True)])
def test_torch_compile_sees_one_graph(negatives: int | None, own: bool) -> None:
    problem = Problem(5, 7, 3, negatives, own=own, biased=True)
    expected = problem.run(torch.float64, "cpu")
    compiled = torch.compile(softmax_loss, fullgraph=True, backend="aot_eager")
    users, table = problem.users.requires_grad_(), problem.table.requires_grad_()
    rows, constants = problem.negatives, problem.constants
    loss = compiled(users, problem.targets, table, rows, temperature=0.05, backend="cpu", **constants)
    (3 * loss).backward()
    for a, e in zip((loss.detach(), users.grad, table.grad), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users_TD": torch.ones(2, 4)}, "are not"),
        ({"users_TD": torch.ones(2, 3, dtype=torch.int64)}, "no floating dtype"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "one axis of int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "3 targets for 2 users"),
        ({"negatives": torch.zeros(2, 1, 1, dtype=torch.int64)}, "one or two axes of int64"),
        ({"temperature": 0.0}, "not positive"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = {"users_TD": torch.ones(2, 3), "targets": torch.tensor([0, 1]), "item_table": torch.ones(5, 3)}
    with pytest.raises(ValueError, match=message):
        softmax_loss(**(inputs | {"temperature": 1.0} | change))


@pytest.mark.parametrize(("negatives", "own"), [(None, False), (600, False), (600, True)])
def test_no_tensor_of_all_logits_is_made(negatives: int | None, own: bool) -> None:
    """Largest tensor of any operation, forward and backward; logits would be 700 × 600 (all of them gathered, × 8)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_loss_cpu, "_LOGITS_PER_STEP", 20_000)
        patch.setattr(softmax_loss_rows, "_PAIRS_PER_STEP", 20_000 // 8)
        problem = Problem(700, 600, 8, negatives, own=own)
        given = problem.negatives.numel() if own and problem.negatives is not None else 0
        with Largest() as seen:
            problem.run(torch.float32, "cpu")
    # Own negatives are an input of T × R integers.
    assert seen.elements <= max(20_000, given)
    assert seen.floats <= 20_000, "numbers for all pairs"


class Largest(TorchDispatchMode):
    """Most elements of a tensor that an operation returned, and of one of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.floats = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                # A view shows all of its base.
                size = tensor.values().numel() if tensor.layout == torch.sparse_csr else tensor.numel()
                self.elements = max(self.elements, size)
                self.floats = max(self.floats, size if tensor.is_floating_point() else 0)
        return out


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"negatives": (3, 2)}, "negatives of 3 positions for 4 targets"),
        ({"negatives": (2,), "negative_bias": (3,)}, r"negative_bias \(3,\) for negatives \(2,\)"),
        ({"negative_bias": (3,)}, r"negative_bias \(3,\) for negatives None"),
        ({"positive_bias": (3,)}, r"positive_bias \(3,\) for 4 targets"),
        ({"weights": (4, 1)}, r"weights \(4, 1\) for 4 targets"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        softmax_loss(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(5, 3), temperature=1.0, **given)
