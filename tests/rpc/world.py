"""A small dataset and snapshots of it with an untrained, seeded encoder: answers are arbitrary but certain."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.vocabulary import Vocabulary
from retrieval.encoder.checkpoint import CheckpointInfo
from retrieval.encoder.config import HSTUConfig
from retrieval.encoder.hstu import HSTUEncoder
from retrieval.encoder.inference import item_vectors
from retrieval.histories.fill import fill_histories
from retrieval.histories.recorded import RecordedHistories, open_histories
from retrieval.index.builder import build_index
from retrieval.index.spec import IndexSpec
from retrieval.rpc.client import History
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot, write_snapshot
from tests.support import Event, write_dataset

ITEMS, USERS, MAX_LENGTH, WIDTH = 300, 40, 12, 16
ACTIONS = ("", "like", "skip")
START = 1_000_000


def histories(seed: int = 0) -> list[list[Event]]:
    """Users with 1 to 30 events, more than the encoder reads, of a catalogue whose last items nobody touched."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(USERS):
        length = 1 + user % 30
        times = START + np.cumsum(rng.integers(0, 100_000, length))
        popular = (rng.random(length) ** 2 * (ITEMS - 50)).astype(int)
        events.append(list(zip(popular.tolist(), rng.integers(0, 3, length).tolist(), times.tolist(), strict=True)))
    return events


@dataclass(frozen=True)
class World:
    """A dataset, a registry and an encoder that belong together."""

    dataset: Dataset
    registry: Registry
    encoder: HSTUEncoder
    stored: RecordedHistories

    def open(self) -> ServingSnapshot:
        return ServingSnapshot(open_snapshot(self.registry.folder(self.registry.current())))

    def history(self, user: int) -> History:
        """A user's events, as a client would send them."""
        stored = self.stored.read(user)
        assert stored is not None
        return History(list(stored.items), stored.timestamps.tolist(), stored.actions)

    def ids(self, rows: list[int] | NDArray[np.int64]) -> list[int] | list[str]:
        return self.dataset.vocabulary.ids_of(np.array(rows, np.int64))


def make_encoder(
    seed: int = 0, num_actions: int = 3, kinds: tuple[int, ...] = (), query_actions: bool = False
) -> HSTUEncoder:
    """Untrained, but with every part of it at work."""
    torch.manual_seed(seed)
    shape = {"max_length": MAX_LENGTH, "width": WIDTH, "num_heads": 2, "qk_dim": 8, "v_dim": 8}
    asked = {"num_actions": num_actions, "kinds": kinds, "query_actions": query_actions}
    config = HSTUConfig(num_items=ITEMS, **shape, **asked)
    encoder = HSTUEncoder(config).eval()
    with torch.no_grad():
        encoder.item_embedding.weight.normal_()
        for table in (encoder.action_embedding, encoder.query_embedding, encoder.side_embedding):
            if table is not None:
                table.weight.normal_()
        for name, parameter in encoder.named_parameters():
            if name.endswith(("uvqk", "time_table")):
                parameter.normal_(std=0.5)
    return encoder


def publish(
    registry: Registry,
    dataset: Dataset,
    encoder: HSTUEncoder,
    actions: tuple[str, ...] = ACTIONS,
    spec: IndexSpec | None = None,
) -> str:
    titles = pa.array([f"Title {row}" if row % 7 else None for row in range(len(dataset.vocabulary))])
    counts = dataset.item_counts
    attributes = {"title": titles, "events": pa.array(counts), "popularity": pa.array(counts.astype(np.float32))}
    vocabulary = Vocabulary(dataset.vocabulary.ids, attributes)
    spec = spec if spec is not None else IndexSpec()

    def write(folder: Path) -> bytes:
        return write_snapshot(
            folder,
            encoder=encoder,
            info=CheckpointInfo(
                encoder=encoder.config,
                actions=actions,
                kinds=dataset.info.kinds if encoder.config.kinds else (),
                dataset=dataset.info.fingerprint,
                split={},
                training={},
            ),
            vocabulary=vocabulary,
            index=build_index(item_vectors(encoder), spec),
            ann_recall=1.0,
            report={},
        )

    return registry.publish(write)


def make_world(folder: Path, item_ids: list[int] | list[str]) -> World:
    dataset = write_dataset(folder / "dataset", histories(), item_ids)
    encoder = make_encoder()
    registry = Registry(folder / "registry")
    publish(registry, dataset, encoder)
    stored = open_histories(str(folder / "histories"))
    fill_histories(dataset, stored)
    return World(dataset, registry, encoder, stored)


def integer_ids() -> list[int]:
    """In no order, with negative ones and ones beyond what a float can hold."""
    ids = [2**53 + 1 + row if row % 3 == 0 else row * 17 - 1000 for row in range(ITEMS)]
    return np.random.default_rng(1).permutation(np.array(ids)).tolist()


def string_ids() -> list[str]:
    """In no order, beyond ASCII, and some that look like numbers."""
    ids = [str(row) if row % 3 == 0 else f"item-é{row:04d}-🎬" for row in range(ITEMS)]
    return np.random.default_rng(2).permutation(np.array(ids)).tolist()
