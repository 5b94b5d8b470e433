"""Who is let in, over real sockets: TLS, mutual TLS, tokens, renewal of both, and limits per client."""

import hashlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from retrieval.errors import ConfigError, InputError
from retrieval.rpc.client import RetrievalClient
from retrieval.rpc.errors import OverloadedError, UnauthenticatedError, UnavailableError
from retrieval.rpc.security import TlsFiles, Tokens, is_loopback
from retrieval.rpc.server import ServerConfig, running_server
from tests.rpc.test_server import Gate, gate, wait_for
from tests.rpc.world import World

__all__ = ["gate"]

TOKEN, OTHER = "correct-horse-battery", "another-horse-battery"


class Authority:
    """A certificate authority and the files that it writes for a server."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.files = TlsFiles(cert=folder / "tls.crt", key=folder / "tls.key", client_ca=folder / "ca.crt")
        self.root = self.authority.cert_pem.bytes()
        (folder / "ca.crt").write_bytes(self.root)
        self.renew()

    def renew(self) -> None:
        issued = self.authority.issue_cert("127.0.0.1", common_name="server")
        replace(self.files.cert, b"".join(part.bytes() for part in issued.cert_chain_pems))
        replace(self.files.key, issued.private_key_pem.bytes())

    def client(self, name: str) -> grpc.ChannelCredentials:
        issued = self.authority.issue_cert("client.test", common_name=name)
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.root, issued.private_key_pem.bytes(), chain)


def replace(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


def config(world: World, **options: Any) -> ServerConfig:
    return ServerConfig(registry=world.registry.location, port=0, **options)


@pytest.fixture
def _every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at whenever they are needed."""
    monkeypatch.setattr("retrieval.rpc.security._LOOK_SECONDS", 0.0)


def test_tls_serves_who_trusts_its_authority_and_nobody_in_the_clear(integer_world: World, tmp_path: Path) -> None:
    tls = Authority(tmp_path)
    server_only = tls.files.model_copy(update={"client_ca": None})
    trusting = grpc.ssl_channel_credentials(tls.root)
    with running_server(config(integer_world, tls=server_only)) as address:
        with RetrievalClient(address, 10, credentials=trusting) as client:
            assert len(client.retrieve(integer_world.history(9), k=3).items) == 3
        stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        for credentials in (None, stranger):
            with RetrievalClient(address, 2, credentials=credentials) as client, pytest.raises(UnavailableError):
                client.serving_state()


def test_mutual_tls_takes_only_clients_with_a_certificate(integer_world: World, tmp_path: Path) -> None:
    tls = Authority(tmp_path)
    with running_server(config(integer_world, tls=tls.files)) as address:
        with RetrievalClient(address, 10, credentials=tls.client("ranker")) as client:
            assert client.is_serving()
        nobody = grpc.ssl_channel_credentials(tls.root)
        with RetrievalClient(address, 2, credentials=nobody) as client, pytest.raises(UnavailableError):
            client.serving_state()


@pytest.mark.usefixtures("_every_look")
def test_a_renewed_certificate_is_shown_to_the_next_connection(integer_world: World, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "next").mkdir()
    tls, successor = Authority(tmp_path / "served"), Authority(tmp_path / "next")
    old, new = grpc.ssl_channel_credentials(tls.root), grpc.ssl_channel_credentials(successor.root)
    server_only = tls.files.model_copy(update={"client_ca": None})
    with (
        running_server(config(integer_world, tls=server_only)) as address,
        RetrievalClient(address, 10, credentials=old) as before,
    ):
        assert before.is_serving()
        # Half of a renewal: the key does not belong to the certificate yet.
        replace(tls.files.cert, successor.files.cert.read_bytes())
        with RetrievalClient(address, 10, credentials=old) as client:
            assert client.is_serving()
        replace(tls.files.key, successor.files.key.read_bytes())
        with RetrievalClient(address, 10, credentials=new) as client:
            assert client.is_serving()
        assert before.is_serving(), "open connections stay"


