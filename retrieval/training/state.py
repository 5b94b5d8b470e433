"""What a training run needs to go on after a kill as if nothing had happened: one file, replaced atomically."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from retrieval.errors import CheckpointError
from retrieval.files import write_atomically

__all__ = ["load_state", "save_state"]


def save_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, header: dict[str, Any]) -> None:
    """Write weights, optimiser state and a JSON header.

    Random numbers need no state: every step seeds its own generators from the run's seed and the step's number.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": tensor for name, tensor in entries.items()})
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(file, save(ready, metadata={"header": json.dumps(header)}))


def load_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, expected: dict[str, Any]) -> int:
    """Put weights and optimiser state back; return the number of steps done.

    Args:
        file: what `save_state` wrote.
        model: receives the weights.
        optimizer: receives its state.
        expected: the header that this run would write, without `step`.

    Raises:
        CheckpointError: the file is damaged, or of a run with other settings; the sentence names the first.
    """
    try:
        with safe_open(file, "pt") as reader:
            header = json.loads(reader.metadata()["header"])
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    step: int = header.pop("step")
    for key, value in expected.items():
        if header.get(key) != value:
            raise CheckpointError(
                f"{file}: was trained with {key} {header.get(key)}, not {value}; use a new run folder"
            )
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".")
            state.setdefault(int(index), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step
