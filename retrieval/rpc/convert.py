"""Messages to plain requests and answers, and back. Used by both ends: no numpy, torch or faiss here."""

from collections.abc import Sequence
from typing import Any

from retrieval.errors import InvalidRequestError, RetrievalError
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.convert_filter import filter_from_message, filter_to
from retrieval.rpc.errors import ServerFaultError
from retrieval.rpc.fields import set_field
from retrieval.rpc.requests import (
    Attribute,
    Debug,
    Embedded,
    Embedding,
    EmbedRequest,
    History,
    Ids,
    Retrieved,
    RetrieveRequest,
    SearchPlan,
    ServingState,
    Source,
    StoredUser,
)
from retrieval.rpc.status import error_from, error_to

__all__ = [
    "batch_from",
    "batch_request_from",
    "batch_request_to",
    "embed_request_from",
    "embed_request_to",
    "embedded_from",
    "embedded_to",
    "id_from",
    "id_to",
    "result_to",
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
_PLANS = {
    None: pb.Debug.PLAN_UNSPECIFIED,
    SearchPlan.INDEX: pb.Debug.PLAN_INDEX,
    SearchPlan.SELECTOR: pb.Debug.PLAN_SELECTOR,
    SearchPlan.SCAN: pb.Debug.PLAN_SCAN,
}
_PLAN_OF = {number: plan for plan, number in _PLANS.items()}
_SOURCE_OF = {number: source for source, number in _SOURCES.items()}
_VALUE_KINDS = {
    "": pb.VALUE_KIND_UNSPECIFIED,
    "text": pb.VALUE_KIND_TEXT,
    "integers": pb.VALUE_KIND_INTEGER,
    "numbers": pb.VALUE_KIND_NUMBER,
    "true or false": pb.VALUE_KIND_BOOLEAN,
    "moments": pb.VALUE_KIND_MOMENT,
}
_STAGES = ("decode", "queue", "encode", "search")
_NUMBER, _TEXT = "an integer of its range", "text"


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


def id_to(message: pb.UserId | pb.ItemId, value: int | str, field: str) -> None:
    """Set an id.

    Raises:
        InvalidRequestError: it is neither text nor an integer of 64 bits.
    """
    kind = "string" if isinstance(value, str) else "integer"
    set_field(message, kind, value, field, "a string or a 64-bit integer")


def id_from(message: pb.UserId | pb.ItemId, field: str) -> int | str:
    """The id in a message.

    Raises:
        InvalidRequestError: there is none.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequestError(field, "holds no id; set `integer` or `string`")
    value: int | str = getattr(message, kind)
    return value


def _user_to(message: Any, user: History | StoredUser | Embedding | None, prefix: str) -> None:
    if isinstance(user, History):
        _history_to(message.history, user, f"{prefix}history")
    elif isinstance(user, StoredUser):
        id_to(message.stored_user, user.id, f"{prefix}stored_user")
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
            return StoredUser(id_from(message.stored_user, f"{prefix}stored_user"), fresh)
        case "embedding":
            return Embedding(message.embedding.values)
    return None


def _series_from(message: pb.AuxiliarySeries, field: str) -> list[tuple[int, str]]:
    if len(message.values) != len(message.timestamps):
        raise InvalidRequestError(
            field, f"has {len(message.values)} values, but {len(message.timestamps)} timestamps; send one for each"
        )
    return list(zip(message.timestamps, message.values, strict=True))


def retrieve_request_to(request: RetrieveRequest) -> pb.RetrieveRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.RetrieveRequest()
    _retrieve_request_into(message, request)
    return message


def _retrieve_request_into(message: pb.RetrieveRequest, request: RetrieveRequest) -> None:
    _user_to(message, request.user, "")
    set_field(message, "k", request.k, "k", _NUMBER)
    if request.request_time is not None:
        set_field(message, "request_time", request.request_time, "request_time", _NUMBER)
    if len(request.exclude):
        _ids_to(message.exclude, request.exclude, "exclude")
    if request.filter is not None:
        filter_to(message.filter, request.filter, "filter")
    set_field(message, "required_version", request.required_version, "required_version", _TEXT)
    set_field(message, "action", request.action, "action", _TEXT)
    for name in ("exclude_seen", "include_titles", "exact", "debug"):
        # A switch that is off need not be written.
        if getattr(request, name):
            setattr(message, name, True)


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
        filter=filter_from_message(message.filter, "filter") if message.HasField("filter") else None,
        required_version=message.required_version,
        action=message.action,
        exact=message.exact,
        debug=message.debug,
    )


def batch_request_to(requests: Sequence[RetrieveRequest]) -> pb.BatchRetrieveRequest:
    """Requests as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.BatchRetrieveRequest()
    for place, request in enumerate(requests):
        try:
            _retrieve_request_into(message.requests.add(), request)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"requests[{place}].{error.field}", error.reason) from None
    return message


