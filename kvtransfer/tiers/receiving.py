"""What workers push into a store: areas that leases own, frames kept as they come, records when a lease commits.

Landing memory is bounded: an offer reserves what its blocks can take at most, and gets as many blocks as there is
room for. A block that is landing under one lease is not wanted from another.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvtransfer.frames import AckFault
from kvtransfer.landing import CannotLand
from kvtransfer.layouts import Paged
from kvtransfer.lease_types import Refusal
from kvtransfer.tiers.codec_classes import CODEC_RANKS
from kvtransfer.tiers.records import BlockRecord, Part, RecordId, Shape

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable

    from kvtransfer.frames import Frame, FrameHeader
    from kvtransfer.layouts import CacheLayout, Plane
    from kvtransfer.lease_types import Landing, RequestId

REMEMBERED_LEASES = 4096

# A payload may be a little longer than its piece where a codec cannot shrink it.
_PAYLOAD_SLACK = 16  # a sixteenth
_AREA_SLACK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Offer:
    """Blocks that a worker has and would write back: `keys`, the first of which begins at token
    `first_block * block_tokens` of the sequence. `tenant`: its label. `layout`: with the writer's dtypes.
    `fidelity`: worst rank of what it may send (0 exact)."""

    tenant: bytes
    keys: tuple[bytes, ...]
    first_block: int
    block_tokens: int
    layout: CacheLayout
    fidelity: int

    @property
    def shape(self) -> Shape:
        return shape_of(self.layout, self.block_tokens)

    @property
    def block_bytes(self) -> int:
        """Canonical bytes of one block."""
        return self.layout.num_bytes(self.block_tokens)


@dataclass(slots=True)
class _Area:
    owner: RequestId
    offer: Offer
    shape: Shape
    blocks: range  # of the sequence
    reserved_bytes: int
    landed_bytes: int = 0
    parts: dict[int, list[tuple[int, Part]]] = field(default_factory=dict)  # by block: rank and part


class ReceivingAreas:
    """A FrameSink. `limit_bytes`: of payloads that are landing, all leases together. `lock`: the store's."""

    def __init__(self, limit_bytes: int, lock: threading.RLock) -> None:
        self.limit_bytes = limit_bytes
        self.reserved_bytes = 0
        self._lock = lock
        self._areas: dict[bytes, _Area] = {}
        self._landing: dict[tuple[bytes, Shape], int] = {}  # key and shape to rank
        self._layouts: OrderedDict[bytes, CacheLayout] = OrderedDict()  # of closed leases too

    @property
    def num_open(self) -> int:
        return len(self._areas)

    def is_landing(self, key: bytes, shape: Shape, bound: int) -> bool:
        """Whether somebody is pushing this block, no worse than `bound`. Under the lock."""
        rank = self._landing.get((key, shape))
        return rank is not None and rank <= bound

    def num_blocks_that_fit(self, block_bytes: int) -> int:
        """How many blocks may land beside what is landing. Under the lock."""
        free = self.limit_bytes - self.reserved_bytes - _AREA_SLACK_BYTES
        return max(0, free // _reserve(block_bytes))

    def find(self, owner: RequestId) -> range | None:
        """The blocks that the same offer was granted before, and that are still being pushed. Under the lock."""
        return next((area.blocks for area in self._areas.values() if area.owner == owner), None)

    def open(self, lease_id: bytes, owner: RequestId, offer: Offer, blocks: range) -> None:
        """Reserves an area for blocks of the sequence under a lease. Under the lock."""
        reserved = len(blocks) * _reserve(offer.block_bytes) + _AREA_SLACK_BYTES
        self._areas[lease_id] = _Area(owner, offer, offer.shape, blocks, reserved)
        self.reserved_bytes += reserved
        for block in blocks:
            self._landing[offer.keys[block - offer.first_block], offer.shape] = offer.fidelity
        self._layouts[lease_id] = offer.layout
        if len(self._layouts) > REMEMBERED_LEASES:
            self._layouts.popitem(last=False)

    def close(self, lease_ids: Iterable[bytes]) -> None:
        """Forgets what landed under leases that are over or committed. Under the lock; idempotent."""
        for lease_id in lease_ids:
            area = self._areas.pop(lease_id, None)
            if area is None:
                continue
            self.reserved_bytes -= area.reserved_bytes
            for block in area.blocks:
                self._landing.pop((area.offer.keys[block - area.offer.first_block], area.shape), None)

    def take(self, lease_id: bytes, num_tokens: int) -> list[BlockRecord]:
        """The whole blocks below position `num_tokens` as records, and the area closed. All pieces must have landed
        (`coverage.find_gap`). Under the lock. Raises KeyError for a lease without an area."""
        area = self._areas[lease_id]
        records = []
        for block in range(area.blocks.start, min(area.blocks.stop, num_tokens // area.offer.block_tokens)):
            ranked = area.parts[block]
            key = area.offer.keys[block - area.offer.first_block]
            name = RecordId(key, max(rank for rank, _ in ranked), area.shape)
            records.append(BlockRecord(name, area.offer.tenant, tuple(part for _, part in ranked)))
        self.close([lease_id])
        return records

    def block_tokens_of(self, lease_id: bytes) -> int:
        """Of the lease's key blocks. Under the lock. Raises KeyError for a lease without an area."""
        return self._areas[lease_id].offer.block_tokens

    def layout_of(self, lease_id: bytes) -> CacheLayout:
        """As its offer described it. Raises CannotLand for a lease that is not known."""
        with self._lock:
            layout = self._layouts.get(lease_id)
        if layout is None:
            raise CannotLand(Refusal.UNKNOWN_LEASE, f"no lease {lease_id.hex()} is known here")
        return layout

    # ---- FrameSink

    def check(self, header: FrameHeader) -> int:
        codec_rank = CODEC_RANKS.get((header.codec, header.codec_version))
        if codec_rank is None:
            text = f"codec {header.codec!r} version {header.codec_version} is not known to this store"
            raise CannotLand(AckFault.UNKNOWN_CODEC, text)
        with self._lock:
            area = self._areas.get(header.lease.lease_id)
        if area is not None:  # of a lease that is over the table has the word
            plane = area.offer.layout.plane(header.piece.plane)
            if header.dtypes != plane.dtypes:
                text = f"dtypes {header.dtypes}, the offer said {plane.dtypes}"
                raise CannotLand(AckFault.BAD_PIECE, text)
            _block_of(header, plane, area)
        return max(header.fidelity, codec_rank)

    def write(self, landing: Landing, frame: Frame) -> None:
        header, num_bytes = frame.header, len(frame.payload)
        with self._lock:
            area = self._areas[landing.lease_id]
            if area.landed_bytes + num_bytes > area.reserved_bytes:
                text = f"payloads of more than the {area.reserved_bytes} bytes that were reserved"
                raise CannotLand(AckFault.LANDING_FAILED, text)
            area.landed_bytes += num_bytes
        plane = area.offer.layout.plane(header.piece.plane)
        block = _block_of(header, plane, area)
        first, per_entry = _first_entry(plane, block, area.offer.block_tokens)
        entries = range(header.piece.entries.start - first, header.piece.entries.stop - first)
        part = Part(
            *(header.piece.plane, header.piece.layers, header.piece.heads, entries, per_entry),
            *(header.dtypes, header.fidelity, header.codec, header.codec_version, header.raw_bytes),
            bytes(frame.payload),
        )
        rank = max(header.fidelity, CODEC_RANKS[header.codec, header.codec_version])
        with self._lock:
            area.parts.setdefault(block, []).append((rank, part))

    def fence(self) -> None:
        """Nothing lies elsewhere."""


def shape_of(layout: CacheLayout, block_tokens: int) -> Shape:
    """What a store needs to know of a layout to find records for it."""
    return Shape(layout.identity(), block_tokens, layout.dtypes)


def why_not_storable(layout: CacheLayout, block_tokens: int) -> str | None:
    """Why blocks of this layout cannot be kept by key, or None."""
    if block_tokens < 1:
        return f"key blocks of {block_tokens} tokens"
    for plane in layout.planes:
        if not isinstance(plane.kind, Paged):
            return f"plane {plane.name!r} is a window: its rows do not belong to one block"
        if block_tokens % plane.kind.tokens_per_entry:
            return f"plane {plane.name!r} has an entry that crosses blocks of {block_tokens} tokens"
    return None


def _reserve(block_bytes: int) -> int:
    return block_bytes + block_bytes // _PAYLOAD_SLACK


def _first_entry(plane: Plane, block: int, block_tokens: int) -> tuple[int, int]:
    """The first entry of a block of the sequence, and tokens per entry. Only for layouts that are storable."""
    per_entry = plane.kind.tokens_per_entry if isinstance(plane.kind, Paged) else 1
    return block * block_tokens // per_entry, per_entry


def _block_of(header: FrameHeader, plane: Plane, area: _Area) -> int:
    """The block of the sequence in which a piece lies. Raises CannotLand for one that crosses blocks, or lies
    outside of those that were asked for."""
    block_tokens, entries = area.offer.block_tokens, header.piece.entries
    _, per_entry = _first_entry(plane, 0, block_tokens)
    block, last = (entry * per_entry // block_tokens for entry in (entries.start, entries.stop - 1))
    if block != last:
        text = f"entries [{entries.start}, {entries.stop}) cross key blocks of {block_tokens} tokens"
        raise CannotLand(AckFault.BAD_PIECE, text)
    if block not in area.blocks:
        text = f"block {block}, but [{area.blocks.start}, {area.blocks.stop}) are wanted"
        raise CannotLand(AckFault.BAD_PIECE, text)
    return block
