"""One schema file through the commands: ingest, train, publish, serve, query; and a night of `rebuild`."""

import json
from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.rpc.server import ServerConfig, running_server

SCHEMA = '[items.attributes.genre]\nkind = "category"\n[context.age]\n[auxiliary.region]\n'
START = 1_700_000_000


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    rows = [
        f"{user},{(user + step) % 12},{START + 3600 * step},{'like' if step % 3 else 'skip'},r{(user + step // 4) % 2}"
        for user in range(30)
        for step in range(8)
    ]
    (folder / "events.csv").write_text("user_id,item_id,timestamp,action,region\n" + "\n".join(rows))
    (folder / "items.csv").write_text("item_id,genre\n" + "".join(f"{item},g{item % 3}\n" for item in range(12)))
    (folder / "users.csv").write_text("user_id,age\n" + "".join(f"{user},{20 + user % 2}\n" for user in range(30)))
    (folder / "features.toml").write_text(SCHEMA)
    return folder


def options(work: Path) -> str:
    return f"--items {work}/items.csv --users {work}/users.csv --features {work}/features.toml --positive like"


def test_a_schema_goes_the_whole_way(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        f"ingest {work}/events.csv {options(work)} --out {work}/data",
        f"train {work}/data --features {work}/features.toml --query-actions --epochs 1 --preset demo --out {work}/run",
        f"evaluate {work}/data {work}/run",
        f"publish {work}/data {work}/run --registry {work}/registry",
    ]
    for command in commands:
        assert main(command.split()) == 0, command
    (work / "history.jsonl").write_text(
        '{"item": 3, "timestamp": 1700000000}\n{"series": "region", "timestamp": 1700000000, "value": "r1"}\n'
    )
    with running_server(ServerConfig(registry=work / "registry", port=0)) as address:
        capsys.readouterr()
        answers = {}
        for extra in ("", "--context age=21", "--action like"):
            query = f"query --history {work}/history.jsonl -k 12 --request-time 1700009999 --json {extra}"
            assert main([*query.split(), "--address", address]) == 0
            answers[extra] = json.loads(capsys.readouterr().out)["scores"]
        assert len({tuple(scores) for scores in answers.values()}) == 3
        assert main(f"query --user 3 --context age=21 --address {address}".split()) == 2
        assert main(f"query --history {work}/history.jsonl --context age --address {address}".split()) == 2
        assert "--context age: is not NAME=VALUE" in capsys.readouterr().err


def test_a_night_reads_the_same_schema(work: Path, tmp_path: Path) -> None:
    (tmp_path / "gates.json").write_text(
        '{"worse_by": 0.99, "max_search_ms": 1000, "min_overlap": 0, "min_coverage": 0}'
    )
    command = f"rebuild {work}/events.csv {options(work)} --registry {tmp_path}/registry --work {tmp_path}/work"
    command += f" --preset demo --epochs 1 --warm-epochs 1 --hold-out 0.3 --gates {tmp_path}/gates.json"
    assert main(command.split()) == 0
    # The same log again, with one event more: the night starts from the live weights.
    events = (work / "events.csv").read_text() + "\n" + "\n".join(f"{user},3,1700100000,like,r2" for user in range(30))
    (tmp_path / "events.csv").write_text(events)
    assert main(command.replace(f"{work}/events.csv", f"{tmp_path}/events.csv").split()) == 0


def test_a_schema_that_is_not_the_datasets_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"ingest {work}/events.csv {options(work)} --out {tmp_path}/data".split()) == 0
    (tmp_path / "other.toml").write_text("[auxiliary.region]\n")
    train = f"train {tmp_path}/data --features {tmp_path}/other.toml --out {tmp_path}/run --epochs 1 --preset demo"
    assert main(train.split()) == 2
    assert "names context and series ['region'], but" in capsys.readouterr().err
    assert main(f"train {tmp_path}/data --preset bert4rec-ml1m --out {tmp_path}/run --epochs 1".split()) == 2
    assert "bert4rec reads items and actions alone" in capsys.readouterr().err
