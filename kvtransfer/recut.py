"""One cache over several stores: the ranks of a tensor- or pipeline-parallel engine as one end of a transfer.

What two ends must share is the layout's identity (layouts.py). How each cuts its planes over ranks, how long its
physical blocks are and which dtype it stores is its own affair: pieces name entries, their bytes are in
canonical order, and each store converts to and from the dtypes on the wire. So no end knows of the other's
cut, and any two fit. Headrace's own engine has one block size, that of the key block (engine/runner.py);
other sizes are met where another engine's cache is the store.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtransfer.cache_store import CacheStore
    from kvtransfer.layouts import CacheLayout, Piece, Plane


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of each plane. A replicated plane (heads == 1) is held by each rank of its layers, whatever
    `heads` says."""

    layers: range
    heads: range


@dataclass(frozen=True, slots=True)
class _Box:
    """A part of a piece that one shard holds: where it is in the piece, and the shard's own name for it."""

    store: CacheStore
    layers: slice
    heads: slice
    piece: Piece
    wire: Plane


class ShardedStore:
    """The CacheStore of all planes of `layout`, each rank's store holding its cut of them.

    A shard's store numbers its layers and heads from 0, as the rank's own layout does: planes of
    `len(cut.layers)` layers and `len(cut.heads)` heads. Every shard knows the same owners. Raises ValueError where
    the cuts leave out or repeat a part of a plane; of a replicated plane the same layers may be held repeatedly,
    the first shard is read and all are written.
    """

    def __init__(self, layout: CacheLayout, shards: Sequence[tuple[Cut, CacheStore]]) -> None:
        self._layout = layout
        self._shards = tuple(shards)
        for plane in layout.planes:
            _check_tiling(plane, [cut for cut, _ in self._shards])

    def gather(
        self, owner: bytes, piece: Piece, wire: Plane, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See CacheStore. Without `out`, on the CPU where more than one shard holds a part of the piece."""
        self._layout.check(piece)
        if out is not None and len(out) != wire.num_bytes(piece):
            raise ValueError(f"a piece of {wire.num_bytes(piece)} bytes does not fit into {len(out)}")
        boxes = list(self._boxes(piece, wire))
        if wire.heads == 1:  # replicas: the first of each layer is read
            boxes = list({(box.layers.start, box.layers.stop): box for box in reversed(boxes)}.values())
        if len(boxes) == 1:
            return boxes[0].store.gather(owner, boxes[0].piece, boxes[0].wire, out)
        raw = torch.empty(wire.num_bytes(piece), dtype=torch.uint8) if out is None else out
        records = _by_record(raw, piece, wire)
        for box in boxes:
            target = records[box.layers, :, box.heads]
            if target.is_contiguous():
                box.store.gather(owner, box.piece, box.wire, target.view(-1))
            else:
                target.copy_(box.store.gather(owner, box.piece, box.wire).view(target.shape))
        return raw

    def scatter(self, owner: bytes, piece: Piece, wire: Plane, data: torch.Tensor) -> None:
        """See CacheStore. Where a shard refuses, those before it have been written."""
        self._layout.check(piece)
        if len(data) != wire.num_bytes(piece):
            raise ValueError(f"{len(data)} bytes for a piece of {wire.num_bytes(piece)}")
        records = _by_record(data, piece, wire)
        for box in self._boxes(piece, wire):
            part = records[box.layers, :, box.heads].contiguous().view(-1)
            box.store.scatter(owner, box.piece, box.wire, part)

    def fence(self) -> None:
        """Returns when every shard's has."""
        for _, store in self._shards:
            store.fence()

    def _boxes(self, piece: Piece, wire: Plane) -> Iterator[_Box]:
        for cut, store in self._shards:
            held = _heads_of(cut, wire)
            layers, heads = _overlap(piece.layers, cut.layers), _overlap(piece.heads, held)
            if layers and heads:
                there = replace(
                    piece, layers=_shifted(layers, cut.layers.start), heads=_shifted(heads, held.start)
                )
                yield _Box(
                    store,
                    _within(layers, piece.layers),
                    _within(heads, piece.heads),
                    there,
                    replace(wire, layers=len(cut.layers), heads=len(held)),
                )


def _by_record(raw: torch.Tensor, piece: Piece, wire: Plane) -> torch.Tensor:
    """Canonical bytes as uint8 [layers, entries, heads, record]; a view."""
    return raw.view(len(piece.layers), len(piece.entries), len(piece.heads), wire.record_bytes)


def _heads_of(cut: Cut, plane: Plane) -> range:
    return range(1) if plane.heads == 1 else cut.heads


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _shifted(box: range, origin: int) -> range:
    return range(box.start - origin, box.stop - origin)


def _within(part: range, whole: range) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _check_tiling(plane: Plane, cuts: Sequence[Cut]) -> None:
    """Raises ValueError unless every layer and head of the plane is held once (of a replicated plane, at least once,
    by shards that hold the same layers or none in common)."""
    held: list[tuple[range, range, int]] = []
    for number, cut in enumerate(cuts):
        layers, heads = cut.layers, _heads_of(cut, plane)
        for axis, box, limit in (("layers", layers, plane.layers), ("heads", heads, plane.heads)):
            if box.step != 1 or not 0 <= box.start < box.stop <= limit:
                raise ValueError(
                    f"shard {number}: {axis} [{box.start}, {box.stop}) of plane {plane.name!r}, which has {limit}"
                )
        if plane.heads == 1 and any(layers == other for other, _, _ in held):
            continue
        for other_layers, other_heads, other in held:
            if _overlap(layers, other_layers) and _overlap(heads, other_heads):
                raise ValueError(f"shards {other} and {number} both hold a part of plane {plane.name!r}")
        held.append((layers, heads, number))
    missing = plane.layers * plane.heads - sum(len(layers) * len(heads) for layers, heads, _ in held)
    if missing:
        raise ValueError(
            f"plane {plane.name!r}: no shard holds {missing} of its {plane.layers} layers × {plane.heads} heads"
        )
