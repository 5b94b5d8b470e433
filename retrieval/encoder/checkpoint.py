"""An encoder on disk: `encoder.json` (what it is) beside `encoder.safetensors` (its weights).

The two are bound by the weights' SHA-256 in the JSON, so that halves of two checkpoints never load together.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
        encoder.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{weights}: does not fit {_JSON} ({error})") from None
    return encoder.to(device).eval(), info
