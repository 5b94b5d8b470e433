"""One event, as it is recorded. Loads nothing: clients use it, too."""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Event"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a user did once, or what is so of a user from some time on.

    Attributes:
        user_id: whose; an integer of 64 bits, or text.
        item_id: on which item; an integer of 64 bits, or text. None: on none, `context` or `auxiliary` is told alone.
        timestamp: seconds since 1970 (UTC).
        action: what was done, by name; "" if that is not known.
        event_id: by which a repeat is recognised, unique among the user's events. Where "", by item, action and time.
        context: static attributes of the user, by name; those of the latest time stay.
        auxiliary: slowly changing values at this time, by the name of their series.
    """

    user_id: int | str
    item_id: int | str | None
    timestamp: int
    action: str = ""
    event_id: str = ""
    context: Mapping[str, str] = field(default_factory=dict)
    auxiliary: Mapping[str, str] = field(default_factory=dict)
