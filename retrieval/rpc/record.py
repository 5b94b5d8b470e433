"""Events to record, checked: what is wrong with one is told before any of them is recorded."""

from collections.abc import Sequence

from retrieval.errors import InvalidRequestError
from retrieval.histories.event import Event
from retrieval.histories.recorded import MAX_ID_BYTES
from retrieval.rpc.prepare import Limits, shown
from retrieval.rpc.serving import ServingSnapshot

__all__ = ["check_events"]

_MAX_NAME_BYTES = 100
_MAX_TOLD = 32
_DAY = 86_400


def check_events(serving: ServingSnapshot, events: Sequence[Event], *, now: int, limits: Limits) -> int:
    """Check events; gives how many of them have an item that the catalogue does not have.

    Args:
        serving: the snapshot whose catalogue says of what kind item ids are.
        events: the events.
        now: the server's time in seconds.
        limits: what a call may ask for.

    Raises:
        InvalidRequestError: something is wrong; the sentence names the field.
    """
    if not 1 <= len(events) <= limits.max_recorded:
        raise InvalidRequestError("events", f"has {len(events)} events; from 1 to {limits.max_recorded} are taken")
    for place, event in enumerate(events):
        _check(serving, event, f"events[{place}]", now)
    items: list = [event.item_id for event in events if event.item_id is not None]
    return int((serving.snapshot.vocabulary.rows_of(items) < 0).sum())


def _check(serving: ServingSnapshot, event: Event, field: str, now: int) -> None:
    if event.user_id == "":
        raise InvalidRequestError(f"{field}.user_id", "is empty")
    if event.item_id is None and not event.context and not event.auxiliary:
        raise InvalidRequestError(f"{field}.item_id", "holds no id, and the event tells neither context nor auxiliary")
    if event.item_id is not None and isinstance(event.item_id, str) != serving.string_ids:
        has = "strings" if serving.string_ids else "integers"
        raise InvalidRequestError(f"{field}.item_id", f"is {shown(event.item_id)}, but the catalogue's ids are {has}")
    for name, value, most in (
        ("user_id", event.user_id, MAX_ID_BYTES),
        ("item_id", event.item_id, MAX_ID_BYTES),
        ("action", event.action, _MAX_NAME_BYTES),
        ("event_id", event.event_id, _MAX_NAME_BYTES),
    ):
        if isinstance(value, str) and (size := len(value.encode())) > most:
            raise InvalidRequestError(f"{field}.{name}", f"has {size} bytes; at most {most} are taken")
    if (count := len(event.context) + len(event.auxiliary)) > _MAX_TOLD:
        raise InvalidRequestError(
            field, f"has {count} values of context and auxiliary series; at most {_MAX_TOLD} are taken"
        )
    for name, values in (("context", event.context), ("auxiliary", event.auxiliary)):
        for key, value in values.items():
            if (size := max(len(key.encode()), len(value.encode()))) > _MAX_NAME_BYTES:
                raise InvalidRequestError(
                    f"{field}.{name}[{shown(key)}]", f"has {size} bytes; at most {_MAX_NAME_BYTES} are taken"
                )
    # One from the future would stay the user's last event until then.
    if not 0 <= event.timestamp <= now + _DAY:
        raise InvalidRequestError(
            f"{field}.timestamp", f"{event.timestamp} is not a time in seconds from 1970 to a day from now"
        )
