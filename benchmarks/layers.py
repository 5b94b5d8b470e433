"""One HSTU layer beside a Transformer layer of the same width: time and memory per token, forward plus backward.

    python -m benchmarks.layers [--device cuda] [--quick]

HSTU has weights [D, 4D] in and [D, D] out, position and time bias and the gate: 5D² in all. The Transformer has
attention [D, 3D] and [D, D] and a feed-forward network of width 4D: 12D², with torch's scaled_dot_product_attention
(flash attention on a GPU), causal, no bias. Rows are of full length, so that neither pads. No dropout. Timed are the
output and the gradients of input and weights. `kept_bytes_per_token` are the tensors that autograd keeps for the
backward pass, each storage once, weights left out. A layer's output and input gradient are compared with the same layer
in float32 (ours: with the reference kernels) before it is timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import append_rows, compare, environment, timed
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu_layer import HSTULayer
from retrieval.kernels.backend import Backend
from retrieval.kernels.hstu_attention import plan_attention

RESULTS = Path(__file__).parent / "results" / "layers.csv"
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}

Layer = Callable[[Tensor], Tensor]


class TransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward network on `[B, N, D]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, N, D]`."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.contract(functional.gelu(self.expand(self.norms[1](x))))
        return out


@dataclass(frozen=True)
class Setting:
    """Where and in what type is measured, and for how long."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    seconds: float


def _hstu(layer: nn.Module, batch: int, length: int, device: torch.device, backend: Backend) -> Layer:
    """The layer on flat tokens; times grow by gaps from seconds to weeks."""
    g = torch.Generator().manual_seed(0)
    offsets = torch.arange(batch + 1) * length
    times = (10**9 + torch.exp(torch.rand(batch * length, generator=g) * 14).long().cumsum(0)).to(device)
    plan = plan_attention(offsets, times, times + 3600, time_bias=True, backend=backend)
    return lambda x: layer(x, plan)


def _measure(module: nn.Module, layer: Layer, exact: Layer, shape: tuple[int, ...], at: Setting) -> tuple[float, float]:
    """Median milliseconds of forward plus backward, and bytes kept between the two.

    Raises:
        WrongAnswerError: the layer does not give what `exact` does.
    """
    g = torch.Generator(at.device).manual_seed(1)
    x, grad = (torch.randn(shape, generator=g, device=at.device) for _ in range(2))
    wanted = x.clone().requires_grad_()
    expected = exact(wanted)
    answers = [expected.detach(), *torch.autograd.grad(expected, wanted, grad)]
    own = x.to(at.dtype).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> list[Tensor]:
        with torch.autocast(at.device.type, torch.bfloat16, enabled=at.dtype == torch.bfloat16):
            out = layer(own)
        return [out, torch.autograd.grad(out, [own, *module.parameters()], grad.to(out.dtype))[0]]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = run()
    compare(type(module).__name__, found, answers, [_TOLERANCE[at.dtype]] * 2)
    return timed(run, at.device, at.seconds)[1], float(sum(kept.values()))


def _compare(length: int, batch: int, width: int, heads: int, at: Setting) -> list[dict[str, object]]:
    """A row for each layer."""
    torch.manual_seed(0)
    size = {"width": width, "num_heads": heads, "qk_dim": width // heads, "v_dim": width // heads}
    ours = HSTULayer(HSTUConfig(num_items=1, max_length=length, dropout=0.0, **size)).to(at.device)
    theirs = TransformerLayer(width, heads).to(at.device)
    fast, exact = (_hstu(ours, batch, length, at.device, backend) for backend in (at.backend, "reference"))
    measured = {
        "Transformer": _measure(theirs, theirs, theirs, (batch, length, width), at),
        "HSTU": _measure(ours, fast, exact, (batch * length, width), at),
    }
    return [
        {
            "layer": name,
            "length": length,
            "rows": batch,
            "width": width,
            "heads": heads,
            "dtype": str(at.dtype).removeprefix("torch."),
            "microseconds_per_token": 1000 * milliseconds / (batch * length),
            "time_over_transformer": milliseconds / measured["Transformer"][0],
            "kept_bytes_per_token": kept / (batch * length),
        }
        for name, (milliseconds, kept) in measured.items()
    ]


def main() -> None:
    """Check, time, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device, quick = torch.device(options.device), options.quick
    seconds = 0.1 if quick else 2.0
    if device.type == "cuda":
        at, width, heads, tokens = Setting(device, torch.bfloat16, "triton", seconds), 512, 4, 1 << 16
    else:
        at, width, heads, tokens = Setting(device, torch.float32, "cpu", seconds), 128, 2, 1 << 13
    where = environment(device)
    for length in [64, 256] if quick else [1024, 2048, 4096, 8192]:
        rows = _compare(length, 1 if quick else max(1, tokens // length), width, heads, at)
        for row in rows:
            figures = (f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in row.items())
            print("  ".join(figures), flush=True)
        if not quick:
            append_rows(options.out, [row | where for row in rows])


if __name__ == "__main__":
    main()
