"""The two-way map between item ids, as the user writes them, and rows of the item table.

File `vocabulary.arrow`: one row per item in row order; column `id` (int64 or string) and, optionally, attribute
columns such as `title`. Ids come back exactly as they went in.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrieval.data.columns import map_columns, write_columns
from retrieval.errors import DataError

__all__ = ["RESERVED", "Vocabulary", "id_positions", "integers_of"]

RESERVED = frozenset({"id", "events", "popularity", "listed", "expired"})
"""Columns of our own: an item attribute of such a name gets another."""

_HASHED_AT_ONCE = 2**16
_INT64 = range(-(2**63), 2**63)


def integers_of(ids: Sequence[object] | NDArray) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids as int64 `[len(ids)]`, and which of them are 64-bit integers at all: bool `[len(ids)]`, else 0."""
    array = ids if isinstance(ids, np.ndarray) else np.asarray(ids) if len(ids) else np.zeros(0, np.int64)
    if array.dtype.kind == "i" or (array.dtype.kind == "u" and array.itemsize < 8):
        return array.astype(np.int64), np.ones(len(array), bool)
    # Mixed or huge values: numpy would take them for floats or text, and so change the ids among them.
    fits = [isinstance(one, int | np.integer) and not isinstance(one, bool) and int(one) in _INT64 for one in ids]
    values = [int(one) if fit else 0 for one, fit in zip(ids, fits, strict=True)]
    return np.array(values, np.int64), np.array(fits, bool)


def id_positions(sorted_ids: pa.Array, ids: pa.Array) -> NDArray[np.int64]:
    """Position of each of `ids` in `sorted_ids` (ascending, unique), −1 where absent: int64 `[len(ids)]`.

    Both have the same type, int64 or string; strings are ordered by their UTF-8 bytes; null is absent. Works
    on memory-mapped ids by bisection, so nothing is built or loaded up front.
    """
    if len(sorted_ids) == 0:
        return np.full(len(ids), -1, np.int64)
    if pa.types.is_integer(sorted_ids.type):
        known = sorted_ids.to_numpy()
        wanted = ids.to_numpy(zero_copy_only=False)
        position = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[position] == wanted, position, -1)
    places = (-1 if value is None else _bisect(sorted_ids, value) for value in ids.to_pylist())
    return np.fromiter(places, np.int64, len(ids))


def _bisect(sorted_ids: pa.Array, value: str) -> int:
    wanted = value.encode()
    low, high = 0, len(sorted_ids)
    while low < high:
        middle = (low + high) // 2
        if sorted_ids[middle].as_py().encode() < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(sorted_ids) and sorted_ids[low].as_py() == value else -1


class Vocabulary:
    """Items of a catalogue: `ids[row]` is the id of a row of the item table.

    Args:
        ids: int64 or string array, unique, without nulls.
        attributes: further columns aligned with the rows, e.g. `title`.

    Raises:
        DataError: ids are of another type, or an attribute has another length.
    """

    def __init__(self, ids: pa.Array, attributes: Mapping[str, pa.Array] | None = None) -> None:
        if not (pa.types.is_int64(ids.type) or pa.types.is_string(ids.type)):
            raise DataError(f"vocabulary: item ids must be int64 or string, not {ids.type}")
        self.ids = ids
        self.attributes = dict(attributes or {})
        for name, column in self.attributes.items():
            if len(column) != len(ids):
                raise DataError(f"vocabulary: attribute {name!r} has {len(column)} rows instead of {len(ids)}")

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Memory-map `vocabulary.arrow`.

        Raises:
            DataError: the file is missing or unreadable, or ids are null.
        """
        batch = map_columns(path)
        if "id" not in batch.schema.names:
            raise DataError(f"{path}: has no column 'id'")
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        ids = columns.pop("id")
        if ids.null_count:
            raise DataError(f"{path}: column 'id' has {ids.null_count} nulls")
        return cls(ids, columns)

    def save(self, path: Path) -> None:
        """Write `vocabulary.arrow`."""
        write_columns(path, {"id": self.ids, **self.attributes})

    def __len__(self) -> int:
        return len(self.ids)

    def check_unique(self) -> None:
        """Whether each id stands in one row.

        Raises:
            DataError: one does not.
        """
        order = pc.sort_indices(self.ids)
        ordered = self.ids.take(order)
        equal = np.flatnonzero(pc.equal(ordered[:-1], ordered[1:]).to_numpy(zero_copy_only=False))
        if len(equal):
            first, second = sorted(order.take(pa.array([equal[0], equal[0] + 1])).to_pylist())
            raise DataError(f"vocabulary: id {ordered[int(equal[0])].as_py()!r} stands in rows {first} and {second}")

    @property
    def has_string_ids(self) -> bool:
        """Whether ids are strings (else 64-bit integers)."""
        return bool(pa.types.is_string(self.ids.type))

    @property
    def fingerprint(self) -> str:
        """Names the ids in their order: SHA-256 of their kind, lengths and bytes, as 64 hex digits."""
        if not self.has_string_ids:
            return hashlib.sha256(b"int64" + self.ids.to_numpy().astype("<i8").tobytes()).hexdigest()
        digest = hashlib.sha256(b"string" + pc.binary_length(self.ids).to_numpy().astype("<i8").tobytes())
        for start in range(0, len(self), _HASHED_AT_ONCE):
            digest.update("".join(self.ids.slice(start, _HASHED_AT_ONCE).to_pylist()).encode())
        return digest.hexdigest()

    @cached_property
    def _row_of_string(self) -> dict[str, int]:
        return {value: row for row, value in enumerate(self.ids.to_pylist())}

    @cached_property
    def _sorted_integers(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = self.ids.to_numpy()
        order = np.argsort(ids, kind="stable")
        return ids[order], order

    def rows_of(self, ids: Sequence[int] | Sequence[str] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each id, −1 where the catalogue does not have it: int64 `[len(ids)]`.

        Ids of the other kind (a string asked of an integer vocabulary, or the reverse) are simply not known.
        """
        if self.has_string_ids:
            known = self._row_of_string
            return np.fromiter((known.get(value, -1) for value in ids), np.int64, len(ids))  # type: ignore[arg-type]
        wanted, fits = integers_of(ids)
        if len(self) == 0:
            return np.full(len(ids), -1, np.int64)
        sorted_ids, order = self._sorted_integers
        position = np.minimum(np.searchsorted(sorted_ids, wanted), len(sorted_ids) - 1)
        return np.where(fits & (sorted_ids[position] == wanted), order[position], -1)

    def ids_of(self, rows: NDArray[np.int64]) -> list[int] | list[str]:
        """Ids of rows, as Python integers or strings."""
        values: list[int] | list[str] = self.ids.take(pa.array(rows)).to_pylist()
        return values

    @cached_property
    def rank_by_id(self) -> NDArray[np.int64]:
        """Place of each row when the catalogue is sorted by id, int64 `[N]`: how equal scores are ordered."""
        rank = np.empty(len(self), np.int64)
        rank[pc.sort_indices(self.ids).to_numpy()] = np.arange(len(self))
        return rank
