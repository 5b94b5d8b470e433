"""`retrieval snapshots`: look at a registry, verify it, roll back, remove what is old."""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from retrieval.cli.console import OUT
from retrieval.cli.options import REGISTRY_HELP, add_json_option

__all__ = ["add_parser"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its own sub-commands."""
    parser = commands.add_parser("snapshots", help="list, show, verify, roll back, prune", description=__doc__)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, run, text in (
        ("list", _list, "all versions, the live one marked"),
        ("show", _show, "manifest of a version"),
        ("verify", _verify, "check every byte of a version against its manifest"),
        ("rollback", _rollback, "make the version before the live one (or the one named) live"),
        ("prune", _prune, "remove what is older than the newest versions and than the live one"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        action.add_argument("registry", metavar="REGISTRY", help=REGISTRY_HELP)
        if name == "prune":
            action.add_argument("--keep", type=int, default=7, metavar="N", help="versions that stay (default: 7)")
        elif name != "list":
            default = "the one before the live one" if name == "rollback" else "the live one"
            action.add_argument("version", nargs="?", help=f"default: {default}")
        add_json_option(action)
        action.set_defaults(run=run)


def _list(parsed: argparse.Namespace) -> None:
    from retrieval.errors import NoSnapshotError
    from retrieval.snapshot.registry import Registry

    registry = Registry(parsed.registry)
    try:
        live: str | None = registry.current()
    except NoSnapshotError:
        live = None
    manifests = {version: registry.manifest(version) for version in registry.versions()}
    if parsed.json:
        print(json.dumps({"current": live, "versions": list(manifests)}))
        return
    table = Table("version", "created", "items", "index", "recall@100", "live")
    for version, manifest in manifests.items():
        mark = "live" if version == live else ""
        row = (
            version,
            manifest.created,
            f"{manifest.items - manifest.expired:,}",
            str(manifest.index),
            f"{manifest.ann_recall:.3f}",
        )
        table.add_row(*row, mark)
    OUT.print(table if manifests else f"{parsed.registry}: no snapshots")


def _show(parsed: argparse.Namespace) -> None:
    from retrieval.snapshot.registry import Registry

    registry = Registry(parsed.registry)
    version = parsed.version or registry.current()
    manifest = registry.manifest(version)
    print(manifest.model_dump_json(indent=None if parsed.json else 2))


def _verify(parsed: argparse.Namespace) -> None:
    from retrieval.snapshot.registry import Registry, storage_at
    from retrieval.snapshot.store import open_snapshot

    # Of an object store what is there now, not a copy that was good once.
    with TemporaryDirectory() as cache:
        registry = Registry(parsed.registry, storage_at(parsed.registry, Path(cache)))
        version = parsed.version or registry.current()
        snapshot = open_snapshot(registry.folder(version))
    if parsed.json:
        print(json.dumps({"version": version, "verified": True}))
    else:
        OUT.print(f"{version}: {len(snapshot.manifest.files)} files verified, loads")


def _rollback(parsed: argparse.Namespace) -> None:
    from retrieval.snapshot.registry import Registry
    from retrieval.snapshot.store import open_snapshot

    registry = Registry(parsed.registry)
    left = registry.current()
    version = parsed.version or registry.previous()
    open_snapshot(registry.folder(version))
    registry.activate(version)
    if parsed.json:
        print(json.dumps({"current": version, "was": left}))
    else:
        OUT.print(f"{version} is live (was {left})")


def _prune(parsed: argparse.Namespace) -> None:
    from retrieval.snapshot.registry import Registry

    registry = Registry(parsed.registry)
    removed = registry.prune(parsed.keep)
    if parsed.json:
        print(json.dumps({"removed": removed, "versions": registry.versions()}))
    else:
        OUT.print(f"removed {', '.join(removed) or 'nothing'}; {len(registry.versions())} versions stay")
