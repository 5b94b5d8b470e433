"""Nights on a small log whose next item is a rule: published, refused, killed and run again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.cli.main import build_parser, main
from retrieval.cli.rebuild import _inputs
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import ingest
from retrieval.errors import ConfigError
from retrieval.files import sha256_of
from retrieval.histories.recorded import open_histories
from retrieval.index.spec import IndexSpec
from retrieval.jobs import rebuild as module
from retrieval.jobs.night import alone, name_of_night
from retrieval.jobs.publish import Candidate, build_candidate
from retrieval.jobs.warm_start import carried_over
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from retrieval.training.config import TrainConfig

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
    (folder,) = (root / "work").glob("night-*")
    found: dict[str, object] = json.loads((folder / "report.json").read_text())
    return found


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


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry after its first night."""
    root = tmp_path_factory.mktemp("first")
    assert night(write_log(root / "log", 4), root, "--histories", str(root / "histories")) == 0
    return root


@pytest.fixture
def root(first: Path, tmp_path: Path) -> Path:
    shutil.copytree(first, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def strict(tmp_path: Path) -> tuple[str, str]:
    """Gates that judge by few users."""
    (tmp_path / "gates.json").write_text(json.dumps({"k": 5, "min_queries": 20}))
    return "--gates", str(tmp_path / "gates.json")


def test_the_first_night_is_held_against_popularity(first: Path) -> None:
    report = report_of(first)
    assert report["start"] == "scratch"
    assert report["live"] is None
    assert gates_of(report) == dict.fromkeys(("recall@50", "ndcg@50", "norms", "ann-recall", "latency"), True)
    snapshot = open_snapshot(Registry(first / "registry").folder(Registry(first / "registry").current()))
    assert snapshot.manifest.items == ITEMS
    assert stored_days(first / "histories") == 4


def test_the_next_night_starts_from_the_live_weights_and_is_held_against_it(
    root: Path, strict: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = Registry(root / "registry").current()
    write_log(root / "log", 5, items=ITEMS + 3)
    assert night(root / "log", root, *strict) == 0
    out = capsys.readouterr().out
    registry = Registry(root / "registry")
    report = report_of(root)
    assert registry.current() != before
    assert registry.current() in out
    assert (report["start"], report["live"]) == ("live weights", before)
    assert report["vocabulary"] == {"items": ITEMS + 3, "new": 3, "gone": 0}
    assert set(gates_of(report)) >= {"recall@5", "ndcg@5", "catalogue", "coverage", "overlap"}
    assert all(gates_of(report).values())
    held_out = report["held_out"]
    assert isinstance(held_out, dict)
    assert set(held_out) == {"candidate", "popularity", "live"}
    snapshot = open_snapshot(registry.folder(registry.current()))
    assert snapshot.vocabulary.rows_of([ITEMS + 2]).min() >= 0, "an item that is new tonight can be retrieved"


def test_a_warm_night_costs_what_is_new_and_a_share_of_the_rest(root: Path) -> None:
    # Half of the users are back; of the 60 others six are met again. An epoch of everybody has 8 batches.
    write_log(root / "log", 5)
    lines = (root / "log" / "day-04.csv").read_text().splitlines()
    back = [line for line in lines if line.startswith("user") or int(line.split(",")[0]) < USERS // 2]
    (root / "log" / "day-04.csv").write_text("\n".join(back) + "\n")
    assert night(root / "log", root, "--history-share", "0.1") == 0
    (folder,) = (root / "work").glob("night-*")
    steps = [
        json.loads((folder / name / "encoder.json").read_text())["training"]["steps"] for name in ("judged", "final")
    ]
    assert steps == [2 * 5, 5]


def test_a_night_that_is_run_again_does_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Registry(root / "registry").versions()
    assert night(root / "log", root) == 0
    assert Registry(root / "registry").versions() == before
    assert f"{before[-1]} is live" in capsys.readouterr().out


def test_a_log_without_news_is_no_night_unless_it_is_asked_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(root / "log" / "day-00.csv", (1, 1))
    before = Registry(root / "registry").versions()
    assert night(root / "log", root) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert Registry(root / "registry").versions() == before
    assert night(root / "log", root, "--full") == 0
    assert len(Registry(root / "registry").versions()) == len(before) + 1


def test_a_dry_run_publishes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_log(root / "log", 5)
    before = Registry(root / "registry").versions()
    assert night(root / "log", root, "--dry-run", "--histories", str(root / "histories")) == 0
    assert stored_days(root / "histories") == 4
    assert Registry(root / "registry").versions() == before
    assert "dry run" in capsys.readouterr().out


def refused(root: Path, log: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, bool]:
    """Verdicts of a night that must leave the live snapshot where it is."""
    registry = Registry(root / "registry")
    before = registry.current()
    assert night(log, root, *options) == 3
    assert f"{before} stays live" in capsys.readouterr().err
    assert registry.current() == before
    open_snapshot(registry.folder(before))
    return gates_of(report_of(root))


def test_shuffled_labels_are_refused_by_recall(
    root: Path, strict: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    # The candidate learns from noise; the events that it is judged on follow the rule again.
    write_log(root / "log", 8, shuffled_from=4)
    write_log(root / "rule", 12)
    for day in range(8, 12):
        shutil.copy(root / "rule" / f"day-{day:02d}.csv", root / "log")
    gates = refused(root, root / "log", capsys, *strict, "--full", "--epochs", "1", "--hold-out", "0.3")
    assert not gates["recall@5"]


def test_half_a_catalogue_is_refused_by_its_size(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "log")
    log = write_log(root / "log", 5, items=ITEMS // 2)
    gates = refused(root, log, capsys, "--histories", str(root / "refused"))
    assert not gates["catalogue"]
    assert stored_days(root / "refused") == 5, "events are no model's: a server may answer from them all the same"


def test_weights_that_are_not_numbers_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(dataset: Dataset, run_dir: Path, spec: IndexSpec) -> Candidate:
        candidate = build_candidate(dataset, run_dir, spec)
        candidate.vectors[3] = np.nan
        return candidate

    monkeypatch.setattr(module, "build_candidate", poisoned)
    write_log(root / "log", 5)
    assert not refused(root, root / "log", capsys)["norms"]


def test_an_index_that_finds_too_little_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "build_candidate", lambda *what: replace(build_candidate(*what), ann_recall=0.9))
    write_log(root / "log", 5)
    gates = refused(root, root / "log", capsys)
    assert [gate for gate, passed in gates.items() if not passed] == ["ann-recall"]


def test_old_snapshots_leave_but_the_live_one_stays(root: Path) -> None:
    registry = Registry(root / "registry")
    for days in (5, 6):
        write_log(root / "log", days)
        assert night(root / "log", root, "--keep", "2") == 0
    assert len(registry.versions()) == 2
    assert registry.current() == registry.versions()[-1]
    registry.activate(registry.versions()[0])
    assert registry.prune(1) == []
    assert len(registry.versions()) == 2


def test_weights_follow_ids_and_names_to_their_new_rows(root: Path) -> None:
    registry = Registry(root / "registry")
    live = open_snapshot(registry.folder(registry.current()))
    write_log(root / "moved", 1, first_item=-2, items=ITEMS + 2)
    dataset = ingest(root / "moved", root / "dataset")
    config = live.info.encoder.model_copy(update={"num_items": ITEMS + 2})
    weights = carried_over(config, dataset, live)
    old = live.encoder.state_dict()
    assert torch.equal(weights["item_embedding.weight"][2:], old["item_embedding.weight"])
    assert torch.equal(weights["item_embedding.weight"][0], old["item_embedding.weight"].mean(0))
    assert torch.equal(weights["layers.1.uvqk"], old["layers.1.uvqk"])
    with pytest.raises(ConfigError, match="another shape"):
        carried_over(config.model_copy(update={"width": 32}), dataset, live)


def test_two_rebuilds_at_once_are_one_too_many(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry(root / "registry")
    for folder, held in ((root / "work", alone(root / "work")), (root / "registry", registry.lease())):
        with held:
            assert night(root / "log", root) == 2
            assert f"{folder}: another rebuild is at work" in capsys.readouterr().err
    assert night(root / "log", root) == 0


def test_a_night_that_is_killed_ends_like_one_that_was_not(root: Path, tmp_path: Path) -> None:
    write_log(root / "log", 5)
    other = tmp_path / "other"
    shutil.copytree(root, other)
    # The log's path and times name the night: both runs read the same files.
    assert night(root / "log", root) == 0
    command = [sys.executable, "-m", "retrieval.cli.main", "rebuild", str(root / "log"), *OPTIONS]
    command += ["--registry", str(other / "registry"), "--work", str(other / "work")]
    before = Registry(other / "registry").current()
    for marker in ("train …", "finish …", "index …"):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(marker):
                    break
            else:
                pytest.fail(f"ended before {marker!r}")
            time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        assert Registry(other / "registry").current() == before
        open_snapshot(Registry(other / "registry").folder(before))
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    killed, whole = (Registry(one / "registry") for one in (other, root))
    for name in ("encoder.safetensors", "vocabulary.arrow", "index.faiss"):
        assert sha256_of(killed.folder(killed.current()) / name) == sha256_of(whole.folder(whole.current()) / name)
    assert [path.name for path in (other / "work").glob("night-*/.tmp-*")] == []


def test_another_file_of_items_or_other_options_are_another_night(tmp_path: Path) -> None:
    items, log = tmp_path / "items.csv", write_log(tmp_path / "log", 1)
    items.write_text("item_id,title\n1,One\n")

    def name(*options: str) -> str:
        command = ["rebuild", str(log), "--registry", "r", "--work", "w", "--items", str(items), *OPTIONS, *options]
        parts = {"training": TrainConfig(), "index": IndexSpec()}
        config = module.RebuildConfig.parse(parts | {"inputs": _inputs(build_parser().parse_args(command))}, "test")
        return name_of_night(log, config, None)

    first = name()
    assert name() == first
    assert name("--dry-run", "--json", "--memory", "1GB") == first
    assert name("--item", "article") != first
    assert name("--query-actions") != first
    items.write_text("item_id,title\n1,Two\n")
    assert name() != first
