"""C++ parts: compiled for this machine on first use, kept in the user's cache folder.

A compiler is not required: whoever asks for a library computes the same in another way where there is none.
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
from collections.abc import Sequence
from pathlib import Path

from numpy.typing import NDArray

__all__ = ["address", "compiled"]

_FOLDER = Path(__file__).parent
_HEADERS = (_FOLDER / "native_threads.h",)
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread", f"-I{_FOLDER}")

_log = logging.getLogger(__name__)


def compiled(
    name: str, sources: Sequence[Path], without: str, flags: Sequence[str] = (), headers: Sequence[Path] = ()
) -> ctypes.CDLL | None:
    """A library of C++ sources; None where it cannot be had, or is not wanted (RETRIEVAL_NATIVE=0).

    Args:
        name: of the library's file.
        sources: its sources, which may include `native_threads.h`.
        without: what it means to do without it, for the log.
        flags: of the compiler, after the usual ones.
        headers: that the sources include beside that one.
    """
    if os.environ.get("RETRIEVAL_NATIVE", "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        _log.warning("no C++ compiler: %s", without)
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, name, sources, flags, headers)))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [str(error)])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    _log.warning("%s: %s", without, reason)
    return None


def address(array: NDArray) -> int:
    """Where the elements of a contiguous array lie, while the array lives."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # must not be written to, or is empty; the general way takes three times as long
        return int(array.ctypes.data)


def _built(compiler: str, name: str, sources: Sequence[Path], flags: Sequence[str], headers: Sequence[Path]) -> Path:
    """Path of the library, built if the cache has none for these sources, compiler and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    texts = [file.read_text("utf-8") for file in (*sources, *headers, *_HEADERS)]
    key = hashlib.sha256("\n".join([*texts, *_FLAGS, *flags, version, _processor()]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrieval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        # No place to keep it: every process builds its own.
        folder = Path(tempfile.mkdtemp(prefix="retrieval-"))
    target = folder / f"{name}-{key[:16]}.so"
    if target.exists():
        return target
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as unfinished:
        pass
    try:
        command = [compiler, *_FLAGS, *flags, *map(str, sources), "-o", unfinished.name]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        # Whoever builds it beside us builds the same.
        os.replace(unfinished.name, target)
    finally:
        Path(unfinished.name).unlink(missing_ok=True)
    _log.info("compiled %s in %.1f s", name, time.perf_counter() - begun)
    return target


def _processor() -> str:
    """What the machine code depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    described = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join([platform.machine(), *sorted(described)])
