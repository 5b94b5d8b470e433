"""A trained encoder's item embeddings in files, to build an index over without holding them in memory."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.encoder.inference import item_blocks
from retrieval.encoder.protocol import UserEncoder
from retrieval.index.vectors import keep_vectors, mapped

__all__ = ["Embedded", "embed_items"]

_FOLDER = "index-build"


@dataclass(frozen=True, slots=True)
class Embedded:
    """Memory-mapped embeddings.

    Attributes:
        items: of all items, `[N, D]`.
        answers: of those that may be answers, `[M, D]`; `items` itself where all may.
        folder: where they lie, and what is begun of an index over them.
    """

    items: NDArray[np.float32]
    answers: NDArray[np.float32]
    folder: Path

    def remove(self) -> None:
        """Remove the files; what is mapped stays readable."""
        shutil.rmtree(self.folder, ignore_errors=True)


def embed_items(encoder: UserEncoder, weights: str, served: NDArray[np.bool_], run_dir: Path) -> Embedded:
    """Embed items block by block into the training run's folder; what an earlier attempt left there is used.

    Args:
        encoder: of the run.
        weights: hash of its weights: other ones leave their files no room.
        served: which items may be answers, bool `[N]`.
        run_dir: of the training run.
    """
    name = hashlib.sha256(weights.encode() + np.packbits(served).tobytes()).hexdigest()[:16]
    folder = run_dir / _FOLDER / name
    for other in (run_dir / _FOLDER).glob("*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    items = _kept(folder / "items.npy", encoder, None)
    answers = items if served.all() else _kept(folder / "answers.npy", encoder, np.flatnonzero(served))
    return Embedded(items, answers, folder)


def _kept(path: Path, encoder: UserEncoder, rows: NDArray[np.int64] | None) -> NDArray[np.float32]:
    return mapped(path) if path.exists() else keep_vectors(path, item_blocks(encoder, rows))
