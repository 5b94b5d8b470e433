"""Rows, tombstones and the optimiser's state from night to night."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from retrieval.errors import DataError
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import Snapshot, open_snapshot
from tests.jobs.nights import DAY, ITEMS, latest, night, report_of, write_log

START = 1_700_000_000


def live_of(root: Path) -> Snapshot:
    registry = Registry(root / "registry")
    return open_snapshot(registry.folder(registry.current()))


def ids_of(live: Snapshot) -> list[object]:
    return list(live.vocabulary.ids.to_pylist())


def add_day(log: Path, day: int, events: list[tuple[int, int]]) -> None:
    """A further file of users' events, a second apart."""
    rows = [(user, item, START + day * DAY + place) for place, (user, item) in enumerate(events)]
    with (log / f"day-{day:02d}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp"), *rows])


def ring(users: range, items: range) -> list[tuple[int, int]]:
    """Every user goes through six neighbouring items."""
    return [(user, items[(user + step) % len(items)]) for step in range(6) for user in users]


def state_of(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "final" / "training-state.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_rows_are_appended_and_never_given_to_another_item(root: Path) -> None:
    before = live_of(root)
    assert ids_of(before) == list(range(ITEMS))
    # Smaller ids than any that there are: sorted anew, every row would move.
    add_day(root / "log", 4, ring(range(120), range(-5, ITEMS)))
    assert night(root / "log", root) == 0
    after = live_of(root)
    assert ids_of(after) == [*range(ITEMS), -5, -4, -3, -2, -1]
    assert report_of(root)["vocabulary"] == {
        "items": ITEMS + 5,
        "new": 5,
        "back": 0,
        "gone": 0,
        "rows": ITEMS + 5,
    }


def test_an_expired_item_leaves_the_answers_the_same_night_and_comes_back_in_its_row(root: Path) -> None:
    rules = ("--expire-after", "1.5", "--gates", str(root / "gates.json"))
    (root / "gates.json").write_text(json.dumps({"min_catalogue": 0.5, "min_coverage": 0, "min_overlap": 0}))
    # Days 4 and 5 know the first 30 items only.
    add_day(root / "log", 4, ring(range(120), range(30)))
    add_day(root / "log", 5, ring(range(120), range(30)))
    assert night(root / "log", root, *rules) == 0
    live = live_of(root)
    assert ids_of(live) == list(range(ITEMS))
    assert np.flatnonzero(~live.served).tolist() == list(range(30, ITEMS))
    assert report_of(root)["vocabulary"] == {"items": 30, "new": 0, "back": 0, "gone": ITEMS - 30, "rows": ITEMS}
    queries = np.eye(live.info.encoder.width, dtype=np.float32)
    found = live.searcher.search(queries, [ITEMS] * len(queries))
    assert found.rows.max() == 29
    assert set(live.popular.tolist()) == set(range(30))
    known = live.encoder.state_dict()["item_embedding.weight"]
    assert len(known) == ITEMS, "histories may still hold what has expired"
    add_day(root / "log", 6, ring(range(120), range(20, ITEMS)))
    assert night(root / "log", root, *rules) == 0
    live = live_of(root)
    assert ids_of(live) == list(range(ITEMS))
    assert live.served.all()
    assert report_of(root)["vocabulary"] == {"items": ITEMS, "new": 0, "back": ITEMS - 30, "gone": 0, "rows": ITEMS}


def test_items_that_the_log_lost_are_tombstones_until_a_night_from_scratch(root: Path) -> None:
    for file in (root / "log").glob("*.csv"):
        file.unlink()
    for day in range(4, 8):
        add_day(root / "log", day, ring(range(120), range(2, ITEMS + 1)))
    assert night(root / "log", root) == 0
    live = live_of(root)
    assert ids_of(live) == list(range(ITEMS + 1))
    assert np.flatnonzero(~live.served).tolist() == [0, 1]
    assert night(root / "log", root, "--full") == 0
    live = live_of(root)
    assert ids_of(live) == list(range(2, ITEMS + 1)), "the table is compact again"
    assert live.served.all()


def test_the_optimisers_state_moves_with_its_rows(root: Path) -> None:
    before = state_of(latest(root))
    add_day(root / "log", 4, ring(range(120), range(-5, ITEMS)))
    # As many steps as there are none: what the night begins with is what the night before ended with.
    assert night(root / "log", root, "--learning-rate", "1e-12") == 0
    after = state_of(latest(root))
    step = "optimizer.layers.0.uvqk.step"
    judged, final = (
        json.loads((latest(root) / name / "encoder.json").read_text())["training"]["steps"]
        for name in ("judged", "final")
    )
    assert after[step] == before[step] + judged + final
    table = "model.item_embedding.weight"
    assert np.allclose(after[table][:ITEMS], before[table], atol=1e-6)
    # A new row starts from the mean, and its moments from nothing: they are of tonight's gradients alone.
    assert np.allclose(after[table][ITEMS:], before[table].mean(0), atol=1e-6)
    assert before["optimizer.item_embedding.weight.exp_avg_sq"].shape[0] == ITEMS
    assert after["optimizer.item_embedding.weight.exp_avg_sq"].shape[0] == ITEMS + 5
    decay = 0.98 ** (judged + final)
    kept = after["optimizer.item_embedding.weight.exp_avg_sq"][:ITEMS]
    assert (kept >= decay * before["optimizer.item_embedding.weight.exp_avg_sq"] * 0.999).all()


@pytest.mark.parametrize("lost", ["the file", "other settings"])
def test_without_the_state_a_night_says_so_and_starts_the_optimiser_anew(
    root: Path, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    if lost == "the file":
        (latest(root) / "final" / "training-state.safetensors").write_bytes(b"damaged")
    live = Registry(root / "registry").current()
    write_log(root / "log", 6)
    assert night(root / "log", root, *(["--ema-decay", "0.9"] if lost == "other settings" else [])) == 0
    said = "".join(capsys.readouterr().err.split())  # lines are broken where the terminal ends
    assert "theoptimiserstartsanew" in said
    assert live in said
    assert "".join(str(report_of(root)["optimiser"]).split()) in said
    assert report_of(root)["start"] == "live weights"


def test_after_a_rollback_the_optimiser_goes_on_from_what_is_live(root: Path) -> None:
    first = Registry(root / "registry").current()
    write_log(root / "log", 5)
    assert night(root / "log", root) == 0
    Registry(root / "registry").activate(first)
    write_log(root / "log", 6)
    assert night(root / "log", root) == 0
    assert report_of(root)["optimiser"] == f"the optimiser goes on from {first}"


def test_ids_of_another_kind_are_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "log" / "day-04.csv").write_text(f"user_id,item_id,timestamp\n1,book,{START + 5 * DAY}\n")
    assert night(root / "log", root) == 2
    assert "but the items known before have integers as ids" in capsys.readouterr().err
    assert DataError.exit_code == 2
