"""What building an index takes in memory and time: one table row per size, source, index and number of threads.

    python -m benchmarks.index_build [--items 1000000 ...] [--factories IVF2048,Int8 ...] [--threads 1 2] [--folder DIR]

Synthetic embeddings around cluster centres are written to a Parquet file once. Sources:

    array     a `.npy` file read into memory, as a caller without ours would
    mapped    the same file memory-mapped
    arrow     the Parquet file, by `index.vectors`, which makes such a file of it first

Each build runs in a process of its own. `anonymous_mb` is the most that it held at any time, beyond what it held before
(sampled every 5 ms): memory that the system cannot take back, as it can pages of files. `bytes_an_item` is that without
the sample that centres are trained on, over the items. Before a figure is kept the index must find some items by
themselves, and indexes of all sources and threads must be the same file.
"""

import argparse
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from benchmarks.harness import WrongAnswerError, append_rows, environment
from retrieval.files import sha256_of
from retrieval.index.builder import build_index
from retrieval.index.spec import IndexSpec
from retrieval.index.vectors import arrow_batches, keep_vectors, mapped, vectors_of

_RESULTS = Path(__file__).parent / "results" / "index_build.csv"
_WIDTH, _BLOCK, _CLUSTERS = 64, 1 << 18, 2000
_TRAINED_ON = 256


def blocks(count: int) -> Iterator[NDArray[np.float32]]:
    """Synthetic embeddings of unit length; always the same ones."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(_CLUSTERS, _WIDTH)).astype(np.float32)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        x = rng.standard_normal((size, _WIDTH), np.float32) + 1.2 * centres[rng.integers(0, _CLUSTERS, size)]
        yield np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def prepare(folder: Path, count: int) -> tuple[Path, Path]:
    """The embeddings as `.npy` and as Parquet."""
    array, table = folder / f"items-{count}.npy", folder / f"items-{count}.parquet"
    if not array.exists():
        keep_vectors(array, blocks(count))
    if not table.exists():
        schema = pa.schema([("embedding", pa.list_(pa.float32(), _WIDTH))])
        with pq.ParquetWriter(table, schema, compression="none", use_dictionary=False) as writer:
            for block in blocks(count):
                column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), _WIDTH)
                writer.write_table(pa.table([column], schema), row_group_size=1 << 16)
    return array, table


class _Peak:
    """The most anonymous memory held, in bytes, while it watches."""

    def __init__(self) -> None:
        self.most, self._ended = _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, _anonymous())

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return max(self.most, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def build(source: str, array: Path, table: Path, factory: str, threads: int, answer: Path) -> None:
    """Build one index; write what it took to `answer`."""
    faiss.omp_set_num_threads(threads)
    build_index(np.eye(8, dtype=np.float32), IndexSpec())  # what is compiled or loaded on first use
    before, peak, begun = _anonymous(), _Peak(), time.perf_counter()
    if source == "array":
        vectors = np.load(array)
    elif source == "mapped":
        vectors = mapped(array)
    else:
        copy = answer.with_suffix(".npy")
        vectors = vectors_of(arrow_batches(table, "embedding"), "embedding", copy)
        copy.unlink()  # it stays readable
    read = time.perf_counter() - begun
    spec = IndexSpec(factory=factory, search={"nprobe": 4} if factory.startswith("IVF") else {})
    index = build_index(vectors, spec)
    seconds = time.perf_counter() - begun - read
    most = peak.end() - before
    rows = np.linspace(0, len(vectors) - 1, 100).astype(np.int64)
    found = index.search(np.ascontiguousarray(vectors[rows]), 10).rows
    if np.mean((found == rows[:, None]).any(axis=1)) < 0.95:
        raise WrongAnswerError(f"{factory}: does not find the items that it was built over")
    file = answer.with_suffix(".index")
    index.save(file)
    told = {"read": read, "seconds": seconds, "most": most, "size": index.size, "hash": sha256_of(file)}
    file.unlink()
    answer.write_text(json.dumps(told), encoding="utf-8")


def main() -> None:
    """Build, compare, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--factories", nargs="+", default=["Flat", "IVF2048,Int8"])
    parser.add_argument("--sources", nargs="+", default=["array", "mapped", "arrow"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--folder", type=Path, required=True, help="for embeddings, kept for the next run")
    parser.add_argument("--note", default="", help="kept with the rows, e.g. that the machine was busy")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    for count in options.items:
        array, table = prepare(options.folder, count)
        for factory in options.factories:
            hashes = set()
            for source, threads in ((s, t) for s in options.sources for t in options.threads):
                answer = options.folder / "answer.json"
                answer.unlink(missing_ok=True)
                process = context.Process(target=build, args=(source, array, table, factory, threads, answer))
                process.start()
                process.join()
                if process.exitcode:
                    raise WrongAnswerError(f"{source}, {factory}: the build ended with {process.exitcode}")
                told = json.loads(answer.read_text(encoding="utf-8"))
                hashes.add(told["hash"])
                lists = IndexSpec(factory=factory).lists or 0
                row: dict[str, object] = {
                    "items": count,
                    "width": _WIDTH,
                    "source": source,
                    "index": factory,
                    "threads": threads,
                    "read_seconds": told["read"],
                    "build_seconds": told["seconds"],
                    "embeddings_mb": count * _WIDTH * 4 / 1e6,
                    "index_mb": told["size"] / 1e6,
                    "anonymous_mb": told["most"] / 1e6,
                    "bytes_an_item": (told["most"] - lists * _TRAINED_ON * _WIDTH * 4) / count,
                }
                print(json.dumps(row), flush=True)
                append_rows(_RESULTS, [row | environment(torch.device("cpu")) | {"note": options.note}])
            if len(hashes) > 1:
                raise WrongAnswerError(f"{factory}: sources or threads made different files")


if __name__ == "__main__":
    main()
