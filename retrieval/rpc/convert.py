"""Messages to plain requests and answers, and back. Used by both ends: no numpy, torch or faiss here."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from retrieval.errors import FilterError, InvalidRequestError
from retrieval.histories.event import Event
from retrieval.index.filter import And, Compare, Filter, In, Missing, Not, Or, Value
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.errors import ServerFaultError
from retrieval.rpc.requests import (
    Embedded,
    Embedding,
    EmbedRequest,
    History,
    Ids,
    Recorded,
    RecordRequest,
    Retrieved,
    RetrieveRequest,
    ServingState,
    Source,
    StoredUser,
)

__all__ = [
    "embed_request_from",
    "embed_request_to",
    "embedded_from",
    "embedded_to",
    "record_request_from",
    "record_request_to",
    "recorded_from",
    "recorded_to",
    "retrieve_request_from",
    "retrieve_request_to",
    "retrieved_from",
    "retrieved_to",
    "state_from",
    "state_to",
]

_SOURCES = {
    Source.MODEL: pb.SOURCE_MODEL,
    Source.POPULARITY: pb.SOURCE_POPULARITY,
    Source.CONTEXT: pb.SOURCE_CONTEXT,
}
_OPERATORS = {
    "<": pb.Filter.OPERATOR_LESS,
    "<=": pb.Filter.OPERATOR_AT_MOST,
    ">": pb.Filter.OPERATOR_GREATER,
    ">=": pb.Filter.OPERATOR_AT_LEAST,
}
_OPERATOR_OF = {number: operator for operator, number in _OPERATORS.items()}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# As deep as a filter's text may be; whatever walks a filter recurses.
_DEEPEST = 50
_SOURCE_OF = {number: source for source, number in _SOURCES.items()}


def _fill(target: Any, values: Sequence[Any], field: str, kind: str) -> None:
    """Extend a repeated field.

    Raises:
        InvalidRequestError: a value is of another type, or is a number that does not fit in 64 bits.
    """
    try:
        target.extend(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(field, f"must be {kind} ({error})") from None


def _ids_to(message: pb.ItemIds, ids: Ids, field: str) -> None:
    if len(ids) and isinstance(ids[0], str):
        _fill(message.strings.values, ids, field, "ids of one kind, all strings")
    else:
        _fill(message.integers.values, ids, field, "ids of one kind, all 64-bit integers or all strings")


def _ids_from(message: pb.ItemIds) -> Ids:
    ids: Ids = message.strings.values if message.WhichOneof("kind") == "strings" else message.integers.values
    return ids


def _history_to(message: pb.History, history: History, field: str) -> None:
    _ids_to(message.items, history.items, f"{field}.items")
    _fill(message.actions, history.actions, f"{field}.actions", "strings")
    _fill(message.timestamps, history.timestamps, f"{field}.timestamps", "integers, in seconds")
    try:
        message.context.update(history.context)
        for name, events in history.auxiliary.items():
            series = message.auxiliary[name]
            series.timestamps.extend(time for time, _ in events)
            series.values.extend(value for _, value in events)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(field, f"context and auxiliary must hold strings and seconds ({error})") from None
    # An empty history must still say that it is one.
    message.SetInParent()


def _id_to(message: pb.UserId | pb.ItemId, value: int | str, field: str) -> None:
    try:
        setattr(message, "string" if isinstance(value, str) else "integer", value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field, f"must be a string or a 64-bit integer ({error})") from None


def _id_from(message: pb.UserId | pb.ItemId, field: str) -> int | str:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError(field, "holds no id; set `integer` or `string`")
    value: int | str = getattr(message, kind)
    return value


def _user_to(message: Any, user: History | StoredUser | Embedding | None, prefix: str) -> None:
    if isinstance(user, History):
        _history_to(message.history, user, f"{prefix}history")
    elif isinstance(user, StoredUser):
        _id_to(message.stored_user, user.id, f"{prefix}stored_user")
        if user.fresh is not None:
            _history_to(message.fresh_events, user.fresh, f"{prefix}fresh_events")
    elif isinstance(user, Embedding):
        _fill(message.embedding.values, user.values, f"{prefix}embedding.values", "numbers")
        message.embedding.SetInParent()


def _history_from(message: pb.History, field: str) -> History:
    auxiliary = {
        name: _series_from(series, f"{field}.auxiliary[{name!r}]") for name, series in message.auxiliary.items()
    }
    return History(_ids_from(message.items), message.timestamps, message.actions, message.context, auxiliary)


def _user_from(message: Any, prefix: str) -> History | StoredUser | Embedding | None:
    kind = message.WhichOneof("user")
    fresh = None
    if message.HasField("fresh_events"):
        fresh = _history_from(message.fresh_events, f"{prefix}fresh_events")
    if fresh is not None and kind != "stored_user":
        raise InvalidRequestError(f"{prefix}fresh_events", "needs a stored user; other events belong in history")
    match kind:
        case "history":
            return _history_from(message.history, f"{prefix}history")
        case "stored_user":
            return StoredUser(_id_from(message.stored_user, f"{prefix}stored_user"), fresh)
        case "embedding":
            return Embedding(message.embedding.values)
    return None


def _series_from(message: pb.AuxiliarySeries, field: str) -> list[tuple[int, str]]:
    if len(message.values) != len(message.timestamps):
        raise InvalidRequestError(
            field, f"has {len(message.values)} values, but {len(message.timestamps)} timestamps; send one for each"
        )
    return list(zip(message.timestamps, message.values, strict=True))


def _set_number(message: Any, field: str, value: int) -> None:
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field, f"must be an integer of its range ({error})") from None


def _value_to(message: pb.FilterValue, value: Value, field: str) -> None:
    try:
        if isinstance(value, bool):
            message.boolean = value
        elif isinstance(value, int):
            message.integer = value
        elif isinstance(value, float):
            message.number = value
        elif isinstance(value, str):
            message.text = value
        else:
            moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            message.moment = (moment - _EPOCH) // timedelta(microseconds=1)
    except ValueError as error:
        raise InvalidRequestError(field, f"must be a 64-bit integer or Unicode text ({error})") from None


def _value_from(message: pb.FilterValue, field: str) -> Value:
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError(field, "is empty; set text, integer, number, boolean or moment")
    value: Value = getattr(message, kind)
    if kind != "moment":
        return value
    try:
        return _EPOCH + timedelta(microseconds=message.moment)
    except OverflowError:
        raise InvalidRequestError(field, f"{message.moment} is not a moment of the years 1 to 9999") from None


def _check_depth(depth: int) -> None:
    if depth > _DEEPEST:
        raise InvalidRequestError("filter", f"is nested deeper than {_DEEPEST} levels")


def _filter_to(message: pb.Filter, filter_: Filter, field: str, depth: int = 1) -> None:
    _check_depth(depth)
    if isinstance(filter_, And | Or):
        kind = "all" if isinstance(filter_, And) else "any"
        for place, part in enumerate(filter_.parts):
            _filter_to(getattr(message, kind).filters.add(), part, f"{field}.{kind}[{place}]", depth + 1)
    elif isinstance(filter_, Not):
        _filter_to(getattr(message, "not"), filter_.part, f"{field}.not", depth + 1)
    elif isinstance(filter_, In):
        test = getattr(message, "in")
        test.attribute = filter_.attribute
        for place, value in enumerate(filter_.values):
            _value_to(test.values.add(), value, f"{field}.in.values[{place}]")
    elif isinstance(filter_, Compare):
        message.compare.attribute, message.compare.operator = filter_.attribute, _OPERATORS[filter_.operator]
        _value_to(message.compare.value, filter_.value, f"{field}.compare.value")
    else:
        assert isinstance(filter_, Missing)
        message.missing.attribute = filter_.attribute


def _filter_from(message: pb.Filter, field: str, depth: int = 1) -> Filter:
    _check_depth(depth)
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError(field, "is empty; set in, compare, missing, all, any or not")
    inner = getattr(message, kind)
    field = f"{field}.{kind}"
    try:
        if kind == "in":
            values = (_value_from(value, f"{field}.values[{place}]") for place, value in enumerate(inner.values))
            return In(inner.attribute, tuple(values))
        if kind == "compare":
            if inner.operator not in _OPERATOR_OF:
                raise InvalidRequestError(f"{field}.operator", f"{inner.operator} is no operator")
            return Compare(inner.attribute, _OPERATOR_OF[inner.operator], _value_from(inner.value, f"{field}.value"))
        if kind == "missing":
            return Missing(inner.attribute)
        if kind == "not":
            return Not(_filter_from(inner, field, depth + 1))
        parts = tuple(_filter_from(part, f"{field}[{place}]", depth + 1) for place, part in enumerate(inner.filters))
        return And(parts) if kind == "all" else Or(parts)
    except FilterError as error:
        raise InvalidRequestError(field, str(error)) from None


def retrieve_request_to(request: RetrieveRequest) -> pb.RetrieveRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.RetrieveRequest(exclude_seen=request.exclude_seen, include_titles=request.include_titles)
    _user_to(message, request.user, "")
    _set_number(message, "k", request.k)
    if request.request_time is not None:
        _set_number(message, "request_time", request.request_time)
    if len(request.exclude):
        _ids_to(message.exclude, request.exclude, "exclude")
    if request.filter is not None:
        _filter_to(message.filter, request.filter, "filter")
    message.required_version = request.required_version
    message.action = request.action
    return message


def retrieve_request_from(message: pb.RetrieveRequest) -> RetrieveRequest:
    """A message as a request; its lists are the message's own, not copies.

    Raises:
        InvalidRequestError: a stored user without an id, fresh events without one, or a filter that is none.
    """
    return RetrieveRequest(
        user=_user_from(message, ""),
        k=message.k,
        request_time=message.request_time if message.HasField("request_time") else None,
        exclude=_ids_from(message.exclude),
        exclude_seen=message.exclude_seen,
        include_titles=message.include_titles,
        filter=_filter_from(message.filter, "filter") if message.HasField("filter") else None,
        required_version=message.required_version,
        action=message.action,
    )


def embed_request_to(request: EmbedRequest) -> pb.EmbedUsersRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.EmbedUsersRequest(action=request.action)
    for place, user in enumerate(request.users):
        _user_to(message.users.add(), user, f"users[{place}].")
    if request.request_time is not None:
        _set_number(message, "request_time", request.request_time)
    return message


def embed_request_from(message: pb.EmbedUsersRequest) -> EmbedRequest:
    """A message as a request; its lists are the message's own, not copies.

    Raises:
        InvalidRequestError: a stored user without an id, or fresh events without one.
    """
    users = [_user_from(user, f"users[{place}].") for place, user in enumerate(message.users)]
    return EmbedRequest(
        # The message's oneof has no embedding.
        users=[user for user in users if not isinstance(user, Embedding)],
        request_time=message.request_time if message.HasField("request_time") else None,
        action=message.action,
    )


def record_request_to(request: RecordRequest) -> pb.RecordEventsRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.RecordEventsRequest()
    for place, event in enumerate(request.events):
        part, field = message.events.add(), f"events[{place}]"
        _id_to(part.user_id, event.user_id, f"{field}.user_id")
        if event.item_id is not None:
            _id_to(part.item_id, event.item_id, f"{field}.item_id")
        for name, kind in (("action", "text"), ("timestamp", "an integer, in seconds"), ("event_id", "text")):
            try:
                setattr(part, name, getattr(event, name))
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(f"{field}.{name}", f"must be {kind} ({error})") from None
        for name in ("context", "auxiliary"):
            try:
                getattr(part, name).update(getattr(event, name))
            except (TypeError, ValueError) as error:
                raise InvalidRequestError(f"{field}.{name}", f"must map names to texts ({error})") from None
    return message


def record_request_from(message: pb.RecordEventsRequest) -> RecordRequest:
    """A message as a request.

    Raises:
        InvalidRequestError: an event without a user, or with an id that is none.
    """
    return RecordRequest(
        events=[
            Event(
                user_id=_id_from(event.user_id, f"events[{place}].user_id"),
                item_id=_id_from(event.item_id, f"events[{place}].item_id") if event.HasField("item_id") else None,
                timestamp=event.timestamp,
                action=event.action,
                event_id=event.event_id,
                context=dict(event.context),
                auxiliary=dict(event.auxiliary),
            )
            for place, event in enumerate(message.events)
        ]
    )


def recorded_to(answer: Recorded) -> pb.RecordEventsResponse:
    """An answer as a message."""
    return pb.RecordEventsResponse(unknown_items=answer.unknown_items)


def recorded_from(message: pb.RecordEventsResponse) -> Recorded:
    """A message as an answer."""
    return Recorded(unknown_items=message.unknown_items)


def retrieved_to(answer: Retrieved, *, string_ids: bool) -> pb.RetrieveResponse:
    """An answer as a message; `string_ids` keeps the kind of an answer without items."""
    message = pb.RetrieveResponse(
        snapshot_version=answer.snapshot_version,
        source=_SOURCES[answer.source],
        shortfall=answer.shortfall,
        unknown_items=answer.unknown_items,
        titles=answer.titles,
    )
    ids: Any = message.items.strings if string_ids else message.items.integers
    ids.values.extend(answer.items)
    ids.SetInParent()
    message.scores.extend(answer.scores)
    return message


def retrieved_from(message: pb.RetrieveResponse) -> Retrieved:
    """A message as an answer.

    Raises:
        ServerFaultError: the source is none that this version knows.
    """
    if message.source not in _SOURCE_OF:
        raise ServerFaultError(f"the answer's source {message.source} is unknown to this client; is it older?")
    return Retrieved(
        items=list(_ids_from(message.items)),  # type: ignore[arg-type]
        scores=list(message.scores),
        snapshot_version=message.snapshot_version,
        source=_SOURCE_OF[message.source],
        shortfall=message.shortfall,
        unknown_items=message.unknown_items,
        titles=list(message.titles),
    )


def embedded_to(answer: Embedded) -> pb.EmbedUsersResponse:
    """An answer as a message."""
    return pb.EmbedUsersResponse(
        values=answer.values,
        width=answer.width,
        events_read=answer.events_read,
        unknown_items=answer.unknown_items,
        snapshot_version=answer.snapshot_version,
    )


def embedded_from(message: pb.EmbedUsersResponse) -> Embedded:
    """A message as an answer."""
    return Embedded(
        values=list(message.values),
        width=message.width,
        events_read=list(message.events_read),
        unknown_items=list(message.unknown_items),
        snapshot_version=message.snapshot_version,
    )


def state_to(state: ServingState) -> pb.GetServingStateResponse:
    """A state as a message."""
    return pb.GetServingStateResponse(
        snapshot_version=state.snapshot_version,
        created=state.created,
        dataset=state.dataset,
        items=state.items,
        item_ids=pb.ID_KIND_STRING if state.string_ids else pb.ID_KIND_INTEGER,
        width=state.width,
        max_length=state.max_length,
        actions=state.actions,
        index=state.index,
        ann_recall=state.ann_recall,
        stored_users=state.stored_users,
        context=state.context,
        auxiliary=state.auxiliary,
        query_actions=state.query_actions,
    )


def state_from(message: pb.GetServingStateResponse) -> ServingState:
    """A message as a state."""
    return ServingState(
        snapshot_version=message.snapshot_version,
        created=message.created,
        dataset=message.dataset,
        items=message.items,
        string_ids=message.item_ids == pb.ID_KIND_STRING,
        width=message.width,
        max_length=message.max_length,
        actions=tuple(message.actions),
        index=message.index,
        ann_recall=message.ann_recall,
        stored_users=message.stored_users,
        context=tuple(message.context),
        auxiliary=tuple(message.auxiliary),
        query_actions=message.query_actions,
    )
