"""One event, as it is recorded. Loads nothing: clients use it, too."""

from dataclasses import dataclass

__all__ = ["Event"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a user did once.

    Attributes:
        user_id: whose; an integer of 64 bits, or text.
        item_id: on which item; an integer of 64 bits, or text.
        timestamp: seconds since 1970 (UTC).
        action: what was done, by name; "" if that is not known.
        event_id: by which a repeat is recognised, unique among the user's events. Where "", by item, action and time.
    """

    user_id: int | str
    item_id: int | str
    timestamp: int
    action: str = ""
    event_id: str = ""
