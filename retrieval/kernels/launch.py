"""Tile and launch of the Triton kernels of HSTU attention: a default for every shape, or what was measured here.

`python -m benchmarks.tune_kernels` times a bounded list of configurations on the GPU at hand and writes the fastest to
`tuned-kernels.json` in the user's cache folder, keyed by GPU, Triton version, kernel, head widths and element size.
Nothing is ever timed while the model runs: the same folder gives the same launches, hence the same bits, in every
process. Without the file, or for a shape that it does not hold, the module's default is used.
"""

import json
import logging
import os
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from retrieval.files import write_atomically

__all__ = ["Kernel", "LaunchConfig", "device_name", "save_table", "shape_key", "table", "table_path", "tuned"]

Kernel = Literal["forward", "keys", "queries", "distances"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Queries and keys of a tile, warps per program, depth of software pipelining."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        sizes = astuple(self)
        powers = all(isinstance(size, int) and size > 0 and size & (size - 1) == 0 for size in sizes[:3])
        if not powers or min(sizes[:2]) < 16 or not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(
                f"{sizes} is no launch: tiles of powers of two from 16 on, warps a power of two, stages ≥ 1"
            )

    def arguments(self) -> dict[str, int]:
        """As a launch takes them."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def table_path() -> Path:
    """The file of measured configurations; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrieval" / "tuned-kernels.json"


def device_name(device: torch.device) -> str:
    """What measured configurations belong to: GPU model and Triton version."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, triton {triton.__version__}"


def tuned(kernel: Kernel, device: torch.device, qk_dim: int, v_dim: int, itemsize: int) -> LaunchConfig | None:
    """The configuration that was measured for a kernel on such a device, or None."""
    return table(device).get(shape_key(kernel, qk_dim, v_dim, itemsize))


def shape_key(kernel: Kernel, qk_dim: int, v_dim: int, itemsize: int) -> str:
    """Key of a configuration within a device's: what tiles depend on."""
    return f"{kernel} qk{qk_dim} v{v_dim} bytes{itemsize}"


def save_table(device: torch.device) -> Path:
    """Write a device's configurations to the file, beside those of other devices; returns where it is."""
    path = table_path()
    try:
        devices = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        devices = {}
    devices[device_name(device)] = {key: astuple(config) for key, config in sorted(table(device).items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(devices, indent=1).encode())
    return path


@cache
def table(device: torch.device) -> dict[str, LaunchConfig]:
    """A device's measured configurations. A file that cannot be used is reported once, and then as if not there."""
    path = table_path()
    try:
        entries = json.loads(path.read_text("utf-8")).get(device_name(device), {})
        return {key: LaunchConfig(*entry) for key, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("%s: %s; kernels are launched by their defaults", path, error)
        return {}
