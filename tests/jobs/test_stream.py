"""Nights of a catalogue that turns over by the hour, with popularity in the scores."""

import random
from pathlib import Path

import numpy as np

from retrieval.cli.main import main
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot

USERS, DAY = 200, 86_400
OPTIONS = ["--preset", "stream", "--epochs", "2", "--warm-epochs", "1", "--batch-size", "32", "--num-negatives", "64"]
OPTIONS += ["--negatives", "in-batch", "--visit-order", "time", "--learning-rate", "0.005"]


def write_day(folder: Path, day: int) -> None:
    """Every hour has five items of its own; users click on three of one hour's, mostly on its first two."""
    chance = random.Random(day)
    folder.mkdir(exist_ok=True)
    lines = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        hour = 24 * day + chance.randrange(24)
        clicked = dict.fromkeys(chance.choices(range(5), (8, 4, 1, 1, 1), k=3))
        for place, item in enumerate(clicked):
            lines.append(f"{user},{5 * hour + item},{1_700_000_000 + 3600 * hour + 600 * place + user}")
    (folder / f"day-{day}.csv").write_text("\n".join(lines) + "\n")


def night(root: Path) -> Snapshot:
    options = ["--registry", str(root / "registry"), "--work", str(root / "work"), *OPTIONS]
    assert main(["rebuild", str(root / "log"), *options]) == 0
    registry = Registry(root / "registry")
    return open_snapshot(registry.folder(registry.current()))


def test_each_night_ranks_by_the_popularity_of_its_own_last_hours(tmp_path: Path) -> None:
    for day in range(3):
        write_day(tmp_path / "log", day)
    first = night(tmp_path)
    write_day(tmp_path / "log", 3)
    second = night(tmp_path)
    for snapshot in (first, second):
        assert snapshot.searcher.width == snapshot.manifest.width == snapshot.info.encoder.width + 1
        # A user of whom the encoder knows nothing but the constant: what is left of the score is popularity.
        user = np.zeros((1, snapshot.manifest.width), np.float32)
        user[0, -1] = 1
        rows = snapshot.searcher.search(user, [20]).rows[0]
        popularity = snapshot.vocabulary.attributes["popularity"].to_numpy()
        assert popularity[rows].tolist() == np.sort(popularity)[::-1][:20].tolist()
    newest = [int(item) for item in second.vocabulary.ids_of(second.popular[:5])]
    assert max(newest) >= 3 * 24 * 5, "of the last day"
