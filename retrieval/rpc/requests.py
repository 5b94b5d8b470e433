"""What is asked of the service and what it answers, as plain values that know nothing of gRPC.

The in-process service and the client take and return the same objects. No numpy here: the client must load fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from retrieval.histories.event import Event
from retrieval.index.filter import Filter

__all__ = [
    "Attribute",
    "Debug",
    "EmbedRequest",
    "Embedded",
    "Embedding",
    "History",
    "Ids",
    "RecordRequest",
    "Recorded",
    "RetrieveRequest",
    "Retrieved",
    "SearchPlan",
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
        exact: score every eligible item instead of asking the index.
        debug: also answer how the answer came about.
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
    exact: bool = False
    debug: bool = False


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
    """Where an answer's items, or one of them, come from.

    Attributes:
        MODEL: the model's nearest items.
        POPULARITY: the most popular items, since nothing is known of the user.
        CONTEXT: the model's nearest items for a user of whom it knows the context alone.
        COLD_ITEM: of one item: the model's choice, though no event of the training log was on it.
    """

    MODEL = "model"
    POPULARITY = "popularity"
    CONTEXT = "context"
    COLD_ITEM = "cold item"


class SearchPlan(Enum):
    """How items were found.

    Attributes:
        INDEX: the index was asked for more than wanted, and what is not eligible was dropped.
        SELECTOR: the index looked at eligible items only.
        SCAN: every eligible item was scored, which is exact.
    """

    INDEX = "index"
    SELECTOR = "selector"
    SCAN = "scan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Debug:
    """How an answer came about.

    Attributes:
        plan: how the items were found; None where they are the popular ones.
        eligible: items that meet the filter and are not excluded.
        batch_size: queries that were encoded and searched together.
        decode_seconds: from the request's bytes to a checked query, the look-up of a stored history included.
        queue_seconds: waiting for the worker.
        encode_seconds: encoding the batch.
        search_seconds: searching for the batch.
    """

    plan: SearchPlan | None
    eligible: int
    batch_size: int = 0
    decode_seconds: float = 0.0
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    search_seconds: float = 0.0


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
        cold_items: places in `items` of those that no event of the training log was on; empty for popular items.
        debug: how the answer came about, if that was asked for.
    """

    items: list[int] | list[str]
    scores: list[float]
    snapshot_version: str
    source: Source
    shortfall: int = 0
    unknown_items: int = 0
    titles: list[str] = field(default_factory=list)
    cold_items: list[int] = field(default_factory=list)
    debug: Debug | None = None

    @property
    def sources(self) -> list[Source]:
        """The source of each item."""
        cold = set(self.cold_items)
        return [Source.COLD_ITEM if place in cold else self.source for place in range(len(self.items))]


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


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of the catalogue's items, by which answers can be filtered.

    Attributes:
        name: as filters call it.
        values: "text", "integers", "numbers", "true or false" or "moments"; "" where filters compare none, and can ask
            whether it is missing.
        several: whether an item may have several values.
    """

    name: str
    values: str
    several: bool


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
        max_k: highest k of a request.
        max_batch: most requests of one BatchRetrieve.
        index: the index, for people.
        ann_recall: recall@100 of the index against exact search, measured at publishing.
        stored_users: whether the server holds histories.
        attributes: what filters can ask about.
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
    max_k: int = 0
    max_batch: int = 0
    attributes: tuple[Attribute, ...] = ()
