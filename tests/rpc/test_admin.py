"""The admin service over real sockets: what is live is listed, changed and rolled back, and by whom."""

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from retrieval.errors import (
    ConfigError,
    InputError,
    InvalidRequestError,
    SnapshotConflictError,
    SnapshotCorruptError,
    SnapshotError,
    UnknownVersionError,
)
from retrieval.rpc._generated.retrieval.v1 import admin_pb2 as pb
from retrieval.rpc.admin_client import AdminClient, AsyncAdminClient, SnapshotInfo, SnapshotList
from retrieval.rpc.client import History, RetrievalClient
from retrieval.rpc.errors import DeadlineError, ServerFaultError, UnauthenticatedError, UnavailableError
from retrieval.rpc.server import AdminConfig, Server, ServerConfig
from retrieval.rpc.serving import ServingSnapshot
from retrieval.snapshot.registry import Registry
from tests.rpc.test_reload import until
from tests.rpc.test_security import OTHER, TOKEN, Authority
from tests.rpc.world import ITEMS, World, make_encoder, publish

NEVER = 3600.0


@pytest.fixture(scope="module")
def prepared(integer_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, list[str]]:
    """Three versions; tests leave the last one live."""
    registry = Registry(tmp_path_factory.mktemp("admin"))
    return registry, [publish(registry, integer_world.dataset, make_encoder(seed)) for seed in range(3)]


def serve(config: ServerConfig, ask: Callable[[Server], None]) -> None:
    """Run `ask` beside a server, on a thread of its own."""

    async def run() -> None:
        server = Server(config)
        try:
            await server.start()
            await asyncio.to_thread(ask, server)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


def config(registry: Registry, **options: Any) -> ServerConfig:
    given: dict[str, Any] = {"admin": AdminConfig(port=0), "poll_seconds": NEVER} | options
    return ServerConfig(registry=registry.location, port=0, **given)


def admin_of(server: Server, **options: Any) -> AdminClient:
    assert server.admin_address is not None
    return AdminClient(server.admin_address, 20, **options)


def test_versions_are_listed_activated_and_rolled_back(prepared: tuple[Registry, list[str]]) -> None:
    registry, versions = prepared

    def ask(server: Server) -> None:
        with admin_of(server) as admin, RetrievalClient(server.address, timeout=20) as client:
            listed = admin.list_snapshots()
            assert [one.version for one in listed.snapshots] == versions
            assert (listed.current_version, listed.serving_version, listed.problem) == (versions[2], versions[2], "")
            last = listed.snapshots[-1]
            manifest = registry.manifest(versions[2])
            assert (last.created, last.dataset, last.index) == (manifest.created, manifest.dataset, str(manifest.index))
            assert (last.items, last.ann_recall, last.problem, last.parent) == (ITEMS, 1.0, "", "")
            activated = admin.activate(versions[0])
            # Not at the next poll: when the call returns.
            assert client.retrieve(History([], []), k=1).snapshot_version == versions[0]
            assert (activated.previous_version, activated.serving_version) == (versions[2], versions[0])
            assert registry.current() == versions[0]
            with pytest.raises(UnknownVersionError, match=f"has no version before {versions[0]} to roll back to"):
                admin.roll_back()
            assert admin.activate(versions[2]).previous_version == versions[0]
            back = admin.roll_back()
            assert (back.previous_version, back.serving_version) == (versions[2], versions[1])
            assert client.serving_state().snapshot_version == registry.current() == versions[1]
            again = admin.activate(versions[1])
            assert (again.previous_version, again.serving_version) == (versions[1], versions[1])

            async def over() -> None:
                assert server.admin_address is not None
                async with AsyncAdminClient(server.admin_address, 20) as asynchronous:
                    assert (await asynchronous.activate(versions[2])).previous_version == versions[1]
                    assert (await asynchronous.roll_back()).serving_version == versions[1]
                    assert (await asynchronous.list_snapshots()).serving_version == versions[1]
                    registry.activate(versions[2])
                    assert (await asynchronous.refresh()).serving_version == versions[2]

            asyncio.run(over())

    serve(config(registry), ask)


