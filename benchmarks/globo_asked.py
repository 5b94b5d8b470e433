"""Globo.com's clicks as a stream: how they are read, what is asked after a moment, and what answers beside a model.

first clicks  each user's first click after the moment, with everything before it as history
every click   a sample of all clicks after it, each with everything before it as history, of the same day too, as a
              server has it. Clicks on what the user had read before are left out: answers leave out what was read.

Items that an answerer cannot know count as not found.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from retrieval.data.dataset import Dataset
from retrieval.data.features import FeatureSchema, SideColumn
from retrieval.data.ingest import EventSchema, ingest
from retrieval.data.popularity import recent_popularity
from retrieval.data.splits import Queries, Split
from retrieval.evaluation.baselines import Scorer
from retrieval.evaluation.gates import paired_difference
from retrieval.evaluation.metrics import Estimate, evaluate_ranks
from retrieval.evaluation.ranking import query_batches, rank_by_scores
from retrieval.training.config import TrainConfig

__all__ = [
    "KS",
    "READ_BESIDE",
    "brief",
    "constant",
    "early",
    "every_click",
    "first_clicks",
    "first_time",
    "hindsight",
    "popularities",
    "read_clicks",
    "recalls",
    "scored",
    "training",
]

KS = (10, 50, 200)
_SCHEMA = EventSchema(time="timestamp_ms", time_unit="ms")
READ_BESIDE = ("referrer_type", "region", "device_group")
_FEATURES = FeatureSchema(auxiliary={name: SideColumn() for name in READ_BESIDE})
# Fewer clicks than these by midnight tell nothing of what becomes of an article.
_CLICKS = 30


def read_clicks(log: Path, out: Path, *, known: object = None, replace: bool = False) -> Dataset:
    """Ingest a folder of clicks, with what is read beside them: where a reader came from, the region, the device."""
    return ingest(log, out, schema=_SCHEMA, features=_FEATURES, known=known, replace=replace)


def training(epochs: int, seed: int = 0) -> TrainConfig:
    """How the preset `stream` is trained."""
    how = TrainConfig(negatives="in-batch", num_negatives=1024, visit_order="time", learning_rate=0.002)
    return how.model_copy(update={"epochs": epochs, "seed": seed})


def first_time(day: Path) -> int:
    """Time of a day's first click, seconds."""
    return int(pc.min(pq.read_table(day, columns=["timestamp_ms"])["timestamp_ms"]).as_py()) // 1000


def first_clicks(split: Split, count: int) -> Queries:
    """So many users' first clicks after a split's moment."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(split.test))[:count])
    return Queries(users=split.test.users[chosen], targets=split.test.targets[chosen])


def every_click(dataset: Dataset, moment: int, count: int) -> Queries:
    """A sample of so many clicks from a moment on, of items that the user had not read."""
    events, offsets = dataset.events, dataset.offsets
    later = np.flatnonzero(np.asarray(events.timestamps) >= moment)
    users = np.searchsorted(offsets, later, side="right") - 1
    later, users = later[later > offsets[users]], users[later > offsets[users]]
    # Half as many again as are asked: some fall away.
    drawn = np.random.default_rng(0).permutation(len(later))[: count + count // 2]
    unread = [
        place for place in drawn if events.items[later[place]] not in events.items[offsets[users[place]] : later[place]]
    ]
    chosen = np.sort(unread[:count])
    return Queries(users=users[chosen], targets=later[chosen])


def early(dataset: Dataset, asked: Queries, moment: int) -> NDArray[np.bool_]:
    """Which of the queries are asked within three hours after a moment."""
    return np.asarray(dataset.events.timestamps[asked.targets]) < moment + 3 * 3600


def constant(counts: NDArray[np.float32]) -> Scorer:
    """Scores that are the same for everybody."""
    return lambda histories: np.tile(counts, (len(histories), 1))


def popularities(dataset: Dataset, split: Split, moment: int) -> dict[str, Scorer]:
    """Popularity at a moment: of the half-life that predicted best until then, of the last hour, of the last six."""
    times, items = np.asarray(dataset.events.timestamps), np.asarray(dataset.events.items)
    found = {"popularity": constant(recent_popularity(dataset, split).counts)}
    for hours, words in ((1, "popularity of 1 hour"), (6, "popularity of 6 hours")):
        recent = (times >= moment - 3600 * hours) & (times < moment)
        counts = np.bincount(items[recent], minlength=len(dataset.vocabulary))
        found[words] = constant(counts.astype(np.float32))
    return found


def hindsight(dataset: Dataset, asked: Queries, moment: int) -> dict[str, Scorer]:
    """The best that one list for everybody can do: items by how often they are asked for.

    Of all items with a click before the moment, and of those with enough clicks by then to tell what they are.
    """
    before = np.asarray(dataset.events.timestamps) < moment
    counts = np.bincount(np.asarray(dataset.events.items)[before], minlength=len(dataset.vocabulary))
    wanted = np.bincount(dataset.events.items[asked.targets], minlength=len(counts)).astype(np.float32)
    lists = {"best list in hindsight": 1, f"best list of items with {_CLICKS} clicks": _CLICKS}
    return {
        name: constant(np.where(counts >= least, wanted, -np.inf).astype(np.float32)) for name, least in lists.items()
    }


def scored(dataset: Dataset, asked: Queries, score: Scorer) -> NDArray[np.int64]:
    """Exact rank of each query's target, `[Q]`."""
    ranks = np.empty(len(asked), np.int64)
    for batch in query_batches(dataset, asked, 200):
        ranks[batch.place] = rank_by_scores(
            batch,
            len(dataset.vocabulary),
            lambda part, batch=batch: score(batch.histories[part]),  # type: ignore[misc]
        )
    return ranks


def recalls(
    ranks: Mapping[str, NDArray[np.int64]],
    part: NDArray[np.bool_],
    ours: Sequence[str],
    about: Callable[[str], dict[str, object]],
) -> list[dict[str, object]]:
    """A row for each ranker: recall, and how far each of `ours` is ahead over the same queries, with 95% intervals."""
    rows = []
    for name, found in ranks.items():
        metrics = evaluate_ranks(found[part], KS)
        row: dict[str, object] = {"ranker": name, "queries": int(part.sum())}
        row |= {f"recall@{k}": brief(metrics[f"recall@{k}"]) for k in KS}
        for our in ours:
            for k in KS:
                row[f"{our}_ahead@{k}"] = ""
                if our in ranks and our != name:
                    hits = ((one[part] <= k).astype(float) for one in (ranks[our], found))
                    row[f"{our}_ahead@{k}"] = brief(paired_difference(*hits))
        rows.append(row | about(name))
    return rows


def brief(one: Estimate) -> str:
    """A mean and its interval, for a table."""
    return f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]"
