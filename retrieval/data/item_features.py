"""Attributes of items as rows of one embedding table, bounded in size, and as vectors: declared in one schema.

Legend: N items, M features of all items together, F rows of the table of features, V numbers of an item's vectors.
"""

import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from retrieval.config import Config
from retrieval.data.vocabulary import Vocabulary
from retrieval.errors import ConfigError

__all__ = ["ItemAttribute", "ItemFeatureSchema", "ItemFeatures", "item_features"]

_WORD = re.compile(r"\w+")


class ItemAttribute(Config):
    """How one column of the item metadata is read; a missing value gives no feature.

    Attributes:
        kind: "category": one value. "set": several, a list or a text divided by `separator`. "number": in `buckets`
            of about as many items each. "text": words and pairs of neighbouring words, without case. "vector": an
            embedding that was made elsewhere, a list of as many numbers for every item that has one.
        separator: between the values of a set that is written as text.
        buckets: rows of the table; values and words are hashed to them.
    """

    kind: Literal["category", "set", "number", "text", "vector"]
    separator: str = Field(default="|", min_length=1)
    buckets: int = Field(default=1024, ge=1, le=2**24)


class ItemFeatureSchema(Config):
    """What an item's embedding is made of beside its id.

    Attributes:
        attributes: columns of the item metadata and how each is read.
        id_dropout: chance that a training step reads an item by its attributes alone.
        min_count: training events from which on an item has an embedding of its own; below, attributes make it and
        overflow: rows that such items share, by a hash of their ids.
    """

    attributes: dict[str, ItemAttribute] = Field(default_factory=dict)
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    min_count: int = Field(default=1, ge=1)
    overflow: int = Field(default=0, ge=0, le=2**24)

    @model_validator(mode="after")
    def _makes_items_of_something(self) -> Self:
        if not self.attributes and not self.overflow:
            raise ValueError("there are neither attributes nor overflow rows")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemFeatures:
    """Features of every item, end to end.

    Attributes:
        offsets: int64 `[N + 1]`; item i has features `offsets[i]:offsets[i + 1]`.
        features: rows of the table of features, int64 `[M]`.
        size: F.
        vectors: those of all vector attributes side by side, each scaled to length 1, or 0 where an item has none,
            float32 `[N, V]`.
    """

    offsets: NDArray[np.int64]
    features: NDArray[np.int64]
    size: int
    vectors: NDArray[np.float32]


def item_features(vocabulary: Vocabulary, schema: ItemFeatureSchema, item_counts: NDArray[np.int64]) -> ItemFeatures:
    """Features of a catalogue. The order of attributes does not matter.

    Args:
        vocabulary: the catalogue, with its attributes.
        schema: what features are made of.
        item_counts: training events of each item, int64 `[N]`.

    Raises:
        ConfigError: the schema names a column that the catalogue does not have, or one of another kind.
    """
    found: list[list[int]] = [[] for _ in range(len(vocabulary))]
    vectors = [np.empty((len(vocabulary), 0), np.float32)]
    first = 0
    for name, attribute in sorted(schema.attributes.items()):
        if name not in vocabulary.attributes:
            known = ", ".join(vocabulary.attributes) or "none"
            raise ConfigError(f"item features: the catalogue has no attribute {name!r}; it has {known}")
        if attribute.kind == "vector":
            vectors.append(_vectors(name, vocabulary.attributes[name]))
            continue
        for item, places in enumerate(_places(name, vocabulary.attributes[name], attribute)):
            found[item] += [first + place for place in places]
        first += attribute.buckets
    if schema.overflow:
        for item in np.flatnonzero(item_counts < schema.min_count).tolist():
            place = zlib.crc32(str(vocabulary.ids[item].as_py()).encode()) % schema.overflow
            found[item].append(first + place)
        first += schema.overflow
    lengths = np.array([len(one) for one in found], np.int64)
    return ItemFeatures(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        features=np.array([place for one in found for place in one], np.int64),
        size=first,
        vectors=np.concatenate(vectors, axis=1),
    )


def _places(name: str, column: pa.Array, attribute: ItemAttribute) -> list[list[int]]:
    """Buckets of each item, ascending without repeats."""
    values = column.to_pylist()
    if attribute.kind == "number":
        return _number_places(name, column, attribute.buckets)
    names = ([] if value is None else _names(value, attribute) for value in values)
    return [sorted({zlib.crc32(one.encode()) % attribute.buckets for one in several}) for several in names]


def _names(value: object, attribute: ItemAttribute) -> list[str]:
    if attribute.kind == "text":
        words = _WORD.findall(str(value).casefold())
        return words + [f"{first} {second}" for first, second in pairwise(words)]
    if attribute.kind == "category":
        return [str(value)]
    several = value if isinstance(value, list) else str(value).split(attribute.separator)
    return [str(one).strip() for one in several if one is not None]


def _number_places(name: str, column: pa.Array, buckets: int) -> list[list[int]]:
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ConfigError(f"item features: attribute {name!r} is {column.type}, not a number")
    numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    real = ~np.isnan(numbers)
    if not real.any():
        return [[] for _ in numbers]
    edges = np.quantile(numbers[real], np.arange(1, buckets) / buckets)
    places = np.searchsorted(edges, numbers, side="right")
    return [[int(place)] if one else [] for place, one in zip(places, real, strict=True)]


def _vectors(name: str, column: pa.Array) -> NDArray[np.float32]:
    """A column of lists as unit vectors, float32 `[N, width]`; zeros where it has none or one that points nowhere."""
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    lists = lists or pa.types.is_fixed_size_list(column.type)
    inner = column.type.value_type if lists else column.type
    if not lists or not (pa.types.is_floating(inner) or pa.types.is_integer(inner)):
        raise ConfigError(f"item features: attribute {name!r} is {column.type}, not lists of numbers")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    present = np.flatnonzero(lengths)
    if not len(present):
        raise ConfigError(f"item features: no item has a vector in attribute {name!r}")
    width = int(lengths[present[0]])
    if (lengths[present] != width).any():
        other = present[np.argmax(lengths[present] != width)]
        raise ConfigError(
            f"item features: attribute {name!r} has vectors of {width} numbers, and of {lengths[other]} in row {other}"
        )
    # float64, so that the length of large float32 numbers does not overflow.
    flat = pc.list_flatten(column).cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, width)
    if not np.isfinite(flat).all():
        row = present[np.argmin(np.isfinite(flat).all(1))]
        raise ConfigError(f"item features: attribute {name!r} holds what is not a finite number in row {row}")
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    vectors = np.zeros((len(column), width), np.float32)
    vectors[present] = np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0)
    return vectors
