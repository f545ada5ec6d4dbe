"""Frames of the bulk stream as bytes: the format at the head of `kvtransfer.proto`, and nothing else.

A frame is one message: magic, checksum, header, payload. The checksum covers everything behind it,
the header too, because a flipped bit in a range would land good bytes in a wrong place. A payload may lie in a
landing slot instead; the checksum is the same, so that a frame may change its way when it is sent again. What a
frame means (leases, layouts, codecs) is decided elsewhere.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import msgpack  # type: ignore[import-untyped]  # it ships no types
import xxhash

from kvtransfer.layouts import DEFAULT_PIECE_BYTES, Piece

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from kvtransfer.layouts import CacheLayout

MAGIC = b"HRF1"
SLOT_MAGIC = b"HRS1"
MAX_HEADER_BYTES = 1024
MAX_RAW_BYTES = 64 << 20
LEASE_ID_BYTES = 16
MAX_OPENING_BYTES = 256 << 10
MAX_ACK_TEXT = 1024

_PREFIX = struct.Struct("<4sQ")
_LENGTH = struct.Struct("<I")
_SLOT = struct.Struct("<III")
_HEADER_START = _PREFIX.size + _LENGTH.size
_UNPACK_LIMITS = {
    "max_map_len": 16,
    "max_array_len": 8,
    "max_str_len": 256,
    "max_bin_len": LEASE_ID_BYTES,
    "max_ext_len": 0,
}
_OPENING_LIMITS = {
    "max_map_len": 64,
    "max_array_len": 4096,
    "max_str_len": MAX_OPENING_BYTES,
    "max_bin_len": MAX_OPENING_BYTES,
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


class SlotRef(NamedTuple):
    """Where a payload lies that is not in the message: in which of the stream's offers, slot, and how long it is."""

    offer: int
    slot: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """What a manifest says of one frame."""

    raw_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Frame:
    """`wire_bytes`: of the message itself, without what lies in a slot."""

    header: FrameHeader
    payload: memoryview
    checksum: int
    wire_bytes: int

    @property
    def record(self) -> FrameRecord:
        return FrameRecord(self.header.raw_bytes, self.checksum)


class AckFault(StrEnum):
    """Why a frame did not land, beside the lease table's refusals."""

    DAMAGED_FRAME = "DAMAGED_FRAME"  # send it again
    BAD_PIECE = "BAD_PIECE"  # not of this layout, or over a prefix that is held here
    UNKNOWN_CODEC = "UNKNOWN_CODEC"
    FIDELITY_EXCEEDED = "FIDELITY_EXCEEDED"  # loses more than the lease allows
    LANDING_FAILED = "LANDING_FAILED"  # could not be decoded or written


@dataclass(frozen=True, slots=True)
class Ack:
    """The receiver's word on one frame. `number` is None where a damaged frame does not tell.

    `credit`: bytes of messages that it now allows in flight on this stream; one frame may always go.
    """

    number: int | None
    ok: bool
    cause: str = ""
    message: str = ""
    landing_s: float = 0.0
    credit: int = 0


@dataclass(frozen=True, slots=True)
class Opening:
    """The receiver's first word on a stream: the credit to begin with, and the landing slots that it offers."""

    credit: int
    offers: tuple[dict[str, Any], ...] = ()


def max_frame_bytes(layout: CacheLayout, piece_bytes: int = DEFAULT_PIECE_BYTES) -> int:
    """The longest message of a sender that cuts pieces of about `piece_bytes`, in `layout`'s dtypes at the widest."""
    largest_entry = max(layout.entry_bytes(plane) for plane in layout.planes)
    return _HEADER_START + MAX_HEADER_BYTES + max(piece_bytes, largest_entry)


def encode_frame(header: FrameHeader, payload: Buffer, slot: SlotRef | None = None) -> tuple[bytes, int]:
    """The message and its checksum. The payload is copied once, or stays in the slot where it lies."""
    packed = _pack_header(header)
    length = _LENGTH.pack(len(packed))
    digest = xxhash.xxh3_64(length)
    digest.update(packed)
    digest.update(payload)
    checksum = digest.intdigest()
    if slot is not None:
        return b"".join((_PREFIX.pack(SLOT_MAGIC, checksum), length, packed, _SLOT.pack(*slot))), checksum
    return b"".join((_PREFIX.pack(MAGIC, checksum), length, packed, payload)), checksum


