import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_MODEL: _ClassVar[Source]
    SOURCE_POPULARITY: _ClassVar[Source]
    SOURCE_CONTEXT: _ClassVar[Source]

class IdKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ID_KIND_UNSPECIFIED: _ClassVar[IdKind]
    ID_KIND_INTEGER: _ClassVar[IdKind]
    ID_KIND_STRING: _ClassVar[IdKind]

class ValueKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VALUE_KIND_UNSPECIFIED: _ClassVar[ValueKind]
    VALUE_KIND_TEXT: _ClassVar[ValueKind]
    VALUE_KIND_INTEGER: _ClassVar[ValueKind]
    VALUE_KIND_NUMBER: _ClassVar[ValueKind]
    VALUE_KIND_BOOLEAN: _ClassVar[ValueKind]
    VALUE_KIND_MOMENT: _ClassVar[ValueKind]
SOURCE_UNSPECIFIED: Source
SOURCE_MODEL: Source
SOURCE_POPULARITY: Source
SOURCE_CONTEXT: Source
ID_KIND_UNSPECIFIED: IdKind
ID_KIND_INTEGER: IdKind
ID_KIND_STRING: IdKind
VALUE_KIND_UNSPECIFIED: ValueKind
VALUE_KIND_TEXT: ValueKind
VALUE_KIND_INTEGER: ValueKind
VALUE_KIND_NUMBER: ValueKind
VALUE_KIND_BOOLEAN: ValueKind
VALUE_KIND_MOMENT: ValueKind

class ItemIds(_message.Message):
    __slots__ = ("integers", "strings")
    INTEGERS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    integers: Int64List
    strings: StringList
    def __init__(self, integers: _Optional[_Union[Int64List, _Mapping]] = ..., strings: _Optional[_Union[StringList, _Mapping]] = ...) -> None: ...

class Int64List(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class StringList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("items", "actions", "timestamps", "context", "auxiliary")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class AuxiliaryEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: AuxiliarySeries
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[AuxiliarySeries, _Mapping]] = ...) -> None: ...
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMPS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    AUXILIARY_FIELD_NUMBER: _ClassVar[int]
    items: ItemIds
    actions: _containers.RepeatedScalarFieldContainer[str]
    timestamps: _containers.RepeatedScalarFieldContainer[int]
    context: _containers.ScalarMap[str, str]
    auxiliary: _containers.MessageMap[str, AuxiliarySeries]
    def __init__(self, items: _Optional[_Union[ItemIds, _Mapping]] = ..., actions: _Optional[_Iterable[str]] = ..., timestamps: _Optional[_Iterable[int]] = ..., context: _Optional[_Mapping[str, str]] = ..., auxiliary: _Optional[_Mapping[str, AuxiliarySeries]] = ...) -> None: ...

class AuxiliarySeries(_message.Message):
    __slots__ = ("values", "timestamps")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMPS_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    timestamps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[str]] = ..., timestamps: _Optional[_Iterable[int]] = ...) -> None: ...

