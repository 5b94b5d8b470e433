"""`retrieval demo`: the whole way once, from events to answers of a live server."""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from retrieval.cli.console import OUT, say
from retrieval.cli.evaluate import evaluate_run, report_table, write_report
from retrieval.cli.ingest import add_event_options, ingest_with_progress
from retrieval.cli.options import (
    add_device_option,
    add_index_options,
    add_training_options,
    existing_path,
    index_spec,
    pick_device,
    train_config,
)
from retrieval.cli.query import candidate_table
from retrieval.cli.serve import READY
from retrieval.cli.train import encoder_config, train_with_progress
from retrieval.errors import InputError, RetrievalError

if TYPE_CHECKING:
    from retrieval.data.dataset import Dataset
    from retrieval.evaluation.offline import Report
    from retrieval.histories.recorded import RecordedHistories
    from retrieval.histories.store import StoredHistory
    from retrieval.index.choice import AutoIndex
    from retrieval.index.spec import IndexSpec
    from retrieval.rpc.client import Retrieved
    from retrieval.training.config import TrainConfig

__all__ = ["add_parser"]

_MARKER = ".retrieval-demo"
_STAGES = 5
_SHOWN_EVENTS = 6
_SHOWN_CANDIDATES = 8


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="the whole way on a small world or on your events",
        description="Ingest, train, evaluate, publish, serve and ask, on a synthetic world whose best possible recall "
        "is known or on your own event log.",
    )
    parser.add_argument("events", type=existing_path, nargs="?", metavar="EVENTS", help="default: a synthetic world")
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="for all artifacts (default: demo)"
    )
    parser.add_argument("--size", choices=("nano", "small"), default="small", help="of the synthetic world")
    add_event_options(parser)
    add_training_options(parser)
    add_index_options(parser)
    add_device_option(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    """What the demo runs on; `possible` is the best recall that the data allow, where it is known."""

    dataset: "Dataset"
    possible: Mapping[int, float] | None
    title: str


def run(parsed: argparse.Namespace) -> None:
    """Run all stages."""
    spec = index_spec(parsed)
    # The synthetic world is small: a few quick passes at a high rate learn it.
    config = train_config(parsed, **({} if parsed.events else {"learning_rate": 0.003}))
    device = pick_device(parsed.device)
    out: Path = parsed.out
    _start_afresh(out)
    started = time.monotonic()
    _stage(1, "events → dataset")
    data = _real_input(parsed, out) if parsed.events else _synthetic_input(parsed, out)
    info = data.dataset.info
    say(f"   {info.events:,} events of {info.users:,} users on {info.items:,} items")
    _stage(2, "train the HSTU encoder")
    _train(parsed, data.dataset, config, out / "run", device)
    _stage(3, "evaluate on held-out events")
    report = evaluate_run(data.dataset, out / "run", spec)
    write_report(report, out / "run", title=data.title, possible=data.possible)
    _stage(4, "build the index, publish a snapshot")
    version = _publish(data.dataset, report, spec, out)
    _stage(5, "serve it, and ask over the socket")
    with closing(_filled_histories(data.dataset, out)) as histories, _server(out, device) as address:
        answers = _ask(address, data.dataset, histories)
    _print_report(data, report, version, answers, out)
    OUT.print(f"Done in {time.monotonic() - started:.0f} s.")


def _stage(number: int, text: str) -> None:
    say(f"{number}/{_STAGES} {text}")


def _start_afresh(out: Path) -> None:
    """Empty the folder of an earlier demo; refuse any other folder that holds something."""
    if out.exists() and any(out.iterdir()):
        if not (out / _MARKER).exists():
            raise InputError(f"{out}: holds files that are not an earlier demo's; name another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()


def _synthetic_input(parsed: argparse.Namespace, out: Path) -> _Input:
    from retrieval.data import synthetic
    from retrieval.evaluation.offline import KS

    make = {"nano": synthetic.nano, "small": synthetic.small}[parsed.size]
    world = synthetic.generate_world(make(seed=parsed.seed or 0), out / "world")
    dataset = ingest_with_progress(
        parsed, world.events_folder, out / "dataset", items=world.items_file, positive=synthetic.POSITIVE_ACTIONS
    )
    possible = synthetic.possible_recall(world.folder, KS)
    return _Input(dataset=dataset, possible=possible, title=f"synthetic world ({parsed.size})")


def _real_input(parsed: argparse.Namespace, out: Path) -> _Input:
    dataset = ingest_with_progress(parsed, parsed.events, out / "dataset")
    return _Input(dataset=dataset, possible=None, title=parsed.events.name)


def _train(parsed: argparse.Namespace, dataset: "Dataset", config: "TrainConfig", run_dir: Path, device: str) -> None:
    from retrieval.data.splits import SplitInfo, split_dataset

    split = split_dataset(dataset, SplitInfo(protocol="paper"))
    train_with_progress(
        dataset,
        split,
        encoder_config(dataset, parsed, preset="ml1m" if parsed.events else "demo"),
        config,
        run_dir,
        device=device,
    )


def _publish(dataset: "Dataset", report: "Report", spec: "IndexSpec | AutoIndex", out: Path) -> str:
    from retrieval.jobs.publish import publish_snapshot
    from retrieval.snapshot.registry import Registry

    return publish_snapshot(dataset, out / "run", Registry(out / "registry"), spec, report.model_dump(mode="json"))


def _filled_histories(dataset: "Dataset", out: Path) -> "RecordedHistories":
    from retrieval.histories.fill import fill_histories
    from retrieval.histories.recorded import open_histories

    store = open_histories(str(out / "histories"))
    fill_histories(dataset, store)
    return store


@contextmanager
def _server(out: Path, device: str) -> Iterator[str]:
    """`retrieval serve` in a process of its own, on a free port; gives its address."""
    command = [sys.executable, "-m", "retrieval.cli.main", "serve", str(out / "registry"), "--port", "0"]
    command += ["--histories", str(out / "histories"), "--device", device]
    log_file = out / "server.log"
    with (
        log_file.open("w", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(READY):
                raise RetrievalError(f"the server did not start; see {log_file}")
            say(f"   server process {process.pid}: {line.strip()}")
            yield line.removeprefix(READY).strip()
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """One user's last events and candidates, and how long the call took."""

    user: int | str
    history: "StoredHistory"
    answer: "Retrieved"
    milliseconds: float


def _ask(address: str, dataset: "Dataset", histories: "RecordedHistories") -> list[_Answered]:
    """Ask for two users with histories of ordinary length, as of a minute after their last event."""
    import numpy as np

    from retrieval.rpc.client import RetrievalClient, StoredUser

    lengths = np.diff(dataset.offsets)
    ordinary = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:2]
    answered = []
    with RetrievalClient(address, timeout=10.0) as client:
        client.wait_until_serving(30.0)
        for user in (dataset.user_ids[int(index)].as_py() for index in ordinary):
            history = histories.read(user)
            assert history is not None
            started = time.perf_counter()
            answer = client.retrieve(
                StoredUser(user),
                k=_SHOWN_CANDIDATES,
                request_time=int(history.timestamps[-1]) + 60,
                exclude_seen=True,
                include_titles=True,
            )
            taken = 1000 * (time.perf_counter() - started)
            answered.append(_Answered(user=user, history=history, answer=answer, milliseconds=taken))
    return answered


def _print_report(data: _Input, report: "Report", version: str, answers: list[_Answered], out: Path) -> None:
    OUT.print()
    OUT.print(report_table(report, data.possible))
    encoder = report.rows[0]
    reached, popular = (row.metrics["recall@10"].mean for row in (encoder, report.row("popularity")))
    times = f", {reached / popular:.1f} times popularity" if popular else ""
    of = f" of the {data.possible[10]:.3f} that is possible" if data.possible else ""
    OUT.print(f"{encoder.ranker} reached recall@10 {reached:.3f}{of}{times}.\n")
    for answered in answers:
        OUT.print(f"User {answered.user}, answered by snapshot {version} in {answered.milliseconds:.1f} ms:")
        OUT.print(_side_by_side(answered, data.dataset))
    OUT.print("Artifacts:")
    for name, text in (
        ("dataset", "events by user and time"),
        ("run", "encoder, report.json, recall.png, TensorBoard log"),
        ("registry", "snapshots; CURRENT names the live one"),
        ("histories", "users' last events, which RecordEvents adds to"),
    ):
        OUT.print(f"  {out / name}  {text}")
    serve = f"retrieval serve {out / 'registry'} --histories {out / 'histories'}"
    OUT.print(f"Serve it again: {serve}\nand ask: retrieval query --user {answers[0].user} -k 20")


def _side_by_side(answered: _Answered, dataset: "Dataset") -> Table:
    """Last events on the left, candidates on the right."""
    # What the other columns leave of the line, shared by the two columns of titles.
    title_width = max(12, (OUT.width - 62) // 2)
    vocabulary, history = dataset.vocabulary, answered.history
    titles = vocabulary.attributes.get("title")
    events = Table(box=None)
    for column, width in (("time (UTC)", None), ("action", None), ("last events", title_width)):
        events.add_column(column, no_wrap=True, max_width=width)
    for place in range(max(0, len(history.items) - _SHOWN_EVENTS), len(history.items)):
        (row,) = vocabulary.rows_of(history.items[place : place + 1])
        title = titles[int(row)].as_py() if titles is not None else None
        when = datetime.fromtimestamp(int(history.timestamps[place]), UTC)
        events.add_row(f"{when:%Y-%m-%d %H:%M}", history.actions[place], title or str(history.items[place]))
    both = Table.grid(padding=(0, 3))
    both.add_row(events, candidate_table(answered.answer, title_width))
    return both
