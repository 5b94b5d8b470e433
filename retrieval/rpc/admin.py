"""The admin service: what a registry holds, and which of it is live."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

from retrieval.errors import InvalidRequestError, NoSnapshotError, SnapshotError
from retrieval.rpc._generated.retrieval.v1 import admin_pb2 as pb
from retrieval.rpc.handler import Method, parsed
from retrieval.rpc.prepare import shown
from retrieval.rpc.reload import Reloader
from retrieval.snapshot.manifest import is_version
from retrieval.snapshot.registry import Registry

__all__ = ["ADMIN_DESCRIPTOR", "Admin"]

ADMIN_DESCRIPTOR = pb.DESCRIPTOR.services_by_name["AdminService"]

_Result = TypeVar("_Result")


class Admin:
    """Methods of `retrieval.v1.AdminService`.

    Args:
        registry: whose snapshots are listed.
        reloader: serves them, and changes which one is.
    """

    def __init__(self, registry: Registry, reloader: Reloader) -> None:
        self._registry, self._reloader = registry, reloader
        self._going_on: set[asyncio.Task[Any]] = set()

    @property
    def methods(self) -> dict[str, Method]:
        """By name."""
        return {
            "ListSnapshots": self._list,
            "ActivateSnapshot": self._activate,
            "RollbackSnapshot": self._roll_back,
            "RefreshSnapshot": self._refresh,
        }

    async def _list(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        parsed(pb.ListSnapshotsRequest, content)
        snapshots, current = await asyncio.to_thread(self._look)
        answer = pb.ListSnapshotsResponse(
            snapshots=snapshots,
            current_version=current,
            serving_version=self._reloader.serving_version,
            problem=self._reloader.problem,
        )
        return answer.SerializeToString()

    def _look(self) -> tuple[list[pb.Snapshot], str]:
        """All versions, oldest first, and the current one."""
        try:
            current = self._registry.current()
        except NoSnapshotError:
            current = ""
        return [self._described(version) for version in self._registry.versions()], current

    def _described(self, version: str) -> pb.Snapshot:
        try:
            manifest = self._registry.manifest(version)
        except SnapshotError as error:
            # Pruned just now, or damaged; the others are worth telling.
            return pb.Snapshot(version=version, problem=str(error))
        return pb.Snapshot(
            version=version,
            created=manifest.created,
            parent=manifest.parent or "",
            dataset=manifest.dataset,
            items=manifest.items - manifest.expired,
            index=str(manifest.index),
            ann_recall=manifest.ann_recall,
        )

    async def _activate(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        version = parsed(pb.ActivateSnapshotRequest, content).version
        if not is_version(version):
            raise InvalidRequestError("version", f"{shown(version)} is no version's name")
        left = await self._to_its_end(self._reloader.activate(version))
        answer = pb.ActivateSnapshotResponse(previous_version=left, serving_version=self._reloader.serving_version)
        return answer.SerializeToString()

    async def _roll_back(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        parsed(pb.RollbackSnapshotRequest, content)
        left = await self._to_its_end(self._reloader.activate(None))
        answer = pb.RollbackSnapshotResponse(previous_version=left, serving_version=self._reloader.serving_version)
        return answer.SerializeToString()

    async def _refresh(self, content: bytes, context: grpc.aio.ServicerContext, client: str) -> bytes:
        parsed(pb.RefreshSnapshotRequest, content)
        await self._to_its_end(self._reloader.refresh())
        answer = pb.RefreshSnapshotResponse(
            serving_version=self._reloader.serving_version, problem=self._reloader.problem
        )
        return answer.SerializeToString()

    async def _to_its_end(self, change: Coroutine[Any, Any, _Result]) -> _Result:
        """A change that goes on when its caller is gone: halfway it would leave registry and server apart."""
        task = asyncio.ensure_future(change)
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        return await asyncio.shield(task)
