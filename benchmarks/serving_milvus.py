"""milvus-lite under the embedding queries of `benchmarks.serving`; started by it, with a Python that has milvus-lite.

    python serving_milvus.py FOLDER INDEX CALLERS SECONDS K

FOLDER holds vectors.npy and queries.npy, float32 of unit length. Milvus-lite lives in the caller's process, so callers
are threads of it and its CPU time is theirs, too. Prints one JSON object: its answers to the first queries, and of many
callers and of one the calls per second, latencies and CPU time. Imports nothing of this project.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient  # type: ignore[import-not-found]

_ROWS_PER_INSERT, _CHECKED = 5_000, 32


def _collection(folder: Path, vectors: Any, index: str) -> Any:
    client = MilvusClient(str(folder / "milvus.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=vectors.shape[1])
    parameters = client.prepare_index_params()
    options = {"nlist": 1024} if index.startswith("IVF") else {}
    parameters.add_index("vector", index_type=index, metric_type="IP", params=options)
    client.create_collection("items", schema=schema, index_params=parameters)
    for start in range(0, len(vectors), _ROWS_PER_INSERT):
        block = vectors[start : start + _ROWS_PER_INSERT]
        client.insert("items", [{"id": start + row, "vector": vector} for row, vector in enumerate(block)])
    client.load_collection("items")
    return client


def _load(ask: Any, queries: Any, callers: int, seconds: float) -> dict[str, float]:
    latencies: list[float] = []
    begun, cpu = time.perf_counter(), time.process_time()

    def caller(number: int) -> None:
        while (sent := time.perf_counter()) - begun < seconds:
            ask(queries[number % len(queries)])
            latencies.append(time.perf_counter() - sent)
            number += callers

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken, cpu = time.perf_counter() - begun, time.process_time() - cpu
    p50, p99, p999 = np.quantile(latencies, [0.5, 0.99, 0.999]).tolist()
    rate = len(latencies) / taken
    return {"rate": rate, "p50": p50, "p99": p99, "p999": p999, "cpu": cpu / len(latencies)}


def main() -> None:
    """Build, answer, measure, print."""
    folder, index, callers, seconds, k = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
    queries = np.load(folder / "queries.npy").tolist()
    client = _collection(folder, np.load(folder / "vectors.npy"), index)
    parameters = {"metric_type": "IP", "params": {"nprobe": 16} if index.startswith("IVF") else {}}

    def ask(query: list[float]) -> Any:
        return client.search("items", data=[query], limit=k, search_params=parameters, output_fields=["id"])[0]

    answers = [[(hit["id"], hit["distance"]) for hit in ask(query)] for query in queries[:_CHECKED]]
    closed, single = (_load(ask, queries, count, seconds) for count in (callers, 1))
    print(json.dumps({"answers": answers, "closed": closed, "single": single}))


if __name__ == "__main__":
    main()
