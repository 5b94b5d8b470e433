"""Which index a night builds: the one that is asked for, yesterday's choice, or a new one by measurement.

A choice takes longer than building its index, and yesterday's is as good as any while the catalogue is much the same.
It is kept unless what is asked for has changed, the items served are by a quarter more or fewer than those that it was
made for, or it no longer reaches the recall on tonight's embeddings. A night from scratch always chooses anew.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.config import Config
from retrieval.evaluation.ann import ann_recall
from retrieval.files import write_atomically
from retrieval.index.backend import Index
from retrieval.index.builder import build_index
from retrieval.index.choice import AutoIndex, Measured, choose_index
from retrieval.index.lists import Report
from retrieval.index.searcher import Searcher
from retrieval.index.spec import IndexSpec

__all__ = ["BuiltIndex", "Chosen", "built_index"]

_CHOICE = "index-choice.json"
_CHANGED_ENOUGH = 0.25
# A choice is tuned on half of the users: on others it may fall a little short of what it reached there.
_SHORT_BY = 0.005


class Chosen(Config):
    """A choice, and what it was made for.

    Attributes:
        auto: what it had to reach.
        spec: what was chosen.
        items: how many the index was over.
    """

    auto: AutoIndex
    spec: IndexSpec
    items: int


class _File(Config):
    """Contents of `index-choice.json`: what was chosen for which embeddings."""

    vectors: str
    chosen: Chosen
    table: tuple[Measured, ...]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIndex:
    """An index and how it came about.

    Attributes:
        index: over all the vectors.
        spec: what it is.
        why: why this one, for people.
        chosen: the choice that it rests on; None where it was given.
        table: what was measured to choose it; empty where nothing was.
    """

    index: Index
    spec: IndexSpec
    why: str
    chosen: Chosen | None = None
    table: tuple[Measured, ...] = ()


def built_index(
    vectors: NDArray[np.float32],
    users: NDArray[np.float32],
    spec: IndexSpec | AutoIndex,
    run_dir: Path,
    on_choice: Callable[[str], None] = lambda line: None,
    *,
    before: Chosen | None = None,
    work: Path | None = None,
    on_progress: Report = lambda done, total: None,
) -> BuiltIndex:
    """Build an index.

    Args:
        vectors: embeddings of the items served, `[N, D]`.
        users: users' embeddings `[B, D]`, to choose by.
        spec: the index to build, or what a chosen one has to reach.
        run_dir: the training run, whose folder keeps the choice: doing this again builds the same index.
        on_choice: told of each step of choosing.
        before: the choice that the live snapshot rests on.
        work: folder that keeps what is done, so that a build that was killed goes on; None: it starts anew.
        on_progress: told how many items are in the index, and of how many.

    Raises:
        ConfigError: the index cannot be built, or nothing reaches what is asked for.
    """

    def build(spec: IndexSpec) -> Index:
        # Of each index its own: what is begun of one is nothing to another.
        folder = work / f"lists-{spec.lists}" if work is not None and spec.lists is not None else None
        return build_index(vectors, spec, work=folder, report=on_progress)

    if isinstance(spec, IndexSpec):
        return BuiltIndex(index=build(spec), spec=spec, why="as asked for")
    file, digest = run_dir / _CHOICE, hashlib.sha256(np.ascontiguousarray(vectors).data).hexdigest()
    if file.exists():
        found = _File.model_validate_json(file.read_bytes())
        if (found.vectors, found.chosen.auto) == (digest, spec):
            index, kept = build(found.chosen.spec), found.chosen
            return BuiltIndex(index=index, spec=kept.spec, why=found.why, chosen=kept, table=found.table)
    why = "chosen tonight"
    if before is not None:
        built, why = _kept(vectors, users, spec, before, build)
        if built is not None:
            return built
    on_choice(why)
    choice = choose_index(vectors, users, spec, report=on_choice)
    chosen = Chosen(auto=spec, spec=choice.spec, items=len(vectors))
    content = _File(vectors=digest, chosen=chosen, table=choice.table, why=why)
    write_atomically(file, content.model_dump_json(indent=2).encode())
    return BuiltIndex(index=choice.index, spec=choice.spec, why=why, chosen=chosen, table=choice.table)


def _kept(
    vectors: NDArray[np.float32],
    users: NDArray[np.float32],
    auto: AutoIndex,
    before: Chosen,
    build: Callable[[IndexSpec], Index],
) -> tuple[BuiltIndex | None, str]:
    """The index of an earlier choice, or None and why another one is needed."""
    if before.auto != auto:
        return None, f"chosen tonight: {auto} is asked for, and before it was {before.auto}"
    change = len(vectors) / before.items - 1
    if abs(change) > _CHANGED_ENOUGH:
        return None, f"chosen tonight: {change:+.0%} items since the last choice"
    index = build(before.spec)
    if auto.max_bytes is not None and index.size > auto.max_bytes:
        return None, f"chosen tonight: {before.spec} does not fit into {auto.max_bytes} bytes any more"
    searcher = Searcher(index, np.arange(len(vectors)))
    recall = ann_recall(searcher, vectors, users, auto.depth)
    if recall < auto.recall - _SHORT_BY:
        return None, f"chosen tonight: {before.spec} reaches recall@{auto.depth} {recall:.4f} only"
    why = f"kept: recall@{auto.depth} {recall:.4f}, {change:+.0%} items since it was chosen"
    return BuiltIndex(index=index, spec=before.spec, why=why, chosen=before), why
