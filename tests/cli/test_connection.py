"""`retrieval query` over mutual TLS with a token, and connection options that do not fit."""

from pathlib import Path

import pytest

from retrieval.cli.main import main
from retrieval.rpc.server import running_server
from tests.rpc.test_security import TOKEN, Authority, config
from tests.rpc.world import World, integer_ids, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), integer_ids())


def test_a_query_by_mutual_tls_with_a_token(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tls = Authority(tmp_path)
    (tmp_path / "tokens").write_text(f"ranker:{TOKEN}\n")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "other").write_text("nobody-knows-this-token\n")
    item = world.history(9).items[0]
    (tmp_path / "history").write_text(f'{{"item": {item}, "timestamp": 5}}\n')
    files = ["--tls-ca", str(tmp_path / "ca.crt"), "--tls-cert", str(tls.files.cert), "--tls-key", str(tls.files.key)]
    with running_server(config(world, tls=tls.files, tokens=tmp_path / "tokens")) as address:
        query = ["query", "--history", str(tmp_path / "history"), "-k", "3", "--address", address, "--timeout", "20"]
        assert main([*query, *files, "--token-file", str(tmp_path / "token"), "--json"]) == 0
        assert '"items"' in capsys.readouterr().out
        assert main([*query, *files, "--token-file", str(tmp_path / "other")]) == 1
        assert "not known" in capsys.readouterr().err
        assert main([*query, "--tls-ca", str(tmp_path / "ca.crt"), "--timeout", "2"]) == 1
        assert "no server answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--tls-cert {file}", "--tls-cert and --tls-key: one without the other"),
        ("--tls-cert {file} --tls-key {file}", "--tls-cert: needs --tls-ca"),
        ("--token-file {file}", "file: does not hold one token"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, sentence: str
) -> None:
    (tmp_path / "file").write_text("two words\n")
    command = f"query --user 1 --address 127.0.0.1:1 {options}".format(file=tmp_path / "file")
    assert main(command.split()) == 2
    assert sentence in capsys.readouterr().err
