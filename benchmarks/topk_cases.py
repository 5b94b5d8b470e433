"""The shapes of `topk_scores` for `benchmarks.kernels`: K best of millions of items."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_cases import Case, Makers
from retrieval.kernels.topk_scores import topk_scores

__all__ = ["topk_cases"]

_K = 100


def _case(queries: int, items: int, width: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The best 100 by `topk_scores`, and by a product of all with `torch.topk`; scores are compared."""
    g = torch.Generator(device).manual_seed(0)
    x = functional.normalize(torch.randn(items, width, generator=g, device=device), dim=1).to(dtype)
    asked = functional.normalize(torch.randn(queries, width, generator=g, device=device), dim=1).to(dtype)
    ours: Literal["cpu", "triton"] = "triton" if device.type == "cuda" else "cpu"

    def eager(asked: Tensor, x: Tensor) -> Tensor:
        return (asked @ x.T).topk(_K, dim=1).values

    size = x.element_size() * width * (items + queries) + 12 * _K * queries
    return Case(
        op="topk_scores",
        shape=f"B{queries} N{items} D{width} K{_K}",
        dtype=dtype,
        leaves=[],
        grad=None,
        variants={ours: lambda: topk_scores(asked, x, _K, backend=ours)[0], "eager": lambda: eager(asked, x)},
        exact=lambda: [eager(asked.float(), x.float())],
        forward=(2.0 * queries * items * width, size),
    )


def topk_cases(device: torch.device, quick: bool) -> Makers:
    """On a GPU a million and ten million items in two precisions, one query and many."""
    if device.type == "cuda":
        counts = [100_000] if quick else [1_000_000, 10_000_000]
        shapes = [(b, n, 64) for n in counts for b in (1, 64, 256)]
        return [partial(_case, *shape, kind, device) for shape in shapes for kind in (torch.float32, torch.bfloat16)]
    shapes = [(8, 2000, 32)] if quick else [(1, 100_000, 64), (64, 100_000, 64)]
    return [partial(_case, *shape, torch.float32, device) for shape in shapes]
