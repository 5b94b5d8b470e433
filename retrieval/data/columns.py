"""Arrow files of plain columns that are memory-mapped on reading and written in bounded memory.

A column file is an Arrow IPC file (uncompressed) with exactly one record batch, so that every column is one
contiguous run of bytes and a fixed-width column is a numpy array without a copy.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from retrieval.errors import DataError

__all__ = ["as_numpy", "map_columns", "write_columns"]


def write_columns(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """Write equally long columns as one record batch. Memory-mapped inputs are not pulled into memory."""
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def map_columns(path: Path) -> pa.RecordBatch:
    """Memory-map a column file.

    Raises:
        DataError: the file is missing, or is no Arrow file of one record batch.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1:
            raise DataError(f"{path}: has {reader.num_record_batches} record batches instead of one")
        return reader.get_batch(0)
    except FileNotFoundError:
        raise DataError(f"{path}: is missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a readable Arrow file ({error})") from None


def as_numpy(batch: pa.RecordBatch, name: str, path: Path) -> NDArray:
    """A fixed-width column without nulls as a read-only numpy array that shares the file's bytes.

    Raises:
        DataError: the column is missing, has nulls, or is not of fixed width.
    """
    index = batch.schema.get_field_index(name)
    if index < 0:
        raise DataError(f"{path}: has no column {name!r}")
    column = batch.column(index)
    if column.null_count:
        raise DataError(f"{path}: column {name!r} has {column.null_count} nulls")
    try:
        values: NDArray = np.asarray(column.to_numpy(zero_copy_only=True))
    except pa.ArrowInvalid:
        raise DataError(f"{path}: column {name!r} holds {column.type} values instead of numbers") from None
    return values