def test_what_cannot_be_activated_changes_nothing(integer_world: World, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    damaged, unreadable, good = (publish(registry, integer_world.dataset, make_encoder(seed)) for seed in range(3))
    index = registry.folder(damaged) / "index.faiss"
    index.write_bytes(index.read_bytes()[:-1])
    (registry.folder(unreadable) / "manifest.json").write_text("{}")

    def ask(server: Server) -> None:
        with admin_of(server) as admin, RetrievalClient(server.address, timeout=20) as client:
            with pytest.raises(SnapshotCorruptError, match=r"index\.faiss"):
                admin.activate(damaged)
            with pytest.raises(SnapshotError, match=r"manifest\.json"):
                admin.activate(unreadable)
            with pytest.raises(UnknownVersionError, match=r"has no version '000009-0123456789ab'"):
                admin.activate("000009-0123456789ab")
            for name in ("", "CURRENT", "../" + good, good + "/", "x" * 10**6):
                with pytest.raises(InvalidRequestError, match=r"^version: '.{0,60}…?' is no version's name$"):
                    admin.activate(name)
            with pytest.raises(InvalidRequestError, match=r"^version: must be text"):
                admin.activate("\ud800")
            listed = admin.list_snapshots()
            assert (listed.current_version, listed.serving_version, listed.problem) == (good, good, "")
            assert [bool(one.problem) for one in listed.snapshots] == [False, True, False]
            newer = publish(registry, integer_world.dataset, make_encoder(3))
            registry.activate(good)
            # As where the registry is mounted for reading only.
            (tmp_path / "CURRENT.lock").unlink()
            (tmp_path / "CURRENT.lock").mkdir()
            with pytest.raises(SnapshotError, match="cannot be written"):
                admin.activate(newer)
            # So many that a sentence with all of their names would not fit into a status.
            for number in range(100, 600):
                (tmp_path / f"{number:06d}-0123456789ab").mkdir()
            with pytest.raises(UnknownVersionError, match=r"has no version '000009-0123456789ab' .*…$"):
                admin.activate("000009-0123456789ab")
            assert client.retrieve(History([], []), k=1).snapshot_version == good
            assert registry.current() == good

    serve(config(registry), ask)


def test_a_look_at_the_registry_can_be_asked_for_and_says_what_is_wrong(integer_world: World, tmp_path: Path) -> None:
    registry = Registry(tmp_path)

    def ask(server: Server) -> None:
        with admin_of(server) as admin:
            empty = admin.refresh()
            assert empty.serving_version == ""
            assert "holds no live snapshot yet" in empty.problem
            assert admin.list_snapshots().current_version == ""
            with pytest.raises(UnknownVersionError):
                admin.activate("000009-0123456789ab")
            first = publish(registry, integer_world.dataset, make_encoder(1))
            assert (admin.refresh().serving_version, admin.list_snapshots().problem) == (first, "")
            second = publish(registry, integer_world.dataset, make_encoder(2))
            index = registry.folder(second) / "index.faiss"
            content = index.read_bytes()
            index.write_bytes(content[:-1])
            refused = admin.refresh()
            assert refused.serving_version == first
            assert "index.faiss" in refused.problem
            assert admin.list_snapshots().problem == refused.problem
            index.write_bytes(content)
            # Whatever polls would wait after a failure.
            mended = admin.refresh()
            assert (mended.serving_version, mended.problem) == (second, "")

    serve(config(registry), ask)


def test_a_change_goes_on_when_its_caller_is_gone(
    prepared: tuple[Registry, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, versions = prepared
    warm_up = ServingSnapshot._warm_up

    def slowly(self: ServingSnapshot) -> None:
        time.sleep(0.5)
        warm_up(self)

    monkeypatch.setattr(ServingSnapshot, "_warm_up", slowly)

    def ask(server: Server) -> None:
        with admin_of(server) as admin, RetrievalClient(server.address, timeout=20) as client:
            with pytest.raises(DeadlineError):
                admin.activate(versions[0], timeout=0.2)
            until(lambda: client.serving_state().snapshot_version == versions[0])
            assert registry.current() == versions[0]
            admin.activate(versions[2])

    serve(config(registry), ask)


def test_a_change_by_another_at_the_same_time_is_a_conflict(
    prepared: tuple[Registry, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, versions = prepared
    switch = Registry._switch

    def late(self: Registry, *arguments: Any) -> Any:
        if self is not registry:
            registry.activate(versions[1])
        return switch(self, *arguments)

    def ask(server: Server) -> None:
        with admin_of(server) as admin, RetrievalClient(server.address, timeout=20) as client:
            monkeypatch.setattr(Registry, "_switch", late)
            with pytest.raises(SnapshotConflictError):
                admin.activate(versions[0])
            monkeypatch.undo()
            assert client.serving_state().snapshot_version == versions[2]
            assert admin.refresh().serving_version == versions[1]
            admin.activate(versions[2])

    serve(config(registry), ask)


def test_the_admin_service_is_nowhere_else_and_nothing_else_is_there(prepared: tuple[Registry, list[str]]) -> None:
    registry, _ = prepared

    def ask(server: Server) -> None:
        assert server.admin_address is not None
        with AdminClient(server.address, 5) as admin, pytest.raises(ServerFaultError, match="UNIMPLEMENTED"):
            admin.list_snapshots()
        with RetrievalClient(server.admin_address, 5) as client, pytest.raises(ServerFaultError, match="UNIMPLEMENTED"):
            client.serving_state()
        with grpc.insecure_channel(server.admin_address) as channel, pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/retrieval.v1.AdminService/ActivateSnapshot")(b"\xff")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    serve(config(registry), ask)
    serve(config(registry, admin=None), lambda server: check_none(server))


def check_none(server: Server) -> None:
    assert server.admin_address is None
    assert server.health_address is None


def test_a_port_that_is_taken_is_named(prepared: tuple[Registry, list[str]]) -> None:
    registry, _ = prepared
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options in ({"admin": AdminConfig(port=port)}, {"health_port": port}):
            with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen there"):
                serve(config(registry, **options), lambda _: None)


def test_callers_are_no_admins(prepared: tuple[Registry, list[str]], tmp_path: Path) -> None:
    registry, versions = prepared
    (tmp_path / "callers").write_text(f"ranker:{TOKEN}\n")
    (tmp_path / "admins").write_text(f"operator:{OTHER}\n")
    tls = Authority(tmp_path)
    files = tls.files.model_copy(update={"client_ca": None})
    options = {"tls": files, "tokens": tmp_path / "callers", "admin": AdminConfig(port=0, tokens=tmp_path / "admins")}

    def ask(server: Server) -> None:
        credentials = grpc.ssl_channel_credentials(tls.root)
        for token in (None, TOKEN):
            with admin_of(server, credentials=credentials, token=token) as admin:
                for call in (admin.list_snapshots, admin.roll_back, admin.refresh):
                    with pytest.raises(UnauthenticatedError):
                        call()
        with admin_of(server, token=OTHER) as admin, pytest.raises(UnavailableError):
            admin.list_snapshots(timeout=2)
        with admin_of(server, credentials=credentials, token=OTHER) as admin:
            assert admin.list_snapshots().serving_version == versions[2]

    serve(config(registry, **options), ask)


def test_an_admin_service_that_other_machines_reach_asks_who_they_are(tmp_path: Path) -> None:
    tls = Authority(tmp_path).files
    alone = tls.model_copy(update={"client_ca": None})
    reachable = {"host": "0.0.0.0", "port": 1}
    for options, sentence in (
        ({"admin": reachable}, "nothing would be encrypted"),
        ({"admin": reachable, "insecure": True}, "anybody there could change what is served"),
        ({"admin": reachable, "tls": alone}, "anybody there could change what is served"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            ServerConfig.parse({"registry": tmp_path} | options, "command line")
    for good in (
        {"admin": reachable, "tls": tls},
        {"admin": reachable | {"tokens": tmp_path}, "tls": alone},
        {"admin": reachable | {"tokens": tmp_path}, "insecure": True},
        {"admin": {"port": 1}},
    ):
        assert ServerConfig.parse({"registry": tmp_path} | good, "command line").admin is not None


def test_a_health_port_answers_in_the_clear_whatever_the_server_asks_for(
    prepared: tuple[Registry, list[str]], tmp_path: Path
) -> None:
    registry, _ = prepared
    (tmp_path / "callers").write_text(f"ranker:{TOKEN}\n")
    tls = Authority(tmp_path)

    def ask(server: Server) -> None:
        assert server.health_address is not None
        with RetrievalClient(server.health_address, 10) as probe:
            assert probe.is_serving()
            with pytest.raises(ServerFaultError, match="UNIMPLEMENTED"):
                probe.retrieve(History([], []))
        with RetrievalClient(server.address, 2) as client, pytest.raises(UnavailableError):
            client.is_serving()

    serve(config(registry, tls=tls.files, tokens=tmp_path / "callers", health_port=0, admin=None), ask)


def test_the_messages_name_every_attribute() -> None:
    assert list(SnapshotInfo.__dataclass_fields__) == [field.name for field in pb.Snapshot.DESCRIPTOR.fields]
    assert list(SnapshotList.__dataclass_fields__) == [f.name for f in pb.ListSnapshotsResponse.DESCRIPTOR.fields]
