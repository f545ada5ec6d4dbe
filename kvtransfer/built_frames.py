"""From an encoded piece to a message of the bulk stream. Knows no torch: a store sends payloads as it kept them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtransfer.frames import FrameHeader, FrameRecord, encode_frame

if TYPE_CHECKING:
    from kvtransfer.frames import LeaseRef, SlotRef
    from kvtransfer.sources import EncodedPiece


@dataclass(frozen=True, slots=True)
class BuiltFrame:
    """A message of the bulk stream, and what books want to know of it. `wire_bytes`: of the message, and of what
    lies in a slot."""

    number: int
    message: bytes
    record: FrameRecord
    payload_bytes: int
    wire_bytes: int


def build_frame(
    lease: LeaseRef, number: int, encoded: EncodedPiece, slot: SlotRef | None = None
) -> BuiltFrame:
    """The message for an encoded piece; `slot`: where the payload lies already, and is read from by the receiver."""
    header = FrameHeader(
        lease,
        number,
        encoded.piece,
        encoded.codec,
        encoded.codec_version,
        encoded.raw_bytes,
        encoded.dtypes,
        encoded.fidelity,
    )
    message, checksum = encode_frame(header, encoded.payload, slot)
    payload_bytes = memoryview(encoded.payload).nbytes
    wire_bytes = len(message) + (payload_bytes if slot is not None else 0)
    return BuiltFrame(number, message, FrameRecord(encoded.raw_bytes, checksum), payload_bytes, wire_bytes)
