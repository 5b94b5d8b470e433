"""C++ parts of the CPU backend: compiled for this machine on first use, kept in the user's cache folder.

A compiler is not required. Without one, or with RETRIEVAL_NATIVE=0, the CPU backend computes the same in torch
operations, which takes longer; the log says so once.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

__all__ = ["library"]

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / f"{name}_native.cpp" for name in ("gated_norm", "hstu_attention", "softmax_loss"))
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread")

_log = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be had or is not wanted."""
    if os.environ.get("RETRIEVAL_NATIVE", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        _log.warning("no C++ compiler: kernels on the CPU run in torch operations, about twice as slow")
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [str(error)])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    _log.warning("kernels on the CPU run in torch operations, about twice as slow: %s", reason)
    return None


def _compiled(compiler: str) -> Path:
    """Path of the library, built if the cache has none for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    texts = [file.read_text("utf-8") for file in (*_SOURCES, _FOLDER / "native_threads.h")]
    key = hashlib.sha256("\n".join([*texts, *_FLAGS, version, _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrieval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # No place to keep it: every process builds its own.
        folder = Path(tempfile.mkdtemp(prefix="retrieval-"))
    target = folder / f"kernels-{key[:16]}.so"
    if target.exists():
        return target
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as unfinished:
        pass
    try:
        command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o", unfinished.name]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        # Whoever builds it beside us builds the same.
        os.replace(unfinished.name, target)
    finally:
        Path(unfinished.name).unlink(missing_ok=True)
    _log.info("compiled the CPU kernels in %.1f s", time.perf_counter() - begun)
    return target


def _processor() -> str:
    """What the machine code depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    described = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join([platform.machine(), *sorted(described)])
