from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Snapshot(_message.Message):
    __slots__ = ("version", "problem", "created", "parent", "dataset", "items", "index", "ann_recall")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ANN_RECALL_FIELD_NUMBER: _ClassVar[int]
    version: str
    problem: str
    created: str
    parent: str
    dataset: str
    items: int
    index: str
    ann_recall: float
    def __init__(self, version: _Optional[str] = ..., problem: _Optional[str] = ..., created: _Optional[str] = ..., parent: _Optional[str] = ..., dataset: _Optional[str] = ..., items: _Optional[int] = ..., index: _Optional[str] = ..., ann_recall: _Optional[float] = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("snapshots", "current_version", "serving_version", "problem")
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVING_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    current_version: str
    serving_version: str
    problem: str
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ..., current_version: _Optional[str] = ..., serving_version: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class ActivateSnapshotRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class ActivateSnapshotResponse(_message.Message):
    __slots__ = ("previous_version", "serving_version")
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVING_VERSION_FIELD_NUMBER: _ClassVar[int]
    previous_version: str
    serving_version: str
    def __init__(self, previous_version: _Optional[str] = ..., serving_version: _Optional[str] = ...) -> None: ...

class RollbackSnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackSnapshotResponse(_message.Message):
    __slots__ = ("previous_version", "serving_version")
    PREVIOUS_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVING_VERSION_FIELD_NUMBER: _ClassVar[int]
    previous_version: str
    serving_version: str
    def __init__(self, previous_version: _Optional[str] = ..., serving_version: _Optional[str] = ...) -> None: ...

class RefreshSnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RefreshSnapshotResponse(_message.Message):
    __slots__ = ("serving_version", "problem")
    SERVING_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    serving_version: str
    problem: str
    def __init__(self, serving_version: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...