class UserId(_message.Message):
    __slots__ = ("integer", "string")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    STRING_FIELD_NUMBER: _ClassVar[int]
    integer: int
    string: str
    def __init__(self, integer: _Optional[int] = ..., string: _Optional[str] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class FilterValue(_message.Message):
    __slots__ = ("text", "integer", "number", "boolean", "moment")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    MOMENT_FIELD_NUMBER: _ClassVar[int]
    text: str
    integer: int
    number: float
    boolean: bool
    moment: int
    def __init__(self, text: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., boolean: _Optional[bool] = ..., moment: _Optional[int] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("compare", "missing", "all", "any")
    class Operator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OPERATOR_UNSPECIFIED: _ClassVar[Filter.Operator]
        OPERATOR_LESS: _ClassVar[Filter.Operator]
        OPERATOR_AT_MOST: _ClassVar[Filter.Operator]
        OPERATOR_GREATER: _ClassVar[Filter.Operator]
        OPERATOR_AT_LEAST: _ClassVar[Filter.Operator]
    OPERATOR_UNSPECIFIED: Filter.Operator
    OPERATOR_LESS: Filter.Operator
    OPERATOR_AT_MOST: Filter.Operator
    OPERATOR_GREATER: Filter.Operator
    OPERATOR_AT_LEAST: Filter.Operator
    class In(_message.Message):
        __slots__ = ("attribute", "values")
        ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
        VALUES_FIELD_NUMBER: _ClassVar[int]
        attribute: str
        values: _containers.RepeatedCompositeFieldContainer[FilterValue]
        def __init__(self, attribute: _Optional[str] = ..., values: _Optional[_Iterable[_Union[FilterValue, _Mapping]]] = ...) -> None: ...
    class Compare(_message.Message):
        __slots__ = ("attribute", "operator", "value")
        ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
        OPERATOR_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        attribute: str
        operator: Filter.Operator
        value: FilterValue
        def __init__(self, attribute: _Optional[str] = ..., operator: _Optional[_Union[Filter.Operator, str]] = ..., value: _Optional[_Union[FilterValue, _Mapping]] = ...) -> None: ...
    class Missing(_message.Message):
        __slots__ = ("attribute",)
        ATTRIBUTE_FIELD_NUMBER: _ClassVar[int]
        attribute: str
        def __init__(self, attribute: _Optional[str] = ...) -> None: ...
    class Parts(_message.Message):
        __slots__ = ("filters",)
        FILTERS_FIELD_NUMBER: _ClassVar[int]
        filters: _containers.RepeatedCompositeFieldContainer[Filter]
        def __init__(self, filters: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ...) -> None: ...
    IN_FIELD_NUMBER: _ClassVar[int]
    COMPARE_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    ANY_FIELD_NUMBER: _ClassVar[int]
    NOT_FIELD_NUMBER: _ClassVar[int]
    compare: Filter.Compare
    missing: Filter.Missing
    all: Filter.Parts
    any: Filter.Parts
    def __init__(self, compare: _Optional[_Union[Filter.Compare, _Mapping]] = ..., missing: _Optional[_Union[Filter.Missing, _Mapping]] = ..., all: _Optional[_Union[Filter.Parts, _Mapping]] = ..., any: _Optional[_Union[Filter.Parts, _Mapping]] = ..., **kwargs) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("history", "stored_user", "embedding", "k", "request_time", "exclude", "exclude_seen", "include_titles", "filter", "required_version", "action", "fresh_events", "exact", "debug")
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    STORED_USER_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIME_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TITLES_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    FRESH_EVENTS_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    DEBUG_FIELD_NUMBER: _ClassVar[int]
    history: History
    stored_user: UserId
    embedding: Embedding
    k: int
    request_time: int
    exclude: ItemIds
    exclude_seen: bool
    include_titles: bool
    filter: Filter
    required_version: str
    action: str
    fresh_events: History
    exact: bool
    debug: bool
    def __init__(self, history: _Optional[_Union[History, _Mapping]] = ..., stored_user: _Optional[_Union[UserId, _Mapping]] = ..., embedding: _Optional[_Union[Embedding, _Mapping]] = ..., k: _Optional[int] = ..., request_time: _Optional[int] = ..., exclude: _Optional[_Union[ItemIds, _Mapping]] = ..., exclude_seen: _Optional[bool] = ..., include_titles: _Optional[bool] = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., required_version: _Optional[str] = ..., action: _Optional[str] = ..., fresh_events: _Optional[_Union[History, _Mapping]] = ..., exact: _Optional[bool] = ..., debug: _Optional[bool] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("items", "scores", "snapshot_version", "source", "shortfall", "unknown_items", "titles", "cold_items", "debug")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SHORTFALL_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    TITLES_FIELD_NUMBER: _ClassVar[int]
    COLD_ITEMS_FIELD_NUMBER: _ClassVar[int]
    DEBUG_FIELD_NUMBER: _ClassVar[int]
    items: ItemIds
    scores: _containers.RepeatedScalarFieldContainer[float]
    snapshot_version: str
    source: Source
    shortfall: int
    unknown_items: int
    titles: _containers.RepeatedScalarFieldContainer[str]
    cold_items: _containers.RepeatedScalarFieldContainer[int]
    debug: Debug
    def __init__(self, items: _Optional[_Union[ItemIds, _Mapping]] = ..., scores: _Optional[_Iterable[float]] = ..., snapshot_version: _Optional[str] = ..., source: _Optional[_Union[Source, str]] = ..., shortfall: _Optional[int] = ..., unknown_items: _Optional[int] = ..., titles: _Optional[_Iterable[str]] = ..., cold_items: _Optional[_Iterable[int]] = ..., debug: _Optional[_Union[Debug, _Mapping]] = ...) -> None: ...

class Debug(_message.Message):
    __slots__ = ("plan", "eligible", "batch_size", "decode", "queue", "encode", "search")
    class Plan(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PLAN_UNSPECIFIED: _ClassVar[Debug.Plan]
        PLAN_INDEX: _ClassVar[Debug.Plan]
        PLAN_SELECTOR: _ClassVar[Debug.Plan]
        PLAN_SCAN: _ClassVar[Debug.Plan]
    PLAN_UNSPECIFIED: Debug.Plan
    PLAN_INDEX: Debug.Plan
    PLAN_SELECTOR: Debug.Plan
    PLAN_SCAN: Debug.Plan
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ELIGIBLE_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    plan: Debug.Plan
    eligible: int
    batch_size: int
    decode: _duration_pb2.Duration
    queue: _duration_pb2.Duration
    encode: _duration_pb2.Duration
    search: _duration_pb2.Duration
    def __init__(self, plan: _Optional[_Union[Debug.Plan, str]] = ..., eligible: _Optional[int] = ..., batch_size: _Optional[int] = ..., decode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., search: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class BatchRetrieveRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RetrieveRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RetrieveRequest, _Mapping]]] = ...) -> None: ...

class BatchRetrieveResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[RetrieveResult]
    def __init__(self, results: _Optional[_Iterable[_Union[RetrieveResult, _Mapping]]] = ...) -> None: ...

class RetrieveResult(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: RetrieveResponse
    error: Error
    def __init__(self, response: _Optional[_Union[RetrieveResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "reason", "message", "field")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    field: str
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ...) -> None: ...

class EmbedUsersRequest(_message.Message):
    __slots__ = ("users", "request_time", "action")
    class User(_message.Message):
        __slots__ = ("history", "stored_user", "fresh_events")
        HISTORY_FIELD_NUMBER: _ClassVar[int]
        STORED_USER_FIELD_NUMBER: _ClassVar[int]
        FRESH_EVENTS_FIELD_NUMBER: _ClassVar[int]
        history: History
        stored_user: UserId
        fresh_events: History
        def __init__(self, history: _Optional[_Union[History, _Mapping]] = ..., stored_user: _Optional[_Union[UserId, _Mapping]] = ..., fresh_events: _Optional[_Union[History, _Mapping]] = ...) -> None: ...
    USERS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_TIME_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    users: _containers.RepeatedCompositeFieldContainer[EmbedUsersRequest.User]
    request_time: int
    action: str
    def __init__(self, users: _Optional[_Iterable[_Union[EmbedUsersRequest.User, _Mapping]]] = ..., request_time: _Optional[int] = ..., action: _Optional[str] = ...) -> None: ...

class EmbedUsersResponse(_message.Message):
    __slots__ = ("values", "width", "events_read", "unknown_items", "snapshot_version")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    EVENTS_READ_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    width: int
    events_read: _containers.RepeatedScalarFieldContainer[int]
    unknown_items: _containers.RepeatedScalarFieldContainer[int]
    snapshot_version: str
    def __init__(self, values: _Optional[_Iterable[float]] = ..., width: _Optional[int] = ..., events_read: _Optional[_Iterable[int]] = ..., unknown_items: _Optional[_Iterable[int]] = ..., snapshot_version: _Optional[str] = ...) -> None: ...

class ItemId(_message.Message):
    __slots__ = ("integer", "string")
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    STRING_FIELD_NUMBER: _ClassVar[int]
    integer: int
    string: str
    def __init__(self, integer: _Optional[int] = ..., string: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("user_id", "item_id", "action", "timestamp", "event_id", "context", "auxiliary")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class AuxiliaryEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    AUXILIARY_FIELD_NUMBER: _ClassVar[int]
    user_id: UserId
    item_id: ItemId
    action: str
    timestamp: int
    event_id: str
    context: _containers.ScalarMap[str, str]
    auxiliary: _containers.ScalarMap[str, str]
    def __init__(self, user_id: _Optional[_Union[UserId, _Mapping]] = ..., item_id: _Optional[_Union[ItemId, _Mapping]] = ..., action: _Optional[str] = ..., timestamp: _Optional[int] = ..., event_id: _Optional[str] = ..., context: _Optional[_Mapping[str, str]] = ..., auxiliary: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RecordEventsRequest(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class RecordEventsResponse(_message.Message):
    __slots__ = ("unknown_items",)
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    unknown_items: int
    def __init__(self, unknown_items: _Optional[int] = ...) -> None: ...

class GetServingStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Attribute(_message.Message):
    __slots__ = ("name", "values", "several")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SEVERAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: ValueKind
    several: bool
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Union[ValueKind, str]] = ..., several: _Optional[bool] = ...) -> None: ...

class GetServingStateResponse(_message.Message):
    __slots__ = ("snapshot_version", "created", "dataset", "items", "item_ids", "width", "max_length", "actions", "index", "ann_recall", "stored_users", "context", "auxiliary", "query_actions", "max_k", "max_batch", "attributes")
    SNAPSHOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ANN_RECALL_FIELD_NUMBER: _ClassVar[int]
    STORED_USERS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    AUXILIARY_FIELD_NUMBER: _ClassVar[int]
    QUERY_ACTIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_K_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    snapshot_version: str
    created: str
    dataset: str
    items: int
    item_ids: IdKind
    width: int
    max_length: int
    actions: _containers.RepeatedScalarFieldContainer[str]
    index: str
    ann_recall: float
    stored_users: bool
    context: _containers.RepeatedScalarFieldContainer[str]
    auxiliary: _containers.RepeatedScalarFieldContainer[str]
    query_actions: bool
    max_k: int
    max_batch: int
    attributes: _containers.RepeatedCompositeFieldContainer[Attribute]
    def __init__(self, snapshot_version: _Optional[str] = ..., created: _Optional[str] = ..., dataset: _Optional[str] = ..., items: _Optional[int] = ..., item_ids: _Optional[_Union[IdKind, str]] = ..., width: _Optional[int] = ..., max_length: _Optional[int] = ..., actions: _Optional[_Iterable[str]] = ..., index: _Optional[str] = ..., ann_recall: _Optional[float] = ..., stored_users: _Optional[bool] = ..., context: _Optional[_Iterable[str]] = ..., auxiliary: _Optional[_Iterable[str]] = ..., query_actions: _Optional[bool] = ..., max_k: _Optional[int] = ..., max_batch: _Optional[int] = ..., attributes: _Optional[_Iterable[_Union[Attribute, _Mapping]]] = ...) -> None: ...
