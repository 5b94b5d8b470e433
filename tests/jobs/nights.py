"""Nights on a small log whose next item is a rule."""

import json
import random
from contextlib import closing
from pathlib import Path

from retrieval.cli.main import main
from retrieval.histories.recorded import open_histories

USERS, ITEMS, DAY = 120, 40, 86_400
OPTIONS = ["--preset", "demo", "--epochs", "6", "--warm-epochs", "2", "--learning-rate", "0.01", "--batch-size", "16"]
OPTIONS += ["--negatives", "full"]


def write_log(folder: Path, days: int, *, first_item: int = 0, items: int = ITEMS, shuffled_from: int = 99) -> Path:
    """One file a day; item i is followed by i + 1, from `shuffled_from` on by anything."""
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(days):
        lines = ["user_id,item_id,timestamp"]
        for user in range(USERS):
            for step in range(6):
                item = first_item + (user + 6 * day + step) % items
                if day >= shuffled_from:
                    item = first_item + chance.randrange(items)
                lines.append(f"{user},{item},{1_700_000_000 + day * DAY + 600 * step + user}")
        (folder / f"day-{day:02d}.csv").write_text("\n".join(lines) + "\n")
    return folder


def night(log: Path, root: Path, *options: str) -> int:
    return main(
        ["rebuild", str(log), "--registry", str(root / "registry"), "--work", str(root / "work"), *OPTIONS, *options]
    )


def report_of(root: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((latest(root) / "report.json").read_text())
    return found


def latest(root: Path) -> Path:
    """Folder of the latest night."""
    return max((root / "work").glob("night-*/report.json"), key=lambda file: file.stat().st_mtime_ns).parent


def gates_of(report: dict[str, object]) -> dict[str, bool]:
    gates = report["gates"]
    assert isinstance(gates, list)
    return {gate["gate"]: gate["passed"] for gate in gates}


def stored_days(folder: Path) -> float:
    """Days of the log that a store of histories holds of a user."""
    with closing(open_histories(str(folder))) as store:
        history = store.read(7)
    assert history is not None
    return len(history.timestamps) / 6
