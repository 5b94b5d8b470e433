"""Nights whose registry is an S3 bucket."""

from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.snapshot.object_storage import ObjectStorage, object_store
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.jobs.nights import OPTIONS, write_log
from tests.s3 import s3_server, s3_url  # noqa: F401


def test_two_nights_follow_each_other_and_one_that_finds_another_at_work_is_refused(
    s3_url: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there = Registry(s3_url, ObjectStorage(s3_url, object_store(s3_url), tmp_path / "there", lease_seconds=1.0))
    night = ["rebuild", str(tmp_path / "log"), "--registry", s3_url, "--work", str(tmp_path / "work"), *OPTIONS]
    write_log(tmp_path / "log", 4)
    with there.lease():
        assert main(night) == 2
        assert "another rebuild is at work there" in capsys.readouterr().err
    assert main(night) == 0
    first = there.current()
    assert main(night) == 0, "nothing to do"
    write_log(tmp_path / "log", 5)
    assert main(night) == 0
    second = there.current()
    assert there.versions() == [first, second]
    manifest = there.manifest(second)
    assert manifest.parent == first
    assert manifest.trained_on is not None
    assert {gate.gate for gate in manifest.gates} >= {"norms", "ann-recall", "catalogue"}
    assert open_snapshot(there.folder(second)).version == second
