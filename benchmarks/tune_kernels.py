"""Find the fastest tiles and launches of HSTU attention's Triton kernels on the GPU at hand, and keep them.

    python -m benchmarks.tune_kernels [--widths 50 64 128] [--dtypes bfloat16] [--length 1024]

Kernel after kernel (forward; keys, queries and distances of the backward pass) a bounded list of configurations is
tried with the others as they are. A configuration that gives another answer than the one in use, or needs more of the
GPU than there is, is passed over; a new one is taken if its median is faster by 2%. The result goes to
`tuned-kernels.json` in the user's cache folder, where `retrieval.kernels.launch` finds it: bits of results may change
with it, so tune once, not between two runs that should agree. Without a GPU it says so and does nothing.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks.harness import WrongAnswerError, compare, timed
from benchmarks.kernel_cases import Case, attention_case
from retrieval.kernels import launch
from retrieval.kernels.launch import Kernel, LaunchConfig

_KERNELS: tuple[Kernel, ...] = ("forward", "keys", "queries", "distances")
_GAIN = 0.98
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_SIZES = {"blocks": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)}


def candidates(kernel: Kernel, width: int) -> Iterator[LaunchConfig]:
    """Tiles of 1,024 pairs and more that heads of a width leave room for; square ones for `distances`."""
    most = 4096 if width > 64 or kernel != "forward" else 8192
    for m, n, warps, stages in product(_SIZES["blocks"], _SIZES["blocks"], _SIZES["warps"], _SIZES["stages"]):
        if m * n <= most and (m == n or kernel != "distances"):
            yield LaunchConfig(m, n, warps, stages)


def _answers(case: Case) -> list[Tensor]:
    assert case.grad is not None
    out = case.variants["triton"]()
    return [out.detach(), *torch.autograd.grad(out, case.leaves, case.grad.to(out.dtype))]


def _median(case: Case, kernel: Kernel, device: torch.device, seconds: float) -> float:
    """Milliseconds of the pass that a kernel is part of."""
    run = case.variants["triton"]
    if kernel == "forward":
        with torch.no_grad():
            return timed(run, device, seconds)[1]
    out = run()
    assert case.grad is not None
    grad = case.grad.to(out.dtype)
    return timed(lambda: torch.autograd.grad(out, case.leaves, grad, retain_graph=True), device, seconds)[1]


def tune(
    kernel: Kernel, case: Case, width: int, device: torch.device, configs: Sequence[LaunchConfig], seconds: float = 0.05
) -> tuple[float, float]:
    """Leave the fastest of some configurations in the device's table.

    Returns:
        Milliseconds of the pass before, and with what was kept.
    """
    key = launch.shape_key(kernel, width, width, case.leaves[0].element_size())
    table = launch.table(device)
    expected = _answers(case)
    before = best = _median(case, kernel, device, seconds)
    kept = table.get(key)
    for config in configs:
        table[key] = config
        try:
            compare(f"{kernel} {config}", _answers(case), expected, [_TOLERANCE[case.dtype]] * len(expected))
            found = _median(case, kernel, device, seconds)
        except WrongAnswerError as error:
            print(f"passed over: {error}", file=sys.stderr, flush=True)
            continue
        except _too_large():
            continue
        if found < _GAIN * best:
            best, kept = found, config
    if kept is None:
        del table[key]
    else:
        table[key] = kept
    return before, best


def _too_large() -> tuple[type[Exception], ...]:
    """Errors of a configuration that a GPU has no room for."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    return (OutOfResources, PTXASError, CompileTimeAssertionFailure)


def main() -> None:
    """Tune, print a line per kernel and shape, and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[50, 64, 128], help="head widths (queries and values)")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest row")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here; nothing was tuned")
        return
    device = torch.device("cuda")
    for width, name in product(options.widths, options.dtypes):
        case = attention_case("uniform", options.length, 32 * options.length, width, True, getattr(torch, name), device)
        for kernel in _KERNELS:
            before, after = tune(kernel, case, width, device, list(candidates(kernel, width)))
            path = launch.save_table(device)
            print(f"{kernel:9} d{width} {name}: {before:.3f} ms before, {after:.3f} ms now", flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
