"""A real S3 server on a free port of this machine, for tests of object stores."""

import logging
import uuid
from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

__all__ = ["make_bucket", "s3_server", "s3_url", "settings"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Its endpoint."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def settings(endpoint: str) -> dict[str, str]:
    """The environment that says how to reach it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }


def make_bucket(endpoint: str) -> str:
    """URL of a folder in a new bucket."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    urlopen(Request(f"{endpoint}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/recommender/items"


@pytest.fixture
def s3_url(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket's folder; the environment says how to reach it."""
    for name, value in settings(s3_server).items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_server)
