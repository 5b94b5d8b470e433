"""Running an encoder outside training: numpy in, numpy out. Evaluation, jobs and the server all use this."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.protocol import UserEncoder
from retrieval.types import JaggedBatch

__all__ = ["as_read", "embed_users", "item_blocks", "item_vectors"]

_BLOCK: Final = 1 << 16


def as_read(encoder: UserEncoder, batch: JaggedBatch) -> JaggedBatch:
    """The histories as the encoder reads them: whole, or shortened to its `read_length`."""
    config = encoder.config
    if config.read_length is None:
        return batch
    return batch.shortened(config.read_length, spread=config.read == "spread")


@torch.inference_mode()
def embed_users(encoder: UserEncoder, batch: JaggedBatch) -> NDArray[np.float32]:
    """Embedding of each user at the request's time, float32 `[B, D]`: of unit length, D the encoder's `vector_width`.

    With popularity the last number is 1, and the others have unit length.

    Rows must not be empty nor longer than the encoder's `max_length`; `data.sequences` makes them so. They are read up
    to its `read_length`. A user's embedding does not depend on who shares the batch, beyond float rounding.
    """
    assert not encoder.training
    assert bool((batch.lengths > 0).all())
    tensors = JaggedTensors.of(as_read(encoder, batch), encoder.device)
    vectors = encoder.user_vectors(encoder.last(tensors))
    embeddings: NDArray[np.float32] = vectors.float().cpu().numpy()
    return embeddings


@torch.inference_mode()
def item_vectors(encoder: UserEncoder, rows: NDArray[np.int64] | slice | None = None) -> NDArray[np.float32]:
    """Embeddings of items, float32 `[M, D]`: of unit length, or with popularity all but the last.

    Args:
        encoder: whose items.
        rows: which of them, in that order; None for all N in row order.
    """
    place = torch.from_numpy(rows).to(encoder.device) if isinstance(rows, np.ndarray) else rows or slice(None)
    vectors: NDArray[np.float32] = encoder.item_vectors(place).float().cpu().numpy()
    return vectors


def item_blocks(encoder: UserEncoder, rows: NDArray[np.int64] | None = None) -> Iterator[NDArray[np.float32]]:
    """`item_vectors` of all items or some, a block of 65,536 at a time."""
    total = encoder.config.num_items if rows is None else len(rows)
    for start in range(0, total, _BLOCK):
        block = slice(start, min(start + _BLOCK, total))
        yield item_vectors(encoder, block if rows is None else rows[block])
