"""Filters as messages, and back. Used by both ends: no numpy, torch or faiss here."""

from datetime import UTC, datetime, timedelta

from retrieval.errors import FilterError, InvalidRequestError
from retrieval.index.filter import And, Compare, Filter, In, Missing, Not, Or, Value
from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb
from retrieval.rpc.fields import set_field

__all__ = ["filter_from_message", "filter_to"]

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


def filter_to(message: pb.Filter, filter_: Filter, field: str, depth: int = 1) -> None:
    """A filter as a message.

    Args:
        message: to be filled.
        filter_: the filter.
        field: the message's path in the request, for errors.
        depth: levels of nesting down to it.

    Raises:
        InvalidRequestError: a value or name does not fit its field, or the filter is nested too deep.
    """
    _check_depth(depth)
    if isinstance(filter_, And | Or):
        kind = "all" if isinstance(filter_, And) else "any"
        for place, part in enumerate(filter_.parts):
            filter_to(getattr(message, kind).filters.add(), part, f"{field}.{kind}[{place}]", depth + 1)
    elif isinstance(filter_, Not):
        filter_to(getattr(message, "not"), filter_.part, f"{field}.not", depth + 1)
    elif isinstance(filter_, In):
        test = getattr(message, "in")
        set_field(test, "attribute", filter_.attribute, f"{field}.in.attribute", "text")
        for place, value in enumerate(filter_.values):
            _value_to(test.values.add(), value, f"{field}.in.values[{place}]")
    elif isinstance(filter_, Compare):
        set_field(message.compare, "attribute", filter_.attribute, f"{field}.compare.attribute", "text")
        message.compare.operator = _OPERATORS[filter_.operator]
        _value_to(message.compare.value, filter_.value, f"{field}.compare.value")
    else:
        assert isinstance(filter_, Missing)
        set_field(message.missing, "attribute", filter_.attribute, f"{field}.missing.attribute", "text")


def filter_from_message(message: pb.Filter, field: str, depth: int = 1) -> Filter:
    """A message as a filter; arguments as of `filter_to`.

    Raises:
        InvalidRequestError: it is none; the field leads to the part at fault.
    """
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
            return Not(filter_from_message(inner, field, depth + 1))
        parts = tuple(
            filter_from_message(part, f"{field}[{place}]", depth + 1) for place, part in enumerate(inner.filters)
        )
        return And(parts) if kind == "all" else Or(parts)
    except FilterError as error:
        raise InvalidRequestError(field, str(error)) from None
