"""Compile Triton kernels for GPUs that are not here, and read what they need.

Run as a program by the tests, in a process without TRITON_INTERPRET, since an interpreted kernel cannot be compiled:

    python -m tests.kernels.aot retrieval.kernels.some_op_triton sm_90

The module offers `aot_cases() -> list[AotCase]` with the default configurations of all its kernels. Prints one JSON
line per case: name, registers, spill and shared bytes.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval.kernels.aot_case import AotCase

__all__ = ["SHARED_LIMIT", "Resources", "compile_module"]

# Shared memory that one block may have, in bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: registers per thread, bytes spilled per thread, bytes of shared memory."""

    name: str
    registers: int
    spilled: int
    shared: int


def compile_module(module: str, chip: str) -> list[Resources]:
    """Compile all cases of a module for `chip` in a process of its own."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "HOME": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        command = [sys.executable, "-m", "tests.kernels.aot", module, chip]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Resources(**json.loads(line)) for line in done.stdout.splitlines()]


def _pointers(kinds: tuple[Any, ...], path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Places of the pointers among arguments, some of which are tuples."""
    for place, kind in enumerate(kinds):
        if isinstance(kind, tuple):
            yield from _pointers(kind, (*path, place))
        elif kind.startswith("*"):
            yield (*path, place)


def _compile(case: "AotCase", capability: int) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # torch's allocations are aligned, and the launcher tells the compiler so: it then loads whole vectors.
    aligned = {place: [["tt.divisibility", 16]] for place in _pointers(tuple(case.signature.values()))}
    source = ASTSource(case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    # ptxas puts what does not fit in registers on the thread's stack.
    figures = {name: int(re.search(rf"{name}:(\d+)", usage.stdout).group(1)) for name in ("REG", "STACK")}  # type: ignore[union-attr]
    return Resources(case.name, figures["REG"], figures["STACK"], compiled.metadata.shared)


if __name__ == "__main__":
    for one in importlib.import_module(sys.argv[1]).aot_cases():
        print(json.dumps(asdict(_compile(one, int(sys.argv[2].removeprefix("sm_"))))), flush=True)
