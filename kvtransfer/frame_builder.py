"""From a piece of cache to an encoded piece: gather, convert, encode. What everybody who sends from a cache shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.codecs import Fidelity
from kvtransfer.sources import EncodedPiece

if TYPE_CHECKING:
    import torch

    from kvtransfer.cache_store import CacheStore
    from kvtransfer.codecs import Codec
    from kvtransfer.layouts import CacheLayout, Piece


class PieceEncoder:
    """Reads pieces of one owner's cache and encodes them. Safe to call from several threads.

    `layout` has the dtypes that the cache stores, `wire` those that travel; where they differ the content counts
    as `near`.
    """

    def __init__(self, cache: CacheStore, owner: bytes, layout: CacheLayout, wire: CacheLayout) -> None:
        self._cache = cache
        self._owner = owner
        self._layout = layout
        self._wire = wire

    def encode(
        self, piece: Piece, codec: Codec, fidelity: int, out: torch.Tensor | None = None
    ) -> EncodedPiece:
        """The piece in `codec`. `fidelity`: worst rank of what the cache holds there. `out`: uint8 on the CPU, at
        least as long as the piece; the bytes before the codec are put there, which is all of it for `raw`."""
        wire = self._wire.plane(piece.plane)
        raw_bytes = wire.num_bytes(piece)
        target = None if out is None else out[:raw_bytes]
        raw = self._cache.gather(self._owner, piece, wire, target)
        return EncodedPiece(
            piece=piece,
            dtypes=wire.dtypes,
            fidelity=self._fidelity(piece, fidelity),
            codec=codec.name,
            codec_version=codec.version,
            raw_bytes=raw_bytes,
            payload=codec.encode(raw, wire, piece),
        )

    def _fidelity(self, piece: Piece, fidelity: int) -> int:
        is_converted = self._wire.plane(piece.plane).dtypes != self._layout.plane(piece.plane).dtypes
        return max(fidelity, Fidelity.NEAR.rank) if is_converted else fidelity
