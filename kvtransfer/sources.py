"""What a fetch asks for, and what whoever answers it must offer: a worker's cache, a host tier, a disk.

Pure types. The blocks asked for are named by their keys, which nobody can guess who does not hold the
tenant's secret (keys.py), so that a key is also the permission to read what it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from kvtransfer.frames import LeaseRef
    from kvtransfer.layouts import Piece

MAX_FETCH_KEYS = 1 << 16


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """Blocks `keys`, the first of which begins at token `first_block * block_tokens` of the sequence.

    `lease`: the asker's own lease, which the frames name; its receiver epoch is the asker's, its sender epoch
    the answerer's. `layout`: identity of the asker's layout; `block_tokens`: its key block. `dtypes`: by plane
    and field, what the asker stores. `fidelity`: the worst class that it takes (Fidelity's value); `codecs`: the
    (name, version) pairs that it decodes.
    """

    lease: LeaseRef
    keys: tuple[bytes, ...]
    first_block: int
    block_tokens: int
    layout: str
    dtypes: tuple[tuple[str, ...], ...]
    fidelity: str
    codecs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """A piece ready to travel. `fidelity`: worst class of its content before the codec, as a rank (0 exact)."""

    piece: Piece
    dtypes: tuple[str, ...]
    fidelity: int
    codec: str
    codec_version: int
    raw_bytes: int
    payload: Buffer


class SourceRefused(Exception):
    """The blocks cannot be served. `cause` is UPPER_SNAKE: NO_BLOCKS, LAYOUT_MISMATCH, DTYPE_MISMATCH, BUSY, …"""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message


class OpenBlocks(Protocol):
    """Blocks held for one fetch: they stay until `close`."""

    @property
    def num_blocks(self) -> int:
        """How many leading keys of the request are served; at least 1."""

    def pieces(self) -> Iterator[EncodedPiece]:
        """All of them, block after block; each is read and encoded when it is asked for."""

    def close(self) -> None:
        """Nothing is read any more. Idempotent."""


class BlockSource(Protocol):
    """Serves cached blocks by key. Any thread may call."""

    def open(self, request: FetchRequest) -> OpenBlocks:
        """Pins the longest leading run of the keys that is held. Raises SourceRefused."""
