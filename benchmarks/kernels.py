"""How fast the kernels are, as fractions of what the machine reaches: one table row per variant and direction.

    python -m benchmarks.kernels [--device cuda] [--quick] [--ops hstu_attention softmax_loss …]

Every variant's output and gradients are compared with a float32 reference before its time is taken; what differs gets
no row and fails the run. Variants: `triton` or `cpu` (ours), `eager` (padded plain torch), `compile` (torch.compile of
that, where there is a compiler), and torch's `sdpa`, another function at the same shapes, as a yardstick.

Arithmetic is what the formulas need, whoever computes it: only pairs that a causal mask leaves,
P = Σ_rows n(n+1)/2 · heads for attention, with one recomputation of the scores in a backward
pass, as is usual in publications:

    hstu_attention, sdpa   forward 2P(D + V)     backward P(6D + 4V)
    hstu_decode            forward 2P(D + V)     P = visible (query, key) pairs · heads
    softmax_loss           none is counted: ours computes the gradients in its forward pass; compare both together
    gated_norm             none is counted: memory is its limit

Bytes are those of every input read once and every output written once. `fraction_of_gemm` and `fraction_of_copy` set
both against this run's own large matrix product and copy; neither can be expected to be 1.
"""

import argparse
import gc
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import WrongAnswerError, append_rows, compare, environment, limits, timed
from benchmarks.kernel_cases import CASES as _OF_THE_ENCODER
from benchmarks.kernel_cases import Case
from benchmarks.topk_cases import topk_cases

_CASES = {**_OF_THE_ENCODER, "topk_scores": topk_cases}
_RESULTS = Path(__file__).parent / "results" / "kernels.csv"
# Of the largest element: rounding of inputs to the dtype and of probabilities between two products. Gradients of the
# bias tables add up most terms.
_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 5e-2), torch.float16: (5e-3, 2e-2)}


def _answers(case: Case, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A variant's output, with its graph, and gradients."""
    out = run()
    if case.grad is None:
        return out, []
    return out, list(torch.autograd.grad(out, case.leaves, case.grad.to(out.dtype), retain_graph=True))


def measure(case: Case, device: torch.device, seconds: float, quick: bool) -> list[dict[str, object]]:
    """Check, then time, all variants of a case.

    Raises:
        WrongAnswerError: a variant's answer is not the reference's.
    """
    rows: list[dict[str, object]] = []
    ceiling = limits(device, case.dtype, quick)
    exact = case.exact()
    for variant in case.variants:
        try:
            for direction, times, error in _measure_variant(case, variant, exact, device, seconds):
                rows.append(_row(case, variant, direction, times, ceiling.gemm_tflops, ceiling.copy_gbytes, error))
                _show(rows[-1])
        except torch.OutOfMemoryError:
            print(f"{case.op} {variant} {case.shape}: does not fit into memory, no row", flush=True)
        _free(device)
    return rows


def _measure_variant(
    case: Case, variant: str, exact: list[Tensor], device: torch.device, seconds: float
) -> list[tuple[str, tuple[float, float, float], float]]:
    """Direction, percentiles of milliseconds and error; its graph dies with this call."""
    run = case.variants[variant]
    forward, backward = _TOLERANCE[case.dtype]
    out, grads = _answers(case, run)
    name = f"{case.op} {variant} {case.shape}"
    error = compare(name, [out, *grads], exact, [forward, *[backward] * len(grads)])
    del grads
    measured = [("forward", timed(run, device, seconds), error)]
    if case.grad is not None:
        grad = case.grad.to(out.dtype)

        def back() -> object:
            return torch.autograd.grad(out, case.leaves, grad, retain_graph=True)

        measured.append(("backward", timed(back, device, seconds), error))
    return measured


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _row(
    case: Case,
    variant: str,
    direction: str,
    times: tuple[float, float, float],
    gemm_tflops: float,
    copy_gbytes: float,
    error: float,
) -> dict[str, object]:
    flops, size = case.forward if direction == "forward" else case.backward
    tflops, gbytes = flops / times[1] / 1e9, size / times[1] / 1e6
    return {
        "op": case.op,
        "variant": variant,
        "direction": direction,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": case.shape,
        "p20_ms": times[0],
        "p50_ms": times[1],
        "p80_ms": times[2],
        "tflops": tflops if flops else float("nan"),
        "fraction_of_gemm": tflops / gemm_tflops if flops else float("nan"),
        "gbytes_per_s": gbytes,
        "fraction_of_copy": gbytes / copy_gbytes,
        "gemm_tflops": gemm_tflops,
        "copy_gbytes_per_s": copy_gbytes,
        "error": error,
    }


def _show(row: dict[str, object]) -> None:
    figures = f"{row['p50_ms']:10.3f} ms"
    if row["tflops"] == row["tflops"]:
        figures += f" {row['tflops']:9.3f} TFLOP/s = {row['fraction_of_gemm']:6.1%} of gemm"
    figures += f" {row['gbytes_per_s']:8.1f} GB/s = {row['fraction_of_copy']:6.1%} of copy"
    print(
        f"{row['op']:15} {row['variant']:8} {row['direction']:8} {row['dtype']:8} {figures}  {row['shape']}", flush=True
    )


def _with_compile(case: Case) -> Case:
    """The case with torch.compile of its eager variant."""
    torch._dynamo.reset()
    compiled = torch.compile(case.variants["eager"], dynamic=False)
    return replace(case, variants={**case.variants, "compile": compiled})


def run(
    ops: Sequence[str], device: torch.device, quick: bool, compiling: bool, seconds: float
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows of all cases, and what was wrong."""
    rows, wrong = [], []
    for op in ops:
        for make in _CASES[op](device, quick):
            case = make()
            if compiling and "eager" in case.variants:
                case = _with_compile(case)
            try:
                rows += measure(case, device, seconds, quick)
            except WrongAnswerError as error:
                wrong.append(str(error))
                print(f"WRONG ANSWER, no figure: {error}", file=sys.stderr, flush=True)
            except torch.OutOfMemoryError:
                print(f"{op} {case.shape}: the reference does not fit into memory, no row", flush=True)
            del case
            _free(device)
    return rows, wrong


def main() -> None:
    """Check, time, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, less than a minute on a CPU")
    parser.add_argument("--ops", nargs="+", choices=list(_CASES), default=list(_CASES))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="also torch.compile; default: not with --quick"
    )
    parser.add_argument("--out", type=Path, default=_RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    compiling = not options.quick if options.compile is None else options.compile
    if compiling and not (shutil.which("c++") or shutil.which("g++") or shutil.which("gcc")):
        print("no C++ compiler: torch.compile is left out")
        compiling = False
    if compiling:
        from torch._functorch import config

        # It would reuse saved tensors as outputs of the backward pass, which is timed many times over one graph.
        config.donated_buffer = False
    where = environment(device)
    print(", ".join(f"{name} {value}" for name, value in where.items() if value), flush=True)
    rows, wrong = run(options.ops, device, options.quick, compiling, 0.1 if options.quick else 0.5)
    append_rows(options.out, [row | where for row in rows])
    print(f"{len(rows)} rows appended to {options.out}")
    if wrong:
        sys.exit(f"{len(wrong)} wrong answers, which got no rows")


if __name__ == "__main__":
    main()
