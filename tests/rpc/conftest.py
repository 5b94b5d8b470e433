from collections.abc import Iterator

import faiss
import pytest
import torch

from retrieval.rpc.client import RetrievalClient
from retrieval.rpc.server import ServerConfig, running_server
from retrieval.rpc.service import RetrievalService
from retrieval.rpc.serving import ServingSnapshot
from tests.rpc.world import World, integer_ids, make_world, string_ids


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Servers and tests share few cores: a test's threads that spin for each other would starve its server."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before)
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="session", params=["integers", "strings"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    ids = integer_ids() if request.param == "integers" else string_ids()
    return make_world(tmp_path_factory.mktemp(request.param), ids)


@pytest.fixture(scope="session")
def integer_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("one-kind"), integer_ids())


@pytest.fixture(scope="session")
def serving(world: World) -> ServingSnapshot:
    return world.open()


@pytest.fixture(scope="session")
def service(world: World) -> RetrievalService:
    return RetrievalService(world.stored)


@pytest.fixture(scope="session")
def address(world: World) -> Iterator[str]:
    """A server over the world, with stored histories."""
    with running_server(ServerConfig(registry=world.registry.location, port=0), world.stored) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[RetrievalClient]:
    with RetrievalClient(address, timeout=10) as client:
        yield client
