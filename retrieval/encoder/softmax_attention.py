"""Softmax attention inside the rows of a jagged batch, for the encoders that HSTU is compared with."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["softmax_attention"]

# Scores of a padded group of rows and one head: float32 16 MiB.
_SCORES = 1 << 22

Bias = Callable[[Tensor, Tensor], Tensor]


def softmax_attention(
    q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, offsets: Tensor, *, causal: bool, bias: Bias | None = None
) -> Tensor:
    """out_i = Σ_j softmax_j(q_i·k_j / √D + bias_ij)·v_j within each row.

    Rows of like length are padded together, a bounded number at a time, and go through torch's
    `scaled_dot_product_attention`; padding is masked, so that rows do not depend on each other.

    Args:
        q_THD: queries `[T, H, D]`.
        k_THD: keys `[T, H, D]`.
        v_THV: values `[T, H, V]`.
        offsets: row b holds tokens `offsets[b]:offsets[b + 1]`, int64 `[B + 1]` on the CPU.
        causal: whether a token sees itself and those before it only.
        bias: gives biases `[G, L, L]` of padded rows from the tokens `[G, L]` in them and which of these are real.

    Returns:
        `[T, H, V]`.
    """
    outs, places = [v_THV[:0]], []
    for index, real in _groups(offsets):
        index, real = index.to(q_THD.device), real.to(q_THD.device)
        q, k, v = (x[index].transpose(1, 2) for x in (q_THD, k_THD, v_THV))
        seen = real.unsqueeze(1).expand(-1, real.shape[1], -1)
        if causal:
            seen = seen.tril()
        # A padded query sees itself, as a softmax over nothing is not a number.
        seen = seen | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
        mask = seen if bias is None else bias(index, real).masked_fill(~seen, -torch.inf)
        out = functional.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1))
        outs.append(out.transpose(1, 2)[real])
        places.append(index[real])
    out = torch.cat(outs)
    if not places:
        return out
    return out[torch.cat(places).argsort()]


def _groups(offsets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens `[G, L]` of rows of like length, and which of them are real, bool `[G, L]`; empty rows fall out."""
    lengths = offsets.diff()
    order = lengths.argsort(stable=True)
    order = order[lengths[order] > 0]
    end = len(order)
    while end:
        longest = int(lengths[order[end - 1]])
        begin = max(0, end - max(1, _SCORES // longest**2))
        rows = order[begin:end]
        place = torch.arange(longest)
        real = place < lengths[rows].unsqueeze(1)
        # Padding repeats the row's first token: any index inside the batch would do.
        yield offsets[rows].unsqueeze(1) + place * real, real
        end = begin
