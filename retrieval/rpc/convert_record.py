"""Events to record as messages, and back. Used by both ends: no numpy, torch or faiss here."""

from retrieval.errors import InvalidRequestError
from retrieval.histories.event import Event
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.convert import id_from, id_to
from retrieval.rpc.fields import set_field
from retrieval.rpc.requests import Recorded, RecordRequest

__all__ = ["record_request_from", "record_request_to", "recorded_from", "recorded_to"]


def record_request_to(request: RecordRequest) -> pb.RecordEventsRequest:
    """A request as a message.

    Raises:
        InvalidRequestError: a value does not fit its field.
    """
    message = pb.RecordEventsRequest()
    for place, event in enumerate(request.events):
        part, field = message.events.add(), f"events[{place}]"
        id_to(part.user_id, event.user_id, f"{field}.user_id")
        if event.item_id is not None:
            id_to(part.item_id, event.item_id, f"{field}.item_id")
        for name, kind in (("action", "text"), ("timestamp", "an integer, in seconds"), ("event_id", "text")):
            set_field(part, name, getattr(event, name), f"{field}.{name}", kind)
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
                user_id=id_from(event.user_id, f"events[{place}].user_id"),
                item_id=id_from(event.item_id, f"events[{place}].item_id") if event.HasField("item_id") else None,
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
