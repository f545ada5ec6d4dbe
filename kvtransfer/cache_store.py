"""Where pieces are read from and written to: an engine's pools, a host arena, shards of them, a test's arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from kvtransfer.layouts import Piece, Plane


class CacheStore(Protocol):
    """A cache that hands out and takes canonical bytes: [layer, entry, head, field], little endian, no padding.

    `owner` is the lease id under which the store holds the sequence's memory. `wire` is the piece's plane with
    the dtypes that the bytes have or shall have; where the store keeps others it converts (`convertible`).
    Both calls may come from other threads than the engine's, while a step computes.
    """

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The piece's bytes: uint8 [wire.num_bytes(piece)], contiguous, on the store's device.

        `out`: uint8 of that length on the CPU, to write into and return instead of memory of its own.
        Raises KeyError for an unknown owner, ValueError for entries that the owner lacks.
        """

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        """Writes the piece's bytes, uint8 [wire.num_bytes(piece)]; `data` may be reused as soon as this returns.

        Raises KeyError for an unknown owner, ValueError for entries that the owner lacks or a wrong length.
        """

    def fence(self) -> None:
        """Returns when everything scattered so far is visible to the engine's next step."""
