"""The store's values on the wire (kvstore.proto) and back. What comes in is checked here, once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from headrace.v1 import kvstore_pb2 as pb
from kvtransfer.keys import KEY_BYTES, LABEL_BYTES
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane
from kvtransfer.sources import MAX_FETCH_KEYS
from kvtransfer.tiers.disk_types import DiskCounters
from kvtransfer.tiers.health import TierState
from kvtransfer.tiers.receiving import Offer
from kvtransfer.tiers.records import MAX_FIDELITY, Shape
from kvtransfer.tiers.store_types import Entry, Found, StoreStats, TierRun, TierStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OFFER_ID_BYTES = 16
MAX_PLANES = 64
MAX_FIELDS = 16


def layout_to_wire(layout: CacheLayout) -> pb.StoreLayout:
    """Raises ValueError for a layout with windows: a store does not keep them."""
    wire = pb.StoreLayout(block_tokens=layout.block_tokens)
    for plane in layout.planes:
        if not isinstance(plane.kind, Paged):
            raise ValueError(f"plane {plane.name!r} is a window, which a store does not keep")
        wire_plane = wire.planes.add(
            name=plane.name,
            layers=plane.layers,
            heads=plane.heads,
            tokens_per_entry=plane.kind.tokens_per_entry,
        )
        for field in plane.fields:
            wire_plane.fields.add(name=field.name, width=field.width, dtype=field.dtype)
    return wire


def layout_from_wire(wire: pb.StoreLayout) -> CacheLayout:
    """Raises ValueError."""
    if not 1 <= len(wire.planes) <= MAX_PLANES:
        raise ValueError(f"a layout has 1 to {MAX_PLANES} planes, got {len(wire.planes)}")
    return CacheLayout(tuple(map(_plane, wire.planes)), wire.block_tokens)


def _plane(wire: pb.StorePlane) -> Plane:
    if len(wire.fields) > MAX_FIELDS:
        raise ValueError(f"plane {wire.name!r} has {len(wire.fields)} fields, at most {MAX_FIELDS} go")
    fields = tuple(Field(field.name, field.width, field.dtype) for field in wire.fields)
    return Plane(wire.name, wire.layers, Paged(wire.tokens_per_entry), wire.heads, fields)


def offer_to_wire(offer: Offer, offer_id: bytes, sender_epoch: int, remaining_s: float) -> pb.OfferRequest:
    """Raises ValueError for a layout that a store does not keep."""
    return pb.OfferRequest(
        offer_id=offer_id,
        tenant_label=offer.tenant,
        keys=offer.keys,
        first_block=offer.first_block,
        block_tokens=offer.block_tokens,
        layout=layout_to_wire(offer.layout),
        fidelity=offer.fidelity,
        remaining_s=remaining_s,
        sender_epoch=sender_epoch,
    )


def offer_from_wire(wire: pb.OfferRequest) -> Offer:
    """Raises ValueError."""
    if len(wire.offer_id) != OFFER_ID_BYTES or len(wire.tenant_label) != LABEL_BYTES:
        raise ValueError(f"offer_id and tenant_label have {OFFER_ID_BYTES} and {LABEL_BYTES} bytes")
    if not math.isfinite(wire.remaining_s):
        raise ValueError("remaining_s must be finite")
    keys = check_keys(wire.keys)
    check_fidelity(wire.fidelity)
    layout = layout_from_wire(wire.layout)
    return Offer(wire.tenant_label, keys, wire.first_block, wire.block_tokens, layout, wire.fidelity)


def shape_from_wire(wire: pb.LookupRequest) -> Shape:
    """Raises ValueError."""
    if len(wire.dtypes) > MAX_PLANES or wire.block_tokens < 1:
        raise ValueError(f"a look-up names a block length and at most {MAX_PLANES} planes")
    dtypes = tuple(tuple(plane.fields) for plane in wire.dtypes)
    return Shape(wire.layout, wire.block_tokens, dtypes)


def check_keys(keys: Sequence[bytes]) -> tuple[bytes, ...]:
    """Raises ValueError."""
    if not 1 <= len(keys) <= MAX_FETCH_KEYS or any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"expected 1 to {MAX_FETCH_KEYS} keys of {KEY_BYTES} bytes")
    return tuple(keys)


def check_fidelity(rank: int) -> None:
    """Raises ValueError."""
    if rank > MAX_FIDELITY:
        raise ValueError(f"fidelity is a rank up to {MAX_FIDELITY}, got {rank}")


def found_to_wire(found: Found, epoch: int) -> pb.LookupResponse:
    runs = [
        pb.StoreTierRun(
            tier=run.tier, num_blocks=run.num_blocks, num_bytes=run.num_bytes, bytes_per_s=run.bytes_per_s
        )
        for run in found.tiers
    ]
    return pb.LookupResponse(epoch=epoch, num_blocks=found.num_blocks, fidelity=found.fidelity, tiers=runs)


def found_from_wire(wire: pb.LookupResponse) -> Found:
    runs = tuple(TierRun(run.tier, run.num_blocks, run.num_bytes, run.bytes_per_s) for run in wire.tiers)
    return Found(wire.num_blocks, wire.fidelity, runs)


def stats_to_wire(stats: StoreStats, epoch: int, directory: str) -> pb.StoreStatResponse:
    return pb.StoreStatResponse(
        epoch=epoch,
        tiers=map(_tier_to_wire, stats.tiers),
        landing_bytes=stats.landing_bytes,
        queued_bytes=stats.queued_bytes,
        dropped_records=stats.dropped_records,
        dropped_bytes=stats.dropped_bytes,
        num_leases=stats.num_leases,
        num_fetches=stats.num_fetches,
        host_hits=stats.host_hits,
        disk_hits=stats.disk_hits,
        misses=stats.misses,
        directory=directory,
    )


def stats_from_wire(wire: pb.StoreStatResponse) -> StoreStats:
    return StoreStats(
        tiers=tuple(map(_tier_from_wire, wire.tiers)),
        landing_bytes=wire.landing_bytes,
        queued_bytes=wire.queued_bytes,
        dropped_records=wire.dropped_records,
        dropped_bytes=wire.dropped_bytes,
        num_leases=wire.num_leases,
        num_fetches=wire.num_fetches,
        host_hits=wire.host_hits,
        disk_hits=wire.disk_hits,
        misses=wire.misses,
    )


def entries_to_wire(entries: Iterable[Entry]) -> Iterable[pb.StoreEntry]:
    for entry in entries:
        yield pb.StoreEntry(
            tier=entry.tier,
            name=entry.name,
            tenant_label=entry.tenant,
            layout=entry.layout,
            block_tokens=entry.block_tokens,
            fidelity=entry.fidelity,
            num_records=entry.num_records,
            num_bytes=entry.num_bytes,
        )


def entry_from_wire(wire: pb.StoreEntry) -> Entry:
    return Entry(
        *(wire.tier, wire.name, wire.tenant_label, wire.layout),
        *(wire.block_tokens, wire.fidelity, wire.num_records, wire.num_bytes),
    )


def _tier_to_wire(tier: TierStats) -> pb.StoreTierStats:
    counters = tier.counters or DiskCounters()
    return pb.StoreTierStats(
        tier=tier.tier,
        state=tier.state,
        reason=tier.reason,
        since_s=tier.since_s,
        limit_bytes=tier.limit_bytes,
        used_bytes=tier.used_bytes,
        num_records=tier.num_records,
        num_pinned=tier.num_pinned,
        num_evicted=tier.num_evicted,
        num_refused=tier.num_refused,
        bytes_per_s=tier.bytes_per_s,
        unusable_files=tier.unusable_files,
        unusable_bytes=tier.unusable_bytes,
        written_records=counters.written,
        write_failures=counters.write_failures,
        read_failures=counters.read_failures,
        bad_records=counters.bad_records,
        torn_files=counters.torn_files,
        tenants=[pb.StoreTenantBytes(tenant_label=t, num_bytes=n) for t, n in tier.tenants.items()],
    )


def _tier_from_wire(wire: pb.StoreTierStats) -> TierStats:
    counters = DiskCounters(
        written=wire.written_records,
        write_failures=wire.write_failures,
        read_failures=wire.read_failures,
        bad_records=wire.bad_records,
        torn_files=wire.torn_files,
    )
    return TierStats(
        tier=wire.tier,
        state=TierState(wire.state),
        reason=wire.reason,
        since_s=wire.since_s,
        limit_bytes=wire.limit_bytes,
        used_bytes=wire.used_bytes,
        num_records=wire.num_records,
        num_pinned=wire.num_pinned,
        num_evicted=wire.num_evicted,
        num_refused=wire.num_refused,
        bytes_per_s=wire.bytes_per_s,
        tenants={tenant.tenant_label: tenant.num_bytes for tenant in wire.tenants},
        unusable_files=wire.unusable_files,
        unusable_bytes=wire.unusable_bytes,
        counters=counters,
    )
