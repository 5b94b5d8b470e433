"""Requests, checked and turned into arrays. Everything that is wrong with a request is found here, in one sentence.

Fields in messages carry the names that they have in `retrieval.proto`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from retrieval.config import Config
from retrieval.errors import FilterError, InvalidRequestError
from retrieval.histories.store import Series, StoredHistory
from retrieval.index.filter import And, Compare, Filter, In, Not, Or
from retrieval.rpc.errors import VersionNotLoadedError
from retrieval.rpc.requests import Embedding, EmbedRequest, History, Ids, RetrieveRequest
from retrieval.rpc.serving import ServingSnapshot
from retrieval.types import SideRows

__all__ = [
    "Known",
    "Limits",
    "PreparedEmbed",
    "PreparedRetrieve",
    "Trace",
    "UserEvents",
    "fresh_history",
    "prepare_embed",
    "prepare_retrieve",
    "shown",
]

# 2200-01-01: later "seconds" are milliseconds or garbage.
_END_OF_TIME = 7_258_118_400
_SHOWN_NAMES = 20
_SHOWN_CHARACTERS = 60
_SHOWN_SENTENCE = 400


class Limits(Config):
    """What one call may ask for.

    Attributes:
        max_k: candidates.
        max_events: events of an inline history.
        max_excluded: ids to exclude.
        max_users: users of one EmbedUsers call.
        max_filter: tests and values of a filter together.
        max_batch: requests of one BatchRetrieve call.
        max_recorded: events of one RecordEvents call.
    """

    max_k: int = Field(default=10_000, ge=1)
    max_events: int = Field(default=20_000, ge=1)
    max_excluded: int = Field(default=100_000, ge=0)
    max_users: int = Field(default=256, ge=1)
    max_filter: int = Field(default=10_000, ge=1)
    max_batch: int = Field(default=64, ge=1)
    max_recorded: int = Field(default=1_000, ge=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEvents:
    """What the encoder is to read of one user.

    Attributes:
        rows: vocabulary rows of the latest known events, int64 `[T]`, T at most the encoder's `max_length`.
        actions: action codes, uint8 `[T]`.
        timestamps: seconds, int64 `[T]`.
        side: what is read beside these, as one row; None where nothing is.
        request_time: seconds.
        action: code of the action that is asked for; 0 for any.
        seen: rows of all known events, with repeats.
        unknown: events whose item the catalogue does not have.
    """

    rows: NDArray[np.int64]
    actions: NDArray[np.uint8]
    timestamps: NDArray[np.int64]
    side: SideRows | None
    request_time: int
    action: int
    seen: NDArray[np.int64]
    unknown: int

    @property
    def is_known(self) -> bool:
        """Whether there is anything of the user that the encoder can tell from nobody."""
        return bool(len(self.rows)) or (
            self.side is not None and bool(self.side.values.any() or self.side.context.any())
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Moments of a request, by `time.perf_counter`: when it came, when decoding it began, and when it was checked."""

    came: float
    began: float
    ready: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRetrieve:
    """A checked `RetrieveRequest`, bound to the snapshot that it was checked against.

    Attributes:
        serving: the snapshot.
        user: a user's events, or an embedding of unit length, float32 `[D]`.
        k: candidates.
        excluded: rows without repeats, int64.
        include_titles: whether titles are wanted.
        filter: what answers must meet, checked against the snapshot; None is anything.
        exact: whether to score every eligible item.
        trace: when this was asked and ready; None where nobody wants to know.
    """

    serving: ServingSnapshot
    user: UserEvents | NDArray[np.float32]
    k: int
    excluded: NDArray[np.int64]
    include_titles: bool
    filter: Filter | None
    exact: bool
    trace: Trace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEmbed:
    """A checked `EmbedRequest`, bound to the snapshot that it was checked against."""

    serving: ServingSnapshot
    users: tuple[UserEvents, ...]


Known = History | StoredHistory | Embedding | None
"""A request's user once stored ones are looked up."""


