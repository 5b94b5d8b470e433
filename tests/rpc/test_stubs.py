import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "retrieval" / "rpc" / "_generated"


def test_the_committed_stubs_are_what_the_protos_give(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")
    subprocess.run([sys.executable, ROOT / "protos" / "generate.py", tmp_path], check=True, timeout=120)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    found = {
        path.relative_to(STUBS): path.read_text()
        for path in STUBS.rglob("*.py*")
        if path.name != "__init__.py" and path.suffix != ".pyc"
    }
    assert fresh == found, "run `make stubs`"
