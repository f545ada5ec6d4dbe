"""What a fetch says beside frames and acknowledgements, as bytes: the request, and the word that closes the stream.

The format is at the head of `kvtransfer.proto`. Every message has a magic of its own and a checksum, and every
number and length in it a limit that is checked before anything is made of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import msgpack  # type: ignore[import-untyped]  # it ships no types
import xxhash

from kvtransfer.frames import (
    LEASE_ID_BYTES,
    MAX_RAW_BYTES,
    DamagedFrame,
    FrameRecord,
    LeaseRef,
    unpack_map,
)
from kvtransfer.keys import KEY_BYTES
from kvtransfer.sources import MAX_FETCH_KEYS, FetchRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

REQUEST_MAGIC = b"HRQ1"
CLOSING_MAGIC = b"HRE1"
MAX_FETCH_FRAMES = 1 << 20
MAX_REQUEST_BYTES = MAX_FETCH_KEYS * KEY_BYTES + (64 << 10)
MAX_BLOCK_TOKENS = 1 << 16
MAX_FIDELITY_RANK = 2

_PREFIX = struct.Struct("<4sQ")
_RECORD = struct.Struct("<IQ")
_MAX_PLANES = 64
_MAX_FIELDS = 16
_MAX_CODECS = 64
_MAX_TEXT = 64
_MAX_REASON = 1024
_REQUEST_LIMITS = {
    "max_map_len": 16,
    "max_array_len": _MAX_PLANES,
    "max_str_len": 4 * _MAX_TEXT,
    "max_bin_len": MAX_FETCH_KEYS * KEY_BYTES,
    "max_ext_len": 0,
}
_CLOSING_LIMITS = {
    "max_map_len": 16,
    "max_array_len": 0,
    "max_str_len": 4 * _MAX_REASON,
    "max_bin_len": MAX_FETCH_FRAMES * _RECORD.size,
    "max_ext_len": 0,
}
MAX_CLOSING_BYTES = _CLOSING_LIMITS["max_bin_len"] + (64 << 10)


class BadFetchMessage(ValueError):
    """The bytes are not a whole, unchanged message of this version. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Served:
    """All of it was sent and landed: the leading `num_blocks` keys of the request, as the frames of `manifest`."""

    num_blocks: int
    manifest: Mapping[int, FrameRecord]


@dataclass(frozen=True, slots=True)
class NotServed:
    """Nothing more comes, and what came is of no use. `cause` is UPPER_SNAKE."""

    cause: str
    message: str


Closing: TypeAlias = Served | NotServed


def encode_request(request: FetchRequest) -> bytes:
    """Raises BadFetchMessage for a request that the other side would refuse to read."""
    lease = request.lease
    fields = {
        "l": lease.lease_id,
        "a": lease.attempt,
        "s": lease.sender_epoch,
        "r": lease.receiver_epoch,
        "k": b"".join(request.keys),
        "b": request.first_block,
        "t": request.block_tokens,
        "y": request.layout,
        "d": request.dtypes,
        "f": request.fidelity,
        "o": request.codecs,
    }
    try:
        message = _enclose(REQUEST_MAGIC, fields)
    except OverflowError as error:
        raise BadFetchMessage(f"a number of the request is too large: {error}") from error
    decode_request(message)
    return message


def decode_request(message: Buffer) -> FetchRequest:
    """Raises BadFetchMessage."""
    fields = _open(message, REQUEST_MAGIC, MAX_REQUEST_BYTES, _REQUEST_LIMITS)
    lease_id = _binary(fields, "l")
    if len(lease_id) != LEASE_ID_BYTES:
        raise BadFetchMessage(f"key 'l' must be {LEASE_ID_BYTES} bytes, got {len(lease_id)}")
    block_tokens = _uint(fields, "t", MAX_BLOCK_TOKENS)
    if block_tokens == 0:
        raise BadFetchMessage("key 't': a block has at least one token")
    return FetchRequest(
        lease=LeaseRef(
            lease_id,
            _uint(fields, "a", (1 << 32) - 1),
            _uint(fields, "s", (1 << 64) - 1),
            _uint(fields, "r", (1 << 64) - 1),
        ),
        keys=_keys(fields),
        first_block=_uint(fields, "b", (1 << 32) - 1),
        block_tokens=block_tokens,
        layout=_text(fields.get("y"), "y"),
        dtypes=_dtypes(fields),
        fidelity=_uint(fields, "f", MAX_FIDELITY_RANK),
        codecs=_codecs(fields),
    )


