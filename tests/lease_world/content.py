"""What is known beforehand: prompts, their keys, and the bytes that their cache must have."""

from __future__ import annotations

import zlib
from functools import cache, lru_cache

from kvtransfer.keys import keys_for, root_key, tenant_secret
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane
from kvtransfer.lease_types import RequestId

BLOCK_TOKENS = 2
ENTRY_BYTES = 4
FRAME_BYTES = 24  # an entry's bytes are few, so that a prompt takes some frames
LAYOUT = CacheLayout(
    planes=(
        Plane("k", 2, Paged(1), 1, (Field("k", ENTRY_BYTES, "uint8"),)),
        Plane("v", 2, Paged(1), 1, (Field("v", ENTRY_BYTES, "uint8"),)),
    ),
    block_tokens=BLOCK_TOKENS,
)
NUM_LAYERS = 2

PROMPTS = {
    RequestId("t", "a"): (1, 2, 3, 4, 5),
    RequestId("t", "b"): (1, 2, 3, 4, 6, 7),  # shares two blocks with the first
    RequestId("t", "c"): (1, 2, 9),
    RequestId("u", "a"): (1, 2, 3, 4, 5),  # the same tokens of another tenant: other keys
}
REQUESTS = tuple(PROMPTS)

Place = tuple[str, int, int]
"""Plane, layer, entry."""


@lru_cache
def root_of(tenant: str) -> bytes:
    return root_key("identity", "", tenant_secret(b"the cluster's secret", tenant))


def keys_of(root: bytes, prompt: tuple[int, ...]) -> list[bytes]:
    return keys_for(root, prompt, BLOCK_TOKENS)


@cache
def entry_bytes(prefix: tuple[int, ...], plane: str, layer: int) -> bytes:
    """The cache of the last token of `prefix`: a function of the tokens up to it, as attention makes it."""
    return zlib.crc32(repr((prefix, plane, layer)).encode()).to_bytes(ENTRY_BYTES, "little")


@cache
def places_of(piece: Piece) -> tuple[Place, ...]:
    """In canonical order: layer, then entry; there is one head."""
    return tuple((piece.plane, layer, entry) for layer in piece.layers for entry in piece.entries)


@cache
def payload_of(prompt: tuple[int, ...], piece: Piece) -> bytes:
    return b"".join(
        entry_bytes(prompt[: entry + 1], plane, layer) for plane, layer, entry in places_of(piece)
    )


def checksum_of(payload: bytes, number: int) -> int:
    """As a frame carries it; a receiver verifies it before anything else."""
    return zlib.crc32(payload + number.to_bytes(4, "little"))


def whole(entries: range, layers: range = range(NUM_LAYERS)) -> tuple[Piece, ...]:
    """Those entries of every plane."""
    return tuple(Piece(plane.name, layers, range(1), entries) for plane in LAYOUT.planes)
