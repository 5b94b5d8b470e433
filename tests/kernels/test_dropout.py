"""Dropout whose mask numpy draws."""

import pytest
import torch

from retrieval.kernels.dropout import dropout, scaled_mask
from retrieval.kernels.gated_norm_reference import drop_threshold, keep_mask_reference


def test_the_mask_is_the_one_of_philox_written_out() -> None:
    for rows, columns in ((5, 50), (1, 1), (7, 16), (3, 33)):
        expected = torch.from_numpy(keep_mask_reference(11, rows, columns, 0.3)) * drop_threshold(0.3)[1]
        assert torch.equal(scaled_mask(11, slice(0, rows), columns, 0.3, torch.float32), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_elements_are_dropped_or_scaled_and_so_are_their_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 50, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.2, training=True)
    assert y.dtype == dtype
    scale = torch.tensor(drop_threshold(0.2)[1], dtype=torch.float64).to(dtype)
    assert set(y.detach().unique().tolist()) == {0.0, scale.item()}
    assert float((y == 0).double().mean()) == pytest.approx(0.2, abs=0.015)  # five standard deviations
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_the_seed_of_torch_decides_and_nothing_happens_outside_training() -> None:
    x = torch.ones(20, 20)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(dropout(x, 0.5, training=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
