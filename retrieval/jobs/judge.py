"""What a night's candidate is held against, and what the gates say of it."""

import math
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.sequences import user_histories
from retrieval.data.splits import Queries, Split, training_counts
from retrieval.encoder.inference import embed_users, item_vectors
from retrieval.encoder.protocol import UserEncoder
from retrieval.evaluation.gates import GateConfig, GateResult, at_least, at_most, not_worse
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.jobs.publish import Candidate, current_user_embeddings
from retrieval.jobs.warm_start import live_histories, live_ranks
from retrieval.snapshot.store import Snapshot, served_rows

__all__ = ["asked_of", "held_out_ranks", "quality_gates", "snapshot_gates"]

_SAMPLE = 500
_DEPTH = 100
_SEARCHES = 50
_BLOCK = 1 << 16
_SCORES, _FEWEST = 10**10, 1000


def asked_of(queries: Queries, config: GateConfig, items: int) -> Queries:
    """The queries that the gates judge by: at most `config.max_queries`, and fewer of a catalogue of millions.

    Every item is scored for every query, by tonight's encoder and by the live one. Without a bound a night's evaluation
    would grow with the users times the items, while intervals hardly get narrower.
    """
    most = min(config.max_queries, max(config.min_queries, _FEWEST, _SCORES // items))
    if len(queries) <= most:
        return queries
    chosen = np.sort(np.random.default_rng(0).choice(len(queries), most, replace=False))
    return replace(queries, users=queries.users[chosen], targets=queries.targets[chosen])


def held_out_ranks(
    dataset: Dataset,
    split: Split,
    queries: Queries,
    candidate: UserEncoder,
    live: Snapshot | None,
    expired: NDArray[np.bool_],
) -> dict[str, NDArray[np.int64]]:
    """Rank of each held-out event's item, int64 `[Q]`: of the candidate, of popularity, and of the live snapshot.

    Each answers with the items that it serves alone; what has expired tonight, bool `[N]`, is neither the candidate's
    nor popularity's.
    """
    popularity = training_counts(dataset, split).astype(np.float32)
    popularity[expired] = -np.inf
    ranks = {"candidate": _ranks(dataset, queries, candidate, expired)}
    ranks["popularity"] = _popularity_ranks(dataset, queries, candidate.config.max_length, popularity)
    if live is not None:
        ranks["live"] = live_ranks(dataset, queries, live)
    return ranks


def _ranks(dataset: Dataset, queries: Queries, encoder: UserEncoder, expired: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Exact rank of each query's target, `[Q]`."""
    vectors = item_vectors(encoder)
    ranks = np.empty(len(queries), np.int64)
    for batch in query_batches(dataset, queries, encoder.config.max_length):
        users = embed_users(encoder, batch.histories)

        def score(part: slice, users: NDArray[np.float32] = users) -> NDArray[np.float32]:
            scores: NDArray[np.float32] = users[part] @ vectors.T
            scores[:, expired] = -np.inf
            return scores

        ranks[batch.place] = rank_by_scores(batch, len(vectors), score)
    return ranks


def _popularity_ranks(
    dataset: Dataset, queries: Queries, max_length: int, counts: NDArray[np.float32]
) -> NDArray[np.int64]:
    """As `rank_by_scores` has them, without scores of everything for everybody: all users see the same order."""
    ascending = np.sort(counts)
    ranks = np.empty(len(queries), np.int64)
    for batch in query_batches(dataset, queries, max_length):
        wanted = counts[batch.targets]
        as_good = len(counts) - np.searchsorted(ascending, wanted)
        hidden = [np.count_nonzero(counts[seen] >= one) for seen, one in zip(batch.seen, wanted, strict=True)]
        # What has expired is not found, however much of the rest is hidden.
        ranks[batch.place] = np.where(np.isfinite(wanted), as_good - np.array(hidden), len(counts))
    return ranks


def quality_gates(ranks: dict[str, NDArray[np.int64]], config: GateConfig) -> list[GateResult]:
    """Recall and NDCG on the held-out events against the live snapshot, or on a first night against popularity."""
    rival, words = ("live", "the live snapshot") if "live" in ranks else ("popularity", "popularity")
    hits = {name: (found <= config.k).astype(float) for name, found in ranks.items()}
    gains = {name: hits[name] / np.log2(found + 1.0) for name, found in ranks.items()}
    return [
        not_worse(f"recall@{config.k}", hits["candidate"], hits[rival], words, config),
        not_worse(f"ndcg@{config.k}", gains["candidate"], gains[rival], words, config),
    ]


def snapshot_gates(
    dataset: Dataset, candidate: Candidate, live: Snapshot | None, config: GateConfig
) -> list[GateResult]:
    """What the snapshot itself must show."""
    users = current_user_embeddings(dataset, candidate.encoder)[:_SAMPLE]
    worst = max(_off_length(vectors, candidate.encoder.config.width) for vectors in (candidate.embedded.items, users))
    results = [
        GateResult(
            gate="norms",
            passed=worst < 1e-3,
            figure=worst if worst < math.inf else -1.0,
            limit=1e-3,
            note="every embedding has length 1",
        ),
        at_least(
            "ann-recall",
            candidate.ann_recall,
            config.min_ann_recall,
            f"recall@100 of the index against exact search: {candidate.ann_recall:.4f}",
        ),
    ]
    if not results[0].passed:
        return results
    seconds = _search_seconds(candidate, users)
    note = f"median of single searches: {1000 * seconds:.2f} ms"
    results.append(at_most("latency", 1000 * seconds, config.max_search_ms, note))
    if live is None:
        return results
    items, before = int(served_rows(candidate.vocabulary).sum()), int(live.served.sum())
    share = items / before
    note = f"{items:,} items, the live snapshot has {before:,}"
    results.append(at_least("catalogue", share, config.min_catalogue, note))
    ours, theirs = _answers(dataset, candidate, live)
    coverage = len(set().union(*ours)) / max(1, len(set().union(*theirs)))
    note = f"{coverage:.2f} times as many different items in the first {_DEPTH} of {len(ours)} users"
    results.append(at_least("coverage", coverage, config.min_coverage, note))
    overlap = float(np.mean([len(mine & old) / max(1, len(old)) for mine, old in zip(ours, theirs, strict=True)]))
    note = f"{overlap:.3f} of the live snapshot's first {_DEPTH} come up again"
    results.append(at_least("overlap", overlap, config.min_overlap, note))
    return results


def _off_length(vectors: NDArray[np.float32], width: int) -> float:
    """How far the lengths of embeddings are from 1 at most, infinity where one is not finite.

    Popularity, which may stand behind an embedding, is no part of its length.
    """
    worst = 0.0
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        if not np.isfinite(block).all():
            return math.inf
        worst = max(worst, float(np.abs(np.linalg.norm(block[:, :width], axis=1) - 1).max()))
    return worst


def _search_seconds(candidate: Candidate, users: NDArray[np.float32]) -> float:
    k = min(_DEPTH, len(candidate.vocabulary))
    seconds = []
    candidate.searcher.search(users[:1], [k])
    for user in users[:_SEARCHES]:
        begun = time.perf_counter()
        candidate.searcher.search(user[None], [k])
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


def _answers(
    dataset: Dataset, candidate: Candidate, live: Snapshot
) -> tuple[list[set[int | str]], list[set[int | str]]]:
    """Ids of the first items for some users as they stand now: the candidate's and the live snapshot's."""
    users = np.arange(len(dataset))[:: max(1, len(dataset) // _SAMPLE)][:_SAMPLE]
    # A request right after each user's last event, which is then the end of the history.
    ends = dataset.offsets[users + 1]
    times = dataset.events.timestamps[ends - 1].astype(np.int64)
    histories = user_histories(dataset, users, ends, times, candidate.encoder.config.max_length)
    found = candidate.searcher.search(
        embed_users(candidate.encoder, histories), [min(_DEPTH, len(candidate.vocabulary))] * len(users)
    )
    ours: list[set[int | str]] = [set(candidate.vocabulary.ids_of(rows[rows >= 0])) for rows in found.rows]
    past, known = live_histories(dataset, live, users, ends, times)
    found = live.searcher.search(embed_users(live.encoder, past), [min(_DEPTH, len(live.vocabulary))] * len(past))
    theirs: list[set[int | str]] = [set(live.vocabulary.ids_of(rows[rows >= 0])) for rows in found.rows]
    return [ours[place] for place in known], theirs
