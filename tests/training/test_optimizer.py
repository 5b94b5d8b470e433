"""AdamW by rows against torch's AdamW."""

import pytest
import torch
from torch import nn

from retrieval.errors import ConfigError
from retrieval.training.config import TrainConfig
from retrieval.training.optimizer import EncoderOptimizer, RowAdamW, updates_by_rows


def table(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)))


def gradients(steps: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=g) for _ in range(steps)]


def torch_adamw(parameter: nn.Parameter, steps: list[torch.Tensor], rate: float, decay: float) -> None:
    optimizer = torch.optim.AdamW([parameter], rate, (0.9, 0.98), weight_decay=decay)
    for gradient in steps:
        parameter.grad = gradient
        optimizer.step()


def test_rows_that_every_step_names_move_as_in_adamw() -> None:
    ours, theirs = table(), table()
    by_rows = RowAdamW(ours, weight_decay=0.1)
    rows = torch.tensor([5, 0, 2, 1, 4, 3])
    for gradient in gradients(7):
        by_rows.step(rows, gradient[rows], 0.05)
    torch_adamw(theirs, gradients(7), 0.05, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_row_moves_as_if_the_steps_that_do_not_name_it_were_not_there() -> None:
    ours = table()
    before = ours.detach().clone()
    by_rows = RowAdamW(ours, weight_decay=0.1)
    steps = gradients(6)
    for place, gradient in enumerate(steps):
        rows = torch.tensor([1, 4] if place % 2 else [1])
        by_rows.step(rows, gradient[rows], 0.05)
    every, odd = table(), table()
    torch_adamw(every, steps, 0.05, 0.1)
    torch_adamw(odd, steps[1::2], 0.05, 0.1)
    torch.testing.assert_close(ours[1], every[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[4], odd[4], rtol=1e-5, atol=1e-6)
    assert by_rows.updates.tolist() == [0, 6, 0, 0, 3, 0]
    assert torch.equal(ours[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert not by_rows.mean[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("by_rows", [False, True])
def test_the_state_is_complete_before_the_first_step_and_is_the_state_itself(by_rows: bool) -> None:
    def built() -> tuple[nn.Module, EncoderOptimizer]:
        table = nn.Embedding(6, 3)
        model = nn.Sequential(table, nn.Linear(3, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        return model, EncoderOptimizer(model, table.weight, weight_decay=0.0, by_rows=by_rows)

    def learn(model: nn.Module, optimizer: EncoderOptimizer, value: float) -> None:
        for parameter in optimizer.whole:
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step(0.1, torch.tensor([1, 3]), torch.full((2, 3), value))

    whole_model, whole = built()
    learn(whole_model, whole, 1.0)
    cut_model, cut = built()
    with torch.no_grad():
        for name, tensor in cut.tensors().items():
            tensor.copy_(whole.tensors()[name])
        for mine, other in zip(cut_model.parameters(), whole_model.parameters(), strict=True):
            mine.copy_(other)
    learn(whole_model, whole, -2.0)
    learn(cut_model, cut, -2.0)
    for mine, other in zip(cut_model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, torch.full_like(mine, 0.5))


def test_which_runs_update_by_rows() -> None:
    assert not updates_by_rows(TrainConfig(), 100_000)
    assert updates_by_rows(TrainConfig(), 100_001)
    assert not updates_by_rows(TrainConfig(negatives="full"), 100_001)
    assert not updates_by_rows(TrainConfig(sparse_items=False), 100_001)
    assert updates_by_rows(TrainConfig(sparse_items=True), 5)


def test_what_needs_the_whole_table_is_refused_by_rows() -> None:
    with pytest.raises(ConfigError, match="sparse_items: the full softmax"):
        updates_by_rows(TrainConfig(sparse_items=True, negatives="full"), 5)
    with pytest.raises(ConfigError, match="ema_decay: a running mean"):
        updates_by_rows(TrainConfig(ema_decay=0.9), 1_000_000)
