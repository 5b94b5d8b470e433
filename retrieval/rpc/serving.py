"""A snapshot made ready to answer: with what every call looks up, and warmed."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.data.sequences import gather_histories
from retrieval.encoder.inference import as_read, embed_users
from retrieval.errors import SnapshotCorruptError
from retrieval.histories.store import Series
from retrieval.rpc.requests import Attribute, ServingState
from retrieval.snapshot.store import Snapshot
from retrieval.types import EventColumns, JaggedBatch, SideRows

__all__ = ["ServingSnapshot"]


class ServingSnapshot:
    """An opened snapshot with its look-ups built, ready for its first call. Immutable; any thread may use it.

    Building takes as long as the catalogue is large, so it belongs off the event loop.

    Raises:
        SnapshotCorruptError: the encoder has too few action embeddings for the snapshot's action names.

    Attributes:
        snapshot: the snapshot.
        version: its name.
        max_length: tokens that the encoder reads at most.
        string_ids: whether item ids are strings, else integers.
        actions: names of actions that histories may use, beside ""; empty if any name is accepted and none is read.
        kinds: what is read beside the main series.
        popularity: each item's share of recent events, float32 `[N]`.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.version = snapshot.version
        self.max_length = snapshot.encoder.config.max_length
        self.string_ids = snapshot.vocabulary.has_string_ids
        num_actions = snapshot.encoder.config.num_actions
        if 0 < num_actions < len(snapshot.info.actions):
            # Found here, not by each call that uses such an action.
            raise SnapshotCorruptError(
                f"{snapshot.version}: names {len(snapshot.info.actions)} actions, but its encoder knows {num_actions}"
            )
        self._action_codes = {name: code for code, name in reversed(list(enumerate(snapshot.info.actions)))}
        self._action_codes[""] = 0
        self.actions = tuple(name for name in self._action_codes if name)[::-1]
        self.kinds = snapshot.info.kinds
        self._rows_of = [{value: row for row, value in enumerate(kind.values, 1)} for kind in self.kinds]
        counts = snapshot.vocabulary.attributes["popularity"].to_numpy().astype(np.float64)
        self.popularity: NDArray[np.float32] = (counts / max(counts.sum(), 1.0)).astype(np.float32)
        cold = snapshot.vocabulary.attributes["events"].to_numpy() == 0
        self._cold = cold if cold.any() else None
        # Indexing numpy is many times faster than Arrow's `take` for the few rows of an answer.
        self._ids = snapshot.vocabulary.ids.to_numpy(zero_copy_only=False)
        self._warm_up()

    def _warm_up(self) -> None:
        """Fault in the weights, the index and the look-ups, so that the first call is as fast as any."""
        first = np.zeros(1, np.int64)
        self.snapshot.vocabulary.rows_of(self._ids[:1])
        events = EventColumns(items=first, actions=first.astype(np.uint8), timestamps=first)
        side = self.side({}, {})
        queries = self.embed(gather_histories(events, first, first + 1, first, self.max_length, side))
        self.snapshot.searcher.search(queries, [1])

    def embed(self, histories: JaggedBatch) -> NDArray[np.float32]:
        """User embeddings of histories that are not empty, float32 `[B, D]`."""
        return embed_users(self.snapshot.encoder, histories)

    def as_read(self, histories: JaggedBatch) -> JaggedBatch:
        """Histories as the encoder reads them."""
        return as_read(self.snapshot.encoder, histories)

    def action_codes(self, names: list[str]) -> NDArray[np.uint8]:
        """Code of each action name, uint8; 0 for names that the snapshot does not know."""
        known = self._action_codes
        if self.snapshot.encoder.config.num_actions == 0:
            return np.zeros(len(names), np.uint8)
        return np.fromiter((known.get(name, 0) for name in names), np.uint8, len(names))

    def side(self, context: Mapping[str, str], auxiliary: Mapping[str, Series]) -> SideRows | None:
        """What the encoder is to read beside one user's events; None where it reads nothing there.

        Values that the snapshot does not know have row 0, and names that it does not read are passed over.
        """
        if not self.kinds:
            return None
        fixed = [
            rows.get(context.get(kind.name, ""), 0)
            for kind, rows in zip(self.kinds, self._rows_of, strict=True)
            if kind.context
        ]
        nothing = np.empty(0, np.int64)
        kinds, values, timestamps = [nothing], [nothing], [nothing]
        for number, (kind, rows) in enumerate(zip(self.kinds, self._rows_of, strict=True), 1):
            if kind.context or kind.name not in auxiliary:
                continue
            series = auxiliary[kind.name]
            row_of = np.array([rows.get(value, 0) for value in series.values], np.int64)
            kinds.append(np.full(len(series.codes), number))
            values.append(row_of[series.codes])
            timestamps.append(series.timestamps)
        return SideRows(
            num_kinds=len(self.kinds),
            context=np.array([fixed], np.int64),
            kinds=np.concatenate(kinds),
            values=np.concatenate(values),
            timestamps=np.concatenate(timestamps),
            starts=np.zeros(1, np.int64),
            ends=np.array([sum(map(len, kinds))]),
        )

    def ids_of(self, rows: NDArray[np.int64]) -> list[int] | list[str]:
        """Item ids of rows, as Python integers or strings."""
        ids: list[int] | list[str] = self._ids[rows].tolist()
        return ids

    def cold_places(self, rows: NDArray[np.int64]) -> list[int]:
        """Which of these rows, by their place, are of items that no event of the training log was on."""
        return [] if self._cold is None else np.flatnonzero(self._cold[rows]).tolist()

    def titles_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Titles of rows, "" where an item has none; empty if the catalogue has no titles."""
        titles = self.snapshot.vocabulary.attributes.get("title")
        if titles is None:
            return []
        return [str(title) if title is not None else "" for title in titles.take(pa.array(rows)).to_pylist()]

    def state(self, *, stored_users: bool, max_k: int, max_batch: int) -> ServingState:
        """What is served, for `GetServingState`."""
        manifest = self.snapshot.manifest
        return ServingState(
            snapshot_version=self.version,
            created=manifest.created,
            dataset=manifest.dataset,
            items=manifest.items - manifest.expired,
            string_ids=self.string_ids,
            width=manifest.width,
            max_length=self.max_length,
            actions=self.actions,
            index=str(manifest.index),
            ann_recall=manifest.ann_recall,
            stored_users=stored_users,
            context=tuple(kind.name for kind in self.kinds if kind.context),
            auxiliary=tuple(kind.name for kind in self.kinds if not kind.context),
            query_actions=self.snapshot.encoder.config.query_actions,
            max_k=max_k,
            max_batch=max_batch,
            attributes=tuple(Attribute(name, *kind) for name, kind in self.snapshot.searcher.filterable.items()),
        )
