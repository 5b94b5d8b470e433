"""A registry after its first night, made once."""

import json
import shutil
from pathlib import Path

import pytest

from tests.jobs.nights import night, write_log


@pytest.fixture(scope="session")
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
