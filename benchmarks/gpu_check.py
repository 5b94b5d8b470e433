"""Tests and timings that need a GPU; without one it says so, and claims nothing.

    make gpu-check                              in the project's virtual environment
    make gpu-check GPU_PYTHON=python3           with the packages of a machine that has them
    python3 -m benchmarks.gpu_check --quick --ops softmax_loss --no-compile

The tests of the kernels and of training on them run first (all that are marked `gpu` are among them, and none needs
packages of the index or the server), and those of exact search on a GPU where the index's packages are there; only if
they pass are the kernels timed, then a layer beside a Transformer's. Rows are appended to kernels.csv and layers.csv in
benchmarks/results. Options are those of `benchmarks.kernels`.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent
_NOTHING_COLLECTED = 5


def _pytest(*arguments: str) -> bool:
    """Whether the tests pass."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    if importlib.util.find_spec("pytest_timeout") is None:
        # Its option in pyproject.toml is unknown then, which is an error by default.
        command += ["-o", "addopts=-ra --strict-markers", "-W", "ignore::pytest.PytestConfigWarning"]
    return subprocess.run(command, cwd=_ROOT, check=False).returncode in (0, _NOTHING_COLLECTED)


def main() -> int:
    """Exit status: 0 where all is well, or where there is no GPU."""
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; nothing was tested, nothing was timed, nothing is claimed")
        return 0
    print(f"gpu-check: {torch.cuda.get_device_name()}", flush=True)
    missing = [name for name in ("triton", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu-check: needs {', '.join(missing)}; nothing was tested, nothing was timed", file=sys.stderr)
        return 1
    tests = ["tests/kernels", "tests/training/test_backends.py"]
    # Exact search on the GPU, where there are the index's packages too.
    if all(importlib.util.find_spec(name) is not None for name in ("faiss", "pyarrow", "safetensors")):
        tests.append("tests/snapshot/test_device_items.py")
    if not _pytest(*tests):
        print("gpu-check: tests failed; kernels that fail their tests are not timed", file=sys.stderr)
        return 1
    python = [sys.executable, "-m"]
    kernels = subprocess.run([*python, "benchmarks.kernels", "--device", "cuda", *sys.argv[1:]], cwd=_ROOT, check=False)
    quick = [option for option in sys.argv[1:] if option == "--quick"]
    layers = subprocess.run([*python, "benchmarks.layers", "--device", "cuda", *quick], cwd=_ROOT, check=False)
    return kernels.returncode or layers.returncode


if __name__ == "__main__":
    sys.exit(main())
