"""Setting fields of messages from values that may not fit them."""

from typing import Any

from retrieval.errors import InvalidRequestError

__all__ = ["set_field"]


def set_field(message: Any, name: str, value: object, field: str, kind: str) -> None:
    """Set a field of a message.

    Args:
        message: the message.
        name: the field's name in it.
        value: the value.
        field: the field's path in the request, for the error.
        kind: what the value must be, for the error.

    Raises:
        InvalidRequestError: the value is of another type, is a number that does not fit, or is no Unicode text: half of
            a surrogate pair, which a Python string may hold, cannot be sent.
    """
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(field, f"must be {kind} ({error})") from None
