"""Requests that nobody should send: by hypothesis from the messages' descriptors, and good ones spoilt.

Everything follows from a seed. What is made knows the fields only by their types and a few names, so a new field or
method is attacked without a change here.
"""

import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from retrieval.rpc._generated.retrieval.v1 import retrieval_pb2 as pb

__all__ = ["monsters", "spoilt", "structured"]

_INTEGERS = (0, 1, -1, 7, 20, 500, 10_001, 2**31 - 1, -(2**31), 2**53 + 1, 2**63 - 1, -(2**63), 1_700_000_000)
_NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.3, 1e-45, 3.4e38, 1e308, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    "like",
    "skip",
    "title",
    "events",
    "colour",
    "7",
    "\x00",
    "é" * 60,
    "🎬",
    "x" * 600,
    "000001-abcdef012345",
)
_DEEPEST = 5
_TYPE = FieldDescriptor
_32_BITS = (_TYPE.TYPE_INT32, _TYPE.TYPE_UINT32, _TYPE.TYPE_SINT32, _TYPE.TYPE_ENUM)


def _scalars(field: FieldDescriptor, near: Sequence[int]) -> "tuple[Any, ...]":
    """Values that have gone wrong somewhere before, of a field's type."""
    if field.cpp_type == _TYPE.CPPTYPE_STRING:
        return tuple(text.encode() for text in _TEXTS) if field.type == _TYPE.TYPE_BYTES else _TEXTS
    if field.cpp_type in (_TYPE.CPPTYPE_FLOAT, _TYPE.CPPTYPE_DOUBLE):
        return _NUMBERS[:-4] + _NUMBERS[-3:] if field.cpp_type == _TYPE.CPPTYPE_FLOAT else _NUMBERS
    if field.cpp_type == _TYPE.CPPTYPE_BOOL:
        return (False, True)
    if field.type == _TYPE.TYPE_ENUM:
        return (-1, 0, 1, 2, 3, 4, 99)
    unsigned = field.type in (_TYPE.TYPE_UINT32, _TYPE.TYPE_UINT64)
    bits = 31 if field.type in _32_BITS else 63
    return tuple(n for n in (*_INTEGERS, *near) if -(2**bits) * (not unsigned) <= n < 2**bits)


def _values(field: FieldDescriptor, near: Sequence[int], depth: int) -> "st.SearchStrategy[Any]":
    if field.message_type is None:
        return st.sampled_from(_scalars(field, near))
    return _messages(field.message_type, near, depth + 1)


def _field(field: FieldDescriptor, near: Sequence[int], width: int, depth: int) -> "st.SearchStrategy[Any]":
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        return st.dictionaries(_values(key, near, depth), _values(value, near, depth), max_size=3)
    one = _values(field, near, depth)
    if not field.is_repeated:
        return one
    if field.cpp_type == _TYPE.CPPTYPE_FLOAT:
        finite = st.sampled_from(_NUMBERS[:5])
        return st.lists(finite, min_size=width, max_size=width) | st.lists(one, max_size=width + 1)
    if field.name == "timestamps":
        return st.lists(one, max_size=4).map(sorted) | st.lists(one, max_size=4)
    return st.lists(one, max_size=4)


def _deferred(field: FieldDescriptor, near: Sequence[int], width: int, depth: int) -> "st.SearchStrategy[Any]":
    """For messages that hold themselves."""

    def make() -> "st.SearchStrategy[Any]":
        return _field(field, near, width, depth)

    return st.deferred(make)


def _messages(descriptor: Any, near: Sequence[int], depth: int = 0, width: int = 32) -> "st.SearchStrategy[Any]":
    if depth > _DEEPEST:
        return st.just({})
    optional = {field.name: _deferred(field, near, width, depth) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=optional)


def structured(kind: type[Message], near: Sequence[int], count: int, seed: int) -> list[bytes]:
    """Messages of a kind that hypothesis thinks of, serialised.

    Args:
        kind: the message.
        near: integers that mean something to the server, such as ids.
        count: of messages; a few less where it repeats itself.
        seed: of it all.
    """
    made: list[bytes] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.given(values=_messages(kind.DESCRIPTOR, near))
    def collect(values: dict[str, Any]) -> None:
        made.append(kind(**values).SerializeToString())

    collect()
    return made


def spoilt(good: Sequence[Message], near: Sequence[int], count: int, seed: int) -> Iterator[bytes]:
    """Good messages with 1 to 3 changes each: half of them to fields, half to bytes."""
    chance = random.Random(seed)
    for number in range(count):
        message = chance.choice(good)
        if number % 2:
            changed = type(message)()
            changed.CopyFrom(message)
            for _ in range(chance.randint(1, 3)):
                _spoil(changed, near, chance)
            yield changed.SerializeToString()
        else:
            content = message.SerializeToString()
            for _ in range(chance.randint(1, 3)):
                content = _damage(content, chance.choice(good).SerializeToString(), chance)
            yield content


