"""The loss against its formula, one position at a time in float64; gradients against those of the formula."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval.training.loss import LogQ, next_item_loss
from retrieval.training.negatives import NegativeKind, Negatives, NegativeSampler
from tests.training.test_negatives import COUNTS, chance

TARGETS = torch.tensor([0, 5, 3, 3])
TEMPERATURE = 0.1


def problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True)
    users = torch.nn.functional.normalize(torch.randn(4, 3, generator=g, dtype=torch.float64), dim=1)
    return users.requires_grad_(), table


def brute_force(users: Tensor, table: Tensor, rows: list[list[int]], kind: NegativeKind, log_q: LogQ) -> Tensor:
    unit = table / table.norm(dim=1, keepdim=True)
    losses = []
    for user, target, negatives in zip(users, TARGETS.tolist(), rows, strict=True):
        own, others = user @ unit[target] / TEMPERATURE, []
        for row in negatives:
            score = user @ unit[row] / TEMPERATURE
            if log_q == "standard":
                score = score - np.log(chance(kind, row)) + np.log(chance(kind, target))
            elif log_q == "corrected":
                score = score - np.log(len(negatives) * chance(kind, row))
            if row != target:
                others.append(score)
        if not others:
            losses.append(0 * own)
            continue
        below = torch.logsumexp(torch.stack(others), 0)
        if log_q == "corrected":
            p = torch.sigmoid(own - below).detach()
            losses.append(-(1 - p) * (own - below))  # arXiv 2507.09331
        else:
            losses.append(torch.logaddexp(own, below) - own)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("log_q", get_args(LogQ))
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", ["uniform", "popularity", "in-batch", "mixed"])
def test_loss_and_gradients_are_those_of_the_formula(kind: NegativeKind, shared: bool, log_q: LogQ) -> None:
    sampler = NegativeSampler(kind, 4, shared=shared, item_counts=COUNTS)
    negatives = sampler.draw(TARGETS, torch.Generator().manual_seed(3))
    assert negatives.rows is not None
    rows = negatives.rows.tolist() if not shared else [negatives.rows.tolist()] * 4
    gradients, losses = [], []
    for function in ("ours", "formula"):
        users, table = problem()
        loss = (
            next_item_loss(users, TARGETS, negatives, table, temperature=TEMPERATURE, log_q=log_q)
            if function == "ours"
            else brute_force(users, table, rows, kind, log_q)
        )
        gradients.append(torch.autograd.grad(loss, [users, table]))
        losses.append(float(loss.detach()))
    if log_q != "corrected":  # whose formula has another value, but the same gradient
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, formula in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-7)  # chances are kept in float32


def test_the_corrected_loss_estimates_the_full_softmax() -> None:
    users, table = (x.detach() for x in problem())
    sampler = NegativeSampler("popularity", 40_000, shared=True, item_counts=COUNTS)
    negatives = sampler.draw(TARGETS, torch.Generator().manual_seed(0))
    for t in range(4):
        one = (users[t : t + 1], TARGETS[t : t + 1])
        full = next_item_loss(*one, Negatives(rows=None), table, temperature=1.0)
        loss = next_item_loss(*one, negatives, table, temperature=1.0, log_q="corrected")
        assert float(loss) == pytest.approx(float(full), rel=0.02)


def test_weights_make_a_weighted_mean() -> None:
    users, table = problem()
    weights = torch.tensor([0.0, 1.0, 2.5, 0.5])
    negatives = Negatives(rows=torch.tensor([1, 2, 4]))
    loss = next_item_loss(users, TARGETS, negatives, table, temperature=TEMPERATURE, weights=weights)
    each = [
        next_item_loss(users[t : t + 1], TARGETS[t : t + 1], negatives, table, temperature=TEMPERATURE)
        for t in range(4)
    ]
    expected = (torch.stack(each) * weights).sum() / 4
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x, [users, table]) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_no_positions_and_no_weights_are_no_loss() -> None:
    users, table = problem()
    for positions, weights in ((0, None), (4, torch.zeros(4))):
        given = users[:positions], TARGETS[:positions], Negatives(rows=torch.tensor([1, 2])), table
        loss = next_item_loss(*given, temperature=TEMPERATURE, weights=weights)
        assert float(loss.detach()) == 0
        assert all(not gradient.any() for gradient in torch.autograd.grad(loss, [users, table]))


@pytest.mark.parametrize("log_q", get_args(LogQ))
@pytest.mark.parametrize("kind", get_args(NegativeKind))
def test_a_catalogue_of_one_item_has_no_loss(kind: NegativeKind, log_q: LogQ) -> None:
    sampler = NegativeSampler(kind, 3, shared=True, item_counts=np.array([5]))
    users, table = torch.ones(2, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    targets = torch.tensor([0, 0])
    negatives = sampler.draw(targets, torch.Generator().manual_seed(0))
    loss = next_item_loss(users, targets, negatives, table, temperature=TEMPERATURE, log_q=log_q)
    assert float(loss.detach()) == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, [users, table]))


def test_the_full_softmax_contrasts_with_every_other_item() -> None:
    sampler = NegativeSampler("full", 1, shared=True, item_counts=COUNTS)
    users, table = problem()
    negatives = sampler.draw(TARGETS, torch.Generator())
    loss = next_item_loss(users, TARGETS, negatives, table, temperature=TEMPERATURE, log_q="corrected")
    expected = brute_force(users, table, [list(range(6))] * 4, "full", "none")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_gradients_reach_only_the_rows_that_were_named() -> None:
    users, table = problem()
    negatives = Negatives(rows=torch.tensor([4, 4]))
    next_item_loss(users, TARGETS, negatives, table, temperature=1.0).backward()
    assert table.grad is not None
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 3, 4, 5]


def test_negatives_that_are_all_the_target_leave_nothing_to_learn() -> None:
    users, table = problem()
    nothing = torch.empty(4, 0, dtype=torch.int64)
    for rows in (TARGETS[:, None].expand(4, 3), nothing, nothing[0]):
        loss = next_item_loss(users, TARGETS, Negatives(rows=rows), table, temperature=1.0)
        assert float(loss.detach()) == 0
        assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, [users, table]))
