"""Values, gradients and the dropout mask of the gate, on the CPU; Triton's are in test_gated_norm_triton.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval.kernels import gated_norm_cpu, native
from retrieval.kernels.backend import Backend
from retrieval.kernels.gated_norm import gated_norm
from retrieval.kernels.gated_norm_reference import _philox, gated_norm_reference, keep_mask_reference
from tests.tolerances import assert_close

SEED = 2**40 + 5


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch":
        monkeypatch.setenv("RETRIEVAL_NATIVE", "0")
    native.library.cache_clear()
    if request.param == "compiled" and native.library() is None:
        pytest.skip("no C++ compiler")
    yield
    native.library.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised outputs hold NaN, so that an element which is never written shows."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, u and the output's gradient; u is a slice of wider rows, as in the encoder."""
    g = torch.Generator().manual_seed(seed)
    x, wide, dy = (torch.randn(rows, n, generator=g, dtype=torch.float64) for n in (columns, 2 * columns, columns))
    return x * 3 + 1, wide[:, :columns], dy


def run(data: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, backend: Backend, p: float = 0.3) -> list[Tensor]:
    """Output and both gradients."""
    x, u = (value.detach().to(dtype).requires_grad_() for value in data[:2])
    out = gated_norm(x, u, p=p, seed=SEED, backend=backend)
    out.backward(data[2].to(dtype))
    assert x.grad is not None
    assert u.grad is not None
    return [out.detach(), x.grad, u.grad]


def check(data: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, p: float = 0.3) -> None:
    results = zip(run(data, dtype, "cpu", p), run(data, torch.float64, "reference", p), strict=True)
    for index, (actual, expected) in enumerate(results):
        if expected.numel():
            assert_close(actual, expected, "gated_norm", "backward" if index else "forward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.99])
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 4), (70, 50), (3, 130), (9, 16)])
def test_output_and_gradients_equal_the_reference(rows: int, columns: int, p: float, dtype: torch.dtype) -> None:
    check(inputs(rows, columns), dtype, p)


def test_work_split_into_many_steps_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_norm_cpu, "_ELEMENTS_PER_STEP", 70)
    check(inputs(23, 18), torch.float64)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), columns=st.integers(4, 70), seed=st.integers(0, 1000))
def test_any_shape_equals_the_reference(rows: int, columns: int, seed: int) -> None:
    # With 2 channels x̂ is ±1 and the gradient of x nothing but rounding.
    check(inputs(rows, columns, seed), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    data = tuple(value.to(dtype).double() for value in inputs(20, 50))
    for actual, expected in zip(run(data, dtype, "cpu"), run(data, torch.float32, "cpu"), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected.to(dtype), rtol=0, atol=0)


def test_gradients_of_the_reference_are_those_of_its_formula() -> None:
    x, u, _ = inputs(4, 6)
    leaves = (x.requires_grad_(), u.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: gated_norm_reference(a, b, p=0.3, seed=SEED), leaves)


def test_without_dropout_it_is_torch_s_layer_norm() -> None:
    x, u, _ = inputs(8, 12)
    expected = u * torch.nn.functional.layer_norm(x, (12,), eps=1e-6)
    torch.testing.assert_close(gated_norm(x, u), expected)


def test_philox_gives_the_published_words() -> None:
    # random123's known-answer file, philox4x64 10, all zero.
    words = [int(word[0]) for word in _philox(0, np.zeros(1, np.uint64))]
    assert words == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1])
def test_the_mask_depends_on_seed_row_and_column_alone(seed: int) -> None:
    ones = torch.stack([torch.linspace(1, 2, 50)] * 9)
    mask = gated_norm(ones, torch.ones(9, 50), p=0.4, seed=seed) != 0
    assert torch.equal(mask, torch.from_numpy(keep_mask_reference(seed, 9, 50, 0.4)))
    assert torch.equal(mask[:4], gated_norm(ones[:4], torch.ones(4, 50), p=0.4, seed=torch.tensor([seed])) != 0)
    assert not torch.equal(mask, torch.from_numpy(keep_mask_reference(seed ^ 2, 9, 50, 0.4)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(4000, 25)
    out = gated_norm(x, torch.sign(x), p=p, seed=11)
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float((out == 0).double().mean()) - p) < 5 * sigma
    assert abs(float(out.double().mean()) - 1) < 5 * sigma / (1 - p)


def test_dropped_elements_are_not_correlated_between_neighbours() -> None:
    keep = keep_mask_reference(3, 2000, 48, 0.5).astype(float) * 2 - 1
    for rows, columns in ((0, 1), (1, 0), (0, 4), (0, 16)):
        product = keep[rows:, columns:] * keep[: len(keep) - rows, : keep.shape[1] - columns]
        assert abs(product.mean()) < 5 / product.size**0.5


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_is_a_well_formed_torch_operation(p: float) -> None:
    x, u = (value.float().requires_grad_() for value in inputs(5, 7)[:2])
    torch.library.opcheck(torch.ops.retrieval.gated_norm.default, (x, u, torch.tensor(SEED), p, "cpu"))


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_it_compiles_without_graph_breaks(mode: str) -> None:
    def f(x: Tensor, u: Tensor, seed: Tensor) -> Tensor:
        return gated_norm(x, u, p=0.3, seed=seed).sum()

    grads = []
    for call in (f, torch.compile(f, fullgraph=True, backend=mode)):
        x, u = (value.float().requires_grad_() for value in inputs(6, 20)[:2])
        call(x, u, torch.tensor(SEED)).backward()
        grads.append((x.grad, u.grad))
    for plain, compiled in zip(*grads, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x_TC": torch.zeros(3)}, "not two"),
        ({"u_TC": torch.zeros(2, 5)}, "not two"),
        ({"u_TC": torch.zeros(2, 4, dtype=torch.float64)}, "not two"),
        ({"x_TC": torch.zeros(2, 0), "u_TC": torch.zeros(2, 0)}, "channels"),
        ({"p": 1.0}, "not in"),
        ({"p": -0.1}, "not in"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "not one int64"),
        ({"seed": torch.zeros(1)}, "not one int64"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"x_TC": torch.zeros(2, 4), "u_TC": torch.zeros(2, 4), "p": 0.1, "seed": 1} | change
    with pytest.raises(ValueError, match=sentence):
        gated_norm(arguments.pop("x_TC"), arguments.pop("u_TC"), **arguments)
