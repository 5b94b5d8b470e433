"""Against the row-by-row reference, both ways, on awkward batches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.kernels.backend import Backend
from retrieval.kernels.jagged import jagged_to_padded, padded_to_jagged

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def both_ways(
    lengths: list[int],
    shape: tuple[int, ...],
    max_length: int,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Both outputs and both gradients."""
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(int(offsets[-1]), *shape, generator=g).to(device, dtype).requires_grad_()
    padded = torch.randn(len(lengths), max_length, *shape, generator=g).to(device, dtype).requires_grad_()
    grad = torch.randn(padded.shape, generator=g).to(device, dtype)
    offsets = offsets.to(device)
    out = jagged_to_padded(values, offsets, max_length, -2.5, backend=backend)
    out.backward(grad)
    back = padded_to_jagged(padded, offsets, backend=backend)
    back.backward(values.detach())
    assert values.grad is not None
    assert padded.grad is not None
    return [out.detach(), values.grad, back.detach(), padded.grad]


def check(
    lengths: list[int],
    shape: tuple[int, ...],
    max_length: int,
    backend: Backend,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> None:
    expected = both_ways(lengths, shape, max_length, "reference", device, dtype)
    actual = both_ways(lengths, shape, max_length, backend, device, dtype)
    # Copies: not a bit may differ.
    assert all(a.shape == e.shape and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


AWKWARD: list[tuple[list[int], tuple[int, ...], int]] = [
    ([3, 0, 1, 7], (5,), 7),
    ([3, 0, 1, 7], (2, 3), 4),  # cut
    ([2, 1], (), 5),
    ([0, 0], (3,), 2),
    ([], (3,), 2),
    ([4, 2], (3,), 0),
    ([300, 1, 20], (50,), 300),
    ([5], (300,), 6),
]


@pytest.mark.parametrize(("lengths", "shape", "max_length"), AWKWARD)
def test_awkward_batches_equal_the_reference(lengths: list[int], shape: tuple[int, ...], max_length: int) -> None:
    check(lengths, shape, max_length, "cpu")


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), width=st.integers(0, 4), max_length=st.integers(0, 10))
def test_any_batch_equals_the_reference(lengths: list[int], width: int, max_length: int) -> None:
    check(lengths, (width,), max_length, "cpu")


def test_a_padded_batch_is_what_one_writes_by_hand() -> None:
    padded = jagged_to_padded(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3]), 3, -1.0)
    assert padded.tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]
    assert padded_to_jagged(padded, torch.tensor([0, 2, 2, 3])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_are_those_of_the_values(backend: Backend) -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: jagged_to_padded(x, offsets, 2, 1.0, backend=backend), values)
    assert torch.autograd.gradcheck(lambda x: padded_to_jagged(x, offsets, backend=backend), padded)


def test_the_operators_are_registered_as_torch_wants() -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    values, padded = torch.randn(5, 2, requires_grad=True), torch.randn(3, 4, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.retrieval.jagged_to_padded, (values, offsets, 4, 1.0, "cpu"))
    torch.library.opcheck(torch.ops.retrieval.padded_to_jagged, (padded, offsets, 5, "cpu"))


def test_torch_compile_sees_one_graph() -> None:
    offsets = torch.tensor([0, 2, 2, 5])

    def there_and_back(values: Tensor) -> Tensor:
        return padded_to_jagged(jagged_to_padded(values, offsets, 3), offsets, total=5)

    values = torch.randn(5, 2)
    assert torch.equal(torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(values), values)


def test_what_does_not_fit_is_refused() -> None:
    values, offsets = torch.ones(3, 2), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="negative"):
        jagged_to_padded(values, offsets, -1)
    with pytest.raises(ValueError, match="int64"):
        jagged_to_padded(values, offsets.int(), 3)
    with pytest.raises(ValueError, match="not floating"):
        jagged_to_padded(values.long(), offsets, 3)
    with pytest.raises(ValueError, match="1 rows for 2"):
        padded_to_jagged(torch.ones(2, 3), offsets)
