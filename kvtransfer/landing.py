"""How one frame lands: verify, ask the lease table, decode, write. The same for every transport.

A frame that cannot land becomes a refusal that says why, never an exception: the stream goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kvtransfer.codecs import UnknownCodec, find_codec
from kvtransfer.frames import Ack, AckFault, DamagedFrame, decode_frame
from kvtransfer.layouts import Paged
from kvtransfer.lease_types import AlreadyLanded, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from kvtransfer.cache_store import CacheStore
    from kvtransfer.codecs import Codec
    from kvtransfer.desk import LeaseDesk
    from kvtransfer.frames import Frame, FrameHeader
    from kvtransfer.layouts import CacheLayout, Plane
    from kvtransfer.lease_types import Landing

_log = logging.getLogger(__name__)


class _CannotLand(Exception):
    """Carries the fault and the message of a refusal."""

    def __init__(self, fault: AckFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class FrameLander:
    """Lands frames in the cache under the leases of a desk; safe to call from several threads.

    `pace(num_bytes)`: called before a frame is written, without the lock; it may sleep, so that
    landing does not stall a decode step.
    """

    def __init__(
        self,
        desk: LeaseDesk,
        cache: CacheStore,
        layout: CacheLayout,
        clock: Callable[[], float],
        pace: Callable[[int], None] | None = None,
    ) -> None:
        self._desk = desk
        self._cache = cache
        self._layout = layout
        self._clock = clock
        self._pace = pace

    def land(self, message: Buffer) -> Ack:
        """Takes one message of the bulk stream and gives its acknowledgement."""
        received_at = self._clock()
        try:
            frame = decode_frame(message)
        except DamagedFrame as error:
            return Ack(None, ok=False, cause=AckFault.DAMAGED_FRAME, message=str(error))
        number = frame.header.number
        if self._pace is not None:
            self._pace(len(frame.payload))
        try:
            codec, wire = self._check(frame.header)
            refused = self._admit_and_write(frame, codec, wire)
        except _CannotLand as error:
            return Ack(number, ok=False, cause=error.fault, message=str(error))
        if refused is not None:
            return Ack(number, ok=False, cause=refused.refusal, message=refused.message)
        return Ack(number, ok=True, landing_s=self._clock() - received_at)

    def _check(self, header: FrameHeader) -> tuple[Codec, Plane]:
        try:
            self._layout.check(header.piece)
            wire = self._layout.plane(header.piece.plane).with_dtypes(header.dtypes)
        except ValueError as error:
            raise _CannotLand(AckFault.BAD_PIECE, str(error)) from None
        num_bytes = wire.num_bytes(header.piece)
        if header.raw_bytes != num_bytes:
            text = f"raw length {header.raw_bytes}, but the piece has {num_bytes} bytes here"
            raise _CannotLand(AckFault.BAD_PIECE, text)
        try:
            return find_codec(header.codec, header.codec_version), wire
        except UnknownCodec as error:
            raise _CannotLand(AckFault.UNKNOWN_CODEC, str(error)) from None

    def _admit_and_write(self, frame: Frame, codec: Codec, wire: Plane) -> Refused | None:
        header = frame.header
        with self._desk.change() as table:
            answer = table.begin_landing(header.lease, header.number, frame.record)
        if isinstance(answer, Refused):
            return answer
        if isinstance(answer, AlreadyLanded):
            return None
        landed = False
        try:
            self._write(answer, frame, codec, wire)
            landed = True
        finally:
            with self._desk.change() as table:
                table.end_landing(answer, frame.record, header.piece, landed=landed)
        return None

    def _write(self, landing: Landing, frame: Frame, codec: Codec, wire: Plane) -> None:
        piece = frame.header.piece
        if isinstance(wire.kind, Paged):
            first = landing.start_token // wire.kind.tokens_per_entry
            if piece.entries.start < first:
                text = f"entries from {piece.entries.start}, but those below {first} are shared prefix here"
                raise _CannotLand(AckFault.BAD_PIECE, text)
        try:
            raw = codec.decode(frame.payload, wire, piece)
            if len(raw) != frame.header.raw_bytes:
                raise ValueError(f"decoded to {len(raw)} bytes, declared {frame.header.raw_bytes}")
            self._cache.scatter(landing.lease_id, piece, wire, raw)
        except Exception as error:  # codecs and stores may fail in any way: one frame pays for it
            _log.warning("frame %d of lease %s failed to land", frame.header.number, landing.lease_id.hex())
            raise _CannotLand(AckFault.LANDING_FAILED, f"{type(error).__name__}: {error}") from error
