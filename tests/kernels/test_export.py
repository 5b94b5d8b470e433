"""torch.export sees the operations whole: one node each, any number of tokens, the answers of eager."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from retrieval.kernels.gated_norm import gated_norm
from retrieval.kernels.hstu_attention import hstu_attention
from retrieval.kernels.hstu_decode import hstu_decode
from retrieval.kernels.softmax_loss import softmax_loss
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS

H, D = 2, 5


class Layer(nn.Module):
    """Attention and gated norm, as a layer of HSTU calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_table, self.time_table = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(NUM_TIME_BUCKETS))

    def forward(self, x: Tensor, offsets: Tensor, times: Tensor, query_times: Tensor) -> Tensor:
        q, k, v, u = x.chunk(4, dim=-1)
        out = hstu_attention(
            q,
            k,
            v,
            offsets,
            times,
            query_times,
            pos_table=self.pos_table,
            time_table=self.time_table,
            norm=8.0,
            backend="cpu",
        )
        return gated_norm(out.flatten(1), u.flatten(1), backend="cpu")


class LastQuery(nn.Module):
    """The last query of each row against its keys."""

    def forward(self, x: Tensor, offsets: Tensor, times: Tensor, query_times: Tensor) -> Tensor:
        q, k, v, _ = x.chunk(4, dim=-1)
        last = offsets[1:] - 1
        asked = (query_times[last].unsqueeze(1), (offsets.diff() - 1).unsqueeze(1))
        return hstu_decode(
            q[last].unsqueeze(1),
            k,
            v,
            offsets,
            times,
            *asked,
            pos_table=None,
            time_table=None,
            norm=None,
            max_length=8,
            backend="cpu",
        )


class Loss(nn.Module):
    """The softmax loss over a table."""

    def forward(self, users: Tensor, targets: Tensor, items: Tensor) -> Tensor:
        return softmax_loss(users, targets, items, temperature=0.05, backend="cpu")


def example(lengths: list[int]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    times = torch.randint(0, 10**6, (sum(lengths),), generator=g).sort().values
    return torch.randn(sum(lengths), H, 4 * D, generator=g), offsets, times, times + 60


@pytest.mark.parametrize(("module", "op"), [(Layer, "hstu_attention"), (LastQuery, "hstu_decode")])
def test_an_exported_layer_takes_other_batches(module: type[nn.Module], op: str) -> None:
    layer = module().eval()
    tokens, edges = Dim("tokens", min=2), Dim("edges", min=3)
    shapes = ({0: tokens}, {0: edges}, {0: tokens}, {0: tokens})
    exported = export(layer, example([3, 4]), dynamic_shapes=shapes)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum(target.startswith(f"retrieval.{op}") for target in targets) == 1
    for lengths in ([3, 4], [8, 1, 5, 2]):
        inputs = example(lengths)
        torch.testing.assert_close(exported.module()(*inputs), layer(*inputs))


def test_an_exported_loss_takes_other_batches() -> None:
    tokens = Dim("tokens", min=2)
    exported = export(
        Loss(),
        (torch.randn(4, 6), torch.tensor([0, 8, 3, 3]), torch.randn(9, 6)),
        dynamic_shapes=({0: tokens}, {0: tokens}, None),
    )
    assert sum(str(node.target).startswith("retrieval.softmax_loss") for node in exported.graph.nodes) == 1
    inputs = (torch.randn(7, 6), torch.arange(7), torch.randn(9, 6))
    torch.testing.assert_close(exported.module()(*inputs), Loss()(*inputs))
