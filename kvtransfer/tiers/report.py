"""What a store says about itself. Under the store's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.tiers.health import TierState
from kvtransfer.tiers.host import host_bytes
from kvtransfer.tiers.store_types import DISK, HOST, Entry, StoreStats, TierStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtransfer.tiers.records import RecordId
    from kvtransfer.tiers.segments import DiskTier
    from kvtransfer.tiers.store import NodeStore


def stats_of(store: NodeStore) -> StoreStats:
    """All figures."""
    tiers = [_host_stats(store)]
    if store.disk is not None:
        tiers.append(_disk_stats(store, store.disk))
    queue = store.write_back
    return StoreStats(
        tiers=tuple(tiers),
        landing_bytes=store.areas.reserved_bytes,
        queued_bytes=queue.queued_bytes if queue is not None else 0,
        dropped_records=queue.num_dropped if queue is not None else 0,
        dropped_bytes=queue.dropped_bytes if queue is not None else 0,
        num_leases=store.areas.num_open,
        num_fetches=store.num_fetches,
        host_hits=store.host_hits,
        disk_hits=store.disk_hits,
        misses=store.misses,
    )


def list_entries(store: NodeStore) -> list[Entry]:
    """Memory first, then the segments in no order."""
    sums: dict[tuple[bytes, str, int, int], tuple[int, int]] = {}
    for record in store.host.records():
        shape = record.id.shape
        group = (record.tenant, shape.layout, shape.block_tokens, record.id.fidelity)
        count, num_bytes = sums.get(group, (0, 0))
        sums[group] = count + 1, num_bytes + host_bytes(record)
    entries = [Entry(HOST, "memory", *group, *numbers) for group, numbers in sums.items()]
    if store.disk is not None:
        for segment in store.disk.segments():
            size = store.disk.index.bytes_of(segment.path)
            entries.append(entry_of(segment.path.name, segment.tenant, segment.records, size))
    return entries


def entry_of(name: str, tenant: bytes, records: Iterable[RecordId], num_bytes: int) -> Entry:
    """A segment's line; its worst fidelity stands for all of it."""
    held = list(records)
    shape = held[0].shape if held else None
    return Entry(
        tier=DISK,
        name=name,
        tenant=tenant,
        layout=shape.layout if shape else "",
        block_tokens=shape.block_tokens if shape else 0,
        fidelity=max((record.fidelity for record in held), default=0),
        num_records=len(held),
        num_bytes=num_bytes,
    )


def _host_stats(store: NodeStore) -> TierStats:
    host, index = store.host, store.host.index
    is_on = index.limit_bytes > 0
    return TierStats(
        tier=HOST,
        state=TierState.SERVING if is_on else TierState.OFF,
        reason="" if is_on else "not configured",
        since_s=0.0,
        limit_bytes=index.limit_bytes,
        used_bytes=index.used_bytes,
        num_records=len(index),
        num_pinned=index.num_pinned,
        num_evicted=host.num_evicted,
        num_refused=host.num_refused,
        bytes_per_s=store.speeds[HOST].bytes_per_s,
        tenants=index.tenants,
    )


def _disk_stats(store: NodeStore, disk: DiskTier) -> TierStats:
    status, unusable = disk.status(), disk.unusable
    return TierStats(
        tier=DISK,
        state=status.state,
        reason=status.reason,
        since_s=status.since_s,
        limit_bytes=disk.options.limit_bytes,
        used_bytes=disk.used_bytes,
        num_records=disk.num_records,
        num_pinned=disk.index.num_pinned,
        num_evicted=disk.counters.evicted_segments,
        num_refused=disk.counters.not_written,
        bytes_per_s=store.speeds[DISK].bytes_per_s,
        tenants=disk.index.tenants,
        unusable_files=len(unusable),
        unusable_bytes=sum(unusable.values()),
        counters=disk.counters,
    )
