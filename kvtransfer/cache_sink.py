"""Frames into a cache: decoded, converted where dtypes differ, and written to their places."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvtransfer.codecs import Fidelity, UnknownCodec, find_codec
from kvtransfer.frames import AckFault
from kvtransfer.landing import CannotLand

if TYPE_CHECKING:
    from kvtransfer.cache_store import CacheStore
    from kvtransfer.frames import Frame, FrameHeader
    from kvtransfer.layouts import CacheLayout, Piece
    from kvtransfer.lease_types import Landing


class CacheSink:
    """A FrameSink over a cache; `layout` has the dtypes that the cache stores."""

    def __init__(self, cache: CacheStore, layout: CacheLayout) -> None:
        self._cache = cache
        self._layout = layout

    def check(self, header: FrameHeader) -> int:
        try:
            codec = find_codec(header.codec, header.codec_version)
        except UnknownCodec as error:
            raise CannotLand(AckFault.UNKNOWN_CODEC, str(error)) from None
        is_converted = header.dtypes != self._layout.plane(header.piece.plane).dtypes
        converted = Fidelity.NEAR if is_converted else Fidelity.EXACT
        return max(header.fidelity, codec.fidelity.rank, converted.rank)

    def write(self, landing: Landing, frame: Frame) -> None:
        header = frame.header
        wire = self._layout.plane(header.piece.plane).with_dtypes(header.dtypes)
        codec = find_codec(header.codec, header.codec_version)
        if len(frame.payload) < header.raw_bytes:
            # A few bytes may declare a piece beyond the lease's memory: refused here, before it is decoded.
            self._cache.gather(landing.lease_id, _last_entry(header.piece), wire)
        raw = codec.decode(frame.payload, wire, header.piece)
        if len(raw) != header.raw_bytes:
            raise ValueError(f"decoded to {len(raw)} bytes, declared {header.raw_bytes}")
        self._cache.scatter(landing.lease_id, header.piece, wire, raw)

    def fence(self) -> None:
        self._cache.fence()


def _last_entry(piece: Piece) -> Piece:
    """Of its first layer and head."""
    return replace(piece, layers=piece.layers[:1], heads=piece.heads[:1], entries=piece.entries[-1:])
