"""Random inputs of HSTU attention, shared by the tests of its backends."""

from typing import Any

import torch
from torch import Tensor

from retrieval.kernels.hstu_attention import hstu_attention
from retrieval.kernels.time_bucket import NUM_TIME_BUCKETS

__all__ = ["Problem", "poison"]


def poison(monkeypatch: Any) -> None:
    """Let uninitialised tensors hold NaN, so that an element which is never written shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args: Any, real: Any = real, **kwargs: Any) -> Tensor:
            out: Tensor = real(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)


class Problem:
    """Random inputs for rows of the given lengths, in float64."""

    def __init__(
        self, lengths: list[int], heads: int = 2, qk: int = 5, v: int = 3, seed: int = 0, targets: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        total, longest = int(self.offsets[-1]), max(lengths, default=0)
        rows = [torch.randint(0, 10**8, (n,), generator=g).sort().values for n in lengths]
        self.timestamps = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        self.query_times = self.timestamps + torch.randint(0, 10**6, (total,), generator=g)
        drawn = [int(torch.randint(0, n + 1, (1,), generator=g)) for n in lengths]
        self.num_targets = torch.tensor(drawn, dtype=torch.int64) if targets else None
        shapes = [(total, heads, qk), (total, heads, qk), (total, heads, v), (longest + 3,), (NUM_TIME_BUCKETS,)]
        self.leaves = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
        self.grad_out = torch.randn(total, heads, v, generator=g, dtype=torch.float64)

    def run(
        self, dtype: torch.dtype, backend: Any, device: torch.device | str = "cpu", tables: str = "pt", **options: Any
    ) -> list[Tensor]:
        """Output and, unless `backward` is False, gradients of q, k, v and of the tables in use; on the CPU."""
        backward = options.pop("backward", True)
        leaves = [leaf.to(device, dtype, copy=True).requires_grad_() for leaf in self.leaves]
        q, k, v, pos, time = leaves
        used = {"pos_table": pos if "p" in tables else None, "time_table": time if "t" in tables else None}
        where = [x.to(device) for x in (self.offsets, self.timestamps, self.query_times)]
        targets = None if self.num_targets is None else self.num_targets.to(device)
        options = {"norm": 7.0} | used | options
        out = hstu_attention(q, k, v, *where, num_targets=targets, backend=backend, **options)
        results = [out.detach()]
        if backward:
            out.backward(self.grad_out.to(device, dtype))
            results += [leaf.grad for leaf in leaves if leaf.grad is not None]
        return [result.cpu() for result in results]