def encode_closing(closing: Closing) -> bytes:
    """The frames of a manifest are numbered from 0 without a gap."""
    if isinstance(closing, NotServed):
        return _enclose(CLOSING_MAGIC, {"w": f"{closing.cause}: {closing.message}"[:_MAX_REASON]})
    records = [closing.manifest[number] for number in range(len(closing.manifest))]
    packed = b"".join(_RECORD.pack(record.raw_bytes, record.checksum) for record in records)
    return _enclose(CLOSING_MAGIC, {"n": closing.num_blocks, "m": packed})


def is_closing(message: Buffer) -> bool:
    """Whether a message down the stream says that it is one; all others are frames, whole or damaged."""
    return bytes(memoryview(message)[: len(CLOSING_MAGIC)]) == CLOSING_MAGIC


def decode_closing(message: Buffer) -> Closing:
    """Raises BadFetchMessage."""
    fields = _open(message, CLOSING_MAGIC, MAX_CLOSING_BYTES, _CLOSING_LIMITS)
    if "w" in fields:
        why = fields["w"]
        if not isinstance(why, str):
            raise BadFetchMessage("key 'w' must be text")
        cause, _, text = why.partition(": ")
        return NotServed(cause or "REFUSED", text)
    packed = _binary(fields, "m")
    if not packed or len(packed) % _RECORD.size:
        raise BadFetchMessage(f"key 'm' must be {_RECORD.size} bytes for each frame, got {len(packed)}")
    num_blocks = _uint(fields, "n", MAX_FETCH_KEYS)
    if num_blocks == 0:
        raise BadFetchMessage("key 'n': at least one block is served, or a reason given")
    manifest = {number: FrameRecord(*record) for number, record in enumerate(_RECORD.iter_unpack(packed))}
    if any(record.raw_bytes > MAX_RAW_BYTES for record in manifest.values()):
        raise BadFetchMessage(f"key 'm': a frame has at most {MAX_RAW_BYTES} raw bytes")
    return Served(num_blocks, manifest)


# ---- the envelope


def _enclose(magic: bytes, fields: dict[str, object]) -> bytes:
    packed = cast("bytes", msgpack.packb(fields))
    return _PREFIX.pack(magic, xxhash.xxh3_64_intdigest(packed)) + packed


def _open(message: Buffer, magic: bytes, max_bytes: int, limits: dict[str, int]) -> dict[str, Any]:
    view = memoryview(message)
    if not _PREFIX.size < len(view) <= max_bytes:
        raise BadFetchMessage(f"a message of {len(view)} bytes, at most {max_bytes} are taken")
    found, checksum = _PREFIX.unpack_from(view)
    if found != magic:
        raise BadFetchMessage(f"the message begins with {found!r}, expected {magic!r}")
    packed = view[_PREFIX.size :]
    if xxhash.xxh3_64_intdigest(packed) != checksum:
        raise BadFetchMessage("the checksum does not match")
    try:
        return unpack_map(packed, limits)
    except DamagedFrame as error:
        raise BadFetchMessage(str(error)) from None


# ---- the fields


def _uint(fields: dict[str, Any], key: str, at_most: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= at_most:
        raise BadFetchMessage(f"key {key!r} must be an integer in [0, {at_most}]")
    return value


def _binary(fields: dict[str, Any], key: str) -> bytes:
    value = fields.get(key)
    if not isinstance(value, bytes):
        raise BadFetchMessage(f"key {key!r} must be bytes")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
        raise BadFetchMessage(f"key {key!r} must hold texts of 1 to {_MAX_TEXT} characters")
    return value


def _list(value: object, key: str, at_most: int) -> list[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= at_most:
        raise BadFetchMessage(f"key {key!r} must be lists of 1 to {at_most}")
    return value


def _keys(fields: dict[str, Any]) -> tuple[bytes, ...]:
    packed = _binary(fields, "k")
    if not packed or len(packed) % KEY_BYTES:
        raise BadFetchMessage(f"key 'k' must be {KEY_BYTES} bytes for each block, got {len(packed)}")
    keys = tuple(packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES))
    if len(set(keys)) != len(keys):
        raise BadFetchMessage("key 'k' names a block twice")
    return keys


def _dtypes(fields: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    planes = _list(fields.get("d"), "d", _MAX_PLANES)
    return tuple(tuple(_text(dtype, "d") for dtype in _list(plane, "d", _MAX_FIELDS)) for plane in planes)


def _codecs(fields: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    codecs = []
    for pair in _list(fields.get("o"), "o", _MAX_CODECS):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadFetchMessage("key 'o' must be pairs of a codec's name and version")
        name, version = pair
        if type(version) is not int or not 0 <= version < 1 << 32:
            raise BadFetchMessage("key 'o': a codec's version is an unsigned integer of 32 bits")
        codecs.append((_text(name, "o"), version))
    return tuple(codecs)
