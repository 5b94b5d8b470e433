from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.histories.redis_server import running_redis


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["folder", "redis"])
def new_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Gives an empty place for a store, another one at each call."""
    made = 0

    def place() -> str:
        nonlocal made
        made += 1
        if request.param == "folder":
            return str(tmp_path / f"store-{made}")
        url: str = request.getfixturevalue("redis_url")
        import redis

        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url

    return place
