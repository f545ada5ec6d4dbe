"""Block records for tests of the tiers: contents follow from a seed, so that a wrong byte shows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.tiers.records import BlockRecord, Part, RecordId, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable

SECRET = b"a cluster secret of 32 bytes...."
SHAPE = Shape("layout", 16, (("float32",), ("float32",)))
ALICE, BOB, CAROL = (name.encode().ljust(16) for name in ("alice", "bob", "carol"))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def block(
    number: int,
    payload_bytes: int = 2000,
    *,
    tenant: bytes = ALICE,
    fidelity: int = 0,
    codec: str = "raw",
    shape: Shape = SHAPE,
) -> BlockRecord:
    """Two parts of half the payload each; the bytes follow from number, tenant and fidelity."""
    seed = int.from_bytes(hashlib.blake2b(key(number) + tenant + bytes([fidelity])).digest()[:4], "little")
    data = np.random.default_rng(seed).bytes(payload_bytes)
    half = payload_bytes // 2
    parts = tuple(
        Part(plane, range(2), range(1), range(16), 1, ("float32",), fidelity, codec, 1, len(payload), payload)
        for plane, payload in (("k", data[:half]), ("v", data[half:]))
    )
    return BlockRecord(RecordId(key(number), fidelity, shape), tenant, parts)


def same(left: BlockRecord | None, right: BlockRecord | None) -> bool:
    """Equal to the last byte."""
    if left is None or right is None:
        return left is right
    return (left.id, left.tenant, _facts(left.parts)) == (right.id, right.tenant, _facts(right.parts))


def _facts(parts: Iterable[Part]) -> list[Part]:
    return [replace(part, payload=bytes(part.payload)) for part in parts]
