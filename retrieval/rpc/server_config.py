"""How a server runs."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from retrieval.config import Config
from retrieval.rpc.prepare import Limits
from retrieval.rpc.security import TlsFiles, is_loopback

__all__ = ["AdminConfig", "ServerConfig"]


class AdminConfig(Config):
    """Where the admin service is offered. It is encrypted as the server is.

    Attributes:
        port: port to listen on; 0 takes a free one.
        host: address to listen on; the default is reachable from this machine only.
        tokens: file of bearer tokens, which are others than those of the server's callers; None takes anybody's calls.
    """

    port: int = Field(ge=0, le=65535)
    host: str = "127.0.0.1"
    tokens: Path | None = None


class ServerConfig(Config):
    """How a server runs.

    Attributes:
        registry: folder or URL of snapshots to follow; it may be empty or missing at the start.
        cache: folder for copies of an object store's snapshots; None takes one in the user's cache folder.
        host: address to listen on; the default is reachable from this machine only. Another needs `tls`, or `insecure`.
        port: port to listen on; 0 takes a free one.
        tls: certificate files; None sends everything in the clear.
        tokens: file of bearer tokens (see `security.Tokens`); None takes anybody's calls. Health and reflection ask
            for none: probes have none, and what reflection tells is public.
        insecure: whether other machines may connect without encryption.
        reflection: whether the reflection service is offered.
        health_port: port of the health service alone, on the same host and in the clear, for probes that speak no TLS;
            0 takes a free one, None offers it on `port` only.
        admin: where the admin service is offered; None offers none.
        metrics_port: port of the Prometheus metrics, on the same host; 0 takes a free one, None serves none.
        device: where the encoder runs: "cpu", "cuda", "cuda:1".
        threads: CPU threads of encoding and searching; None leaves one core to the event loop. Without that, threads
            that wait for each other on a busy core make calls many times slower.
        poll_seconds: mean time between two looks at the registry.
        max_batch: calls that are encoded and searched together.
        capacity: calls in hand at once; further ones are refused. RecordEvents has as much to itself, so that a slow
            disk does not refuse a Retrieve.
        client_capacity: of these, calls of one client; None sets no such limit. A client is the name of a token, else
            of a certificate, else an address.
        drain_seconds: time after a stop is asked for in which calls are still taken, for load balancers to notice.
        grace_seconds: time that calls in hand get to finish after that.
        keepalive_seconds: a connection on which nothing comes for so long is asked for a sign of life, and closed if
            none comes in as long again.
        max_message_bytes: size of a request message.
        recall_share: share of Retrieve calls whose answer is compared with exact search, beside the serving.
        limits: what one call may ask for.
    """

    registry: Path | str
    cache: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    tls: TlsFiles | None = None
    tokens: Path | None = None
    insecure: bool = False
    reflection: bool = True
    health_port: int | None = Field(default=None, ge=0, le=65535)
    admin: AdminConfig | None = None
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    poll_seconds: float = Field(default=5.0, gt=0)
    max_batch: int = Field(default=64, ge=1)
    capacity: int = Field(default=256, ge=1)
    client_capacity: int | None = Field(default=None, ge=1)
    drain_seconds: float = Field(default=0.0, ge=0)
    grace_seconds: float = Field(default=10.0, ge=0)
    keepalive_seconds: float = Field(default=60.0, ge=1)
    max_message_bytes: int = Field(default=4 * 2**20, ge=1024)
    recall_share: float = Field(default=0.0, ge=0, le=1)
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _encrypted_or_local(self) -> Self:
        admin = self.admin
        for host in (self.host, admin.host if admin is not None else self.host):
            if self.tls is None and not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"{host} is reachable from other machines, but nothing would be encrypted; give a certificate and "
                    "key (--tls-cert, --tls-key), or say --insecure"
                )
        by_certificate = self.tls is not None and self.tls.client_ca is not None
        if admin is not None and not is_loopback(admin.host) and admin.tokens is None and not by_certificate:
            raise ValueError(
                f"{admin.host} is reachable from other machines, and anybody there could change what is served; give "
                "tokens of the admin service (--admin-tokens), or take only clients with certificates (--tls-client-ca)"
            )
        return self
