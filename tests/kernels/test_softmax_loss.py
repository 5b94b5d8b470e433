"""Against the reference with all logits in memory: losses and every gradient, on awkward inputs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.kernels import softmax_loss_cpu
from retrieval.kernels.backend import Backend
from retrieval.kernels.softmax_loss import softmax_loss
from retrieval.kernels.softmax_loss_reference import softmax_loss_reference
from tests.tolerances import assert_close, assert_close_by_rule


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
    """Random inputs; `negatives` None is the full softmax."""

    def __init__(self, users: int, items: int, width: int, negatives: int | None, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        unit = torch.nn.functional.normalize(torch.randn(users, width, generator=g, dtype=torch.float64), dim=1)
        # In bfloat16, so that every dtype computes from the same numbers.
        self.users = unit.bfloat16().double()
        self.table = torch.randn(items, width, generator=g, dtype=torch.float64).bfloat16().double()
        self.targets = torch.randint(items, (users,), generator=g)
        self.negatives = None if negatives is None else torch.randint(items, (negatives,), generator=g)
        self.grad = torch.randn(users, generator=g, dtype=torch.float64)

    def run(
        self, dtype: torch.dtype, backend: Backend, temperature: float = 0.05, device: torch.device | None = None
    ) -> list[Tensor]:
        """Losses, and gradients of users and table."""
        users, table = (x.to(device, dtype, copy=True).requires_grad_() for x in (self.users, self.table))
        negatives = None if self.negatives is None else self.negatives.to(device)
        targets = self.targets.to(device)
        losses = softmax_loss(users, targets, table, negatives, temperature=temperature, backend=backend)
        losses.backward(self.grad.to(losses))
        assert users.grad is not None
        assert table.grad is not None
        return [losses.detach(), users.grad, table.grad]


def check(problem: Problem, dtype: torch.dtype, temperature: float = 0.05) -> None:
    expected = problem.run(torch.float64, "reference", temperature)
    actual = problem.run(dtype, "cpu", temperature)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if e.numel():
            assert_close(a, e, "softmax_loss", "forward" if index == 0 else "backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("negatives", [None, 40, 1, 0, 700], ids=lambda r: "full" if r is None else f"R{r}")
def test_losses_and_gradients_equal_the_reference(dtype: torch.dtype, negatives: int | None) -> None:
    check(Problem(70, 90, 13, negatives), dtype)


@pytest.mark.parametrize("negatives", [None, 40])
@pytest.mark.parametrize("temperature", [1e-3, 0.05, 10.0])
def test_any_temperature_is_stable(negatives: int | None, temperature: float) -> None:
    check(Problem(30, 60, 8, negatives), torch.float64, temperature)


@settings(max_examples=40, deadline=None)
@given(
    users=st.integers(0, 20),
    items=st.integers(1, 20),
    width=st.integers(2, 9),
    negatives=st.none() | st.integers(0, 20),
    steps=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_steps_equals_the_reference(
    users: int, items: int, width: int, negatives: int | None, steps: tuple[int, int], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax_loss_cpu, "_USERS_PER_STEP", steps[0])
        patch.setattr(softmax_loss_cpu, "_ITEMS_PER_STEP", steps[1])
        # A temperature at which no loss is so small that the reference has lost its digits.
        check(Problem(users, items, width, negatives, seed), torch.float64, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("negatives", [None, 40])
def test_half_precision_is_as_exact_as_torch(dtype: torch.dtype, negatives: int | None) -> None:
    problem = Problem(70, 90, 13, negatives)
    exact, torchs = problem.run(torch.float64, "reference"), problem.run(dtype, "reference")
    for index, (a, t, e) in enumerate(zip(problem.run(dtype, "cpu"), torchs, exact, strict=True)):
        assert_close_by_rule(a, t, e, "softmax_loss", "forward" if index == 0 else "backward")


def test_small_losses_keep_their_digits() -> None:
    # Far below the resolution of float32 beside a logit of 20.
    users, table = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    losses = softmax_loss(users, torch.tensor([0]), table, temperature=0.05, backend="cpu")
    assert float(losses) == pytest.approx(2.0611536e-9, rel=1e-5)


def test_a_position_with_nothing_to_contrast_has_no_loss() -> None:
    problem = Problem(5, 1, 4, 3)
    losses, users, table = problem.run(torch.float32, "cpu")
    assert not losses.any()
    assert not users.any()
    assert not table.any()


def test_the_whole_table_as_negatives_is_the_full_softmax() -> None:
    full, sampled = Problem(9, 12, 4, None), Problem(9, 12, 4, None)
    sampled.negatives = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for a, b in zip(full.run(torch.float64, "cpu"), sampled.run(torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_reference_has_the_gradient_of_its_values() -> None:
    problem = Problem(4, 6, 3, 5)
    leaves = [problem.users.requires_grad_(), problem.table.requires_grad_()]

    def losses(users: Tensor, table: Tensor) -> Tensor:
        return softmax_loss_reference(users, problem.targets, table, problem.negatives, temperature=0.5)

    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("wanted", ["users", "table", "neither"])
def test_gradients_that_nobody_wants_are_not_needed(wanted: str) -> None:
    problem = Problem(5, 7, 3, 4)
    expected = problem.run(torch.float64, "reference")
    users, table = problem.users.requires_grad_(wanted == "users"), problem.table.requires_grad_(wanted == "table")
    losses = softmax_loss(users, problem.targets, table, problem.negatives, temperature=0.05, backend="cpu")
    torch.testing.assert_close(losses.detach(), expected[0])
    if wanted != "neither":
        losses.backward(problem.grad)
        torch.testing.assert_close(users.grad if wanted == "users" else table.grad, expected[1 + (wanted == "table")])


def test_the_operators_are_registered_as_torch_wants() -> None:
    g = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, 3, generator=g, requires_grad=True) for n in (5, 7))
    positive = torch.randn(5, generator=g, requires_grad=True)
    first = torch.tensor([0, 1, 2, 7, 3], dtype=torch.int32)
    last = torch.tensor([0, 3, 3, 7, 4], dtype=torch.int32)
    torch.library.opcheck(torch.ops.retrieval.softmax_loss, (users, items, positive, first, last, 2.0, True, "cpu"))
    inputs = (positive, users, items, positive, first, last, 2.0, "cpu")
    torch.library.opcheck(torch.ops.retrieval.softmax_loss_backward, tuple(
        x.detach() if isinstance(x, Tensor) else x for x in inputs
    ))  # fmt: skip


@pytest.mark.parametrize("negatives", [None, 4])
def test_torch_compile_sees_one_graph(negatives: int | None) -> None:
    problem = Problem(5, 7, 3, negatives)
    expected = problem.run(torch.float64, "cpu")
    compiled = torch.compile(softmax_loss, fullgraph=True, backend="aot_eager")
    users, table = problem.users.requires_grad_(), problem.table.requires_grad_()
    losses = compiled(users, problem.targets, table, problem.negatives, temperature=0.05, backend="cpu")
    losses.backward(problem.grad)
    for a, e in zip((losses.detach(), users.grad, table.grad), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users_TD": torch.ones(2, 4)}, "are not"),
        ({"users_TD": torch.ones(2, 3, dtype=torch.int64)}, "no floating dtype"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "one axis of int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "3 targets for 2 users"),
        ({"negatives": torch.zeros(1, 1, dtype=torch.int64)}, "one axis of int64"),
        ({"temperature": 0.0}, "not positive"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    inputs = {"users_TD": torch.ones(2, 3), "targets": torch.tensor([0, 1]), "item_table": torch.ones(5, 3)}
    with pytest.raises(ValueError, match=message):
        softmax_loss(**(inputs | {"temperature": 1.0} | change))
