"""Ways to spoil a message: its bytes, its msgpack header field by field, its payload; with or without a new seal.

A message whose checksum is right again gets past the first check, and so tries the checks behind it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import xxhash

_PREFIX = struct.Struct("<4sQ")
_LENGTH = struct.Struct("<I")
_HEADER_START = _PREFIX.size + _LENGTH.size
_EDGES = (
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    127,
    128,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
)
_BIG = (*_EDGES, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_TEXTS = ("", "k", "v", "raw", "split", "int8", "float32", "bfloat16", "\0", "é" * 40, "x" * 255, "x" * 300)


def seal(message: bytes) -> bytes:
    """The same with the checksum that belongs to it."""
    magic, _ = _PREFIX.unpack_from(message)
    rest = message[_PREFIX.size :]
    return _PREFIX.pack(magic, xxhash.xxh3_64_intdigest(rest)) + rest


def seal_if_possible(message: bytes) -> bytes:
    return seal(message) if len(message) >= _PREFIX.size else message


def split(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a good frame."""
    (length,) = _LENGTH.unpack_from(message, _PREFIX.size)
    header = msgpack.unpackb(message[_HEADER_START : _HEADER_START + length])
    return header, message[_HEADER_START + length :]


def join(header: object, payload: bytes, magic: bytes = b"HRF1") -> bytes:
    """A sealed frame with that header, whatever it is."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    return seal(_PREFIX.pack(magic, 0) + _LENGTH.pack(len(packed)) + packed + payload)


# ---- bytes


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes anywhere."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTE_MUTATIONS)(rng, data)
    return data


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1 << rng.randrange(8),)) + data[at + 1 :]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    new = rng.randbytes(rng.choice((1, 2, 4, 8, 16)))
    return data[:at] + new + data[at + len(new) :]


def _number(rng: random.Random, data: bytes) -> bytes:
    """Something that may be read as a length or a count."""
    at = rng.randrange(len(data) + 1)
    new = (rng.choice(_BIG) & 0xFFFFFFFF).to_bytes(4, rng.choice(("little", "big")))
    return data[:at] + new + data[at + 4 :]


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((bytes(1), rng.randbytes(3), bytes(64), data[:64]))


def _remove(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16)) :]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 16))) + data[at:]


def _repeat_part(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:stop] + data[start : min(stop, start + 512)] + data[stop:]


def _clear(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    fill = rng.choice((b"\x00", b"\xff"))
    length = min(rng.choice((4, 16, 256)), len(data) - at)
    return data[:at] + fill * length + data[at + length :]


_BYTE_MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _overwrite,
    _number,
    _truncate,
    _extend,
    _remove,
    _insert,
    _repeat_part,
    _clear,
)


# ---- msgpack


def spoil_map(rng: random.Random, fields: dict[str, Any]) -> object:
    """A header in which one to three things are not as they should be."""
    spoiled: object = dict(fields)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spoiled = rng.choice(_MAP_MUTATIONS)(rng, spoiled) if isinstance(spoiled, dict) else spoiled
    return spoiled


def _replace_value(rng: random.Random, fields: dict[str, Any]) -> object:
    key = rng.choice(list(fields)) if fields else "l"
    return {**fields, key: _other(rng, fields.get(key))}


def _nudge(rng: random.Random, fields: dict[str, Any]) -> object:
    """A number or a range a little off: what is most nearly right."""
    key = rng.choice([key for key, value in fields.items() if isinstance(value, (int, list))] or ["n"])
    value = fields.get(key, 0)
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        at = rng.randrange(len(value))
        return {
            **fields,
            key: [item + (rng.choice((-1, 1, 4)) if i == at else 0) for i, item in enumerate(value)],
        }
    if type(value) is int:
        return {**fields, key: max(0, value + rng.choice((-1, 1, 2)))}
    return {**fields, key: value}


def _drop(rng: random.Random, fields: dict[str, Any]) -> object:
    gone = rng.choice(list(fields)) if fields else ""
    return {key: value for key, value in fields.items() if key != gone}


def _add(rng: random.Random, fields: dict[str, Any]) -> object:
    more = {f"{rng.choice('xyz')}{index}": _any(rng) for index in range(rng.choice((1, 3, 20)))}
    return {**fields, **more}


def _swap(rng: random.Random, fields: dict[str, Any]) -> object:
    if len(fields) < 2:
        return fields
    one, other = rng.sample(list(fields), 2)
    return {**fields, one: fields[other], other: fields[one]}


def _not_a_map(rng: random.Random, fields: dict[str, Any]) -> object:
    return rng.choice((list(fields.items()), list(fields), _any(rng), {1: 2}, {None: fields}))


_MAP_MUTATIONS: tuple[Callable[[random.Random, dict[str, Any]], object], ...] = (
    _replace_value,
    _replace_value,
    _replace_value,
    _nudge,
    _nudge,
    _nudge,
    _drop,
    _add,
    _swap,
    _not_a_map,
)


def _other(rng: random.Random, value: object) -> object:
    """Something else, of the same type more often than not."""
    if rng.random() < 0.3:
        return _any(rng)
    match value:
        case bool():
            return not value
        case int():
            return rng.choice(_BIG)
        case str():
            return rng.choice(_TEXTS)
        case bytes():
            return rng.choice((spoil_bytes(rng, value), bytes(len(value)), rng.randbytes(16)))
        case list():
            return [_other(rng, item) for item in value] if rng.random() < 0.5 else [*value, _any(rng)]
        case _:
            return _any(rng)


def _any(rng: random.Random) -> object:
    return rng.choice(
        (
            None,
            True,
            -1,
            -(1 << 63),
            0.5,
            float("nan"),
            float("inf"),
            rng.choice(_BIG),
            rng.choice(_TEXTS),
            rng.randbytes(rng.choice((0, 15, 16, 17, 64))),
            [],
            [0, 0],
            [3, 1],
            [0, (1 << 63) - 1],
            [0, 1, 2],
            ["float32"] * 9,
            {},
            {"a": {"a": {"a": {}}}},
            msgpack.ExtType(5, b"x"),
            msgpack.Timestamp(1, 0),
        )
    )