def test_certificate_files_that_are_not_usable_are_one_sentence_at_the_start(
    integer_world: World, tmp_path: Path
) -> None:
    tls = Authority(tmp_path)
    tls.files.key.write_text("no key")
    with (
        pytest.raises(InputError, match=r"tls\.key.*not usable for TLS"),
        running_server(config(integer_world, tls=tls.files)),
    ):
        pass
    tls.files.key.unlink()
    with (
        pytest.raises(InputError, match=r"tls\.key: cannot be read"),
        running_server(config(integer_world, tls=tls.files)),
    ):
        pass


@pytest.mark.usefixtures("_every_look")
def test_tokens_let_in_who_has_one_and_change_with_their_file(
    integer_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# who may call\nranker:{TOKEN}\n")

    def ask(address: str, token: str | None) -> str:
        with RetrievalClient(address, 10, token=token) as client:
            assert client.is_serving(), "probes have no token"
            return client.serving_state().snapshot_version

    with running_server(config(integer_world, tokens=file)) as address:
        assert ask(address, TOKEN)
        with pytest.raises(UnauthenticatedError, match="has no token"):
            ask(address, None)
        with pytest.raises(UnauthenticatedError, match="not known"):
            ask(address, OTHER)
        replace(file, f"ranker:sha256:{hashlib.sha256(OTHER.encode()).hexdigest()}\n".encode())
        assert ask(address, OTHER)
        with pytest.raises(UnauthenticatedError):
            ask(address, TOKEN)
        with caplog.at_level(logging.ERROR):
            replace(file, b"ranker\n")
            assert ask(address, OTHER)
    assert "line 1: is not of the form name:token; what was read before stays" in caplog.text
    assert OTHER not in caplog.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name", "line 1: is not of the form name:token"),
        ("# ok\n:secret-secret-secret", "line 2: is not of the form name:token"),
        ("name:short", "fewer than 16 characters"),
        ("name:sha256:abc", "64 hexadecimal digits"),
    ],
)
def test_a_malformed_token_file_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(InputError, match=sentence):
        Tokens(tmp_path / "tokens")


def test_another_scheme_than_bearer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"a:{TOKEN}\nb:{OTHER}\n")
    tokens = Tokens(tmp_path / "tokens")
    assert (tokens.name_of(f"Bearer {TOKEN}"), tokens.name_of(f"bearer {OTHER}")) == ("a", "b")
    with pytest.raises(UnauthenticatedError, match="not of the form"):
        tokens.name_of(f"Basic {TOKEN}")


def test_a_client_at_its_limit_is_refused_while_others_are_served(
    integer_world: World, tmp_path: Path, gate: Gate
) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"greedy:{TOKEN}\nmodest:{OTHER}\n")
    history = integer_world.history(9)
    with (
        running_server(config(integer_world, tokens=file, client_capacity=1)) as address,
        RetrievalClient(address, 20, token=TOKEN) as greedy,
        RetrievalClient(address, 20, token=OTHER) as modest,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(greedy.retrieve, history, k=3)
        wait_for(lambda: gate.users == 1)
        with pytest.raises(OverloadedError, match="1 calls of token:greedy are in hand"):
            greedy.retrieve(history, k=3)
        second = pool.submit(modest.retrieve, history, k=3)
        threading.Event().wait(0.1)
        gate.open.set()
        assert len(first.result().items) == len(second.result().items) == 3


@pytest.mark.parametrize("offered", [True, False])
def test_reflection_can_be_turned_off(integer_world: World, offered: bool) -> None:
    with (
        running_server(config(integer_world, reflection=offered)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        database = ProtoReflectionDescriptorDatabase(channel)
        if offered:
            assert "retrieval.v1.RetrievalService" in database.get_services()
        else:
            with pytest.raises(grpc.RpcError) as refusal:
                database.get_services()
            assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_other_machines_are_served_in_the_clear_only_if_that_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        ServerConfig.parse({"registry": "r", "host": "0.0.0.0"}, "command line")
    ServerConfig(registry=Path("r"), host="0.0.0.0", insecure=True)
    ServerConfig(registry=Path("r"), host="0.0.0.0", tls=TlsFiles(cert=Path("c"), key=Path("k")))
    assert [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "example.test")] == [False] * 3
