"""Exact answers at the price of 8-bit arithmetic.

Each item x is held as x̂ = s·c, c whole numbers from −127 to 127, and a query q likewise as q̂. Then

    |q·x − q̂·x̂| ≤ |q| |x − x̂| + |q − q̂| |x̂|,

so scores by codes tell which items can be among the K best: those no further than twice that margin below the K-th.
These, a few hundred, are scored by their float32 vectors. Nothing is lost by the codes: the answers are those of
scoring all the items by their vectors, equal ones by row.

A quarter of the bytes are read, and one instruction of a recent processor multiplies four codes where it multiplies one
float. The selection costs little, as each query's threshold rises while its scores are made.

Legend: B queries, N items, D width, C lists, K answers per query.
"""

import ctypes
import math
import struct
from functools import cache
from pathlib import Path
from typing import Final

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.index.lists import REACH
from retrieval.native import address, compiled
from retrieval.types import SearchResult

__all__ = ["HEADERS", "SOURCES", "Codes", "library"]

_FOLDER: Final = Path(__file__).parent
SOURCES: Final = tuple(_FOLDER / f"{name}_native.cpp" for name in ("codes", "codes_encode", "settle"))
HEADERS: Final = tuple(_FOLDER / f"codes_{name}.h" for name in ("native", "query", "tiles", "matrix"))

_LANES: Final = 16
"""Items of a block."""
_BEYOND: Final = 3 * _LANES
"""Places after the last: the matrix unit multiplies four blocks at a time,"""
_STEP: Final = 15 * 64
"""and 16 groups of four dimensions: so many bytes more."""
_PIECE: Final = 512
"""Items that queries score together where there are no lists: their codes stay in the processor's nearest cache."""
_WORTH_A_THREAD: Final = 4_000_000
"""Products of codes; below, starting a thread takes longer."""
_ENCODED_BY_A_THREAD: Final = 2_000_000
"""Numbers, likewise."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled search; None where it cannot be had or is not wanted."""
    return compiled("codes", SOURCES, "indexes score items by their vectors, several times slower", headers=HEADERS)


class _Codes(ctypes.Structure):
    """`struct Codes` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "groups", "sections")),
        *((name, ctypes.c_void_p) for name in ("starts", "counts", "codes", "scales", "rows", "vectors")),
        *((name, ctypes.c_float) for name in ("error", "norm")),
        ("lists", ctypes.c_int64),
        ("centres", ctypes.c_void_p),
    )


_ASKED: Final = struct.Struct("@4q4P")
"""`struct Asked` of the C++ source; packed, since filling a structure of ctypes takes longer."""


class Codes:
    """Codes of items, in one piece or in lists around centres.

    Args:
        native: the compiled library.
        vectors: float32 `[N, D]`, contiguous, possibly memory-mapped; N below 2³¹. Read once to make
            codes of it, then by rows.
        centres: float32 `[C, D]`; None where every item is scored.
        counts: items of each list, int64 `[C]`; by itself, of pieces that are all searched.
        order: rows of the lists' items, list by list, int64 `[N]`, or of some items only.
    """

    def __init__(
        self,
        native: ctypes.CDLL,
        vectors: NDArray[np.float32],
        centres: NDArray[np.float32] | None = None,
        counts: NDArray[np.int64] | None = None,
        order: NDArray[np.int64] | None = None,
    ) -> None:
        count, width = vectors.shape
        assert vectors.dtype == np.float32
        assert vectors.flags.c_contiguous
        assert count < 2**31
        groups = math.ceil(width / 4)
        if counts is None:
            counts = _pieces(count)
        starts = np.concatenate([[0], np.cumsum(-(-counts // _LANES))]).astype(np.int64)
        places = int(starts[-1]) * _LANES
        codes = _aligned((places + _BEYOND) * groups * 4 + _STEP, np.uint8)
        codes[:] = 128
        scales = _aligned(places + _BEYOND, np.float32)
        scales[:] = 0
        rows = None if order is None else np.full(places, -1, np.int32)
        padded = None
        if centres is not None:
            padded = np.zeros((width + 1, math.ceil(len(centres) / _LANES) * _LANES), np.float32)
            padded[:width, : len(centres)] = centres.T
        self._native, self._width, self._sections, self._in_lists = native, width, len(counts), centres is not None
        self._products = places * width
        # What the structure points at must live as long as it.
        self._held = (starts, counts, codes, scales, rows, vectors, padded)
        self._problem = _Codes(
            width=width,
            groups=groups,
            sections=len(counts),
            starts=_address(starts),
            counts=_address(counts),
            codes=_address(codes),
            scales=_address(scales),
            rows=_address(rows),
            vectors=_address(vectors),
            lists=0 if padded is None else padded.shape[1],
            centres=_address(padded),
        )
        threads = min(faiss.omp_get_max_threads(), max(1, places * width // _ENCODED_BY_A_THREAD))
        radii = None if padded is None else padded[width]
        order_, *outputs = (ctypes.c_void_p(_address(array)) for array in (order, codes, scales, rows, radii))
        native.codes_encode(ctypes.byref(self._problem), order_, ctypes.c_int64(threads), *outputs)
        if radii is not None:
            radii *= REACH
        self.bytes = sum(part.nbytes for part in (starts, counts, codes, scales, rows, padded) if part is not None)

    @classmethod
    def of_rows(cls, native: ctypes.CDLL, vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> "Codes":
        """Codes of some rows in one piece; searching them looks at no others.

        Args:
            native: the compiled library.
            vectors: as above.
            rows: int64 `[M]`, in any order.
        """
        return cls(native, vectors, None, _pieces(len(rows)), rows)

    def search(
        self, queries: NDArray[np.float32], k: int, probes: int = 1, allowed: NDArray[np.uint8] | None = None
    ) -> SearchResult:
        """The best of all items, or of those in the lists of the nearest centres; equal scores by row.

        Args:
            queries: float32 `[B, D]`; one that is not finite finds nothing.
            k: answers per query.
            probes: lists per query.
            allowed: packed bitmap of the rows to look at, uint8 `[ceil(N / 8)]`; None for all.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        count, width = queries.shape
        assert width == self._width
        allowed = None if allowed is None else np.ascontiguousarray(allowed, np.uint8)
        scores, rows = np.empty((count, k), np.float32), np.empty((count, k), np.int64)
        probes = max(1, min(probes, self._sections))
        products = count * self._products * (probes / self._sections if self._in_lists else 1)
        threads = max(1, min(faiss.omp_get_max_threads(), int(products / _WORTH_A_THREAD)))
        asked = _ASKED.pack(
            count,
            k,
            probes,
            threads,
            address(queries),
            0 if allowed is None else address(allowed),
            address(scores),
            address(rows),
        )
        self._native.codes_search(ctypes.byref(self._problem), asked)
        return SearchResult(rows=rows, scores=scores)


def _pieces(count: int) -> NDArray[np.int64]:
    """Sizes of the pieces that so many items are scored in."""
    counts = np.full(math.ceil(count / _PIECE), _PIECE, np.int64)
    counts[-1:] = count - _PIECE * (len(counts) - 1)
    return counts


def _address(array: NDArray | None) -> int | None:
    return None if array is None else address(array)


def _aligned(count: int, dtype: type) -> NDArray:
    """An array whose 64 bytes at a time lie in one line of the cache: reading across two costs double."""
    raw = np.empty(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : len(raw) - 64 + start].view(dtype)
