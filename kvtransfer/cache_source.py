"""A worker's own cache as a source of fetches: blocks pinned under an owner of their own, read piece by piece."""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from kvtransfer.codecs import Fidelity
from kvtransfer.fetching import paged_part
from kvtransfer.frame_builder import PieceEncoder
from kvtransfer.frames import LEASE_ID_BYTES
from kvtransfer.layouts import DEFAULT_PIECE_BYTES, Paged, pieces_for
from kvtransfer.sources import SourceRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtransfer.cache_store import CacheStore
    from kvtransfer.choice import CodecChooser
    from kvtransfer.codecs import Codec
    from kvtransfer.layouts import CacheLayout, Piece
    from kvtransfer.sources import EncodedPiece, FetchRequest

    Pin = Callable[[bytes, Sequence[bytes], int], tuple[int, int] | None]


class CacheBlockSource:
    """A BlockSource over the cache of this worker.

    `layout`: what the cache stores; `block_tokens`: the key block, a multiple of every plane's tokens per entry.
    `pin(owner, keys, rank)`: holds the longest leading run of blocks that are cached with a fidelity rank of at
    most `rank` under `owner`, so that `cache` reads them as that owner's from position 0 on; gives their number and
    the worst rank among them, or None where there is not one. `unpin(owner)`: lets them go. `chooser(request)`: a
    chooser among the codecs that the request and its fidelity allow; may raise SourceRefused. `frame_bytes`: about
    what a piece has before the codec.
    """

    def __init__(
        self,
        cache: CacheStore,
        layout: CacheLayout,
        block_tokens: int,
        pin: Pin,
        unpin: Callable[[bytes], None],
        chooser: Callable[[FetchRequest], CodecChooser],
        frame_bytes: int = DEFAULT_PIECE_BYTES,
    ) -> None:
        self._cache = cache
        self._layout = layout
        self._identity = layout.identity()
        self._block_tokens = block_tokens
        self._pin = pin
        self._unpin = unpin
        self._chooser = chooser
        self._frame_bytes = frame_bytes

    def open(self, request: FetchRequest) -> PinnedBlocks:
        """Raises SourceRefused."""
        if request.layout != self._identity or request.block_tokens != self._block_tokens:
            text = f"blocks of {self._block_tokens} tokens of layout {self._identity} are cached here"
            raise SourceRefused("LAYOUT_MISMATCH", text)
        wire = wire_layout(self._layout, request)
        chooser = self._chooser(request)
        owner = secrets.token_bytes(LEASE_ID_BYTES)
        pinned = self._pin(owner, request.keys, request.fidelity)
        if pinned is None:
            raise SourceRefused("NO_BLOCKS", f"the first of {len(request.keys)} blocks is not cached here")
        num_blocks, fidelity = pinned
        encoder = PieceEncoder(self._cache, owner, self._layout, wire)
        pieces = [
            piece
            for block in range(num_blocks)
            for piece in pieces_for(wire, _tokens(block, self._block_tokens), self._frame_bytes)
        ]
        return PinnedBlocks(
            request, wire, encoder, chooser, pieces, num_blocks, fidelity, lambda: self._unpin(owner)
        )


class PinnedBlocks:
    """OpenBlocks of a worker's cache. `pieces`: at the places that they have here; `wire`: dtypes that travel."""

    def __init__(
        self,
        request: FetchRequest,
        wire: CacheLayout,
        encoder: PieceEncoder,
        chooser: CodecChooser,
        pieces: Sequence[Piece],
        num_blocks: int,
        fidelity: int,
        unpin: Callable[[], None],
    ) -> None:
        self.num_blocks = num_blocks
        self._request = request
        self._wire = wire
        self._encoder = encoder
        self._chooser = chooser
        self._pieces = pieces
        self._fidelity = fidelity
        self._unpin = unpin
        self._lock = threading.Lock()
        # By piece: its codec, for the next time, and its payload's bytes.
        self._made: list[tuple[Codec, int]] = []
        self._is_closed = False

    def pieces(self) -> Iterator[EncodedPiece]:
        bytes_left = sum(piece.num_bytes(self._wire) for piece in self._pieces)
        for piece in self._pieces:
            with self._lock:
                codec = self._chooser.choose(bytes_left).codec
            self._check(codec)
            began_at = time.monotonic()
            encoded = self._encode(piece, codec)
            encode_s = time.monotonic() - began_at
            num_bytes = memoryview(encoded.payload).nbytes
            with self._lock:
                self._made.append((codec, num_bytes))
                self._chooser.note_encoded(codec.name, encoded.raw_bytes, num_bytes, encode_s)
            bytes_left -= encoded.raw_bytes
            yield encoded

    def piece(self, number: int) -> EncodedPiece:
        return self._encode(self._pieces[number], self._made[number][0])

    def note_landed(self, number: int, in_flight_s: float, landing_s: float) -> None:
        with self._lock:
            codec, num_bytes = self._made[number]
            raw_bytes = self._pieces[number].num_bytes(self._wire)
            self._chooser.note_landed(codec.name, raw_bytes, num_bytes, in_flight_s, landing_s)

    def close(self) -> None:
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._unpin()

    def _encode(self, piece: Piece, codec: Codec) -> EncodedPiece:
        """At its place in the asker's sequence; the codec sees that of here, so many whole blocks before it."""
        encoded = self._encoder.encode(piece, codec, self._fidelity)
        kind = self._wire.plane(piece.plane).kind
        assert isinstance(kind, Paged)
        shift = self._request.start_token // kind.tokens_per_entry
        entries = range(piece.entries.start + shift, piece.entries.stop + shift)
        return replace(encoded, piece=replace(piece, entries=entries))

    def _check(self, codec: Codec) -> None:
        request = self._request
        if (codec.name, codec.version) not in request.codecs or codec.fidelity.rank > request.fidelity:
            text = f"codec {codec.name} {codec.version} is none that the asker decodes within its fidelity"
            raise SourceRefused("NO_COMMON_CODEC", text)


def wire_layout(layout: CacheLayout, request: FetchRequest) -> CacheLayout:
    """The paged planes with the dtypes that travel: field by field the narrower of both ends, ours where both are
    equally wide and differ. Raises SourceRefused where numbers cannot be converted, or may not be."""
    try:
        wire = layout.narrowed(request.dtypes)
    except ValueError as error:
        raise SourceRefused("DTYPE_MISMATCH", str(error)) from error
    for plane, wanted in zip(layout.planes, request.dtypes, strict=True):
        if plane.dtypes != wanted and request.fidelity < Fidelity.NEAR.rank and isinstance(plane.kind, Paged):
            both = f"plane {plane.name!r} is {plane.dtypes} here and {wanted} there"
            raise SourceRefused("FIDELITY_EXCEEDED", f"{both}: converting it is not exact")
    return paged_part(wire)


def _tokens(block: int, block_tokens: int) -> range:
    return range(block * block_tokens, (block + 1) * block_tokens)
