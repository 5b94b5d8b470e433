"""What benchmarks share: timing, the machine's own limits, where and on what code a figure was taken, and the table.

A figure goes to the table only after the answer that it belongs to was compared with a reference.
"""

import csv
import datetime
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Limits", "WrongAnswerError", "append_rows", "compare", "environment", "limits", "timed"]


class WrongAnswerError(Exception):
    """A variant's answer is not the reference's: it gets no figure."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine reaches, measured in this run: matrix products in TFLOP/s, copies in GB/s (read + write)."""

    gemm_tflops: float
    copy_gbytes: float


def timed(run: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of a call's milliseconds, over at least 5 calls in about `seconds`."""
    for _ in range(2):
        run()
    _synchronize(device)
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 5 or (time.perf_counter() - begun < seconds and len(taken) < 1000):
        taken.append(_once(run, device))
    p20, p50, p80 = torch.tensor(taken, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def limits(device: torch.device, dtype: torch.dtype, quick: bool) -> Limits:
    """Measure the machine: a large square matrix product of `dtype`, and a copy that fits in no cache."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = 0.5 if quick else 2.0
    product = timed(lambda: a @ b, device, seconds)[0]
    source = torch.zeros((1 << 26) if device.type == "cpu" else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, seconds)[0]
    return Limits(2 * size**3 / product / 1e9, 2 * source.numel() / copy / 1e6)


def compare(name: str, actual: Sequence[Tensor], exact: Sequence[Tensor], tolerances: Sequence[float]) -> float:
    """Largest |actual − exact| over the largest |exact|, of any of the tensors.

    Raises:
        WrongAnswerError: it exceeds that tensor's tolerance, or is not a number.
    """
    worst = 0.0
    for index, (a, e, tolerance) in enumerate(zip(actual, exact, tolerances, strict=True)):
        scale = max(float(e.abs().max()), 1e-30)
        error = float((a.detach().float() - e.float()).abs().max()) / scale
        if not error <= tolerance:  # NaN too
            raise WrongAnswerError(f"{name}: tensor {index} is off by {error:.3g} of its largest element")
        worst = max(worst, error)
    return worst


def environment(device: torch.device) -> dict[str, str]:
    """Where and on what code a figure was taken; columns of every row."""
    root = Path(__file__).parent
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if commit and _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]):
        commit += "+"  # with changes that are not committed
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0]
    else:
        hardware, driver = f"{_processor()} ({torch.get_num_threads()} threads)", ""
    return {
        "hardware": hardware,
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def append_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Add rows to a CSV file, which gets a header where it is new.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            if next(csv.reader(file), None) != columns:
                raise ValueError(f"{path}: has other columns than {', '.join(columns)}")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({name: _brief(value) for name, value in row.items()} for row in rows)


def _brief(value: object) -> object:
    """Floats to 4 significant digits; nothing for what does not apply."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"


def _output(command: list[str]) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
