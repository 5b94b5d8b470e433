"""The table of docs/architecture.md, enforced: which package may import which."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "retrieval"
CORE = ("config", "errors", "files", "native", "types")

# What each room may import besides core and itself. An entry covers the modules below it.
ALLOWED: dict[str, tuple[str, ...]] = {
    "data": (),
    "kernels": (),
    "encoder": ("kernels",),
    "training": ("data", "kernels", "encoder"),
    "index": (),
    "evaluation": ("data", "index"),
    "snapshot": (
        "index",
        "kernels.backend",
        "kernels.topk_scores",
        "encoder.checkpoint",
        "encoder.inference",
        "encoder.protocol",
        "data.vocabulary",
    ),
    "histories": ("data",),
    "jobs": ("data", "kernels", "encoder", "training", "index", "evaluation", "snapshot", "histories"),
    "rpc": (
        "data.sequences",
        "data.vocabulary",
        "encoder.inference",
        "histories",
        "index.filter",
        "index.searcher",
        "snapshot",
    ),
    "cli": tuple(path.name for path in PACKAGE.iterdir() if path.is_dir()),
}
# Narrower than its room: what a client's machine must be able to import.
CLIENT_SIDE = ("rpc.client", "rpc.aio", "rpc.convert", "rpc._generated")
FOREIGN_TO: dict[str, set[str]] = {
    "index": {"torch"},
    "evaluation": {"torch"},
    "data": {"torch", "faiss"},
    "histories": {"torch", "faiss"},
    "kernels": {"faiss", "pyarrow"},
    "encoder": {"faiss", "pyarrow"},
    "training": {"faiss"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of ours, named from below `retrieval`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path


def imports(path: Path) -> Iterator[str]:
    """Absolute names that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def allowed(module: str, imported: str) -> bool:
    room, core = module.split(".")[0], imported.split(".")[0] in CORE
    if room in CORE:
        return core
    own = imported == room or imported.startswith(f"{room}.")
    return core or own or any(imported == name or imported.startswith(f"{name}.") for name in ALLOWED[room])


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_follow_the_table(module: str, path: Path) -> None:
    room = module.split(".")[0]
    for name in imports(path):
        if name == "retrieval" or name.startswith("retrieval."):
            inner = name.removeprefix("retrieval").removeprefix(".")
            assert not inner or allowed(module, inner), f"{module} may not import {inner}"
        else:
            assert name.split(".")[0] not in FOREIGN_TO.get(room, set()), f"{module} may not import {name}"


def test_the_table_names_every_room() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(ALLOWED)


def test_every_public_module_says_what_it_exports() -> None:
    for module, path in modules():
        if "_generated" in module or path.name == "__init__.py" or module == "cli.main":
            continue
        assert "__all__" in path.read_text(encoding="utf-8"), f"{module} has no __all__"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("retrieval", {"torch", "faiss", "pyarrow", "duckdb", "grpc", "numpy"}),
        ("retrieval.rpc.client", {"torch", "faiss", "pyarrow", "duckdb", "numpy"}),
        ("retrieval.rpc.aio", {"torch", "faiss", "pyarrow", "duckdb", "numpy"}),
        ("retrieval.cli.main", {"torch", "faiss", "pyarrow", "duckdb", "matplotlib"}),
        ("retrieval.index.searcher", {"torch"}),
    ],
)
def test_importing_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    script = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("first", ["faiss", "torch"])
def test_faiss_and_torch_live_together_in_either_order(first: str) -> None:
    second = "torch" if first == "faiss" else "faiss"
    script = (
        f"import {first}, {second}; import numpy as np; x = np.eye(64, dtype='float32');"
        "i = faiss.IndexFlatIP(64); i.add(x); t = torch.from_numpy(x);"
        "assert (i.search(x, 1)[1][:, 0] == (t @ t.T).argmax(1).numpy()).all(); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"
