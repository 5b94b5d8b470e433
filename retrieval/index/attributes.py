"""Attributes of items, and the filters over them compiled to bitmaps.

Each attribute that a filter asks about is inverted once: its distinct values in ascending order, and the rows of each
laid end to end in that order. Equality, sets and ranges are then all slices of one array of rows.

Shape legend: N items, V distinct values of one attribute, E rows of all values together (items, where an attribute has
one value each).
"""

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from typing import Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from retrieval.errors import FilterError
from retrieval.index.filter import And, Compare, Filter, In, Missing, Not, Or, Value, literal

__all__ = ["Attributes", "Eligible", "in_bitmap"]

_CACHE_BYTES: Final = 1 << 28
# The rows of a filter are kept beside its bitmap where they take no more memory than it: 64 bits each.
_ROW_BITS: Final = 64
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Eligible:
    """A set of rows; immutable.

    Args:
        bitmap: packed, bit r % 8 of byte r // 8 (the lowest first) tells of row r, uint8 `[ceil(N / 8)]`; bits beyond
            N are zero.

    Attributes:
        bitmap: as given.
        count: how many rows are in the set.
    """

    def __init__(self, bitmap: NDArray[np.uint8]) -> None:
        self.bitmap = bitmap
        self.count = int(np.bitwise_count(bitmap).sum(dtype=np.int64))
        few = self.count * _ROW_BITS <= 8 * len(bitmap)
        self._rows = _set_rows(bitmap) if few else None

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> "Eligible":
        """The rows where a mask `[N]` is true."""
        return cls(np.packbits(mask, bitorder="little"))

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows, ascending, int64 `[count]`; made at each call unless they are few."""
        return self._rows if self._rows is not None else _set_rows(self.bitmap)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bitmap.nbytes + (self._rows.nbytes if self._rows is not None else 0)


def _set_rows(bitmap: NDArray[np.uint8]) -> NDArray[np.int64]:
    full = np.flatnonzero(bitmap)
    byte, bit = np.nonzero(np.unpackbits(bitmap[full, None], axis=1, bitorder="little"))
    return full[byte] * 8 + bit


def in_bitmap(bitmap: NDArray[np.uint8], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the bit of each row is set, in the shape of `rows`; rows must be at least 0."""
    set_: NDArray[np.bool_] = (bitmap[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).view(bool)
    return set_


class _Kind(Protocol):
    """What values of an attribute are, and which values of a filter they compare with."""

    def __call__(self, value: Value) -> str | int | float | None:
        """The value as the attribute's own are held; None if it is of another kind."""


def _text(value: Value) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Value) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _boolean(value: Value) -> int | None:
    return int(value) if isinstance(value, bool) else None


def _microseconds(value: Value) -> int | None:
    if not isinstance(value, datetime):
        return None
    moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)


_KINDS: Final[dict[str, _Kind]] = {
    "text": _text,
    "integers": _integer,
    "numbers": _number,
    "true or false": _boolean,
    "moments": _microseconds,
}


def _kind_of(type_: pa.DataType) -> str | None:
    """A key of `_KINDS`, or None for types that no filter compares."""
    if pa.types.is_dictionary(type_):
        return _kind_of(type_.value_type)
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if pa.types.is_integer(type_):
        return "integers"
    if pa.types.is_floating(type_):
        return "numbers"
    if pa.types.is_boolean(type_):
        return "true or false"
    return "moments" if pa.types.is_timestamp(type_) or pa.types.is_date(type_) else None


@dataclass(frozen=True, slots=True)
class _Inverted:
    """Rows by value: `rows[starts[v]:starts[v + 1]]` are the rows of `values[v]`.

    Attributes:
        values: distinct values, ascending, `[V]`; text as a list of strings.
        starts: int64 `[V + 1]`.
        rows: int32 or int64 `[E]`.
    """

    values: Sequence[str] | NDArray
    starts: NDArray[np.int64]
    rows: NDArray[np.integer]

    def of(self, value: str | int | float) -> slice:
        """Where in `rows` those of one value are."""
        place = bisect_left(self.values, value)
        if place == len(self.values) or self.values[place] != value:
            return slice(0, 0)
        return slice(self.starts[place], self.starts[place + 1])

    def beyond(self, operator: str, value: str | int | float) -> slice:
        """Where in `rows` those of all values on one side of a bound are."""
        find = bisect_left if operator in ("<", ">=") else bisect_right
        place = find(self.values, value)
        edge = self.starts[place]
        return slice(0, edge) if operator in ("<", "<=") else slice(edge, len(self.rows))


