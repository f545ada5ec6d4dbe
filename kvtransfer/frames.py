"""Frames of the bulk stream as bytes: the format at the head of `kvtransfer.proto`, and nothing else.

A frame is one message: magic, checksum, header, payload. The checksum covers everything behind it,
the header too, because a flipped bit in a range would land good bytes in a wrong place. What a frame
means (leases, layouts, codecs) is decided elsewhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

import msgpack  # type: ignore[import-untyped]  # it ships no types
import xxhash

from kvtransfer.layouts import Piece

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"HRF1"
MAX_HEADER_BYTES = 1024
MAX_RAW_BYTES = 64 << 20
LEASE_ID_BYTES = 16

_PREFIX = struct.Struct("<4sQ")
_LENGTH = struct.Struct("<I")
_HEADER_START = _PREFIX.size + _LENGTH.size
_UNPACK_LIMITS = {
    "max_map_len": 16,
    "max_array_len": 8,
    "max_str_len": 256,
    "max_bin_len": LEASE_ID_BYTES,
    "max_ext_len": 0,
}


class DamagedFrame(ValueError):
    """The bytes are not a whole, unchanged frame of this version. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """How every message between workers names a lease: an older attempt or epoch is refused."""

    lease_id: bytes
    attempt: int
    sender_epoch: int
    receiver_epoch: int


@dataclass(frozen=True, slots=True)
class FrameHeader:
    lease: LeaseRef
    number: int
    piece: Piece
    codec: str
    codec_version: int
    raw_bytes: int
    dtypes: tuple[str, ...]
    fidelity: int = 0


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """What a manifest says of one frame."""

    raw_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Frame:
    header: FrameHeader
    payload: memoryview
    checksum: int

    @property
    def record(self) -> FrameRecord:
        return FrameRecord(self.header.raw_bytes, self.checksum)


class AckFault(StrEnum):
    """Why a frame did not land, beside the lease table's refusals."""

    DAMAGED_FRAME = "DAMAGED_FRAME"  # send it again
    BAD_PIECE = "BAD_PIECE"  # not of this layout, or over a prefix that is held here
    UNKNOWN_CODEC = "UNKNOWN_CODEC"
    LANDING_FAILED = "LANDING_FAILED"  # could not be decoded or written


@dataclass(frozen=True, slots=True)
class Ack:
    """The receiver's word on one frame. `number` is None where a damaged frame does not tell."""

    number: int | None
    ok: bool
    cause: str = ""
    message: str = ""
    landing_s: float = 0.0


def encode_frame(header: FrameHeader, payload: Buffer) -> tuple[bytes, int]:
    """The message and its checksum. The payload is copied once."""
    packed = _pack_header(header)
    length = _LENGTH.pack(len(packed))
    digest = xxhash.xxh3_64(length)
    digest.update(packed)
    digest.update(payload)
    checksum = digest.intdigest()
    return b"".join((_PREFIX.pack(MAGIC, checksum), length, packed, payload)), checksum


def decode_frame(message: Buffer) -> Frame:
    """Verifies and parses a message; the payload is a view into it. Raises DamagedFrame."""
    view = memoryview(message)
    if len(view) < _HEADER_START:
        raise DamagedFrame(f"a frame has at least {_HEADER_START} bytes, got {len(view)}")
    magic, checksum = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise DamagedFrame(f"a frame begins with {MAGIC!r}, got {bytes(magic)!r}")
    if xxhash.xxh3_64_intdigest(view[_PREFIX.size :]) != checksum:
        raise DamagedFrame("the checksum does not match")
    (header_bytes,) = _LENGTH.unpack_from(view, _PREFIX.size)
    if header_bytes > min(MAX_HEADER_BYTES, len(view) - _HEADER_START):
        raise DamagedFrame(f"header length {header_bytes} is beyond the frame or {MAX_HEADER_BYTES} bytes")
    payload_start = _HEADER_START + header_bytes
    return Frame(_unpack_header(view[_HEADER_START:payload_start]), view[payload_start:], checksum)


