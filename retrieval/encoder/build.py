"""From a configuration to an encoder."""

from retrieval.encoder.bert4rec import BERT4RecEncoder
from retrieval.encoder.config import BERT4RecConfig, EncoderConfig, GRU4RecConfig, HSTUConfig
from retrieval.encoder.gru4rec import GRU4RecEncoder
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.protocol import UserEncoder
from retrieval.encoder.sasrec import SASRecEncoder
from retrieval.kernels.backend import Backend

__all__ = ["build_encoder"]


def build_encoder(config: EncoderConfig, *, backend: Backend = "auto") -> UserEncoder:
    """A new encoder with random weights; `backend` chooses the kernels of those that have any."""
    if isinstance(config, HSTUConfig):
        return HSTUEncoder(config, backend=backend)
    if isinstance(config, BERT4RecConfig):
        return BERT4RecEncoder(config)
    if isinstance(config, GRU4RecConfig):
        return GRU4RecEncoder(config)
    return SASRecEncoder(config)
