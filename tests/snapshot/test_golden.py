"""Snapshots that were written once are read ever after."""

import json
from pathlib import Path

import pytest

from retrieval.snapshot.manifest import SNAPSHOT_FORMAT
from retrieval.snapshot.registry import Registry
from retrieval.snapshot.store import open_snapshot
from tests.snapshot.golden.write import answers

GOLDEN = sorted((Path(__file__).parent / "golden").glob("format-*"))


def test_there_is_one_of_the_format_that_is_written() -> None:
    assert f"format-{SNAPSHOT_FORMAT}" in [path.name for path in GOLDEN]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_golden_snapshot_opens_and_answers_as_it_did(path: Path) -> None:
    registry = Registry(path)
    snapshot = open_snapshot(registry.folder(registry.current()))
    expected = json.loads((path / "answers.json").read_text(encoding="utf-8"))
    found = answers(snapshot)
    assert list(found) == list(expected)
    for key, scores in expected.items():
        assert found[key] == pytest.approx(scores, abs=1e-5)
