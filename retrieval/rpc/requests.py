"""What is asked of the service and what it answers, as plain values that know nothing of gRPC.

The in-process service and the client take and return the same objects. No numpy here: the client must load fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from retrieval.histories.event import Event
from retrieval.index.filter import Filter

__all__ = [
    "EmbedRequest",
    "Embedded",
    "Embedding",
    "History",
    "Ids",
    "RecordRequest",
    "Recorded",
    "RetrieveRequest",
    "Retrieved",
    "ServingState",
    "Source",
    "StoredUser",
]

Ids = Sequence[int] | Sequence[str]
"""Ids of one kind."""


@dataclass(frozen=True, slots=True)
class History:
    """What a user did, oldest event first.

    Attributes:
        items: item of each event; unknown ones are passed over.
        timestamps: seconds since 1970 (UTC) of each event, never falling.
        actions: name of each event's action, "" where there is none; empty if none is known.
        context: static attributes by name; names that the snapshot does not read are passed over.
        auxiliary: slowly changing values by the name of their series: seconds and value of each event, oldest first.
    """

    items: Ids
    timestamps: Sequence[int]
    actions: Sequence[str] = ()
    context: Mapping[str, str] = field(default_factory=dict)
    auxiliary: Mapping[str, Sequence[tuple[int, str]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredUser:
    """A user whose history the server holds.

    Attributes:
        id: the user's id.
        fresh: events, context and points of auxiliary series that may not be recorded yet, for this call.
    """

    id: int | str
    fresh: History | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """A ready user embedding of any length but 0."""

    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveRequest:
    """Asks for one user's candidates.

    Attributes:
        user: for whom; None, which the wire can express, is refused.
        k: how many.
        request_time: seconds since 1970 (UTC); None is now.
        exclude: items that must not be in the answer.
        exclude_seen: leave out every item of the history, too.
        include_titles: also answer titles.
        filter: what items must meet to be in the answer; None is anything.
        required_version: the snapshot that must answer; "" is whichever is live.
        action: which the user is likely to meet the items with; "" is any positive one.
    """

    user: History | StoredUser | Embedding | None
    k: int
    request_time: int | None = None
    exclude: Ids = ()
    exclude_seen: bool = False
    include_titles: bool = False
    filter: Filter | None = None
    required_version: str = ""
    action: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Asks for embeddings of users at one moment (None is now), for one action ("" is any)."""

    users: Sequence[History | StoredUser | None]
    request_time: int | None = None
    action: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRequest:
    """Asks for events to be added to stored histories."""

    events: Sequence[Event]


class Source(Enum):
    """Where an answer's items come from."""

    MODEL = "model"
    POPULARITY = "popularity"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieved:
    """Candidates, best first.

    Attributes:
        items: item ids, of the catalogue's kind.
        scores: one per item: inner product of user and item, or the item's share of all events.
        snapshot_version: the snapshot that made this answer.
        source: whether the model chose, popularity, or the model from context alone.
        shortfall: k minus the number of items; above 0 where fewer are eligible.
        unknown_items: events of the history whose item the catalogue does not have.
        titles: one per item if they were asked for and the catalogue has them, else empty.
    """

    items: list[int] | list[str]
    scores: list[float]
    snapshot_version: str
    source: Source
    shortfall: int = 0
    unknown_items: int = 0
    titles: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """Embeddings of users.

    Attributes:
        values: `width` numbers per user, one user after the other.
        width: numbers per embedding.
        events_read: events on items that the encoder read, per user; an embedding of all zeros knows nothing at all.
        unknown_items: events whose item the catalogue does not have, per user.
        snapshot_version: the snapshot that made this answer.
    """

    values: list[float]
    width: int
    events_read: list[int]
    unknown_items: list[int]
    snapshot_version: str

    def embedding(self, user: int) -> list[float]:
        """Embedding of the user at this place of the request."""
        return self.values[user * self.width : (user + 1) * self.width]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Events are durable.

    Attributes:
        unknown_items: events whose item the catalogue does not have (yet).
    """

    unknown_items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingState:
    """What a server serves.

    Attributes:
        snapshot_version: the live snapshot.
        created: when it was written, ISO 8601, UTC.
        dataset: fingerprint of the dataset that the encoder was trained on.
        items: size of the catalogue.
        string_ids: whether item ids are strings, else integers.
        width: numbers per embedding.
        max_length: tokens that the encoder reads at most.
        actions: names of actions that histories may use, beside "".
        context: names of the attributes that are read.
        auxiliary: names of the series that are read.
        query_actions: whether requests may name an action.
        index: the index, for people.
        ann_recall: recall@100 of the index against exact search, measured at publishing.
        stored_users: whether the server holds histories.
    """

    snapshot_version: str
    created: str
    dataset: str
    items: int
    string_ids: bool
    width: int
    max_length: int
    actions: tuple[str, ...]
    index: str
    ann_recall: float
    stored_users: bool
    context: tuple[str, ...] = ()
    auxiliary: tuple[str, ...] = ()
    query_actions: bool = False
