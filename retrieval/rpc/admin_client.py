"""The typed client of the admin service, for operators' tools; also for asyncio. Loads no more than `rpc.client`.

from retrieval.rpc.admin_client import AdminClient

with AdminClient("localhost:50052") as admin:
    print(admin.list_snapshots().current_version)
    admin.roll_back()
"""

from dataclasses import dataclass

import grpc

from retrieval.rpc._generated.retrieval.v1 import admin_pb2 as pb
from retrieval.rpc.connection import AsyncConnection, Connection
from retrieval.rpc.fields import set_field

__all__ = ["Activated", "AdminClient", "AsyncAdminClient", "Refreshed", "SnapshotInfo", "SnapshotList"]

_METHODS = pb.DESCRIPTOR.services_by_name["AdminService"].methods_by_name
# A snapshot is verified, copied if need be, and loaded in a call.
_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo:
    """A version of a registry.

    Attributes:
        version: its name.
        problem: why its manifest cannot be read; "" if it can. Nothing else is known then.
        created: when it was written, ISO 8601, UTC.
        parent: the version that was current when it was made; "" for a first one.
        dataset: fingerprint of the dataset that the encoder was trained on.
        items: size of the catalogue.
        index: the index, for people.
        ann_recall: recall@100 of the index against exact search, measured at publishing.
    """

    version: str
    problem: str
    created: str
    parent: str
    dataset: str
    items: int
    index: str
    ann_recall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotList:
    """What a registry holds and a server serves.

    Attributes:
        snapshots: oldest first.
        current_version: of the registry; "" while nothing is published.
        serving_version: from which the server answers; "" while it has none.
        problem: why the server does not serve the current version; "" if it does, or has not tried yet.
    """

    snapshots: list[SnapshotInfo]
    current_version: str
    serving_version: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Activated:
    """A version is live.

    Attributes:
        previous_version: the one that was current before; "" if there was none.
        serving_version: from which the server answers now.
    """

    previous_version: str
    serving_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """The server has looked at the registry; attributes as of `SnapshotList`."""

    serving_version: str
    problem: str


class AdminClient(Connection):
    """A connection to a server's admin service. Any number of threads may share it; no call is tried again by itself.

    All calls raise, with the server's sentence:

    - `UnknownVersionError`: the registry has no such version, or none before the current one
    - `SnapshotCorruptError`, `SnapshotError`: the version cannot be loaded, or the registry not be read or written
    - `SnapshotConflictError`: somebody else changed the current version at the same time
    - `UnauthenticatedError`, `UnavailableError`, `DeadlineError`, `ServerFaultError`: as of `RetrievalClient`

    Args:
        address: HOST:PORT of the admin service.
        timeout: seconds that a call may take; a change goes on when they are over.
        credentials: as of `RetrievalClient`.
        token: one of the admin service's bearer tokens.
    """

    def __init__(
        self,
        address: str,
        timeout: float = _SECONDS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        super().__init__(address, timeout, credentials, token)
        self._list = self._described(_METHODS["ListSnapshots"])
        self._activate = self._described(_METHODS["ActivateSnapshot"])
        self._roll_back = self._described(_METHODS["RollbackSnapshot"])
        self._refresh = self._described(_METHODS["RefreshSnapshot"])

    def list_snapshots(self, *, timeout: float | None = None) -> SnapshotList:
        """All versions, and what the registry and the server have live."""
        return _listed(self._call(self._list, pb.ListSnapshotsRequest(), timeout))

    def activate(self, version: str, *, timeout: float | None = None) -> Activated:
        """Make a version the registry's current one; returns when the server answers from it."""
        return _activated(self._call(self._activate, _activate_request(version), timeout))

    def roll_back(self, *, timeout: float | None = None) -> Activated:
        """`activate` the newest version before the current one."""
        return _activated(self._call(self._roll_back, pb.RollbackSnapshotRequest(), timeout))

    def refresh(self, *, timeout: float | None = None) -> Refreshed:
        """Let the server look at the registry now; returns when it serves the current version, or cannot."""
        return _refreshed(self._call(self._refresh, pb.RefreshSnapshotRequest(), timeout))


class AsyncAdminClient(AsyncConnection):
    """`AdminClient` whose calls are awaited. To be made and used in one event loop."""

    def __init__(
        self,
        address: str,
        timeout: float = _SECONDS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
    ) -> None:
        super().__init__(address, timeout, credentials, token)
        self._list = self._described(_METHODS["ListSnapshots"])
        self._activate = self._described(_METHODS["ActivateSnapshot"])
        self._roll_back = self._described(_METHODS["RollbackSnapshot"])
        self._refresh = self._described(_METHODS["RefreshSnapshot"])

    async def list_snapshots(self, *, timeout: float | None = None) -> SnapshotList:
        """As `AdminClient.list_snapshots`."""
        return _listed(await self._call(self._list, pb.ListSnapshotsRequest(), timeout))

    async def activate(self, version: str, *, timeout: float | None = None) -> Activated:
        """As `AdminClient.activate`."""
        return _activated(await self._call(self._activate, _activate_request(version), timeout))

    async def roll_back(self, *, timeout: float | None = None) -> Activated:
        """As `AdminClient.roll_back`."""
        return _activated(await self._call(self._roll_back, pb.RollbackSnapshotRequest(), timeout))

    async def refresh(self, *, timeout: float | None = None) -> Refreshed:
        """As `AdminClient.refresh`."""
        return _refreshed(await self._call(self._refresh, pb.RefreshSnapshotRequest(), timeout))


def _activate_request(version: str) -> pb.ActivateSnapshotRequest:
    message = pb.ActivateSnapshotRequest()
    set_field(message, "version", version, "version", "text")
    return message


def _listed(message: pb.ListSnapshotsResponse) -> SnapshotList:
    names = SnapshotInfo.__dataclass_fields__
    return SnapshotList(
        snapshots=[SnapshotInfo(**{name: getattr(one, name) for name in names}) for one in message.snapshots],
        current_version=message.current_version,
        serving_version=message.serving_version,
        problem=message.problem,
    )


def _activated(message: pb.ActivateSnapshotResponse | pb.RollbackSnapshotResponse) -> Activated:
    return Activated(previous_version=message.previous_version, serving_version=message.serving_version)


def _refreshed(message: pb.RefreshSnapshotResponse) -> Refreshed:
    return Refreshed(serving_version=message.serving_version, problem=message.problem)
