"""An encoder on disk: `encoder.json` (what it is) beside `encoder.safetensors` (its weights).

The two are bound by the weights' SHA-256 in the JSON, so that halves of two checkpoints never load together.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retrieval.config import Config
from retrieval.encoder.build import build_encoder
from retrieval.encoder.config import EncoderConfig
from retrieval.encoder.protocol import UserEncoder
from retrieval.errors import CheckpointError
from retrieval.files import replacing, sha256_of, write_atomically
from retrieval.types import TokenKind

__all__ = ["CHECKPOINT_FORMAT", "CheckpointInfo", "load_checkpoint", "read_info", "save_checkpoint"]

CHECKPOINT_FORMAT = 1
_JSON, _WEIGHTS = "encoder.json", "encoder.safetensors"
# Of a table that are read at a time.
_ROWS = 65_536


class CheckpointInfo(Config):
    """Contents of `encoder.json`.

    Attributes:
        format: number of the checkpoint's format.
        encoder: shape of the encoder.
        actions: name of each action code; code 0 is an event without an action.
        kinds: what tokens beside the main series tell, and the row of each value; as many as the encoder has.
        dataset: fingerprint of the dataset that it was trained on.
        split: the split that it was trained on, as `data.splits` records it.
        training: hyperparameters, the number of steps done and rows of the tables, for people.
        weights_sha256: hash of `encoder.safetensors`; filled in when saving.
    """

    format: int = CHECKPOINT_FORMAT
    encoder: EncoderConfig
    actions: tuple[str, ...]
    kinds: tuple[TokenKind, ...] = ()
    dataset: str
    split: dict[str, Any]
    training: dict[str, Any]
    weights_sha256: str = ""


def save_checkpoint(folder: Path, encoder: UserEncoder, info: CheckpointInfo) -> None:
    """Write both files; a crash between them leaves a pair that `load_checkpoint` refuses, never a mixed one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with replacing(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary)
    bound = info.model_copy(update={"weights_sha256": sha256_of(folder / _WEIGHTS)})
    write_atomically(folder / _JSON, bound.model_dump_json(indent=2).encode())


def read_info(folder: Path) -> CheckpointInfo:
    """What an encoder on disk is, without its weights.

    Raises:
        CheckpointError: the file is missing, unreadable or of another format.
        ConfigError: it does not say what its format demands.
    """
    return CheckpointInfo.load_json(
        folder / _JSON, format_number=CHECKPOINT_FORMAT, folder_is="a trained encoder's folder", error=CheckpointError
    )


def load_checkpoint(folder: Path, device: torch.device | str = "cpu") -> tuple[UserEncoder, CheckpointInfo]:
    """Read an encoder, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, of another format, or the two do not belong together.
    """
    info = read_info(folder)
    if tuple(kind.rows for kind in info.kinds) != info.encoder.kinds:
        raise CheckpointError(f"{folder / _JSON}: its kinds have other numbers of values than its encoder")
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{weights}: is missing")
    if sha256_of(weights) != info.weights_sha256:
        raise CheckpointError(f"{weights}: is not the file that {_JSON} was written with")
    encoder = build_encoder(info.encoder)
    try:
        _read_weights(weights, encoder.state_dict())
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{weights}: does not fit {_JSON} ({error})") from None
    return encoder.to(device).eval(), info


@torch.no_grad()
def _read_weights(file: Path, state: Mapping[str, Tensor]) -> None:
    """Fill tensors from a file, large ones in blocks, so that no table is in memory twice.

    By numpy: safetensors 0.8's way to torch loses two Python objects per tensor, and a server that swaps snapshots all
    year would never get them back.

    Raises:
        ValueError: the file holds other tensors.
    """
    with safe_open(file, "np") as reader:
        # A reader is no mapping: iterating over it is not for names.
        if (names := set(reader.keys())) != set(state):
            raise ValueError(f"it holds other tensors, among them {min(names ^ set(state))}")
        for name, tensor in state.items():
            part = reader.get_slice(name)
            if part.get_shape() != list(tensor.shape):
                raise ValueError(f"{name} has shape {part.get_shape()}, not {list(tensor.shape)}")
            if tensor.dim() < 2:
                tensor.copy_(torch.from_numpy(reader.get_tensor(name)))
                continue
            for start in range(0, len(tensor), _ROWS):
                end = min(start + _ROWS, len(tensor))
                tensor[start:end].copy_(torch.from_numpy(part[start:end]))
