"""Embeddings on disk: written a block at a time, read memory-mapped, taken from Arrow batch by batch.

An index is built from a memory-mapped file without holding its embeddings in memory: `builder.build_index`.

Legend: N items, D width.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from retrieval.errors import DataError, InputError
from retrieval.files import replacing

__all__ = ["arrow_batches", "keep_vectors", "mapped", "vectors_of"]


def keep_vectors(path: Path, blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Write embeddings block by block as a `.npy` file, which appears whole or not at all, and map it into memory.

    Args:
        path: of the file; one that is there is replaced.
        blocks: float32 `[n, D]` each, at least one, all of one width.

    Returns:
        `[N, D]`, read-only.

    Raises:
        InputError: there is no block, or they are of different widths.
        OSError: the file cannot be written.
    """
    count, width = 0, -1
    with replacing(path) as temporary, temporary.open("wb") as file:
        for block in blocks:
            if width < 0:
                width = block.shape[1]
                _write_header(file, 0, width)
                begin = file.tell()
            elif block.shape[1] != width:
                raise InputError(f"embeddings from row {count} on have {block.shape[1]} values instead of {width}")
            file.write(np.ascontiguousarray(block, np.float32).data)
            count += len(block)
        if width < 0:
            raise InputError(f"{path}: there are no embeddings to keep")
        file.seek(0)
        # A header leaves room for the number of rows to grow.
        _write_header(file, count, width)
        assert file.tell() == begin
    return mapped(path)


def mapped(path: Path) -> NDArray[np.float32]:
    """Embeddings of a file that `keep_vectors` wrote, `[N, D]`, memory-mapped."""
    vectors: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors


def _write_header(file: object, count: int, width: int) -> None:
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(file, shape)  # type: ignore[arg-type]


def arrow_batches(path: Path, column: str) -> Iterator[pa.RecordBatch]:
    """Record batches of a Parquet file, or of Arrow's IPC file or stream, with one column.

    Raises:
        DataError: the file is missing or unreadable, or has no such column.
    """
    try:
        if path.suffix == ".parquet":
            # Mapped: read otherwise, pages of all row groups would stay in memory.
            parquet = pq.ParquetFile(path, memory_map=True)
            _check_column(path, column, parquet.schema_arrow)
            yield from parquet.iter_batches(columns=[column])
            return
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                _check_column(path, column, file.schema)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
                _check_column(path, column, batches.schema)
            for batch in batches:
                yield batch.select([column])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _check_column(path: Path, column: str, schema: pa.Schema) -> None:
    if column not in schema.names:
        raise DataError(f"{path}: has no column {column!r}")


def vectors_of(batches: Iterable[pa.RecordBatch], column: str, path: Path) -> NDArray[np.float32]:
    """Embeddings of a column of lists, one batch in memory at a time, kept as `keep_vectors` does.

    Args:
        batches: with a column of lists of floats, of fixed size or not, of 16, 32 or 64 bits.
        column: its name.
        path: of the file to keep them in.

    Raises:
        InputError: there are none, a row is null or holds nulls, or rows have different numbers of values.
        OSError: the file cannot be written.
    """
    return keep_vectors(path, _blocks(batches, column))


def _blocks(batches: Iterable[pa.RecordBatch], column: str) -> Iterator[NDArray[np.float32]]:
    done, width = 0, -1
    for batch in batches:
        lists = batch.column(column)
        if not len(lists):
            continue
        if not _is_list(lists.type) or not pa.types.is_floating(lists.type.value_type):
            raise InputError(f"column {column!r} holds {lists.type}, not lists of floats")
        values = lists.flatten()
        if lists.null_count or values.null_count:
            raise InputError(f"column {column!r} has nulls between rows {done} and {done + len(lists)}")
        if pa.types.is_fixed_size_list(lists.type):
            sizes = np.full(len(lists), lists.type.list_size)
        else:
            sizes = lists.value_lengths().to_numpy()
        width = int(sizes[0]) if width < 0 else width
        wrong = np.flatnonzero(sizes != width)
        if len(wrong) or not width:
            row = int(wrong[0]) if len(wrong) else 0
            raise InputError(f"column {column!r}, row {done + row}: {sizes[row]} values instead of {width or 'some'}")
        yield values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, width)
        done += len(lists)


def _is_list(type_: pa.DataType) -> bool:
    return any(is_it(type_) for is_it in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