def _spoil(message: Message, near: Sequence[int], chance: random.Random) -> None:
    """Change a field of the message or of one inside it."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    inside = [field for field, _ in message.ListFields() if field.message_type is not None and not _is_map(field)]
    if inside and chance.random() < 0.7:
        field = chance.choice(inside)
        held = getattr(message, field.name)
        _spoil(chance.choice(held) if field.is_repeated else held, near, chance)
        return
    field = chance.choice([field for field in fields if not _is_map(field)] or fields)
    if _is_map(field) or chance.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None:
        if field.is_repeated:
            getattr(message, field.name).add()
        else:
            getattr(message, field.name).SetInParent()
    elif field.is_repeated:
        held = getattr(message, field.name)
        for _ in range(chance.choice([1, 1, 1, 5, 300])):
            held.append(chance.choice(_scalars(field, near)))
        if chance.random() < 0.5:
            held[chance.randrange(len(held))] = chance.choice(_scalars(field, near))
            del held[: chance.randrange(len(held))]
    else:
        setattr(message, field.name, chance.choice(_scalars(field, near)))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _damage(content: bytes, other: bytes, chance: random.Random) -> bytes:
    start, stop = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return chance.choice(
        (
            lambda: content[:start],
            lambda: content[:start] + content[stop:],
            lambda: content[:stop] + content[start:],
            lambda: content[:start] + chance.randbytes(chance.randint(1, 8)) + content[start:],
            lambda: content[:start] + chance.randbytes(stop - start) + content[stop:],
            lambda: content[:start] + other[start:],
            lambda: content + other,
            lambda: content[:start] + b"\xff" * chance.randint(1, 12) + content[stop:],
            lambda: content + struct.pack("<BQ", chance.randrange(256), chance.getrandbits(64)),
            lambda: bytes(byte ^ (1 << chance.randrange(8)) if chance.random() < 0.02 else byte for byte in content),
        )
    )()


def _inside(number: int, content: bytes) -> bytes:
    """A message as a field of another."""
    size, length = len(content), b""
    while size >= 128:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def monsters(ids: Sequence[int], width: int) -> list[tuple[str, bytes]]:
    """Method and message of requests that are large, deep or dear."""
    embedding = {"values": [1.0] * width}
    times = list(range(20_001))

    def nested(depth: int) -> tuple[str, bytes]:
        """As bytes: no library makes a message that is too deep for itself."""
        content = pb.Filter(missing={"attribute": "title"}).SerializeToString()
        for _ in range(depth):
            content = _inside(pb.Filter.NOT_FIELD_NUMBER, content)
        method, rest = retrieve()
        return method, rest + _inside(pb.RetrieveRequest.FILTER_FIELD_NUMBER, content)

    def retrieve(**values: Any) -> tuple[str, bytes]:
        return "Retrieve", pb.RetrieveRequest(**{"k": 10, "embedding": embedding, **values}).SerializeToString()

    def history(count: int, strings: bool = False) -> dict[str, Any]:
        items = {"strings": {"values": ["x"] * count}} if strings else {"integers": {"values": [ids[0]] * count}}
        return {"items": items, "timestamps": times[:count]}

    # Varints of 10 bytes each.
    far = {"integers": {"values": [-1 - number for number in range(400_000)]}}
    wide = [{"in": {"attribute": "events", "values": [{"integer": n} for n in range(9_999)]}}]
    users = [{"history": history(1_900)} for _ in range(256)]
    event = {"user_id": {"integer": 5}, "item_id": {"integer": ids[0]}, "timestamp": 1}
    return [
        retrieve(exclude={"integers": {"values": list(range(1_000_000))}}),
        retrieve(exclude={"integers": {"values": list(range(100_000))}}),
        retrieve(exclude=far),
        retrieve(exclude={"strings": {"values": [""] * 1_000_000}}),
        retrieve(k=2**31 - 1),
        retrieve(k=10_000, include_titles=True),
        retrieve(history=history(20_001)),
        retrieve(history=history(20_000), exclude_seen=True),
        retrieve(history=history(20_000, strings=True)),
        retrieve(history={"context": {f"{n}": "x" for n in range(100_000)}}),
        retrieve(history={"auxiliary": {f"{n}": {"values": ["x"], "timestamps": [n]} for n in range(20_001)}}),
        *(nested(depth) for depth in (49, 50, 51, 90, 99, 100, 200, 5000)),
        retrieve(filter={"all": {"filters": wide}}),
        retrieve(filter={"any": {"filters": wide * 20}}),
        retrieve(filter={"any": {"filters": [{"missing": {"attribute": "x" * 100_000}}]}}),
        retrieve(embedding={"values": [1.0] * 1_000_000}),
        retrieve(required_version="x" * 4_000_000),
        retrieve(action="\n" * 100_000),
        ("Retrieve", b"\x00" * 4_194_305),
        ("Retrieve", b"\x0a\xff\xff\xff\xff\x07"),
        ("EmbedUsers", pb.EmbedUsersRequest(users=users).SerializeToString()),
        ("EmbedUsers", pb.EmbedUsersRequest(users=[{}] * 100_000).SerializeToString()),
        ("EmbedUsers", pb.EmbedUsersRequest(users=[{"stored_user": {"integer": 1}}] * 256).SerializeToString()),
        ("RecordEvents", pb.RecordEventsRequest(events=[event] * 1_000).SerializeToString()),
        ("RecordEvents", pb.RecordEventsRequest(events=[{}] * 100_000).SerializeToString()),
        ("BatchRetrieve", b""),
        ("BatchRetrieve", pb.BatchRetrieveRequest(requests=[{}] * 100_000).SerializeToString()),
        ("BatchRetrieve", pb.BatchRetrieveRequest(requests=[{"k": 2**31 - 1}] * 20).SerializeToString()),
        ("GetServingState", b"\x08\x01" * 1_000_000),
    ]
