"""`retrieval publish`: a trained encoder becomes the live snapshot of a registry."""

import argparse
import json
from pathlib import Path

from retrieval.cli.console import OUT, progress, say
from retrieval.cli.options import REGISTRY_HELP, add_index_options, add_json_option, index_spec

__all__ = ["add_parser"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("publish", help="build a snapshot and make it the live one", description=__doc__)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder made by `retrieval ingest`")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder made by `retrieval train`")
    parser.add_argument("--registry", required=True, metavar="REGISTRY", help=REGISTRY_HELP)
    add_index_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Build and publish."""
    from retrieval.data.dataset import Dataset
    from retrieval.jobs.publish import publish_snapshot
    from retrieval.snapshot.registry import Registry

    spec = index_spec(parsed)
    dataset = Dataset(parsed.dataset)
    report_file = parsed.run_dir / "report.json"
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
    registry = Registry(parsed.registry)
    with progress("index") as update:
        version = publish_snapshot(
            dataset,
            parsed.run_dir,
            registry,
            spec,
            report,
            on_choice=say,
            on_progress=lambda done, total: update(done, total, ""),
        )
    manifest = registry.manifest(version)
    if parsed.json:
        print(json.dumps({"version": version, "items": manifest.items, "ann_recall": manifest.ann_recall}))
        return
    OUT.print(f"published {version}: {manifest.items:,} items, index {manifest.index}, ", end="")
    OUT.print(f"recall@100 against exact {manifest.ann_recall:.3f}")
