"""What a fetch asks for, and what whoever answers it must offer: a worker's cache, a host tier, a disk.

Pure types; fetch_messages.py puts them on the wire. The blocks asked for are named by their keys, which nobody
can guess who does not hold the tenant's secret (keys.py), so that a key is also the permission to read what it
names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from typing_extensions import Buffer

    from kvtransfer.frames import LeaseRef
    from kvtransfer.layouts import Piece

MAX_FETCH_KEYS = 1 << 16


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Blocks `keys`, the first of which begins at token `first_block * block_tokens` of the sequence.

    `lease`: the asker's own lease, which the frames name; its receiver epoch is the asker's, its sender epoch
    the answerer's. `layout`: identity of the asker's layout; `block_tokens`: its key block. `dtypes`: by plane
    and field, what the asker stores. `fidelity`: the worst rank that it takes (0 exact, 1 near, 2 compact), with
    what codecs and conversions lose; `codecs`: the (name, version) pairs that it decodes.
    """

    lease: LeaseRef
    keys: tuple[bytes, ...]
    first_block: int
    block_tokens: int
    layout: str
    dtypes: tuple[tuple[str, ...], ...]
    fidelity: int
    codecs: tuple[tuple[str, int], ...]

    @property
    def start_token(self) -> int:
        """The first position asked for, in the asker's sequence."""
        return self.first_block * self.block_tokens


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """A piece ready to travel. `piece`: at its place in the asker's sequence, within one key block; of a paged
    plane. `dtypes`: of the plane's fields before the codec. `fidelity`: worst class of the content before the
    codec, as a rank (0 exact). `raw_bytes`: canonical bytes of the piece in `dtypes`.
    """

    piece: Piece
    dtypes: tuple[str, ...]
    fidelity: int
    codec: str
    codec_version: int
    raw_bytes: int
    payload: Buffer


class SourceRefused(Exception):
    """The blocks cannot be served. `cause` is UPPER_SNAKE: NO_BLOCKS, LAYOUT_MISMATCH, DTYPE_MISMATCH,
    FIDELITY_EXCEEDED, NO_COMMON_CODEC, BUSY, READ_FAILED, …"""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message


class OpenBlocks(Protocol):
    """Blocks held for one fetch: they stay until `close`. One thread at a time calls, not always the same; only
    `note_landed` may be called while another call runs."""

    @property
    def num_blocks(self) -> int:
        """How many leading keys of the request are served; at least 1."""

    def pieces(self) -> Iterator[EncodedPiece]:
        """All of them, block after block; each is read and encoded when it is asked for. Called once.

        Together they tile the served blocks exactly: every paged plane, all layers and heads. A piece may
        raise SourceRefused where its bytes turn out to be gone or damaged: the fetch ends with that cause.
        """

    def piece(self, number: int) -> EncodedPiece:
        """The piece that `pieces` gave as its `number`-th, from 0, once more: it was damaged on its way.

        Must be the same bytes, codec and dtypes. What was read need not be kept for this. Raises SourceRefused.
        """

    def note_landed(self, number: int, in_flight_s: float, landing_s: float) -> None:
        """Piece `number` is in the asker's cache (CodecChooser.note_landed says what the times are). Nothing
        where no codec is chosen here."""

    def close(self) -> None:
        """Nothing is read any more. Idempotent."""


class BlockSource(Protocol):
    """Serves cached blocks by key. Any thread may call."""

    def open(self, request: FetchRequest) -> OpenBlocks:
        """Pins the longest leading run of the keys that is held. Raises SourceRefused."""


class SourcesByLayout:
    """A BlockSource of several, each with blocks of one layout, by its identity."""

    def __init__(self, sources: Mapping[str, BlockSource]) -> None:
        self._sources = sources

    def open(self, request: FetchRequest) -> OpenBlocks:
        """Raises SourceRefused."""
        source = self._sources.get(request.layout)
        if source is None:
            raise SourceRefused(
                "LAYOUT_MISMATCH", f"blocks of layouts {', '.join(self._sources)} are cached here"
            )
        return source.open(request)
