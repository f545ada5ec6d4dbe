"""The host tier: records in this process's memory. Not thread-safe; the store's lock is around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.tiers.catalog import Catalog
from kvtransfer.tiers.index import NoRoom, TierIndex

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtransfer.tiers.records import BlockRecord, RecordId

# What Python's objects around the payloads take, generously.
RECORD_OVERHEAD_BYTES = 1024
PART_OVERHEAD_BYTES = 768


def host_bytes(record: BlockRecord) -> int:
    """What a record counts against the limit: its payloads, and an allowance for what is around them."""
    return record.payload_bytes + RECORD_OVERHEAD_BYTES + PART_OVERHEAD_BYTES * len(record.parts)


class HostTier:
    """`limit_bytes` counts `host_bytes`; what that means for tenants is said in index.py."""

    def __init__(self, limit_bytes: int, quota_bytes: int | None = None) -> None:
        self._index: TierIndex[RecordId] = TierIndex(limit_bytes, quota_bytes)
        self._catalog: Catalog[BlockRecord] = Catalog()
        self.num_evicted = 0
        self.num_refused = 0

    @property
    def index(self) -> TierIndex[RecordId]:
        """To be read only."""
        return self._index

    def under(self, key: bytes) -> Iterable[RecordId]:
        """The records of a key."""
        return self._catalog.under(key)

    def get(self, name: RecordId) -> BlockRecord | None:
        return self._catalog.get(name)

    def records(self) -> Iterable[BlockRecord]:
        """All of them; the tier must not change meanwhile."""
        return (record for _, record in self._catalog.items())

    def put(self, record: BlockRecord) -> NoRoom | None:
        """Keeps a record, or says why not; one that is here already is only touched."""
        if record.id in self._catalog:
            self._index.touch(record.id)
            return None
        num_bytes = host_bytes(record)
        plan = self._index.plan(record.tenant, num_bytes)
        if plan.refused is not None:
            self.num_refused += 1
            return plan.refused
        for name in plan.evict:
            self._index.remove(name)
            self._catalog.remove(name)
        self.num_evicted += len(plan.evict)
        self._index.insert(record.id, record.tenant, num_bytes)
        self._catalog.add(record.id, record)
        return None

    def touch(self, name: RecordId) -> None:
        """It was used just now. Raises KeyError."""
        self._index.touch(name)

    def pin(self, name: RecordId) -> None:
        """It stays until `unpin`. Raises KeyError."""
        self._index.pin(name)

    def unpin(self, name: RecordId) -> None:
        self._index.unpin(name)
