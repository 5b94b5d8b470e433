import pytest
import torch

from retrieval.training.loss import sampled_softmax_loss, uniform_negatives


def brute_force(users: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor, table: torch.Tensor) -> float:
    """One position at a time, by the formula, temperature 0.1."""
    unit = table / table.norm(dim=1, keepdim=True)
    losses = []
    for user, target in zip(users, targets.tolist(), strict=True):
        own = torch.exp(user @ unit[target] / 0.1)
        others = sum(torch.exp(user @ unit[row] / 0.1) for row in negatives.tolist() if row != target)
        losses.append(-torch.log(own / (own + others)))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("negatives", [[1, 2, 3], [5, 5, 0], [4], list(range(6))])
def test_the_loss_is_its_formula_with_collisions_left_out(negatives: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=g, dtype=torch.float64)
    users = torch.nn.functional.normalize(torch.randn(4, 3, generator=g, dtype=torch.float64), dim=1)
    targets = torch.tensor([0, 5, 2, 2])
    rows = torch.tensor(negatives)
    loss = sampled_softmax_loss(users, targets, rows, table, temperature=0.1)
    assert float(loss) == pytest.approx(brute_force(users, targets, rows, table), rel=1e-12)


def test_no_negatives_named_is_the_full_softmax() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=g, dtype=torch.float64)
    users = torch.nn.functional.normalize(torch.randn(4, 3, generator=g, dtype=torch.float64), dim=1)
    targets = torch.tensor([0, 5, 2, 2])
    expected = brute_force(users, targets, torch.arange(6), table)
    assert float(sampled_softmax_loss(users, targets, None, table, 0.1)) == pytest.approx(expected, rel=1e-12)


def test_as_many_negatives_as_items_are_still_a_sample() -> None:
    # Not the whole catalogue, though of its size: rows that are missing must not be contrasted with.
    g = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=g, dtype=torch.float64)
    users = torch.nn.functional.normalize(torch.randn(4, 3, generator=g, dtype=torch.float64), dim=1)
    targets, rows = torch.tensor([0, 5, 2, 2]), torch.tensor([1, 1, 1, 3, 3, 0])
    loss = sampled_softmax_loss(users, targets, rows, table, 0.1)
    assert float(loss) == pytest.approx(brute_force(users, targets, rows, table), rel=1e-12)


def test_gradients_reach_only_the_rows_that_were_named() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(10, 3, generator=g, requires_grad=True)
    users = torch.nn.functional.normalize(torch.randn(2, 3, generator=g), dim=1)
    sampled_softmax_loss(users, torch.tensor([1, 2]), torch.tensor([7]), table, 1.0).backward()
    assert table.grad is not None
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 2, 7]


def test_a_small_catalogue_is_contrasted_with_as_a_whole() -> None:
    assert uniform_negatives(5, 8, torch.Generator()).tolist() == [0, 1, 2, 3, 4]


def test_negatives_are_uniform_over_the_catalogue() -> None:
    rows = uniform_negatives(100, 99, torch.Generator().manual_seed(0))
    many = torch.cat([uniform_negatives(100, 99, torch.Generator().manual_seed(s)) for s in range(500)])
    counts = torch.bincount(many, minlength=100).double()
    assert rows.shape == (99,)
    # χ² with 99 degrees of freedom: 99.9% of samples lie below 149.
    expected = len(many) / 100
    assert float(((counts - expected) ** 2 / expected).sum()) < 149