def prepare_retrieve(
    serving: ServingSnapshot, request: RetrieveRequest, user: Known, *, now: int, limits: Limits
) -> PreparedRetrieve:
    """Check a request and translate its ids.

    Args:
        serving: the snapshot to answer from.
        request: the request.
        user: `request.user`, or the history of the stored user that it names.
        now: the server's time in seconds, for a request without one.
        limits: what a call may ask for.

    Raises:
        InvalidRequestError: something is wrong; the sentence names the field.
        VersionNotLoadedError: another snapshot is required.
    """
    if request.required_version not in ("", serving.version):
        raise VersionNotLoadedError(
            f"required_version: {shown(request.required_version)} is not the live snapshot, which is {serving.version}"
        )
    if not 1 <= request.k <= limits.max_k:
        raise InvalidRequestError("k", f"must be from 1 to {limits.max_k}, not {request.k}")
    if len(request.exclude) > limits.max_excluded:
        raise InvalidRequestError("exclude", f"has {len(request.exclude)} ids; at most {limits.max_excluded} are taken")
    if user is None:
        raise InvalidRequestError("user", "is missing; send history, stored_user or embedding")
    if request.filter is not None:
        if (size := _filter_size(request.filter)) > limits.max_filter:
            raise InvalidRequestError("filter", f"has {size} tests and values; at most {limits.max_filter} are taken")
        _check_filter(serving, request.filter, "filter")
    action = _action(serving, request.action)
    excluded = _rows(serving, request.exclude, "exclude")
    prepared: UserEvents | NDArray[np.float32]
    if isinstance(user, Embedding):
        if request.exclude_seen:
            raise InvalidRequestError(
                "exclude_seen",
                "needs a history or a stored user; list the items of a ready embedding's user in exclude",
            )
        _request_time(request.request_time, now)
        prepared = _unit(serving, user)
    else:
        time = _request_time(request.request_time, now)
        prepared = _events(serving, user, time, action, limits, "history")
        if request.exclude_seen:
            excluded = np.concatenate([excluded, prepared.seen])
    return PreparedRetrieve(
        serving=serving,
        user=prepared,
        k=request.k,
        excluded=np.unique(excluded[excluded >= 0]) if len(excluded) else excluded,
        include_titles=request.include_titles,
        filter=request.filter,
        exact=request.exact,
    )


def prepare_embed(
    serving: ServingSnapshot, request: EmbedRequest, users: Sequence[Known], *, now: int, limits: Limits
) -> PreparedEmbed:
    """As `prepare_retrieve`, for the users of an `EmbedRequest`.

    Raises:
        InvalidRequestError: something is wrong; the sentence names the field.
    """
    if len(users) > limits.max_users:
        raise InvalidRequestError("users", f"has {len(users)} users; at most {limits.max_users} are taken")
    time = _request_time(request.request_time, now)
    action = _action(serving, request.action)
    prepared = []
    for place, user in enumerate(users):
        if user is None or isinstance(user, Embedding):
            raise InvalidRequestError(f"users[{place}]", "names no user; send history or stored_user")
        prepared.append(_events(serving, user, time, action, limits, f"users[{place}].history"))
    return PreparedEmbed(serving=serving, users=tuple(prepared))


def fresh_history(serving: ServingSnapshot, history: History, limits: Limits, field: str) -> StoredHistory:
    """Check events that a caller adds to a stored history.

    Raises:
        InvalidRequestError: something is wrong; the sentence names the field.
    """
    _check_history(serving, history, limits, field)
    _check_kind(serving, history.items, f"{field}.items")
    return StoredHistory(
        items=list(history.items),  # type: ignore[arg-type]
        actions=list(history.actions) or [""] * len(history.items),
        timestamps=_timestamps(history.timestamps, f"{field}.timestamps"),
        context=history.context,
        auxiliary=_series_of(history),
    )


def _events(
    serving: ServingSnapshot, history: History | StoredHistory, time: int, action: int, limits: Limits, field: str
) -> UserEvents:
    if isinstance(history, History):
        _check_history(serving, history, limits, field)
        rows = _rows(serving, history.items, f"{field}.items")
        timestamps = _timestamps(history.timestamps, f"{field}.timestamps")
        auxiliary = _series_of(history)
    else:
        # Our own store's data: an action that the snapshot does not know is not the caller's mistake.
        rows = serving.snapshot.vocabulary.rows_of(history.items)
        timestamps, auxiliary = history.timestamps, history.auxiliary
    known = np.flatnonzero(rows >= 0)
    latest = known[-serving.max_length :]
    if len(history.actions):
        names = list(history.actions)
        actions = serving.action_codes([names[place] for place in latest.tolist()])
    else:
        actions = np.zeros(len(latest), np.uint8)
    return UserEvents(
        rows=rows[latest],
        actions=actions,
        timestamps=timestamps[latest],
        side=serving.side(history.context, auxiliary),
        request_time=time,
        action=action,
        seen=rows[known],
        unknown=len(rows) - len(known),
    )


def _series_of(history: History) -> Mapping[str, Series]:
    return {name: Series.of(points) for name, points in history.auxiliary.items()}


def _check_history(serving: ServingSnapshot, history: History, limits: Limits, field: str) -> None:
    count = len(history.items)
    if count > limits.max_events:
        raise InvalidRequestError(
            f"{field}.items", f"has {count} events; at most {limits.max_events} are taken, send the latest"
        )
    if len(history.timestamps) != count:
        raise InvalidRequestError(
            f"{field}.timestamps", f"has {len(history.timestamps)} entries, but {field}.items has {count}"
        )
    if (size := sum(map(len, history.auxiliary.values()))) > limits.max_events:
        raise InvalidRequestError(
            f"{field}.auxiliary", f"has {size} events; at most {limits.max_events} are taken, send the latest"
        )
    for name, events in history.auxiliary.items():
        _timestamps([time for time, _ in events], f"{field}.auxiliary[{shown(name)}].timestamps")
    if not len(history.actions):
        return
    if len(history.actions) != count:
        raise InvalidRequestError(
            f"{field}.actions",
            f"has {len(history.actions)} entries, but {field}.items has {count}; send one per item or none",
        )
    unknown = set(history.actions).difference(serving.actions, [""]) if serving.actions else set()
    if unknown:
        place, name = next((place, name) for place, name in enumerate(history.actions) if name in unknown)
        raise InvalidRequestError(
            f"{field}.actions[{place}]",
            f"{shown(name)} is not an action of this snapshot; it has {_names(serving.actions)}",
        )


