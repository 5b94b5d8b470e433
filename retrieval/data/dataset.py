"""A dataset folder: what `ingest` writes, and training, evaluation and the server read.

    dataset.json      format number, action values, statistics, repairs, sources, fingerprint
    vocabulary.arrow  row → item id and attributes (see `data.vocabulary`)
    users.arrow       `id` ascending; `end` int64: where the user's events end (they start at the end before)
    events.arrow      `item` int32 row, `action` uint8 code, `timestamp` int64 seconds; by user, then by time

where tokens of other kinds are declared (`data.features`), also

    context.arrow     an int32 column per context kind, by its name: row of each user's value in the kind's table;
                      only where there is such a kind
    auxiliary.arrow   `kind` uint8, `value` int32 row, `timestamp` int64 seconds; by user, then by time; runs of equal
                      values of one kind are their first event
    ends.arrow        `end` int64: where each user's auxiliary events end

Columns are memory-mapped: opening takes milliseconds at any size, and a process touches only the pages it reads.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.config import Config
from retrieval.data.columns import as_numpy, map_columns
from retrieval.data.vocabulary import Vocabulary, id_positions, integers_of
from retrieval.errors import DataError
from retrieval.files import sha256_of
from retrieval.types import EventColumns, SideRows, TokenKind

__all__ = ["DATASET_FORMAT", "ActionValue", "Dataset", "DatasetInfo", "fingerprint_of"]

DATASET_FORMAT = 1
_SIDE_FILES = ("context.arrow", "auxiliary.arrow", "ends.arrow")


class ActionValue(Config):
    """One action code's meaning; its place in the list is the code. Code 0 is an event without an action."""

    value: str
    positive: bool


class DatasetInfo(Config):
    """Contents of `dataset.json`.

    Attributes:
        format: number of the folder's format.
        users, items, events: counts; items include those that only metadata names.
        actions: meaning of each action code.
        kinds: what tokens beside the main series tell, context first; kind k is the k-th, counted from 1.
        tie_order: what orders a user's events of equal time: "file order" or "column <name>".
        statistics: figures for people (time span, history lengths, …).
        repairs: what ingest mended, by kind, in events.
        sources: the files that were read.
        fingerprint: hash of the Arrow files; checkpoints and snapshots refer to it.
    """

    format: int
    users: int
    items: int
    events: int
    actions: tuple[ActionValue, ...]
    kinds: tuple[TokenKind, ...] = ()
    tie_order: str
    statistics: dict[str, Any]
    repairs: dict[str, int]
    sources: tuple[str, ...]
    fingerprint: str


def fingerprint_of(folder: Path) -> str:
    """Hash of a dataset's Arrow files, as 64 hex digits."""
    names = ["vocabulary.arrow", "users.arrow", "events.arrow"]
    names += [name for name in _SIDE_FILES if (folder / name).exists()]
    return hashlib.sha256("".join(sha256_of(folder / name) for name in names).encode()).hexdigest()


