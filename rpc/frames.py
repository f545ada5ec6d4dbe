"""HTTP/2 frames: their kinds, flags and bytes (RFC 9113, sections 4, 6 and 7)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES: Final = 9
DEFAULT_WINDOW_BYTES: Final = 65_535
MAX_FRAME_BYTES: Final = 16_384  # that every peer takes; larger ones would hold up other streams
MAX_WINDOW_BYTES: Final = 2**31 - 1

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

_HEAD = struct.Struct(">HBBBL")
_MESSAGE_HEAD = struct.Struct(">HBBBLBL")
_SETTING = struct.Struct(">HL")
_U32 = struct.Struct(">L")


class ErrorCode(IntEnum):
    """Why a stream or a connection was ended (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ConnectionFault(Exception):
    """The peer broke the protocol, or this side gives the connection up."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Any frame. `payload`: at most MAX_FRAME_BYTES."""
    length = len(payload)
    return _HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream_id) + payload


def message_frame(stream_id: int, message: bytes) -> bytes:
    """One DATA frame with one whole gRPC message, uncompressed; it has 5 bytes more than the message."""
    length = len(message) + 5
    return _MESSAGE_HEAD.pack(length >> 8, length & 0xFF, DATA, 0, stream_id, 0, length - 5) + message


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(name, value) for name, value in values.items()))


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """What a SETTINGS frame sets, in its order. Raises ValueError for a length that cannot be."""
    if len(payload) % _SETTING.size:
        raise ValueError("a SETTINGS frame has 6 bytes a setting")
    return list(_SETTING.iter_unpack(payload))


def window_update(stream_id: int, num_bytes: int) -> bytes:
    """Lets the peer send so much more. `stream_id` 0: on the whole connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, _U32.pack(num_bytes))


def rst_stream(stream_id: int, code: int) -> bytes:
    """Ends a stream at once."""
    return frame(RST_STREAM, 0, stream_id, _U32.pack(code))


def goaway(last_stream_id: int, code: int, reason: str = "") -> bytes:
    """No stream above `last_stream_id` was or will be looked at."""
    return frame(GOAWAY, 0, 0, _U32.pack(last_stream_id) + _U32.pack(code) + reason.encode())


def headers(stream_id: int, block: bytes, end_stream: bool) -> bytes:
    """A header block, in as many frames as it takes."""
    flags = END_STREAM if end_stream else 0
    if len(block) <= MAX_FRAME_BYTES:
        return frame(HEADERS, flags | END_HEADERS, stream_id, block)
    pieces = [block[at : at + MAX_FRAME_BYTES] for at in range(0, len(block), MAX_FRAME_BYTES)]
    middle = b"".join(frame(CONTINUATION, 0, stream_id, piece) for piece in pieces[1:-1])
    last = frame(CONTINUATION, END_HEADERS, stream_id, pieces[-1])
    return frame(HEADERS, flags, stream_id, pieces[0]) + middle + last