def batch_request_from(message: pb.BatchRetrieveRequest) -> list[RetrieveRequest | RetrievalError]:
    """A message's requests; where one is none, why."""
    requests: list[RetrieveRequest | RetrievalError] = []
    for part in message.requests:
        try:
            requests.append(retrieve_request_from(part))
        except InvalidRequestError as error:
            requests.append(error)
    return requests


def embed_request_to(request: EmbedRequest) -> pb.EmbedUsersRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.EmbedUsersRequest()
    set_field(message, "action", request.action, "action", _TEXT)
    for place, user in enumerate(request.users):
        _user_to(message.users.add(), user, f"users[{place}].")
    if request.request_time is not None:
        set_field(message, "request_time", request.request_time, "request_time", _NUMBER)
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


def retrieved_to(answer: Retrieved, *, string_ids: bool) -> pb.RetrieveResponse:
    """An answer as a message; `string_ids` keeps the kind of an answer without items."""
    message = pb.RetrieveResponse(
        snapshot_version=answer.snapshot_version,
        source=_SOURCES[answer.source],
        shortfall=answer.shortfall,
        unknown_items=answer.unknown_items,
        titles=answer.titles,
        cold_items=answer.cold_items,
    )
    ids: Any = message.items.strings if string_ids else message.items.integers
    ids.values.extend(answer.items)
    ids.SetInParent()
    message.scores.extend(answer.scores)
    if answer.debug is not None:
        _debug_to(message.debug, answer.debug)
    return message


def _debug_to(message: pb.Debug, debug: Debug) -> None:
    message.plan, message.eligible, message.batch_size = _PLANS[debug.plan], debug.eligible, debug.batch_size
    for stage in _STAGES:
        getattr(message, stage).FromNanoseconds(round(1e9 * getattr(debug, f"{stage}_seconds")))


def _debug_from(message: pb.Debug) -> Debug:
    seconds = {f"{stage}_seconds": getattr(message, stage).ToNanoseconds() / 1e9 for stage in _STAGES}
    # A plan that is newer than this client is none that it knows.
    plan = _PLAN_OF.get(message.plan)
    return Debug(plan=plan, eligible=message.eligible, batch_size=message.batch_size, **seconds)


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
        cold_items=list(message.cold_items),
        debug=_debug_from(message.debug) if message.HasField("debug") else None,
    )


def result_to(outcome: pb.RetrieveResponse | Exception) -> pb.RetrieveResult:
    """What became of one request among several, as a message."""
    if isinstance(outcome, Exception):
        return pb.RetrieveResult(error=error_to(outcome))
    return pb.RetrieveResult(response=outcome)


def batch_from(message: pb.BatchRetrieveResponse) -> list[Retrieved | RetrievalError]:
    """A message as outcomes.

    Raises:
        ServerFaultError: as `retrieved_from`.
    """
    return [
        retrieved_from(result.response) if result.HasField("response") else error_from(result.error)
        for result in message.results
    ]


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
        max_k=state.max_k,
        max_batch=state.max_batch,
        attributes=[
            pb.Attribute(name=one.name, values=_VALUE_KINDS[one.values], several=one.several)
            for one in state.attributes
        ],
    )


def state_from(message: pb.GetServingStateResponse) -> ServingState:
    """A message as a state."""
    # A newer server may know further ones.
    kinds = {kind: name for name, kind in _VALUE_KINDS.items()}
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
        max_k=message.max_k,
        max_batch=message.max_batch,
        attributes=tuple(Attribute(one.name, kinds.get(one.values, ""), one.several) for one in message.attributes),
    )
