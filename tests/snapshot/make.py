"""Small snapshots for tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import item_vectors
from retrieval.index.builder import build_index
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import GateVerdict, Interval
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import write_snapshot

ITEMS = 12
CONFIG = HSTUConfig(num_items=ITEMS, max_length=6, width=8, qk_dim=8, v_dim=8)


def writer(
    seed: int = 0,
    *,
    index_of: int | None = None,
    parent: str | None = None,
    expired: Sequence[int] = (),
    spec: IndexSpec | None = None,
) -> Callable[[Path], bytes]:
    """What `Registry.publish` takes.

    Args:
        seed: of the encoder's weights.
        index_of: seed of the encoder over whose items the index is built; by default the same.
        parent: the version that it claims to follow.
        expired: rows that are no answers.
        spec: of the index; exact if not given.
    """
    encoder = _encoder(seed)
    ids = pa.array([f"item-{number}" for number in range(ITEMS)])
    counts = (np.arange(ITEMS) + seed) % 5
    served = ~np.isin(np.arange(ITEMS), expired)
    attributes = {"events": pa.array(counts), "popularity": pa.array(counts.astype(np.float32))}
    vocabulary = Vocabulary(ids, attributes | ({"expired": pa.array(~served)} if expired else {}))
    vectors = item_vectors(encoder if index_of is None else _encoder(index_of))[served]

    def write(folder: Path) -> bytes:
        return write_snapshot(
            folder,
            encoder=encoder,
            info=CheckpointInfo(encoder=CONFIG, actions=("",), dataset="d", split={}, training={}),
            vocabulary=vocabulary,
            index=build_index(vectors, spec or IndexSpec()),
            ann_recall=1.0,
            report={"seed": seed},
            parent=parent,
            trained_on=Interval(first=1_700_000_000, last=1_700_086_400),
            gates=[GateVerdict(gate="ann-recall", passed=True, figure=1.0, limit=0.95, note="exact")],
        )

    return write


def publish(registry: Registry, seed: int = 0, *, expired: Sequence[int] = (), spec: IndexSpec | None = None) -> str:
    """Publish a snapshot of the seed."""
    return registry.publish(writer(seed, expired=expired, spec=spec))


def _encoder(seed: int) -> HSTUEncoder:
    torch.manual_seed(seed)
    return HSTUEncoder(CONFIG).eval()
