"""The command line as a person uses it: real files, real server processes, exit codes and sentences."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.cli.serve import READY
from retrieval.rpc.admin_client import AdminClient

ROWS = "user_id,item_id,timestamp,action\n" + "".join(
    f"{user},{(user + step) % 12 + 100},{1_700_000_000 + 60 * step},{'like' if step % 4 else 'skip'}\n"
    for user in range(30)
    for step in range(8)
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """events.csv → dataset → run → registry, by commands."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "events.csv").write_text(ROWS)
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{item},Title {item}\n" for item in range(100, 113)))
    commands = [
        f"ingest {folder}/events.csv --items {folder}/items.csv --positive like --out {folder}/dataset",
        f"train {folder}/dataset --out {folder}/run --epochs 2 --preset demo",
        f"evaluate {folder}/dataset {folder}/run",
        f"publish {folder}/dataset {folder}/run --registry {folder}/registry",
    ]
    for command in commands:
        assert main(command.split()) == 0, command
    return folder


@contextmanager
def served(registry: Path, *options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    command = [sys.executable, "-m", "retrieval.cli.main", "serve", str(registry), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith(READY)
            yield line.removeprefix(READY).strip(), process
        finally:
            process.terminate()
            process.communicate(timeout=30)


def test_a_dataset_and_a_report_are_left_behind(work: Path) -> None:
    info = json.loads((work / "dataset" / "dataset.json").read_text())
    assert (info["users"], info["items"], info["events"]) == (30, 13, 240)
    report = json.loads((work / "run" / "report.json").read_text())
    assert [row["ranker"] for row in report["rows"]] == ["HSTU", "HSTU through the index", "popularity"]
    assert report["queries"] == 30
    assert (work / "run" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_snapshots_are_listed_shown_verified_and_rolled_back(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = str(work / "registry")
    assert main(["snapshots", "list", registry, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["current"]
    publish = [
        "publish",
        str(work / "dataset"),
        str(work / "run"),
        "--registry",
        registry,
        "--index",
        "HNSW8",
        "--json",
    ]
    assert main(publish) == 0
    second = json.loads(capsys.readouterr().out)["version"]
    assert main(["snapshots", "show", registry]) == 0
    assert json.loads(capsys.readouterr().out)["index"]["factory"] == "HNSW8"
    assert main(["snapshots", "verify", registry]) == 0
    assert second in capsys.readouterr().out
    assert main(["snapshots", "rollback", registry, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"current": first, "was": second}


def test_a_server_answers_the_query_command_and_ends_well(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(work / "histories")
    assert main(["histories", "fill", str(work / "dataset"), store]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        admin_port = str(free.getsockname()[1])
    ports = ["--admin-port", admin_port, "--health-port", "0"]
    with served(work / "registry", "--histories", store, *ports) as (address, process):
        with AdminClient(f"127.0.0.1:{admin_port}") as admin:
            assert admin.list_snapshots().serving_version
        where = ["--address", address]
        assert main(["query", "--user", "7", "-k", "3", "--exclude-seen", "--json", *where]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert len(answer["items"]) == 3
        assert not set(answer["items"]) & {(7 + step) % 12 + 100 for step in range(8)}
        assert answer["titles"] == [f"Title {item}" for item in answer["items"]]

        history = work / "history.jsonl"
        lines = [{"item": (7 + step) % 12 + 100, "timestamp": 1_700_000_000 + 60 * step} for step in range(8)]
        actions = ["like" if step % 4 else "skip" for step in range(8)]
        history.write_text("\n".join(json.dumps(e | {"action": a}) for e, a in zip(lines, actions, strict=True)))
        when = ["--request-time", "1700009999"]
        assert main(["query", "--history", str(history), "-k", "5", "--json", *when, *where]) == 0
        inline = json.loads(capsys.readouterr().out)
        assert main(["query", "--user", "7", "-k", "5", "--json", *when, *where]) == 0
        stored = json.loads(capsys.readouterr().out)
        assert inline["items"] == stored["items"]

        click = {"user": 7, "item": 104, "timestamp": 1_700_009_000, "action": "like", "event_id": "a"}
        (work / "clicks.jsonl").write_text(json.dumps(click))
        (work / "fresh.jsonl").write_text(json.dumps(click))
        query = ["query", "--user", "7", "-k", "5", "--json", *when, *where]
        assert main([*query, "--history", str(work / "fresh.jsonl")]) == 0
        fresh = json.loads(capsys.readouterr().out)
        for _ in range(2):
            assert main(["histories", "record", str(work / "clicks.jsonl"), *where]) == 0
            assert "1 events are recorded" in capsys.readouterr().out
            assert main(query) == 0
            assert json.loads(capsys.readouterr().out)["items"] == fresh["items"]
        assert fresh["scores"] != stored["scores"]
        assert main(["histories", "show", store, "7", "--json"]) == 0
        events = json.loads(capsys.readouterr().out)["events"]
        assert len(events) == 9
        assert events[-1] == {"item": 104, "timestamp": 1_700_009_000, "action": "like"}

        assert main(["query", "--user", "7", "-k", "99", "--exact", "--debug", *where]) == 0
        out, err = capsys.readouterr()
        assert "Title 103" in out
        assert "86 fewer than asked for" in err
        assert "plan scan, eligible 13, batch_size 1, decode_ms " in err
        assert main([*query, "--debug"]) == 0
        debug = json.loads(capsys.readouterr().out)["debug"]
        assert (debug["eligible"], debug["batch_size"]) == (13, 1)

        for arguments, sentence in (
            (["--user", "nobody"], "no history of user 'nobody'"),
            (["--user", "7", "-k", "0"], "k: "),
            (["--user", "7", "--exclude", "x"], "--exclude: 'x' is not an integer"),
        ):
            assert main(["query", *arguments, *where]) == 2
            assert sentence in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_a_server_without_a_snapshot_says_so_and_serves_once_there_is_one(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = tmp_path / "late"
    with served(registry, "--poll-seconds", "0.1") as (address, _):
        query = ["query", "--history", os.devnull, "-k", "2", "--address", address]
        assert main(query) == 1
        assert "no snapshot is loaded yet" in capsys.readouterr().err
        assert main(["publish", str(work / "dataset"), str(work / "run"), "--registry", str(registry)]) == 0
        from retrieval.rpc.client import RetrievalClient

        with RetrievalClient(address) as client:
            client.wait_until_serving(20)
        assert main(query) == 0
        assert "source popularity" in capsys.readouterr().err


def damaged_registry(work: Path, folder: Path) -> Path:
    """A copy of the registry with a truncated index."""
    subprocess.run(["cp", "-r", str(work / "registry"), str(folder)], check=True)
    for index in folder.glob("*/index.faiss"):
        os.truncate(index, index.stat().st_size // 2)
    return folder


@pytest.mark.parametrize(
    ("command", "code", "sentence"),
    [
        ("ingest {work}/nothing.csv --out {tmp}/d", 2, "nothing.csv"),
        ("ingest {work}/events.csv --out {tmp}/d --item artikel", 2, "artikel"),
        ("ingest {work}/events.csv --out {tmp}/d --positive love", 2, "love"),
        ("ingest {work}/events.csv --out {work}/dataset", 2, "dataset"),
        ("train {work}/nothing --out {tmp}/r", 2, "is not a dataset folder"),
        ("train {work}/dataset --out {tmp}/r --epochs 0", 2, "command line: epochs"),
        ("train {work}/dataset --out {work}/run", 2, "continue it with --resume"),
        ("train {work}/dataset --out {tmp}/r --device cuda:99", 2, "--device cuda:99"),
        ("evaluate {work}/dataset {tmp}", 2, "is not a trained encoder's folder"),
        ("evaluate {work}/dataset {work}/run --index IVF4096,Flat", 2, "IVF4096,Flat"),
        ("evaluate {work}/dataset {work}/run --search nprobe", 2, "is not NAME=VALUE"),
        ("publish {work}/dataset {work}/run --registry {tmp}/g --index Nonsense", 2, "could not parse"),
        ("snapshots show {tmp}/none", 1, "holds no live snapshot yet"),
        ("snapshots verify {damaged}", 1, "index.faiss: is cut short"),
        ("snapshots rollback {work}/registry 000077-000000000000", 1, "has no version"),
        ("serve {work}/registry --histories {work}/dataset", 2, "is a dataset, not a store of histories"),
        ("serve {work}/registry --histories {work}/run", 2, "holds something else"),
        ("serve {work}/registry --admin-tokens {work}/events.csv", 2, "no admin service without --admin-port"),
        ("serve {work}/registry --admin-port 1 --admin-host 0.0.0.0 --insecure", 2, "change what is served"),
        ("histories fill {work}/nothing {tmp}/h", 2, "is not a dataset folder"),
        ("histories show {tmp}/h 7", 2, "has no history of user '7'"),
        ("histories record {work}/nothing", 2, "cannot be read"),
        ("histories record {work}/events.csv", 2, "line 1 is not a JSON object"),
        ("query", 2, "for whom?"),
        ("query --user 1 --address 127.0.0.1:1 --timeout 1", 1, "127.0.0.1:1"),
        ("query --history {work}/nothing", 2, "cannot be read"),
        ("query --history {work}/events.csv", 2, "line 1 is not a JSON object"),
        ("demo --size nano --out {work}", 2, "not an earlier demo's"),
    ],
)
def test_a_mistake_gets_one_sentence_and_its_exit_code(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, code: int, sentence: str
) -> None:
    damaged = damaged_registry(work, tmp_path / "damaged") if "{damaged}" in command else ""
    arguments = [part.format(work=work, tmp=tmp_path, damaged=damaged) for part in command.split()]
    if arguments[:2] == ["query", "--history"]:
        with served(work / "registry") as (address, _):
            result = main([*arguments, "--address", address])
    else:
        result = main(arguments)
    err = capsys.readouterr().err
    assert result == code, err
    assert sentence in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("retrieval: ")]) == 1


def test_bad_usage_exits_2() -> None:
    done = subprocess.run([sys.executable, "-m", "retrieval.cli.main", "train"], capture_output=True, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize(
    "command", ["", "demo", "ingest", "train", "evaluate", "publish", "serve", "query", "histories", "snapshots"]
)
def test_help_is_immediate_and_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: retrieval" in capsys.readouterr().out


def test_the_demo_goes_the_whole_way(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [
        sys.executable,
        "-m",
        "retrieval.cli.main",
        "demo",
        "--size",
        "nano",
        "--epochs",
        "12",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "run" / "report.json").read_text())
    recall = {row["ranker"]: row["metrics"]["recall@10"]["mean"] for row in report["rows"]}
    assert recall["HSTU"] > 1.5 * recall["popularity"]
    assert "that is possible" in done.stdout
    assert done.stdout.count("answered by snapshot 000001-") == 2
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_the_demo_takes_real_events(work: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retrieval.cli.main", "demo", str(work / "events.csv"), "--positive", "like"]
    command += ["--items", str(work / "items.csv"), "--epochs", "1", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Title 1" in done.stdout
    assert "possible" not in done.stdout
