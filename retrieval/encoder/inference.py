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
def item_vectors(encoder: UserEncoder) -> NDArray[np.float32]:
    """Embedding of every item in row order, float32 `[N, D]`: of unit length, or with popularity all but the last."""
    vectors: NDArray[np.float32] = encoder.item_vectors().float().cpu().numpy()
    return vectors
