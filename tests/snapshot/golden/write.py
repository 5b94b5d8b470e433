"""Writes golden registries of the current format: `python -m tests.snapshot.golden.write`.

Run it once for each number of the format and kind of index file. What was written before stays as it is: so do the
snapshots of users.
"""

import json
from pathlib import Path

import numpy as np

from retrieval.encoder.inference import item_vectors
from retrieval.index.spec import IndexSpec
from retrieval.snapshot.manifest import SNAPSHOT_FORMAT
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from tests.snapshot.make import publish

__all__ = ["answers"]


def answers(snapshot: Snapshot) -> dict[str, list[float]]:
    """For each item, the scores of the three items nearest to it, best first; keyed by the ids of all four."""
    found = snapshot.searcher.search(item_vectors(snapshot.encoder), [3] * len(snapshot.vocabulary))
    ids = snapshot.vocabulary.ids_of(np.arange(len(snapshot.vocabulary)))
    return {
        f"{one}: {', '.join(map(str, snapshot.vocabulary.ids_of(rows)))}": scores.tolist()
        for one, rows, scores in zip(ids, found.rows, found.scores, strict=True)
    }


def main() -> None:
    """Write the registries that are missing and, beside each, what its snapshot answers."""
    lists = IndexSpec(factory="IVF3,Int8", search={"nprobe": 2})
    for name, spec in {f"format-{SNAPSHOT_FORMAT}": IndexSpec(), f"format-{SNAPSHOT_FORMAT}-lists": lists}.items():
        registry = Registry(Path(__file__).parent / name)
        if registry.versions():
            continue
        version = publish(registry, expired=[3, 7], spec=spec)
        for lock in ("LEASE", "CURRENT.lock"):
            (Path(registry.location) / lock).unlink()
        text = json.dumps(answers(open_snapshot(registry.folder(version))), indent=1)
        (Path(registry.location) / "answers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
