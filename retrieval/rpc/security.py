"""Who may connect and call: TLS from PEM files, bearer tokens, and the name by which a client is known.

Certificates and tokens are read again when their files change; what cannot be read is logged, and the old stays.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import grpc

from retrieval.config import Config
from retrieval.errors import InputError
from retrieval.rpc.errors import UnauthenticatedError

__all__ = ["TlsFiles", "Tokens", "client_of", "is_loopback", "server_credentials"]

_log = logging.getLogger(__name__)

_Value = TypeVar("_Value")

# Files are looked at this often at most: a look is a system call, and the event loop makes it.
_LOOK_SECONDS = 1.0
_SHORTEST_TOKEN = 16
_HASHED = "sha256:"


class TlsFiles(Config):
    """PEM files of a server.

    Attributes:
        cert: the server's certificate, followed by the intermediate ones.
        key: its private key, not encrypted.
        client_ca: authorities whose client certificates are taken; None asks clients for none (no mutual TLS).
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return (self.cert, self.key) if self.client_ca is None else (self.cert, self.key, self.client_ca)


class _FromFiles(Generic[_Value]):
    """A value read from files, read again when they change. Any thread may use it.

    Raises:
        InputError: it cannot be read at the start.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], _Value], clock: Callable[[], float]) -> None:
        self._paths, self._read, self._clock = paths, read, clock
        self._lock = threading.Lock()
        self._looked = clock()
        self._state = self._stat()
        self._value = read()

    def _stat(self) -> list[tuple[int, int, int]]:
        try:
            # Follows links: Kubernetes renews a mounted secret by changing one.
            found = [os.stat(path) for path in self._paths]
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found]

    def get(self) -> _Value:
        """The value of the files as they are, or as they last could be read."""
        with self._lock:
            now = self._clock()
            if now - self._looked < _LOOK_SECONDS:
                return self._value
            self._looked = now
            try:
                state = self._stat()
                if state != self._state:
                    value = self._read()
                    # Files that change meanwhile (a certificate is there, its key not yet) are read at the next look.
                    if self._stat() == state:
                        self._value, self._state = value, state
                        _log.info("%s: read again", ", ".join(map(str, self._paths)))
            except InputError as error:
                _log.error("%s; what was read before stays", error)
            return self._value


def server_credentials(files: TlsFiles, clock: Callable[[], float] = time.monotonic) -> grpc.ServerCredentials:
    """Credentials that every new connection takes from the files as they are then.

    Raises:
        InputError: a file cannot be read, or certificate and key do not belong together.
    """
    held = _FromFiles(files.paths, lambda: _certificates(files), clock)
    # gRPC asks before every handshake, on a thread of its own.
    return grpc.dynamic_ssl_server_credentials(held.get(), held.get, files.client_ca is not None)


def _certificates(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # gRPC would take anything and fail at every handshake. The password keeps OpenSSL from asking on a terminal.
        context.load_cert_chain(files.cert, files.key, password="")
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
        pair = (files.key.read_bytes(), files.cert.read_bytes())
        authorities = files.client_ca.read_bytes() if files.client_ca is not None else None
    except (OSError, ValueError) as error:
        raise InputError(f"{', '.join(map(str, files.paths))}: not usable for TLS ({error})") from None
    return grpc.ssl_server_certificate_configuration([pair], authorities)


class Tokens:
    """Bearer tokens from a file: per line `name:token`, or `name:sha256:HEX` with the token's SHA-256.

    A name may have several lines, so that a token can be replaced while the old one still works. Empty lines and lines
    that begin with # are passed over.

    Args:
        path: the file.
        clock: seconds, for how often the file is looked at.

    Raises:
        InputError: the file cannot be read, or a line is malformed.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._held = _FromFiles([path], lambda: _tokens(path), clock)

    def name_of(self, authorization: str | None) -> str:
        """Name of the client that sent this `authorization` header.

        Raises:
            UnauthenticatedError: there is none, it is no bearer token, or nobody has this token.
        """
        if authorization is None:
            raise UnauthenticatedError("the call has no token; send the metadata authorization: Bearer TOKEN")
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError("the authorization metadata is not of the form: Bearer TOKEN")
        digest, found = hashlib.sha256(token.strip().encode()).digest(), None
        # All of them, and digests at that: how long it takes tells nothing about any token.
        for name, known in self._held.get():
            if hmac.compare_digest(digest, known):
                found = name
        if found is None:
            raise UnauthenticatedError("the token is not known here")
        return found


def _tokens(path: Path) -> list[tuple[str, bytes]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, token = line.strip().partition(":")
        if not name or not colon:
            raise InputError(f"{path}, line {number}: is not of the form name:token")
        if token.startswith(_HASHED):
            try:
                digest = bytes.fromhex(token.removeprefix(_HASHED))
            except ValueError:
                digest = b""
            if len(digest) != hashlib.sha256().digest_size:
                raise InputError(f"{path}, line {number}: {_HASHED} is not followed by 64 hexadecimal digits")
        elif len(token) < _SHORTEST_TOKEN:
            raise InputError(f"{path}, line {number}: the token has fewer than {_SHORTEST_TOKEN} characters")
        else:
            digest = hashlib.sha256(token.encode()).digest()
        tokens.append((name, digest))
    return tokens


def client_of(context: grpc.aio.ServicerContext, tokens: Tokens | None, *, certificates: bool) -> str:
    """The name under which a call is counted: of its token, else of its certificate, else its host's address.

    Args:
        context: the call.
        tokens: who may call; None takes anybody.
        certificates: whether clients show certificates.

    Raises:
        UnauthenticatedError: tokens are asked for, and the call has no valid one.
    """
    if tokens is not None:
        sent = (value for key, value in context.invocation_metadata() or () if key == "authorization")
        header = next(sent, None)
        return f"token:{tokens.name_of(header if isinstance(header, str) else None)}"
    if certificates:
        names = list(context.auth_context().get("x509_common_name", ())) or list(context.peer_identities() or ())
        if names:
            return f"certificate:{names[0].decode(errors='replace')}"
    # ipv4:10.0.0.1:40312; the port differs between the connections of one host.
    return str(context.peer()).rpartition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
