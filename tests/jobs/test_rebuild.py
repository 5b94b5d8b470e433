"""Nights on a small log whose next item is a rule: published, refused, killed and run again."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval.cli.main import build_parser, main
from retrieval.cli.rebuild import _inputs
from retrieval.data.dataset import Dataset
from retrieval.data.ingest import ingest
from retrieval.errors import ConfigError
from retrieval.files import sha256_of
from retrieval.index.spec import IndexSpec
from retrieval.jobs import rebuild as module
from retrieval.jobs.night import alone, name_of_night
from retrieval.jobs.publish import Candidate, build_candidate
from retrieval.jobs.warm_start import carried_over
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from retrieval.training.config import TrainConfig
from tests.jobs.nights import DAY, ITEMS, OPTIONS, USERS, gates_of, latest, night, report_of, stored_days, write_log


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
    assert report["vocabulary"] == {"items": ITEMS + 3, "new": 3, "back": 0, "gone": 0, "rows": ITEMS + 3}
    assert report["optimiser"] == f"the optimiser goes on from {before}"
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
    folder = latest(root)
    steps = [
        json.loads((folder / name / "encoder.json").read_text())["training"]["steps"] for name in ("judged", "final")
    ]
    assert steps == [2 * 5, 5]


def test_a_night_that_is_run_again_does_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Registry(root / "registry").versions()
    assert night(root / "log", root) == 0
    assert Registry(root / "registry").versions() == before
    assert f"{before[-1]} is live" in capsys.readouterr().out


def test_a_report_that_was_not_kept_is_kept_when_the_night_is_run_again(root: Path) -> None:
    """Killed right after it published, a night leaves no page, and perhaps a piece of one."""
    folder = latest(root)
    (page,) = (root / "work" / "reports").glob(f"*-{folder.name.removeprefix('night-')}.html")
    kept = [page, folder / "report.html", folder / "report.json"]
    for path in kept:
        path.unlink()
    pieces = [folder / ".tmp-1-report.json", page.with_name(".tmp-1-page.html")]
    for path in pieces:
        path.write_text("{")
    assert night(root / "log", root) == 0
    assert [path.exists() for path in kept] == [True] * 3
    assert [path.exists() for path in pieces] == [False] * 2
    assert str(report_of(root)["outcome"]).startswith("published as")


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
    def poisoned(dataset: Dataset, run_dir: Path, spec: IndexSpec, **more: Any) -> Candidate:
        candidate = build_candidate(dataset, run_dir, spec, **more)
        items = np.array(candidate.embedded.items)
        items[3] = np.nan
        return replace(candidate, embedded=replace(candidate.embedded, items=items))

    monkeypatch.setattr(module, "build_candidate", poisoned)
    write_log(root / "log", 5)
    assert not refused(root, root / "log", capsys)["norms"]


def test_an_index_that_finds_too_little_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poor(*what: Any, **more: Any) -> Candidate:
        return replace(build_candidate(*what, **more), ann_recall=0.9)

    monkeypatch.setattr(module, "build_candidate", poor)
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


def test_a_disk_that_is_full_is_one_sentence_and_the_night_goes_on_when_there_is_room(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Files may not grow beyond so many bytes: a disk that fills up at another place each time.
    write_log(root / "log", 5)
    before, refusals = Registry(root / "registry").current(), set()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for kilobytes in (1, 4, 16, 48, 96, 192):
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
        try:
            code = night(root / "log", root)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if code == 0:
            break
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert code in (1, 2), said
        assert said.startswith("retrieval: ")
        refusals.add(said)
        assert Registry(root / "registry").current() == before
    assert len(refusals) > 2, refusals
    assert code == 0 or night(root / "log", root) == 0
    live = Registry(root / "registry").current()
    assert live != before
    open_snapshot(Registry(root / "registry").folder(live))


def test_a_log_that_is_not_there_is_told_before_any_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert night(tmp_path / "nothing", tmp_path / "job") == 2
    assert "nothing: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_folders_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log", 2)
    (tmp_path / "file").write_text("")
    for work, registry in (("file/work", "registry"), ("work", "file/registry")):
        options = ["--work", str(tmp_path / work), "--registry", str(tmp_path / registry)]
        assert main(["rebuild", str(log), *options, *OPTIONS]) == 2
        assert f"{tmp_path / 'file'}" in capsys.readouterr().err


def test_clocks_that_jump_by_a_day_change_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall clocks are told in reports; what a night makes follows from the log."""
    write_log(root / "log", 5)
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "other" / "log").rename(tmp_path / "other" / "unused")
    encoders = set()
    for place, days in ((root, -1), (tmp_path / "other", 1)):
        real = time.time
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda real=real, days=days: real() + days * DAY)
            options = ["--work", str(place / "work"), "--registry", str(place / "registry")]
            assert main(["rebuild", str(root / "log"), *options, *OPTIONS, "--expire-after", "30"]) == 0
        registry = Registry(place / "registry")
        encoders.add(registry.manifest(registry.current()).model)
    assert len(encoders) == 1