class Attributes:
    """The attributes of N items, with an index of each that filters have asked about and a cache of filters.

    Any thread may use it; what it answers depends on nothing but the columns and the filter.

    Args:
        columns: one Arrow array of N values per attribute: text, integers, floats, booleans, dates or times of day
            and date, dictionaries of these, or lists of these (an item then has several values, or none).
        count: N.
        cache_bytes: how much memory compiled filters may take together; the least recently used go first.
    """

    def __init__(self, columns: Mapping[str, pa.Array], count: int, cache_bytes: int = _CACHE_BYTES) -> None:
        assert all(len(column) == count for column in columns.values())
        self._columns, self._count, self._cache_bytes = dict(columns), count, cache_bytes
        self._inverted: dict[str, _Inverted] = {}
        self._compiled: OrderedDict[str, Eligible] = OrderedDict()
        self._held = 0
        self._all = np.packbits(np.ones(count, bool), bitorder="little")
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return self._count

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Type of each attribute by its name."""
        return {name: column.type for name, column in self._columns.items()}

    @property
    def kinds(self) -> dict[str, tuple[str, bool]]:
        """By attribute: a key of `_KINDS`, or "" where values cannot be compared; whether an item may have several."""
        return {name: (_kind_of(self._type_of(name)) or "", _is_list(type_)) for name, type_ in self.types.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the compiled filters that are held."""
        return self._held

    def check(self, filter_: Filter) -> None:
        """Whether the filter can be asked of these attributes: cheap, reads no values.

        Raises:
            FilterError: an attribute is not known, or cannot be compared with a value; the sentence names attribute,
                operator and value.
        """
        if isinstance(filter_, And | Or):
            for part in filter_.parts:
                self.check(part)
        elif isinstance(filter_, Not):
            self.check(filter_.part)
        elif isinstance(filter_, In):
            for value in filter_.values:
                self._comparable(filter_.attribute, "in", value)
        elif isinstance(filter_, Compare):
            self._comparable(filter_.attribute, filter_.operator, filter_.value)
        else:
            assert isinstance(filter_, Missing)
            self._type_of(filter_.attribute)

    def compile(self, filter_: Filter) -> Eligible:
        """The rows that meet a filter.

        Raises:
            FilterError: as `check`.
        """
        # Equal filters may be of unequal kinds (1 = 1.0 = true), which their text keeps apart.
        key = str(filter_)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
            self.check(filter_)
            found = Eligible(self._bitmap(filter_))
            self._compiled[key] = found
            self._held += found.nbytes
            while self._held > self._cache_bytes and len(self._compiled) > 1:
                _, dropped = self._compiled.popitem(last=False)
                self._held -= dropped.nbytes
            return found

    def _bitmap(self, filter_: Filter) -> NDArray[np.uint8]:
        # Parts are compiled, so that filters share what they have in common: the tests of single attributes above all.
        if isinstance(filter_, Not):
            return self.compile(filter_.part).bitmap ^ self._all
        if isinstance(filter_, And | Or):
            join = np.bitwise_and if isinstance(filter_, And) else np.bitwise_or
            return reduce(join, (self.compile(part).bitmap for part in filter_.parts))
        mask = np.zeros(self._count, bool)
        if isinstance(filter_, Missing):
            mask[self._invert(filter_.attribute).rows] = True
            return np.packbits(~mask, bitorder="little")
        if isinstance(filter_, In):
            inverted = self._invert(filter_.attribute)
            for value in filter_.values:
                mask[inverted.rows[inverted.of(self._comparable(filter_.attribute, "in", value))]] = True
        else:
            assert isinstance(filter_, Compare)
            inverted = self._invert(filter_.attribute)
            bound = self._comparable(filter_.attribute, filter_.operator, filter_.value)
            mask[inverted.rows[inverted.beyond(filter_.operator, bound)]] = True
        return np.packbits(mask, bitorder="little")

    def _type_of(self, attribute: str) -> pa.DataType:
        """Type of an attribute's single values."""
        if attribute not in self._columns:
            known = ", ".join(map(repr, self._columns)) or "none"
            raise FilterError(f"attribute {attribute!r} is not known; the catalogue has {known}")
        type_ = self._columns[attribute].type
        return type_.value_type if _is_list(type_) else type_

    def _comparable(self, attribute: str, operator: str, value: Value) -> str | int | float:
        """A filter's value as the attribute's own are held."""
        type_ = self._type_of(attribute)
        kind = _kind_of(type_)
        asked = f"attribute {attribute!r}, operator {operator!r}, value {literal(value)}"
        if kind is None:
            raise FilterError(f"{asked}: filters cannot compare values of type {type_}")
        if kind == "true or false" and operator != "in":
            raise FilterError(f"{asked}: true and false have no order")
        try:
            held = _KINDS[kind](value)
        except OverflowError:
            held = None  # an integer beyond every float
        if held is None:
            raise FilterError(f"{asked}: the attribute holds {kind}")
        return held

    def _invert(self, attribute: str) -> _Inverted:
        found = self._inverted.get(attribute)
        if found is None:
            found = self._inverted[attribute] = _inverted(self._columns[attribute])
        return found


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_))


def _inverted(column: pa.Array) -> _Inverted:
    """Invert a column; nulls and not-a-numbers are left out."""
    rows = np.arange(len(column), dtype=np.int32 if len(column) < 2**31 else np.int64)
    if _is_list(column.type):
        rows = rows[pc.list_parent_indices(column).to_numpy()]
        column = pc.list_flatten(column)
    kind = _kind_of(column.type)
    if kind is None:  # only asked whether it is missing
        known = pc.is_valid(column).to_numpy(zero_copy_only=False)
        return _Inverted(np.zeros(1), np.array([0, int(known.sum())]), rows[known])
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    known = pc.is_valid(column)
    if kind == "numbers":
        column = pc.cast(column, pa.float64())
        known = pc.and_(known, pc.invert(pc.fill_null(pc.is_nan(column), True)))
    kept = known.to_numpy(zero_copy_only=False)
    rows, column = rows[kept], column.filter(known)
    if kind == "text":
        encoded = column.dictionary_encode()
        order = pc.sort_indices(encoded.dictionary).to_numpy()
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        values: Sequence[str] | NDArray = encoded.dictionary.take(pa.array(order)).to_pylist()
        codes = rank[encoded.indices.to_numpy()]
    else:
        if kind == "moments":
            moments = pc.cast(column, options=pc.CastOptions(pa.timestamp("us"), allow_time_truncate=True))
            column = moments.cast(pa.int64())
        elif kind == "true or false":
            column = column.cast(pa.int8())
        values, codes = np.unique(column.to_numpy(), return_inverse=True)
    counts = np.bincount(codes, minlength=len(values))
    # Stable, so that the rows of one value ascend.
    return _Inverted(
        values, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), rows[codes.argsort(kind="stable")]
    )
