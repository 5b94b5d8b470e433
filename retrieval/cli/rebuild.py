"""`retrieval rebuild`: one night, from the event log to a published snapshot, or to a refusal that says why."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from retrieval.cli.console import OUT, lines, progress, say
from retrieval.cli.ingest import add_event_options, ingest_with_progress
from retrieval.cli.options import (
    REGISTRY_HELP,
    add_device_option,
    add_histories_option,
    add_index_options,
    add_json_option,
    add_training_options,
    index_spec,
    opened_histories,
    pick_device,
    train_config,
)
from retrieval.cli.train import encoder_config

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval.data.dataset import Dataset
    from retrieval.jobs.rebuild import Night

__all__ = ["add_parser"]

# What a night makes does not follow from these; the log's own files it looks at itself.
_NOT_INPUTS = {"run", "json", "device", "memory", "dry_run", "events", "registry", "work", "histories"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "rebuild",
        help="one night: ingest, train from the live weights, judge, publish",
        description="Read the whole log, train from the live snapshot's weights, hold the result against the live "
        "snapshot on events that neither has seen, and publish it, or refuse (exit code 3) and leave the live one. Run "
        "again after a crash it goes on where it stopped; run again after success it does nothing.",
    )
    parser.add_argument("events", type=Path, metavar="EVENTS", help="file, or folder of files of one format")
    parser.add_argument("--registry", required=True, metavar="REGISTRY", help=REGISTRY_HELP)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for this job's own files")
    parser.add_argument("--full", action="store_true", help="train from scratch")
    parser.add_argument("--dry-run", action="store_true", help="do everything but publish")
    parser.add_argument("--warm-epochs", type=int, help="epochs when starting from the live weights (default: 3)")
    parser.add_argument("--finish-epochs", type=int, help="epochs over all events before publishing (default: 1)")
    parser.add_argument(
        "--history-share",
        type=float,
        metavar="SHARE",
        help="users without new events to train on from the live weights, as a share of those with (default: 0.25)",
    )
    parser.add_argument(
        "--hold-out", type=float, metavar="SHARE", help="latest events to judge by where none are new (default: 0.05)"
    )
    expiry = parser.add_argument_group("which items leave the answers; they stay in users' histories")
    expiry.add_argument(
        "--expire-after", type=float, metavar="DAYS", help="whose last event is longer before the log's (default: none)"
    )
    expiry.add_argument(
        "--expires", metavar="COLUMN", help="by a column of --items with the time from which on an item is none"
    )
    expiry.add_argument("--expire-unlisted", action="store_true", help="that --items does not name")
    parser.add_argument("--keep", type=int, help="snapshots to keep beside the live one (default: 7)")
    parser.add_argument("--gates", type=Path, metavar="FILE", help="limits as JSON, see docs/rebuild.md")
    parser.add_argument("--memory", default="2GB", help="memory that reading and sorting may use (default: 2GB)")
    add_histories_option(parser, "users' histories, to be filled from the log")
    add_event_options(parser)
    add_training_options(parser)
    add_index_options(parser)
    add_device_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Run the night."""
    from retrieval.errors import ConfigError
    from retrieval.evaluation.gates import GateConfig
    from retrieval.jobs.rebuild import RebuildConfig, rebuild
    from retrieval.snapshot.registry import Registry
    from retrieval.training.trainer import StepReport

    gates = GateConfig()
    if parsed.gates is not None:
        try:
            values = json.loads(parsed.gates.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{parsed.gates}: cannot be read ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{parsed.gates}: is not a JSON object")
        gates = GateConfig.parse(values, str(parsed.gates))
    names = ("full", "warm_epochs", "finish_epochs", "history_share", "hold_out", "keep")
    given = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    expiry = {"unseen_days": parsed.expire_after, "column": parsed.expires, "unlisted": parsed.expire_unlisted}
    parts = {"training": train_config(parsed), "index": index_spec(parsed), "gates": gates, "expiry": expiry}
    config = RebuildConfig.parse(given | parts | {"inputs": _inputs(parsed)}, "command line")
    device, indexed = pick_device(parsed.device), lines("index")
    with opened_histories(parsed.histories) as histories, progress("train") as update:

        def on_step(step: StepReport) -> None:
            update(step.step, step.steps, f"loss {step.loss:.3f}")

        def ingest(out: Path, known: "pa.Array") -> "Dataset":
            return ingest_with_progress(parsed, parsed.events, out, known=known, memory=parsed.memory)

        night = rebuild(
            parsed.events,
            Registry(parsed.registry),
            parsed.work,
            config,
            ingest=ingest,
            encoder_config=lambda dataset: encoder_config(dataset, parsed),
            histories=histories,
            dry_run=parsed.dry_run,
            device=device,
            on_stage=lambda name: say(f"{name} …"),
            on_note=say,
            on_step=on_step,
            on_indexed=lambda done, total: indexed(done, total, ""),
        )
    if parsed.json:
        print(json.dumps({"version": night.version, "report": night.report}))
    else:
        _show(night)


def _inputs(parsed: argparse.Namespace) -> dict[str, str]:
    """All options that may decide what a night makes; of files also what tells that they were changed."""
    inputs = {}
    for name, value in vars(parsed).items():
        if name in _NOT_INPUTS or value is None:
            continue
        inputs[name] = str(value)
        if isinstance(value, Path):
            for file in [value] if value.is_file() else sorted(value.rglob("*")):
                found = file.stat()
                inputs[name] += f", {file.name}: {found.st_size} bytes, written at {found.st_mtime_ns}"
    return inputs


def _show(night: "Night") -> None:
    if not night.report:
        OUT.print("no event is newer than the live snapshot: nothing to do (--full rebuilds all the same)")
        return
    vocabulary = night.report["vocabulary"]
    changes = ", ".join(f"{vocabulary[name]:,} {name}" for name in ("new", "back", "gone") if vocabulary[name])
    table = Table("gate", "", "what was found")
    for gate in night.report["gates"]:
        table.add_row(gate["gate"], "passed" if gate["passed"] else "refused", gate["note"])
    OUT.print(table)
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in night.report["seconds"].items())
    OUT.print(f"from {night.report['start']}; {stages}")
    OUT.print(
        f"{vocabulary['items']:,} items{': ' if changes else ''}{changes}; report: {night.folder / 'report.html'}"
    )
    OUT.print(f"{night.version} is live" if night.version else "not published: this was a dry run")
