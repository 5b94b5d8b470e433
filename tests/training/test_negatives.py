"""What the sampler draws is what it says it draws."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval.training.negatives import NegativeKind, NegativeSampler

COUNTS = np.array([5, 1, 0, 7, 2, 3])
TARGETS = torch.tensor([0, 5, 3, 3])


def chance(kind: NegativeKind, row: int) -> float:
    by_count = COUNTS[row] / COUNTS.sum()
    return {
        "uniform": 1 / 6,
        "popularity": (COUNTS[row] + 1) / (COUNTS + 1).sum(),
        "in-batch": by_count,
        "mixed": (by_count + 1 / 6) / 2,
    }[kind]


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in-batch", "mixed"])
def test_items_are_drawn_as_often_as_the_sampler_says(kind: NegativeKind) -> None:
    """Each item's share of 200,000 draws, to 5 standard errors."""
    draws = 200_000
    sampler = NegativeSampler(kind, draws, shared=True, item_counts=COUNTS)
    targets = torch.arange(6).repeat_interleave(torch.from_numpy(COUNTS))
    drawn = sampler.draw(targets, torch.Generator().manual_seed(0))
    assert drawn.rows is not None
    assert drawn.log_expected is not None
    found = np.bincount(drawn.rows.numpy(), minlength=6) / draws
    for row in range(6):
        expected = chance(kind, row)
        assert found[row] == pytest.approx(expected, abs=5 * (expected * (1 - expected) / draws) ** 0.5)
        if found[row]:
            said = drawn.log_expected[drawn.rows == row][0].exp() / draws
            assert float(said) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "uniform", "mixed"])
def test_of_a_pool_alone_negatives_are_drawn(kind: NegativeKind) -> None:
    pool = np.flatnonzero(COUNTS)
    sampler = NegativeSampler(kind, 4000, shared=True, item_counts=COUNTS, pool=pool)
    drawn = sampler.draw(TARGETS, torch.Generator().manual_seed(0))
    assert drawn.rows is not None
    assert set(drawn.rows.tolist()) == {0, 1, 3, 4, 5}
    if kind == "full":
        assert drawn.rows.tolist() == pool.tolist()
    if kind == "uniform":
        assert drawn.log_expected is not None
        assert drawn.target_log_expected is not None
        torch.testing.assert_close(drawn.log_expected.exp(), torch.full((4000,), 800.0))
        torch.testing.assert_close(drawn.target_log_expected.exp(), torch.full((4,), 800.0))


def test_a_pool_of_everything_is_none() -> None:
    sampler = NegativeSampler("full", 9, shared=True, item_counts=COUNTS, pool=np.arange(6))
    assert sampler.draw(TARGETS, torch.Generator()).rows is None


def test_the_same_generator_draws_the_same() -> None:
    sampler = NegativeSampler("mixed", 50, shared=False, item_counts=COUNTS)
    first, second = (sampler.draw(TARGETS, torch.Generator().manual_seed(9)).rows for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.shape == (4, 50)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["in-batch", "mixed"])
def test_in_batch_negatives_are_the_steps_own_targets(kind: NegativeKind, shared: bool) -> None:
    sampler = NegativeSampler(kind, 41, shared=shared, item_counts=COUNTS)
    rows = sampler.draw(TARGETS, torch.Generator().manual_seed(0)).rows
    assert rows is not None
    assert rows.shape == ((41,) if shared else (4, 41))
    assert set(rows[..., 20 if kind == "mixed" else 0 :].flatten().tolist()) == {0, 3, 5}


def test_a_target_that_training_never_saw_has_a_chance_all_the_same() -> None:
    for kind in ("uniform", "popularity", "in-batch", "mixed"):
        drawn = NegativeSampler(kind, 4, shared=True, item_counts=COUNTS).draw(torch.tensor([2]), torch.Generator())
        assert drawn.log_expected is not None
        assert drawn.target_log_expected is not None
        assert drawn.log_expected.isfinite().all()
        assert drawn.target_log_expected.isfinite().all()


def test_the_full_softmax_draws_nothing() -> None:
    assert NegativeSampler("full", 4, shared=True, item_counts=COUNTS).draw(TARGETS, torch.Generator()).rows is None


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in-batch", "mixed"])
def test_a_draw_touches_nothing_of_the_catalogues_size(kind: NegativeKind) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 1)
            return out

    sampler = NegativeSampler(kind, 8, shared=True, item_counts=np.arange(100_000))
    with Largest() as seen:
        sampler.draw(TARGETS, torch.Generator().manual_seed(0))
    assert 0 < seen.elements <= 8
