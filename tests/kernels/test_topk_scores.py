"""Every implementation of `topk_scores` against a float64 oracle, ties compared as ties."""

import importlib.util

import pytest
import torch
from torch import Tensor

from retrieval.kernels import topk_scores_cpu
from retrieval.kernels.backend import Backend
from retrieval.kernels.topk_scores import topk_scores
from tests.kernels.device import DEVICE

BACKENDS: list[Backend] = ["reference", "cpu"]
if importlib.util.find_spec("triton") is not None:
    BACKENDS.append("triton")


def packed(mask: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(mask, (0, -len(mask) % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def assert_best(queries: Tensor, items: Tensor, k: int, mask: Tensor | None, backend: Backend) -> None:
    allowed = None if mask is None else packed(mask).to(DEVICE)
    scores, rows = (x.cpu() for x in topk_scores(queries.to(DEVICE), items.to(DEVICE), k, allowed, backend=backend))
    assert scores.shape == rows.shape == (len(queries), k)
    truth = queries.to(items.dtype).double() @ items.double().T
    eligible = torch.arange(len(items)) if mask is None else mask.nonzero()[:, 0]
    wanted = min(k, len(eligible))
    assert (rows[:, wanted:] == -1).all()
    assert (scores[:, wanted:] == -torch.inf).all()
    got = rows[:, :wanted]
    assert all(len(set(row)) == wanted for row in got.tolist())
    assert torch.isin(got, eligible).all()
    best = truth[:, eligible].sort(dim=1, descending=True).values[:, :wanted]
    scale = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
    torch.testing.assert_close(scores[:, :wanted].double(), best, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(scores[:, :wanted].double(), truth.gather(1, got), atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("queries", "items", "width", "k", "share", "dtype"),
    [
        (1, 300, 8, 5, None, torch.float32),
        (3, 129, 17, 40, 0.3, torch.float32),
        (17, 70, 50, 200, None, torch.float32),  # more than there are
        (2, 200, 33, 7, 0.02, torch.float32),  # fewer survivors than wanted
        (2, 40, 4, 3, 0.0, torch.float32),
        (2, 1, 1, 1, None, torch.float32),
        (2, 0, 4, 3, None, torch.float32),
        (4, 150, 16, 10, 0.5, torch.bfloat16),
        (4, 150, 16, 10, None, torch.float16),
    ],
)
def test_the_best_items_are_found(
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    queries: int,
    items: int,
    width: int,
    k: int,
    share: float | None,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(topk_scores_cpu, "_ELEMENTS", 64 * queries)
    g = torch.Generator().manual_seed(0)
    asked = torch.randn(queries, width, generator=g)
    x = torch.randn(items, width, generator=g).to(dtype)
    mask = None if share is None else torch.rand(items, generator=g) < share
    assert_best(asked, x, k, mask, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_come_by_row_and_zeros_are_items(backend: Backend) -> None:
    items = torch.zeros(100, 4)
    items[[70, 9, 41], 0] = 1
    scores, rows = topk_scores(torch.eye(4)[:2].to(DEVICE), items.to(DEVICE), 5, backend=backend)
    assert rows[0, :3].tolist() == [9, 41, 70]
    assert scores.tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert rows[1].tolist() == sorted(rows[1].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_not_finite_finds_nothing(backend: Backend) -> None:
    queries = torch.ones(3, 4)
    queries[1, 2], queries[2] = torch.nan, torch.inf
    _, rows = topk_scores(queries.to(DEVICE), torch.rand(50, 4).to(DEVICE) + 1, 3, backend=backend)
    assert (rows[0] >= 0).all()
    assert (rows[1:] == -1).all()


def test_what_does_not_fit_is_refused() -> None:
    queries, items = torch.zeros(2, 4), torch.zeros(9, 4)
    with pytest.raises(ValueError, match=r"queries \(2, 3\) and items \(9, 4\) do not fit"):
        topk_scores(queries[:, :3], items, 1)
    with pytest.raises(ValueError, match="k is 0"):
        topk_scores(queries, items, 0)
    with pytest.raises(ValueError, match=r"\(1,\) is no bitmap of 9 items"):
        topk_scores(queries, items, 1, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"float64 and items torch\.float32 do not fit"):
        topk_scores(queries.double(), items, 1)
