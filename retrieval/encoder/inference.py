"""Running an encoder outside training: numpy in, numpy out. Evaluation, jobs and the server all use this."""

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.encoder.batch import JaggedTensors
from retrieval.encoder.protocol import UserEncoder
from retrieval.types import JaggedBatch

__all__ = ["as_read", "embed_users", "item_vectors"]


def as_read(encoder: UserEncoder, batch: JaggedBatch) -> JaggedBatch:
    """The histories as the encoder reads them: whole, or shortened to its `read_length`."""
    config = encoder.config
    if config.read_length is None:
        return batch
    return batch.shortened(config.read_length, spread=config.read == "spread")


@torch.inference_mode()
def embed_users(encoder: UserEncoder, batch: JaggedBatch) -> NDArray[np.float32]:
    """Embedding of each user at the request's time, unit length, float32 `[B, D]`.

    Rows must not be empty nor longer than the encoder's `max_length`; `data.sequences` makes them so. They are read up
    to its `read_length`. A user's embedding does not depend on who shares the batch, beyond float rounding.
    """
    assert not encoder.training
    assert bool((batch.lengths > 0).all())
    vectors = encoder.last(JaggedTensors.of(as_read(encoder, batch), encoder.device))
    embeddings: NDArray[np.float32] = vectors.float().cpu().numpy()
    return embeddings


@torch.inference_mode()
def item_vectors(encoder: UserEncoder) -> NDArray[np.float32]:
    """Embedding of every item in row order, unit length, float32 `[N, D]`."""
    vectors: NDArray[np.float32] = encoder.item_vectors().float().cpu().numpy()
    return vectors
