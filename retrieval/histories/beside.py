"""What a store keeps of a user beside events: context and auxiliary series, and their bytes; see `docs/histories.md`.

As with events, telling again what was told changes nothing: `told` is a pure function from what is held and what is
told to what is to be held.

Legend: C names of context, S series, P points of all series, V different values of these.
"""

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retrieval.histories.store import Series

__all__ = ["MAX_NAMES", "Beside", "Told", "decode_beside", "encode_beside", "told"]

MAX_NAMES = 64
"""Names of context, and of series, that are kept of a user; further ones are passed over."""

_HEADER = struct.Struct("<HHII")

Told = tuple[bool, str, int, str]
"""Whether it is context (else a point of a series), the name, seconds, and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Context by name, each with the time at which it was so, and series by name."""

    context: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    series: Mapping[str, Series] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.context or self.series)


def told(beside: Beside, news: Iterable[Told], max_points: int) -> Beside:
    """Add to what is held.

    - Of a user's context, what was so at the latest time stays; at equal times the greater text, so that the order of
      telling does not matter.
    - A point is a repeat, and passed over, if its series has one of the same time and value. The last `max_points` of
      each series by time stay; among equal times, those that were told first.
    """
    context, series = dict(beside.context), dict(beside.series)
    added: dict[str, tuple[list[int], list[str]]] = {}
    for is_context, name, time, value in news:
        if is_context:
            if name in context or len(context) < MAX_NAMES:
                context[name] = max(context.get(name, (time, value)), (time, value))
            continue
        if name not in added:
            held = series.get(name)
            if held is None and len(series.keys() | added.keys()) >= MAX_NAMES:
                continue
            added[name] = ([], []) if held is None else held.lists()
        times, values = added[name]
        place = bisect_right(times, time)
        if value in values[bisect_left(times, time) : place]:
            continue
        times.insert(place, time)
        values.insert(place, value)
        if len(times) > max_points:
            oldest = bisect_right(times, times[0]) - 1
            del times[oldest], values[oldest]
    series |= {name: Series.of(zip(*lists, strict=True)) for name, lists in added.items() if lists[0]}
    return Beside(context=context, series=series)


def encode_beside(beside: Beside) -> bytes:
    """Bytes of what is kept beside events; the same for the same, in whatever order it was told."""
    context, series = sorted(beside.context.items()), sorted(beside.series.items())
    values: dict[str, int] = {}
    codes = [values.setdefault(one.values[code], len(values)) for _, one in series for code in one.codes.tolist()]
    times = [one.timestamps for _, one in series]
    texts = [*(name for name, _ in context), *(value for _, (_, value) in context), *(name for name, _ in series)]
    encoded = [text.encode() for text in (*texts, *values)]
    return b"".join(
        (
            _HEADER.pack(len(context), len(series), len(values), len(codes)),
            np.fromiter((time for _, (time, _) in context), "<i8", len(context)).tobytes(),
            np.concatenate([np.empty(0, np.int64), *times]).astype("<i8").tobytes(),
            np.fromiter(map(len, times), "<u4", len(series)).tobytes(),
            np.array(codes, "<u4").tobytes(),
            np.fromiter(map(len, encoded), "<u4", len(encoded)).tobytes(),
            *encoded,
        )
    )


def decode_beside(content: bytes, place: int) -> Beside:
    """What `encode_beside` wrote, from some place of the bytes to their end.

    Raises:
        ValueError, struct.error: it is not that.
    """
    num_context, num_series, num_values, num_points = _HEADER.unpack_from(content, place)
    place += _HEADER.size

    def column(dtype: str, count: int) -> NDArray:
        nonlocal place
        found = np.frombuffer(content, dtype, count, place)
        place += found.nbytes
        return found

    context_times, times = column("<i8", num_context), column("<i8", num_points)
    sizes, codes = column("<u4", num_series), column("<u4", num_points)
    texts = []
    for length in column("<u4", 2 * num_context + num_series + num_values).tolist():
        texts.append(content[place : place + length].decode())
        place += length
    if place != len(content) or int(sizes.sum()) != num_points or (codes >= num_values).any():
        raise ValueError("what stands beside the events does not add up")
    names, rest = texts[:num_context], texts[num_context:]
    values = rest[num_context + num_series :]
    ends = np.cumsum(sizes, dtype=np.int64).tolist()
    parts = [slice(end - size, end) for size, end in zip(sizes.tolist(), ends, strict=True)]
    return Beside(
        context=dict(zip(names, zip(context_times.tolist(), rest[:num_context], strict=True), strict=True)),
        series={
            name: Series(timestamps=times[part], codes=codes[part], values=values)
            for name, part in zip(rest[num_context : num_context + num_series], parts, strict=True)
        },
    )
