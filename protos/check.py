"""Lint `protos/` and compare it with what was released, by buf (the package buf-bin).

Usage: python protos/check.py [--accept]

`v1.binpb` is the interface that callers hold us to. What would break one of them is refused; what adds to it is fine
and need not be accepted. `--accept` writes `v1.binpb` anew: for a release, and before the first one at will.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
RELEASED = PROTOS / "v1.binpb"


def buf() -> Path:
    """The program that the package brings along.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        files = metadata.files("buf-bin") or []
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError("buf-bin is not installed; install retrieval[dev]") from None
    return next(Path(str(file.locate())) for file in files if file.name in ("buf", "buf.exe"))


def complaints(protos: Path = PROTOS, released: Path = RELEASED) -> str:
    """What is wrong with the protos of a folder, one line each; "" if nothing is."""
    found = ""
    for arguments in (["lint"], ["breaking", "--against", str(released)]):
        done = subprocess.run([buf(), *arguments], cwd=protos, capture_output=True, text=True, timeout=60, check=False)
        found += done.stdout + done.stderr
        assert done.returncode == 0 or found, f"buf {arguments[0]} ended with {done.returncode} and said nothing"
    return found


def accept(protos: Path = PROTOS, released: Path = RELEASED) -> None:
    """Let the protos be what later ones are compared with."""
    subprocess.run([buf(), "build", "--exclude-source-info", "--output", released], cwd=protos, timeout=60, check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--accept"]:
        accept()
    elif sys.argv[1:]:
        sys.exit(__doc__)
    sys.exit(complaints() or None)