def _action(serving: ServingSnapshot, name: str) -> int:
    """Code of the action that is asked for."""
    if not name:
        return 0
    if not serving.snapshot.encoder.config.query_actions:
        raise InvalidRequestError("action", "cannot be asked for: this snapshot was not trained to be (query_actions)")
    if name not in serving.actions:
        known = _names(serving.actions)
        raise InvalidRequestError("action", f"{shown(name)} is not an action of this snapshot; it has {known}")
    return int(serving.action_codes([name])[0])


def _timestamps(values: Sequence[int], field: str) -> NDArray[np.int64]:
    timestamps = np.array(values, np.int64)
    outside = (timestamps < 0) | (timestamps >= _END_OF_TIME)
    if outside.any():
        place = int(outside.argmax())
        raise InvalidRequestError(
            f"{field}[{place}]", f"{timestamps[place]} is not a time in seconds from 1970 to the year 2199"
        )
    falling = timestamps[1:] < timestamps[:-1]
    if falling.any():
        place = int(falling.argmax()) + 1
        raise InvalidRequestError(
            f"{field}[{place}]",
            f"{timestamps[place]} is before {timestamps[place - 1]}, the one before it; send events oldest first",
        )
    return timestamps


def _request_time(time: int | None, now: int) -> int:
    if time is None:
        return now
    if not 0 <= time < _END_OF_TIME:
        raise InvalidRequestError("request_time", f"{time} is not a time in seconds from 1970 to the year 2199")
    return time


def _rows(serving: ServingSnapshot, ids: Ids, field: str) -> NDArray[np.int64]:
    """Rows of ids, −1 where the catalogue does not have them."""
    if not len(ids):
        return np.empty(0, np.int64)
    _check_kind(serving, ids, field)
    # A message's list becomes an array through the buffer protocol, without a Python integer per id.
    return serving.snapshot.vocabulary.rows_of(ids if serving.string_ids else np.array(ids, np.int64))


def _check_kind(serving: ServingSnapshot, ids: Ids, field: str) -> None:
    if len(ids) and isinstance(ids[0], str) != serving.string_ids:
        has, sent = ("strings", "integers") if serving.string_ids else ("integers", "strings")
        raise InvalidRequestError(field, f"holds {sent}, but the catalogue's item ids are {has}")


def _filter_size(filter_: Filter) -> int:
    if isinstance(filter_, And | Or):
        return sum(map(_filter_size, filter_.parts))
    if isinstance(filter_, Not):
        return _filter_size(filter_.part)
    return 1 + len(filter_.values) if isinstance(filter_, In) else 1


def _check_filter(serving: ServingSnapshot, filter_: Filter, field: str) -> None:
    """Check each test by itself, so that the error can say where in the filter it stands."""
    if isinstance(filter_, And | Or):
        kind = "all" if isinstance(filter_, And) else "any"
        for place, part in enumerate(filter_.parts):
            _check_filter(serving, part, f"{field}.{kind}[{place}]")
    elif isinstance(filter_, Not):
        _check_filter(serving, filter_.part, f"{field}.not")
    else:
        kind = "in" if isinstance(filter_, In) else "compare" if isinstance(filter_, Compare) else "missing"
        try:
            serving.snapshot.searcher.check(filter_)
        except FilterError as error:
            raise InvalidRequestError(f"{field}.{kind}", _shortened(str(error), _SHOWN_SENTENCE)) from None


def _unit(serving: ServingSnapshot, embedding: Embedding) -> NDArray[np.float32]:
    # float64, so that the length of large float32 numbers does not overflow.
    values = np.array(embedding.values, np.float64)
    width = serving.snapshot.searcher.width
    if len(values) != width:
        raise InvalidRequestError("embedding.values", f"has {len(values)} numbers; the snapshot's width is {width}")
    length = math.sqrt(values @ values)
    if not math.isfinite(length):
        place = int((~np.isfinite(values)).argmax())
        raise InvalidRequestError(f"embedding.values[{place}]", f"{values[place]} is not a finite number")
    if length == 0:
        raise InvalidRequestError("embedding.values", "are all zero, which points nowhere")
    return (values / length).astype(np.float32)


def shown(value: int | str) -> str:
    """A caller's value for a message, shortened: gRPC statuses travel in headers, which hold a few KiB."""
    return repr(_shortened(value, _SHOWN_CHARACTERS) if isinstance(value, str) else value)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def _names(names: Sequence[str]) -> str:
    listed = ", ".join(shown(name) for name in names[:_SHOWN_NAMES])
    return listed if len(names) <= _SHOWN_NAMES else f"{listed} and {len(names) - _SHOWN_NAMES} more"
