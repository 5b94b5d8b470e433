"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from retrieval.kernels.softmax_loss import softmax_loss
from tests.kernels.device import DEVICE
from tests.kernels.test_softmax_loss import Problem, check_by_rule, poisoned

pytest.importorskip("triton")

from retrieval.kernels.softmax_loss_triton import user_parts


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def check(problem: Problem, dtype: torch.dtype, temperature: float = 0.05) -> None:
    check_by_rule(problem, dtype, "triton", temperature, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("negatives", [None, 150], ids=["full", "sampled"])
@pytest.mark.parametrize("width", [50, 128, 250])
def test_loss_and_gradients_equal_the_reference(width: int, negatives: int | None, dtype: torch.dtype) -> None:
    check(Problem(140, 170, width, negatives, biased=True), dtype)


@pytest.mark.parametrize(
    ("users", "items", "width", "negatives"),
    [
        (1, 1, 1, None),
        (1, 5, 16, 1),
        (0, 5, 4, 3),
        (5, 5, 4, 0),
        (300, 3, 7, 130),
        (64, 128, 64, None),
        (130, 9, 25, 9),
    ],
)
def test_awkward_shapes_equal_the_reference(users: int, items: int, width: int, negatives: int | None) -> None:
    check(Problem(users, items, width, negatives), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_temperatures_are_stable(dtype: torch.dtype) -> None:
    for temperature in (1e-2, 10.0):
        check(Problem(70, 90, 8, None), dtype, temperature)


def test_float16_keeps_the_gradient_of_a_mean() -> None:
    problem = Problem(40, 300, 8, None)
    problem.constants["weights"] = torch.full((40,), 1e-6, dtype=torch.float64)
    problem.users = problem.users[:1].expand(40, 8)
    check(problem, torch.float16)


def test_the_same_inputs_give_the_same_bits() -> None:
    problem = Problem(300, 80, 20, 70)
    first, second = (problem.run(torch.float32, "triton", device=DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_cover_all_users_once() -> None:
    for users in (1, 63, 64, 65, 1000, 14000):
        for items in (1, 512, 100_000):
            parts, each = user_parts(users, items, 64, 128, 132)
            assert (parts - 1) * each < users <= parts * each
            assert each % 64 == 0
    assert user_parts(14000, 512, 64, 128, 132)[0] * 4 > 132, "few items leave a GPU idle"
    assert user_parts(14000, 100_000, 64, 128, 132)[0] == 1


def test_what_the_kernels_cannot_do_is_refused() -> None:
    targets = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for dtype, width in ((torch.float64, 4), (torch.float32, 257)):
        users, table = (torch.ones(n, width, dtype=dtype, device=DEVICE) for n in (2, 3))
        with pytest.raises(ValueError, match="does not take"):
            softmax_loss(users, targets, table, temperature=1.0, backend="triton")