def decode_frame(message: Buffer, read_slot: Callable[[SlotRef], memoryview] | None = None) -> Frame:
    """Verifies and parses a message; the payload is a view into it, or into the slot that `read_slot` gives.

    Raises DamagedFrame, as `read_slot` must for a slot that is not there.
    """
    view = memoryview(message)
    if len(view) < _HEADER_START:
        raise DamagedFrame(f"a frame has at least {_HEADER_START} bytes, got {len(view)}")
    magic, checksum = _PREFIX.unpack_from(view)
    if magic not in (MAGIC, SLOT_MAGIC):
        raise DamagedFrame(f"a frame begins with {MAGIC!r} or {SLOT_MAGIC!r}, got {bytes(magic)!r}")
    (header_bytes,) = _LENGTH.unpack_from(view, _PREFIX.size)
    if header_bytes > min(MAX_HEADER_BYTES, len(view) - _HEADER_START):
        raise DamagedFrame(f"header length {header_bytes} is beyond the frame or {MAX_HEADER_BYTES} bytes")
    payload_start = _HEADER_START + header_bytes
    payload = view[payload_start:]
    if magic == SLOT_MAGIC:
        payload = _slot_payload(payload, read_slot)
    digest = xxhash.xxh3_64(view[_PREFIX.size : payload_start])
    digest.update(payload)
    if digest.intdigest() != checksum:
        raise DamagedFrame("the checksum does not match")
    return Frame(_unpack_header(view[_HEADER_START:payload_start]), payload, checksum, len(view))


def _slot_payload(reference: memoryview, read_slot: Callable[[SlotRef], memoryview] | None) -> memoryview:
    if read_slot is None or len(reference) != _SLOT.size:
        raise DamagedFrame("a frame in a slot, on a stream without slots or without saying which")
    return read_slot(SlotRef(*_SLOT.unpack(reference)))


def encode_ack(ack: Ack) -> bytes:
    fields: dict[str, object] = {"n": ack.number, "ok": ack.ok, "t": ack.landing_s, "c": ack.credit}
    if not ack.ok:
        fields["w"] = f"{ack.cause}: {ack.message}"[:MAX_ACK_TEXT]
    return cast("bytes", msgpack.packb(fields))


def decode_ack(message: Buffer) -> Ack:
    """Raises DamagedFrame for anything that is not an acknowledgement."""
    fields = unpack_map(message, {**_UNPACK_LIMITS, "max_str_len": 4 * MAX_ACK_TEXT})
    number = None if fields.get("n") is None else _uint(fields, "n", 32)
    ok, landing_s, why = fields.get("ok"), fields.get("t"), fields.get("w", "")
    if not isinstance(ok, bool) or not isinstance(landing_s, float) or not isinstance(why, str):
        raise DamagedFrame(f"not an acknowledgement: {fields!r}")
    cause, _, text = why.partition(": ")
    return Ack(number, ok, cause, text, landing_s, _uint(fields, "c", 64))


def encode_opening(opening: Opening) -> bytes:
    return cast("bytes", msgpack.packb({"c": opening.credit, "offers": list(opening.offers)}))


def decode_opening(message: Buffer) -> Opening:
    """Raises DamagedFrame for anything that does not open a stream."""
    fields = unpack_map(message, _OPENING_LIMITS)
    offers = fields.get("offers")
    if not isinstance(offers, list) or not all(isinstance(offer, dict) for offer in offers):
        raise DamagedFrame("the first message down a stream must say what is offered")
    return Opening(_uint(fields, "c", 64), tuple(offers))


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
    fields = unpack_map(packed, _UNPACK_LIMITS)
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


def unpack_map(packed: Buffer, limits: dict[str, int]) -> dict[str, Any]:
    """A msgpack map; `limits`: msgpack's own. Raises DamagedFrame."""
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
