"""Columns that grow on disk as raw values and then become Arrow files, without passing through memory as a whole."""

import contextlib
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from retrieval.errors import DataError

__all__ = ["Spill"]

# Pages of a mapped column stay resident until the kernel needs them: hand them back after so many bytes.
_SLICE_BYTES = 64 << 20


class Spill:
    """Raw column files in a scratch folder.

    Args:
        folder: an existing folder; its owner removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: list[mmap.mmap] = []

    def file(self, name: str) -> BinaryIO:
        """The file that takes a column's raw values, to be written and closed."""
        return (self._folder / f"{name}.bin").open("wb")

    def column(self, name: str, type_: pa.DataType) -> pa.Array:
        """A written file of fixed-width values as a memory-mapped array."""
        values = self._mapped(name)
        return pa.Array.from_buffers(type_, values.size // (type_.bit_width // 8), [None, values])

    def ids(self, name: str, batches: Iterable[pa.RecordBatch]) -> pa.Array:
        """Write ids, int64 or string, that stream by in their order, and give them back memory-mapped.

        Raises:
            DataError: strings take more than 2 GiB together, which Arrow's strings cannot address.
        """
        type_, count, size = pa.int64(), 0, 0
        with self.file(name) as values, self.file(f"{name}.offsets") as offsets:
            offsets.write(np.zeros(1, np.int32).data)
            for batch in batches:
                column = batch.column(0)
                type_ = column.type
                count += len(column)
                if not pa.types.is_string(type_):
                    values.write(np.ascontiguousarray(column.to_numpy(), np.int64).data)
                    continue
                _, raw, data = column.buffers()
                ends = np.frombuffer(raw, np.int32)[column.offset : column.offset + len(column) + 1].astype(np.int64)
                if size + ends[-1] - ends[0] > np.iinfo(np.int32).max:
                    raise DataError(f"{name} ids take more than 2 GiB together; map them to integers first")
                if data is not None:
                    values.write(memoryview(data)[ends[0] : ends[-1]])
                offsets.write((ends[1:] - ends[0] + size).astype(np.int32).data)
                size += int(ends[-1] - ends[0])
        if pa.types.is_string(type_):
            buffers = [None, self._mapped(f"{name}.offsets"), self._mapped(name)]
            return pa.Array.from_buffers(pa.string(), count, buffers)
        return self.column(name, pa.int64())

    def write(self, path: Path, columns: Mapping[str, pa.Array]) -> None:
        """Like `data.columns.write_columns`, with few pages of this spill's columns resident at any time."""
        batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
        with (
            path.open("wb") as file,
            pa.PythonFile(_Slices(file, self._maps), mode="w") as sink,
            pa.ipc.new_file(sink, batch.schema) as writer,
        ):
            writer.write_batch(batch)

    def _mapped(self, name: str) -> pa.Buffer:
        path = self._folder / f"{name}.bin"
        if not path.stat().st_size:
            return pa.py_buffer(b"")
        with path.open("rb") as file:
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return pa.py_buffer(self._maps[-1])


class _Slices:
    """A file for Arrow to write to that gives mapped pages back as it goes."""

    closed = False

    def __init__(self, file: BinaryIO, maps: list[mmap.mmap]) -> None:
        self._file = file
        self._maps = maps

    def write(self, content: pa.Buffer | bytes) -> int:
        view = memoryview(content)
        for begin in range(0, len(view), _SLICE_BYTES):
            self._file.write(view[begin : begin + _SLICE_BYTES])
            for mapped in self._maps if len(view) > _SLICE_BYTES else ():
                with contextlib.suppress(OSError):  # only advice: without it, the kernel decides
                    mapped.madvise(mmap.MADV_DONTNEED)
        return len(view)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True
