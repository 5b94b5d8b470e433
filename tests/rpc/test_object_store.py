"""A server that follows a registry in an S3 bucket."""

from pathlib import Path

import pytest

from retrieval.rpc.client import History, RetrievalClient
from retrieval.rpc.server import AdminConfig, Server, ServerConfig, running_server
from retrieval.snapshot.registry import Registry, storage_at
from tests.rpc.test_admin import admin_of, serve
from tests.rpc.test_reload import until, version_of
from tests.rpc.world import World, make_encoder, publish
from tests.s3 import s3_server, s3_url  # noqa: F401


def test_a_server_follows_publications_and_rollbacks_and_refuses_what_is_damaged(
    integer_world: World,
    s3_url: str,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = Registry(s3_url, storage_at(s3_url, tmp_path / "publisher"))
    first = publish(registry, integer_world.dataset, make_encoder(1))
    config = ServerConfig(registry=s3_url, cache=tmp_path / "server", port=0, poll_seconds=0.05)
    with running_server(config) as address, RetrievalClient(address, timeout=5) as client:
        assert client.retrieve(History([], []), k=1).snapshot_version == first
        second = publish(registry, integer_world.dataset, make_encoder(2))
        until(lambda: version_of(client) == second)
        registry.activate(first)
        until(lambda: version_of(client) == first)
        (tmp_path / "server" / second / "index.faiss").write_bytes(b"damaged since")
        registry.activate(second)
        until(lambda: version_of(client) == second)
        assert "it is copied again" in caplog.text


def test_the_admin_service_changes_what_a_bucket_has_live(
    integer_world: World,
    s3_url: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    registry = Registry(s3_url, storage_at(s3_url, tmp_path / "publisher"))
    versions = [publish(registry, integer_world.dataset, make_encoder(seed)) for seed in (1, 2)]
    admin = AdminConfig(port=0)
    config = ServerConfig(registry=s3_url, cache=tmp_path / "server", port=0, poll_seconds=3600, admin=admin)

    def ask(server: Server) -> None:
        with admin_of(server) as client:
            assert [one.version for one in client.list_snapshots().snapshots] == versions
            assert client.roll_back().serving_version == registry.current() == versions[0]
            assert client.activate(versions[1]).serving_version == registry.current() == versions[1]

    serve(config, ask)
