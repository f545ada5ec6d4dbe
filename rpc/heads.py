"""What stands in the headers of a gRPC call: method, deadline, metadata, status (gRPC over HTTP/2, PROTOCOL-HTTP2.md).

Blocks that this side writes name nothing in the peer's table: they are literals without indexing and without
Huffman codes (RFC 7541, section 6.2.2), so that they can be made once and sent on any connection.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote, unquote

import grpc

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
Header: TypeAlias = tuple[bytes, bytes]

_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_TIMEOUT_DIGITS = 8
_STATUS_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}
# Printable ASCII but "%"; the rest of a message is percent-encoded.
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if c != 0x25)
_RESERVED = frozenset({b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"})


class BadHead(Exception):
    """A request that is no gRPC call; `http_status` is what to answer."""

    def __init__(self, reason: str, http_status: int) -> None:
        super().__init__(reason)
        self.http_status = http_status


@dataclass(frozen=True, slots=True)
class RequestHead:
    """Of a call. `timeout_s`: None without a deadline."""

    path: str
    timeout_s: float | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended."""

    code: grpc.StatusCode
    details: str = ""
    metadata: Metadata = ()


def parse_request(headers: Iterable[Header]) -> RequestHead:
    """A request's header list.

    Raises:
        BadHead: it is not one of a gRPC call.
    """
    path, method, content_type = "", b"", b""
    timeout_s: float | None = None
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name == b":path":
            path = value.decode("latin-1")
        elif name == b":method":
            method = value
        elif name == b"content-type":
            content_type = value
        elif name == b"grpc-timeout":
            timeout_s = parse_timeout(value.decode("latin-1"))
        elif name not in _RESERVED and not name.startswith(b":"):
            metadata.append(_metadatum(name, value))
    if method != b"POST":
        raise BadHead("gRPC calls are POST requests", 405)
    if not content_type.startswith(b"application/grpc"):
        raise BadHead("the content type of gRPC calls is application/grpc", 415)
    return RequestHead(path, timeout_s, tuple(metadata))


def parse_timeout(text: str) -> float:
    """`grpc-timeout` in seconds. Raises BadHead for what is none."""
    digits, unit = text[:-1], text[-1:]
    if (
        not digits.isascii()
        or not digits.isdigit()
        or len(digits) > _MAX_TIMEOUT_DIGITS
        or unit not in _UNIT_S
    ):
        raise BadHead("grpc-timeout is not up to 8 digits and one of H M S m u n", 400)
    return int(digits) * _UNIT_S[unit]


def parse_status(headers: Iterable[Header]) -> Status | None:
    """The status that a response's headers or trailers bring; None where they bring none."""
    code, details, http_status = None, "", b"200"
    metadata: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name == b"grpc-status":
            number = int(value) if value.isdigit() else -1
            code = _STATUS_BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)
        elif name == b"grpc-message":
            details = unquote(value.decode("latin-1"))
        elif name == b":status":
            http_status = value
        elif name not in _RESERVED and not name.startswith(b":"):
            metadata.append(_metadatum(name, value))
    if code is None and http_status != b"200":
        return Status(grpc.StatusCode.UNAVAILABLE, f"HTTP status {http_status.decode('latin-1')}")
    return None if code is None else Status(code, details, tuple(metadata))


def _metadatum(name: bytes, value: bytes) -> tuple[str, str | bytes]:
    key = name.decode("latin-1")
    if not key.endswith("-bin"):
        return key, value.decode("latin-1")
    try:
        return key, base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        raise BadHead(f"metadata {key} is not base64", 400) from None


def literal(name: bytes, value: bytes) -> bytes:
    """One header, without indexing."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(number: int) -> bytes:
    """A string's length, as an integer with a 7-bit prefix (RFC 7541, section 5.1)."""
    if number < 127:
        return bytes((number,))
    number -= 127
    found = bytearray((127,))
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


def encode(headers: Iterable[Header]) -> bytes:
    """A header block."""
    return b"".join(literal(name, value) for name, value in headers)


RESPONSE = encode(((b":status", b"200"), (b"content-type", b"application/grpc")))
"""How every answer begins."""
_OK = literal(b"grpc-status", b"0")


def trailers(status: Status) -> bytes:
    """How an answer ends."""
    if status.code is grpc.StatusCode.OK and not status.details and not status.metadata:
        return _OK
    block = literal(b"grpc-status", str(status.code.value[0]).encode())
    if status.details:
        block += literal(b"grpc-message", quote(status.details, safe=_PLAIN).encode())
    return block + encode(_wire(status.metadata))


def http_error(http_status: int) -> bytes:
    """The whole answer to a request that is no gRPC call."""
    return literal(b":status", str(http_status).encode())


def request(authority: str, path: str, metadata: Sequence[tuple[str, str | bytes]]) -> bytes:
    """How a call begins."""
    return encode(
        (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *_wire(metadata),
        )
    )


def _wire(metadata: Iterable[tuple[str, str | bytes]]) -> list[Header]:
    found: list[Header] = []
    for key, value in metadata:
        data = value if isinstance(value, bytes) else value.encode()
        found.append((key.encode(), base64.b64encode(data).rstrip(b"=") if key.endswith("-bin") else data))
    return found
