"""Rubbish below gRPC: connections that speak HTTP/2 badly, slowly or not at all, over plain sockets.

Frames (RFC 9113) and headers (RFC 7541, literals without indexing only) are made by hand, since no library sends what
is wrong with these.
"""

import contextlib
import random
import socket
import struct
from collections.abc import Callable

__all__ = ["ATTACKS", "attack", "call", "half_open", "slow_reader"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RST, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS, _PADDED = 1, 4, 8
_INITIAL_WINDOW, _MAX_FRAME = 4, 5
# Seconds that an attacker listens before it hangs up.
_TIMEOUT = 0.05

Attack = Callable[[random.Random, str, bytes], bytes]
"""What is sent, given chance, the path of a method and a good message for it."""


def _frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def _settings(*pairs: tuple[int, int]) -> bytes:
    return _frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def _literal(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    size, length = size - 127, b"\x7f"
    while size >= 128:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return length + bytes([size]) + text


def _block(path: str, *further: tuple[bytes, bytes]) -> bytes:
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"localhost")]
    fields += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), *further]
    return b"".join(b"\0" + _literal(name) + _literal(value) for name, value in fields)


def _grpc(message: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


def _call(stream: int, path: str, message: bytes, *further: tuple[bytes, bytes]) -> bytes:
    return _frame(_HEADERS, _END_HEADERS, stream, _block(path, *further)) + _frame(_DATA, _END_STREAM, stream, message)


def _hello(*pairs: tuple[int, int]) -> bytes:
    return _PREFACE + _settings(*pairs)


def _streams(count: int) -> range:
    return range(1, 2 * count, 2)


def _oversized_headers(chance: random.Random, path: str, message: bytes) -> bytes:
    block = _block(path, *((b"x-%d" % n, b"y" * 1000) for n in range(chance.choice([20, 200]))))
    parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    frames = _frame(_HEADERS, 0, 1, parts[0])
    for part in parts[1:-1]:
        frames += _frame(_CONTINUATION, 0, 1, part)
    return _hello() + frames + _frame(_CONTINUATION, _END_HEADERS, 1, parts[-1])


def _random_frames(chance: random.Random, path: str, message: bytes) -> bytes:
    frames = b""
    for _ in range(chance.randint(1, 60)):
        frames += _frame(
            chance.randrange(12), chance.randrange(256), chance.choice([0, 1, 2, 3, 5, 2**31 - 1]),
            chance.randbytes(chance.choice([0, 1, 4, 5, 8, 100])),
        )  # fmt: skip
    return _hello() + frames


def _flood(make: Callable[[int], bytes], count: int) -> bytes:
    return _hello() + b"".join(make(stream) for stream in _streams(count))


def _bad_header(chance: random.Random, path: str, message: bytes) -> bytes:
    further = chance.choice(
        [
            ((b"grpc-timeout", chance.choice([b"", b"-1S", b"99999999999H", b"1", b"0n", b"xS"])),),
            ((b"grpc-encoding", chance.choice([b"gzip", b"nonsense", b"\xff"])),),
            ((b"content-type", b"text/html"),),
            ((b"authorization", b"Bearer " + chance.randbytes(20)),),
            ((b"x-request-id", chance.randbytes(200)),),
            ((b"grpc-trace-bin", b"!!!"), (b"traceparent", b"00-zz")),
            ((b"Upper-Case", b"x"), (b":late", b"pseudo")),
            ((b"", b""),),
        ]
    )
    where = chance.choice([path, path + "x", "", "/", "/" + "x" * 5000, "*", "/retrieval.v1.RetrievalService/"])
    return _hello() + _call(1, where, _grpc(message), *further)


ATTACKS: dict[str, Attack] = {
    "no preface": lambda chance, path, message: chance.randbytes(chance.randint(1, 5000)),
    "bad preface": lambda chance, path, message: _PREFACE[: chance.randint(1, 23)] + chance.randbytes(40),
    "HTTP/1.1": lambda chance, path, message: f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "TLS hello": lambda chance, path, message: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(508),
    "random frames": _random_frames,
    "odd settings": lambda chance, path, message: (
        _hello(*((chance.randrange(9), chance.getrandbits(32)) for _ in range(20))) + _call(1, path, _grpc(message))
    ),
    "frame too long": lambda chance, path, message: _hello() + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(9000),
    "oversized headers": _oversized_headers,
    "broken headers": lambda chance, path, message: (
        _hello() + _frame(_HEADERS, _END_HEADERS, 1, chance.randbytes(chance.randint(1, 300)))
    ),
    "bad header": _bad_header,
    "headers never end": lambda chance, path, message: (
        _hello() + _frame(_HEADERS, 0, 1, _block(path)) + _frame(_CONTINUATION, 0, 1, b"\0\x01a\x01b") * 2000
    ),
    "wrong message length": lambda chance, path, message: (
        _hello() + _call(1, path, _grpc(message, length=chance.choice([0, 1, 2**31, 2**32 - 1, len(message) + 1])))
    ),
    "compressed rubbish": lambda chance, path, message: (
        _hello() + _call(1, path, _grpc(chance.randbytes(200), 1), (b"grpc-encoding", b"gzip"))
    ),
    "bad compression flag": lambda chance, path, message: (
        _hello() + _call(1, path, _grpc(message, chance.randrange(256)))
    ),
    "many messages": lambda chance, path, message: _hello() + _call(1, path, _grpc(message) * 20),
    "data on no stream": lambda chance, path, message: _hello() + _frame(_DATA, _END_STREAM, 99, _grpc(message)),
    "window overflow": lambda chance, path, message: (
        _hello() + _frame(_WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 3 + _call(1, path, _grpc(message))
    ),
    "padding": lambda chance, path, message: _hello() + _frame(_DATA, _PADDED, 1, b"\xff" + message[:10]),
    "ping flood": lambda chance, path, message: _hello() + _frame(_PING, 0, 0, bytes(8)) * 5000,
    "settings flood": lambda chance, path, message: _hello() + _settings((_MAX_FRAME, 16384)) * 5000,
    "empty data flood": lambda chance, path, message: (
        _hello() + _frame(_HEADERS, _END_HEADERS, 1, _block(path)) + _frame(_DATA, 0, 1) * 5000
    ),
    "rst flood": lambda chance, path, message: _flood(
        lambda stream: _call(stream, path, _grpc(message)) + _frame(_RST, 0, stream, b"\0\0\0\x08"), 500
    ),
    "rst before the message": lambda chance, path, message: _flood(
        lambda stream: _frame(_HEADERS, _END_HEADERS, stream, _block(path)) + _frame(_RST, 0, stream, b"\0\0\0\x08"),
        500,
    ),
    "goaway at once": lambda chance, path, message: (
        _flood(lambda stream: _call(stream, path, _grpc(message)), 50) + _frame(_GOAWAY, 0, 0, bytes(8))
    ),
    "push": lambda chance, path, message: _hello() + _frame(_PUSH, _END_HEADERS, 1, b"\0\0\0\x02" + _block(path)),
    "priority loop": lambda chance, path, message: _hello() + _frame(_PRIORITY, 0, 3, b"\0\0\0\x03\xff") * 100,
}


def call(path: str, message: bytes, *further: tuple[bytes, bytes]) -> bytes:
    """A connection's bytes with one call, and headers beside those that it needs."""
    return _hello() + _call(1, path, _grpc(message), *further)


def _connect(address: str) -> socket.socket:
    """A plain connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def attack(address: str, content: bytes) -> None:
    """Send, listen for a moment, hang up; what the server does with the connection is its own affair."""
    with _connect(address) as connection:
        connection.settimeout(_TIMEOUT)
        with contextlib.suppress(OSError):
            connection.sendall(content)
            while connection.recv(65_536):
                pass


def half_open(address: str, path: str, message: bytes, count: int) -> list[socket.socket]:
    """Connections that stop: before the preface, after it, before the message, within it."""
    begun = _frame(_HEADERS, _END_HEADERS, 1, _block(path))
    parts = (b"", _hello(), _hello() + begun, _hello() + begun + _frame(_DATA, 0, 1, _grpc(message)[:-1]))
    connections = []
    for number in range(count):
        connections.append(_connect(address))
        connections[-1].sendall(parts[number % len(parts)])
    return connections


def slow_reader(address: str, path: str, message: bytes, calls: int) -> socket.socket:
    """A connection that asks and takes none of the answers: its window is closed."""
    connection = _connect(address)
    content = _hello((_INITIAL_WINDOW, 0)) + b"".join(_call(n, path, _grpc(message)) for n in _streams(calls))
    connection.settimeout(_TIMEOUT)
    # Perhaps not even asked to the end: the server takes no more.
    with contextlib.suppress(OSError):
        connection.sendall(content)
    return connection