class Dataset:
    """An opened dataset folder.

    Attributes:
        path: the folder.
        info: contents of `dataset.json`.
        vocabulary: rows and ids of the items.
        user_ids: ids of the users, ascending, Arrow int64 or string `[U]`.
        offsets: int64 `[U + 1]`; user u owns events `offsets[u]:offsets[u + 1]`.
        events: all events, memory-mapped.
        positive: bool `[A]`; whether an action code is a positive engagement.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = DatasetInfo.load_json(
            path / "dataset.json", format_number=DATASET_FORMAT, folder_is="a dataset folder", error=DataError
        )
        self.vocabulary = Vocabulary.load(path / "vocabulary.arrow")
        users = map_columns(path / "users.arrow")
        self.user_ids: pa.Array = users.column("id")
        ends = as_numpy(users, "end", path / "users.arrow")
        self.offsets: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), ends])
        batch = map_columns(path / "events.arrow")
        fields = [as_numpy(batch, name, path / "events.arrow") for name in ("item", "action", "timestamp")]
        self.events = EventColumns(items=fields[0], actions=fields[1], timestamps=fields[2])
        self.positive = np.array([action.positive for action in self.info.actions], bool)
        found = (len(self.user_ids), len(self.vocabulary), len(self.events.items), int(self.offsets[-1]))
        promised = (self.info.users, self.info.items, self.info.events, self.info.events)
        if found != promised:
            raise DataError(f"{path}: files hold {found} users, items, events, but dataset.json says {promised}")
        self._side = _Side(path, self.info.kinds, len(self)) if self.info.kinds else None

    def __len__(self) -> int:
        return len(self.user_ids)

    def users_named(self, ids: Sequence[int] | Sequence[str]) -> NDArray[np.int64]:
        """Index of each user id, −1 where unknown: int64 `[len(ids)]`. Bisects; loads nothing up front."""
        if pa.types.is_integer(self.user_ids.type):
            values, fits = integers_of(ids)
            return np.where(fits, id_positions(self.user_ids, pa.array(values)), -1)
        wanted = pa.array([one if _is_text(one) else None for one in ids], pa.string())
        return id_positions(self.user_ids, wanted)

    def side(self, users: NDArray[np.int64], ends: NDArray[np.int64]) -> SideRows | None:
        """Context of users, and the auxiliary events that come before some event of each in the unified sequence.

        Args:
            users: int64 `[B]`.
            ends: index of that event, int64 `[B]`, or one past the user's last: then all auxiliary events.

        Returns:
            None where the dataset has no tokens beside the main series.
        """
        if self._side is None:
            return None
        within = ends < self.offsets[users + 1]
        limits = np.full(len(users), np.iinfo(np.int64).max)
        # What is recorded with an engagement comes after it: at its own time nothing is known yet.
        limits[within] = self.events.timestamps[ends[within]]
        return self._side.before(users, limits)

    @cached_property
    def item_counts(self) -> NDArray[np.int64]:
        """Events per item over the whole dataset, int64 `[N]`."""
        return np.bincount(self.events.items, minlength=len(self.vocabulary)).astype(np.int64)


class _Side:
    """Context and auxiliary events of all users, memory-mapped."""

    def __init__(self, path: Path, kinds: tuple[TokenKind, ...], users: int) -> None:
        self._num_kinds = len(kinds)
        names = [kind.name for kind in kinds if kind.context]
        context = map_columns(path / "context.arrow") if names else None
        self._context = [as_numpy(context, name, path / "context.arrow") for name in names]
        ends = as_numpy(map_columns(path / "ends.arrow"), "end", path / "ends.arrow")
        self._offsets = np.concatenate([np.zeros(1, np.int64), ends])
        auxiliary = map_columns(path / "auxiliary.arrow")
        self._kinds, self._values, self._timestamps = (
            as_numpy(auxiliary, name, path / "auxiliary.arrow") for name in ("kind", "value", "timestamp")
        )
        found = {len(ends), *map(len, self._context)}
        if found != {users} or int(self._offsets[-1]) != len(self._kinds):
            raise DataError(f"{path}: context, auxiliary events and ends are not those of {users} users")

    def before(self, users: NDArray[np.int64], limits: NDArray[np.int64]) -> SideRows:
        """Of each user, what was known before a time."""
        starts, ends = self._offsets[users], self._offsets[users + 1]
        spans = zip(starts, ends, limits, strict=True)
        known = [start + np.searchsorted(self._timestamps[start:end], limit) for start, end, limit in spans]
        context = [column[users].astype(np.int64) for column in self._context]
        return SideRows(
            num_kinds=self._num_kinds,
            context=np.stack(context, axis=1) if context else np.zeros((len(users), 0), np.int64),
            kinds=self._kinds,
            values=self._values,
            timestamps=self._timestamps,
            starts=starts,
            ends=np.array(known, np.int64),
        )


def _is_text(value: object) -> bool:
    # A lone surrogate has no bytes in UTF-8, so no stored id can be equal to it.
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
