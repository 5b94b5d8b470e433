"""Writes a golden registry of the current format: `python -m tests.snapshot.golden.write`.

Run it once for each number of the format. What was written before stays as it is: so do the snapshots of users.
"""

import json
from pathlib import Path

import numpy as np

from retrieval.encoder.inference import item_vectors
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
    """Write the registry and, beside it, what its snapshot answers."""
    registry = Registry(Path(__file__).parent / f"format-{SNAPSHOT_FORMAT}")
    assert not registry.versions(), "golden files are not written again"
    version = publish(registry, expired=[3, 7])
    for name in ("LEASE", "CURRENT.lock"):
        (Path(registry.location) / name).unlink()
    text = json.dumps(answers(open_snapshot(registry.folder(version))), indent=1)
    (Path(registry.location) / "answers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
