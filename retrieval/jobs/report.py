"""What a night tells: `report.json` for machines, a page for people, refused nights included."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retrieval.data.dataset import Dataset
from retrieval.evaluation.gates import GateResult
from retrieval.evaluation.metrics import evaluate_ranks
from retrieval.files import remove_temporary_files, write_atomically
from retrieval.jobs.night import Clock
from retrieval.jobs.publish import Candidate
from retrieval.jobs.report_page import page_of
from retrieval.jobs.warm_start import rows_before
from retrieval.snapshot.store import Snapshot, served_rows

__all__ = ["REPORT", "keep_report", "keep_report_of_live", "night_report"]

REPORT = "report.json"
_PAGE, _PAGES = "report.html", "reports"
_PAGES_KEPT = 100
_NIGHTS_TOLD = 60
_POINTS = 200


def night_report(
    dataset: Dataset,
    candidate: Candidate,
    live: Snapshot | None,
    last: Mapping[str, Any],
    *,
    night: str,
    start: str,
    optimiser: str,
    held_out_since: int,
    ranks: Mapping[str, NDArray[np.int64]],
    results: Sequence[GateResult],
    k: int,
    trainings: Mapping[str, Path],
    clock: Clock,
) -> dict[str, Any]:
    """Everything that was found.

    Args:
        dataset: tonight's events.
        candidate: what may be published.
        live: the live snapshot.
        last: the report that this was published with; empty if it is not a rebuild's.
        night: tonight's name.
        start: what training started from.
        optimiser: what its optimiser started from.
        held_out_since: T, seconds.
        ranks: of held-out events' items, by who was asked.
        results: of the gates.
        k: depth of recall and NDCG that the gates judge.
        trainings: folder of each training, by stage.
        clock: what each stage took; where an earlier run had done a part of it, what was left.
    """
    held_out = {
        name: {
            metric: estimate.model_dump() for metric, estimate in evaluate_ranks(found, sorted({10, k, 200})).items()
        }
        for name, found in ranks.items()
    }
    told = [*last.get("nights", []), _brief(last, live)] if last and live is not None else []
    return {
        "night": night,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "live": live.version if live is not None else None,
        "start": start,
        "optimiser": optimiser,
        "held_out_since": held_out_since,
        "last_event": int(dataset.events.timestamps.max()),
        "events": dataset.info.events,
        "users": dataset.info.users,
        "vocabulary": _vocabulary(candidate, live),
        "index": {
            "spec": str(candidate.built.spec),
            "recall@100": candidate.ann_recall,
            "why": candidate.built.why,
            "chosen": candidate.built.chosen.model_dump(mode="json") if candidate.built.chosen is not None else None,
        },
        "gates": [result.model_dump() for result in results],
        "k": k,
        "queries": len(next(iter(ranks.values()))),
        "held_out": held_out,
        "losses": {name: _losses(folder / "tensorboard") for name, folder in trainings.items()},
        "nights": told[-_NIGHTS_TOLD:],
        "seconds": dict(clock.seconds),
        "cpu_seconds": dict(clock.cpu_seconds),
        "memory_mb": dict(clock.memory_mb),
    }


def keep_report(work: Path, folder: Path, report: Mapping[str, Any], outcome: str) -> None:
    """Write the report and its page to the night's folder, and the page also among those of other nights.

    Args:
        work: folder of the job; its folder `reports` keeps the newest pages.
        folder: of the night.
        report: as `night_report` gives it.
        outcome: what became of the night.
    """
    report = {**report, "outcome": outcome}
    page = page_of(report).encode()
    pages = work / _PAGES
    pages.mkdir(exist_ok=True)
    for place in (folder, pages):
        remove_temporary_files(place)
    write_atomically(folder / REPORT, json.dumps(report, indent=2).encode())
    write_atomically(folder / _PAGE, page)
    write_atomically(_page_among_others(work, report), page)
    for old in sorted(pages.glob("*.html"))[:-_PAGES_KEPT]:
        old.unlink()


def keep_report_of_live(work: Path, folder: Path, report: Mapping[str, Any], version: str) -> None:
    """Keep the report of a night that published, from the snapshot itself, if the night was killed before it did.

    Nothing happens where the night's folder is not in `work`, and no trace of a killed process stays.
    """
    if not folder.exists():
        return
    if _page_among_others(work, report).exists():
        remove_temporary_files(folder)
        remove_temporary_files(work / _PAGES)
    else:
        keep_report(work, folder, report, f"published as {version}")


def _page_among_others(work: Path, report: Mapping[str, Any]) -> Path:
    when = report["written"].replace("-", "").replace(":", "").partition("+")[0]
    return work / _PAGES / f"{when}-{report['night']}.html"


def _brief(report: Mapping[str, Any], live: Snapshot) -> dict[str, Any]:
    """One night in the reports of later ones."""
    metric = f"recall@{report.get('k', 50)}"
    held_out = report.get("held_out", {})
    return {
        "version": live.version,
        "last_event": report["last_event"],
        "metric": metric,
        "recall": {name: found[metric]["mean"] for name, found in held_out.items() if metric in found},
        "vocabulary": report["vocabulary"],
        "seconds": round(sum(report["seconds"].values()), 1),
        "start": report["start"],
    }


def _vocabulary(candidate: Candidate, live: Snapshot | None) -> dict[str, int]:
    """Items that are answers tonight; of these new ones and ones that were expired; those that are gone; all rows."""
    vocabulary = candidate.vocabulary
    served = served_rows(vocabulary)
    found = {"items": int(served.sum()), "new": int(served.sum()), "back": 0, "gone": 0, "rows": len(vocabulary)}
    if live is None:
        return found
    rows = rows_before(vocabulary, live)
    known = rows >= 0
    before = np.zeros(len(vocabulary), bool)
    before[known] = live.served[rows[known]]
    return found | {
        "new": int((served & ~known).sum()),
        "back": int((served & known & ~before).sum()),
        "gone": int(live.served.sum()) - int((served & before).sum()),
    }


def _losses(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of a training, at most so many points; from its log, which a run that was killed goes on with."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    if "train/loss" not in log.Tags()["scalars"]:
        return []
    losses = log.Scalars("train/loss")
    size = -(-len(losses) // _POINTS)
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [(part[-1].step + 1, round(float(np.mean([one.value for one in part])), 4)) for part in parts]