def encode_ack(ack: Ack) -> bytes:
    fields: dict[str, object] = {"n": ack.number, "ok": ack.ok, "t": ack.landing_s}
    if not ack.ok:
        fields["w"] = f"{ack.cause}: {ack.message}"
    return cast("bytes", msgpack.packb(fields))


def decode_ack(message: Buffer) -> Ack:
    """Raises DamagedFrame for anything that is not an acknowledgement."""
    fields = _unpack_map(message, {**_UNPACK_LIMITS, "max_str_len": 4096})
    number = None if fields.get("n") is None else _uint(fields, "n", 32)
    ok, landing_s, why = fields.get("ok"), fields.get("t"), fields.get("w", "")
    if not isinstance(ok, bool) or not isinstance(landing_s, float) or not isinstance(why, str):
        raise DamagedFrame(f"not an acknowledgement: {fields!r}")
    cause, _, text = why.partition(": ")
    return Ack(number, ok, cause, text, landing_s)


def _pack_header(header: FrameHeader) -> bytes:
    lease, piece = header.lease, header.piece
    fields = {
        "l": lease.lease_id,
        "a": lease.attempt,
        "s": lease.sender_epoch,
        "r": lease.receiver_epoch,
        "n": header.number,
        "p": piece.plane,
        "y": (piece.layers.start, piece.layers.stop),
        "h": (piece.heads.start, piece.heads.stop),
        "e": (piece.entries.start, piece.entries.stop),
        "c": header.codec,
        "v": header.codec_version,
        "b": header.raw_bytes,
        "d": header.dtypes,
        "f": header.fidelity,
    }
    return cast("bytes", msgpack.packb(fields))


def _unpack_header(packed: memoryview) -> FrameHeader:
    fields = _unpack_map(packed, _UNPACK_LIMITS)
    lease_id = fields.get("l")
    if not isinstance(lease_id, bytes) or len(lease_id) != LEASE_ID_BYTES:
        raise DamagedFrame(f"header key 'l' must be {LEASE_ID_BYTES} bytes")
    raw_bytes = _uint(fields, "b", 64)
    if raw_bytes > MAX_RAW_BYTES:
        raise DamagedFrame(f"raw length {raw_bytes} is beyond {MAX_RAW_BYTES} bytes")
    lease = LeaseRef(lease_id, _uint(fields, "a", 32), _uint(fields, "s", 64), _uint(fields, "r", 64))
    piece = Piece(_text(fields, "p"), _range(fields, "y"), _range(fields, "h"), _range(fields, "e"))
    return FrameHeader(
        lease,
        _uint(fields, "n", 32),
        piece,
        _text(fields, "c"),
        _uint(fields, "v", 32),
        raw_bytes,
        _texts(fields, "d"),
        _uint(fields, "f", 8),
    )


def _unpack_map(packed: Buffer, limits: dict[str, int]) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(packed, raw=False, strict_map_key=True, **limits)
    except ValueError as error:
        raise DamagedFrame(f"not a msgpack map within its limits: {error}") from None
    if not isinstance(fields, dict):
        raise DamagedFrame(f"expected a msgpack map, got {type(fields).__name__}")
    return fields


def _uint(fields: dict[str, Any], key: str, bits: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise DamagedFrame(f"header key {key!r} must be an unsigned integer of {bits} bits")
    return value


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise DamagedFrame(f"header key {key!r} must be text")
    return value


def _texts(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DamagedFrame(f"header key {key!r} must be a list of texts")
    return tuple(value)


def _range(fields: dict[str, Any], key: str) -> range:
    value = fields.get(key)
    if not isinstance(value, list) or len(value) != 2 or any(type(edge) is not int for edge in value):
        raise DamagedFrame(f"header key {key!r} must be [start, stop]")
    start, stop = value
    if not 0 <= start <= stop < 1 << 63:
        raise DamagedFrame(f"header key {key!r}: [{start}, {stop}) is not a range of non-negative numbers")
    return range(start, stop)
