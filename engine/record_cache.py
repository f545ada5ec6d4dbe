"""Window records as blocks of their own, so that they travel and are stored as blocks do.

A record is one entry of a layout in which each window plane is a paged plane with one entry for a key block, whose
heads are the rows: the row of position p is head p modulo their number. It has a key of its own, made from that of the
block that it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.cache_size import far_boundary, window_planes
from engine.engine import Engine
from kvtransfer.layouts import CacheLayout, Paged, Piece, Plane


def record_layout(layout: CacheLayout) -> CacheLayout | None:
    """The layout of a model's window records; None for a model without windows."""
    boundary = far_boundary(layout)
    planes = [
        Plane(plane.name, plane.layers, Paged(layout.block_tokens), len(plane.live(boundary)), plane.fields)
        for plane in window_planes(layout)
        if plane.live(boundary)
    ]
    return CacheLayout(tuple(planes), layout.block_tokens) if planes else None


class RecordCache:
    """A CacheStore of an engine's window records. An owner has one record, to be read or to be filled."""

    def __init__(self, engine: Engine, layout: CacheLayout) -> None:
        """`layout`: that of `record_layout`."""
        assert engine.pool.windows is not None
        self.layout = layout
        self._engine = engine
        self._windows = engine.pool.windows
        self._rows = {plane.name: plane.heads for plane in layout.planes}

    # --- which record ----------------------------------------------------------------------------

    def pin(self, owner: bytes, keys: Sequence[bytes], bound: int) -> tuple[int, int] | None:
        """Keep the record of the first of `keys` with a rank of at most `bound`, to be gathered under `owner`. Returns
        (1, its rank), or None where it is not here."""
        with self._engine.lock:
            rank = self._windows.read(owner, keys[0], bound)
            return None if rank is None else (1, rank)

    def open(self, owner: bytes) -> bool:
        """A record to be filled under `owner`; False where there is none to give up."""
        with self._engine.lock:
            return self._windows.land(owner)

    def seal(self, owner: bytes, block: bytes, fidelity: int) -> None:
        """What landed is whole: the windows at the end of the block with that key."""
        with self._engine.lock:
            is_cached = self._engine.pool.lookup_rank(block, fidelity) == fidelity
            self._windows.landed(owner, (block, fidelity) if is_cached else None)

    def release(self, owner: bytes) -> None:
        """Let it go. Idempotent."""
        with self._engine.lock:
            self._windows.close(owner)

    def has(self, block: bytes, bound: int) -> int | None:
        """The rank of a block's record that is here, of at most `bound`."""
        with self._engine.lock:
            return next((rank for rank in range(bound + 1) if self._windows.has((block, rank))), None)

    # --- CacheStore ------------------------------------------------------------------------------

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See CacheStore."""
        raw = self._part(owner, piece, wire).contiguous().view(torch.uint8).reshape(-1).cpu()
        return raw if out is None else out.copy_(raw)

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        """See CacheStore."""
        part = self._part(owner, piece, wire)
        if len(data) != wire.num_bytes(piece):
            raise ValueError(f"{len(data)} bytes for a piece of {wire.num_bytes(piece)}")
        aligned = data.cpu().clone(memory_format=torch.contiguous_format)
        part.copy_(aligned.view(part.dtype).view(part.shape))

    def fence(self) -> None:
        """Nothing lies elsewhere."""

    def _part(self, owner: bytes, piece: Piece, wire: Plane) -> torch.Tensor:
        """[layers, rows, width] of the owner's record."""
        self.layout.check(piece)
        plane = self.layout.plane(piece.plane)
        if wire.dtypes != plane.dtypes or piece.entries != range(1):
            raise ValueError(f"plane {piece.plane!r}: a record is one entry of {', '.join(plane.dtypes)}")
        with self._engine.lock:
            record = self._windows.record_of(owner)
        rows, stored = self._rows[piece.plane], self._engine.cache.windows.records[piece.plane]
        first = record * rows
        return stored[
            piece.layers.start : piece.layers.stop,
            0,
            first + piece.heads.start : first + piece.heads.stop,
        ]
