"""What a training run needs to go on after a kill as if nothing had happened: one file, replaced atomically.

Random numbers need no state: every step seeds its own generators from the run's seed and the step's number.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval.errors import CheckpointError
from retrieval.files import replacing

__all__ = ["load_state", "read_settings", "read_state", "save_state"]


def save_state(
    file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """Write tensors, the settings of the run, and how far it is, as JSON can hold them.

    Tensors on the CPU are written from where they are: a table of gigabytes is not copied.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(file) as path:
        save_file(ready, path, metadata={"settings": json.dumps(settings), "progress": json.dumps(progress)})


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of the run that wrote the file, as JSON gives them back.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(file, "pt") as reader:
            settings: dict[str, Any] = json.loads(reader.metadata()["settings"])
            return settings
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None


def read_state(file: Path) -> dict[str, Tensor]:
    """All tensors that `save_state` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(file, "pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None


@torch.no_grad()
def load_state(file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Put what `save_state` wrote into the tensors of the same names; return the progress.

    Args:
        file: what `save_state` wrote.
        tensors: receive their contents, one after another.
        settings: those of this run.

    Raises:
        CheckpointError: the file is damaged, or of a run with other settings; the sentence names the first.
    """
    try:
        with safe_open(file, "pt") as reader:
            metadata = reader.metadata()
            found, progress = json.loads(metadata["settings"]), json.loads(metadata["progress"])
            # As JSON gives them back: tuples are lists there.
            _check(file, found, json.loads(json.dumps(settings)))
            for name, tensor in tensors.items():
                tensor.copy_(reader.get_tensor(name))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    return dict(progress)


def _check(file: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if found.get(key) == value:
            continue
        before, now = found.get(key), value
        if isinstance(before, dict) and isinstance(now, dict):
            inner = next(one for one in now | before if before.get(one) != now.get(one))
            key, before, now = f"{key} {inner}", before.get(inner), now.get(inner)
        raise CheckpointError(f"{file}: was trained with {key} {before}, not {now}; use a new run folder")
