"""What a tier of bounded size keeps and what goes: LRU with pins, a byte limit, a quota and a share per tenant.

Pure: items are names with a size; it decides which must go before another may come, and others delete them.

The limit is never exceeded, nor a tenant's quota: what does not fit after all evictions that are allowed is
refused. Below the limit a tenant may use what is free, up to its quota. Its *share* is what nobody can take from
it: its quota, or the limit divided by the tenants that hold or ask for something, whichever is smaller. Whoever
needs room makes it like this:

- a tenant that would exceed its quota evicts its own items;
- a tenant that stays within its share evicts those of tenants above theirs, and where there are none, its own;
- a tenant beyond its share evicts its own, and those that leave their owner with at least its share;

in each case the least recently used first, and never a pinned one. So a tenant at or below its share loses nothing
to others, and one above it can be taken below by no more than the one item that straddles the line.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

Name = TypeVar("Name", bound=Hashable)


class NoRoom(StrEnum):
    """Why an item is refused."""

    TOO_LARGE = "TOO_LARGE"  # for the limit or the tenant's quota, whatever would go
    PINNED = "PINNED"  # what may go for it is being read or written
    SHARES = "SHARES"  # the rest is held by tenants within their shares


@dataclass(frozen=True, slots=True)
class Plan(Generic[Name]):
    """What must go, in this order, before the item may come; or why it cannot."""

    evict: tuple[Name, ...] = ()
    refused: NoRoom | None = None


@dataclass(slots=True)
class _Item:
    tenant: bytes
    num_bytes: int
    used: int  # a logical time: larger is more recent
    pins: int = 0


class TierIndex(Generic[Name]):
    """`quota_bytes`: of every tenant; None for no quota but the limit. Not thread-safe."""

    def __init__(self, limit_bytes: int, quota_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.quota_bytes = limit_bytes if quota_bytes is None else quota_bytes
        self.used_bytes = 0
        self._items: dict[Name, _Item] = {}
        self._by_tenant: dict[bytes, OrderedDict[Name, _Item]] = {}  # least recently used first
        self._held: dict[bytes, int] = {}
        self._now = 0

    def __contains__(self, name: Name) -> bool:
        return name in self._items

    def __len__(self) -> int:
        return len(self._items)

    def bytes_of(self, name: Name) -> int:
        """Raises KeyError."""
        return self._items[name].num_bytes

    @property
    def tenants(self) -> dict[bytes, int]:
        """Bytes by tenant."""
        return dict(self._held)

    @property
    def num_pinned(self) -> int:
        return sum(item.pins > 0 for item in self._items.values())

    def share_bytes(self, tenant: bytes) -> int:
        """What nobody can take from a tenant that holds or asks for something."""
        return min(self.quota_bytes, self.limit_bytes // len(self._held.keys() | {tenant}))

    def plan(self, tenant: bytes, num_bytes: int) -> Plan[Name]:
        """What must go so that `tenant` may bring `num_bytes`. Changes nothing."""
        if num_bytes > min(self.limit_bytes, self.quota_bytes):
            return Plan(refused=NoRoom.TOO_LARGE)
        return _Planning(self, tenant, num_bytes).plan()

    def insert(self, name: Name, tenant: bytes, num_bytes: int) -> None:
        """Counts an item, the most recently used of all. Raises ValueError where limit or quota forbid it: nothing
        may come that was not planned."""
        held = self._held.get(tenant, 0)
        if self.used_bytes + num_bytes > self.limit_bytes or held + num_bytes > self.quota_bytes:
            raise ValueError(
                f"{num_bytes} bytes do not fit: {self.used_bytes} of {self.limit_bytes} are used"
            )
        self.adopt(name, tenant, num_bytes)

    def adopt(self, name: Name, tenant: bytes, num_bytes: int) -> None:
        """Counts an item that is there already, fit or not; `excess` says what must go for it."""
        if name in self._items:
            raise ValueError(f"{name!r} is held already")
        self._now += 1
        item = _Item(tenant, num_bytes, self._now)
        self._items[name] = item
        self._by_tenant.setdefault(tenant, OrderedDict())[name] = item
        self._held[tenant] = self._held.get(tenant, 0) + num_bytes
        self.used_bytes += num_bytes

    def excess(self) -> tuple[Name, ...]:
        """The least recently used items beyond a quota or the limit: what must go after `adopt`."""
        over = {tenant: held - self.quota_bytes for tenant, held in self._held.items()}
        over_all = self.used_bytes - self.limit_bytes
        evict: list[Name] = []
        for name, item in sorted(self._items.items(), key=lambda pair: pair[1].used):
            if not item.pins and (over_all > 0 or over[item.tenant] > 0):
                evict.append(name)
                over[item.tenant] -= item.num_bytes
                over_all -= item.num_bytes
        return tuple(evict)

    def resize(self, name: Name, num_bytes: int) -> None:
        """An item turned out to have another size; `excess` says what must go for it."""
        item = self._items[name]
        self._held[item.tenant] += num_bytes - item.num_bytes
        self.used_bytes += num_bytes - item.num_bytes
        item.num_bytes = num_bytes

    def touch(self, name: Name) -> None:
        """It was used just now. Raises KeyError."""
        item = self._items[name]
        self._now += 1
        item.used = self._now
        self._by_tenant[item.tenant].move_to_end(name)

    def pin(self, name: Name) -> None:
        """It may not go until `unpin`. Raises KeyError."""
        self._items[name].pins += 1

    def unpin(self, name: Name) -> int:
        """How many pins are left."""
        item = self._items[name]
        item.pins -= 1
        return item.pins

    def remove(self, name: Name) -> None:
        """It is gone. Raises KeyError, and ValueError while it is pinned."""
        item = self._items[name]
        if item.pins:
            raise ValueError(f"{name!r} has {item.pins} pins")
        del self._items[name]
        of_tenant = self._by_tenant[item.tenant]
        del of_tenant[name]
        self._held[item.tenant] -= item.num_bytes
        if not of_tenant:
            del self._by_tenant[item.tenant], self._held[item.tenant]
        self.used_bytes -= item.num_bytes

    def oldest(self, tenant: bytes) -> Iterator[tuple[Name, _Item]]:
        """The tenant's items that may go, least recently used first."""
        items = self._by_tenant.get(tenant)
        return ((name, item) for name, item in (items or OrderedDict()).items() if not item.pins)


class _Planning(Generic[Name]):
    """One admission, played through on paper."""

    def __init__(self, index: TierIndex[Name], tenant: bytes, num_bytes: int) -> None:
        self._index = index
        self._tenant = tenant
        self._num_bytes = num_bytes
        self._used = index.used_bytes
        self._held = index.tenants
        self._held.setdefault(tenant, 0)
        self._share = index.share_bytes(tenant)
        self._queues = {holder: index.oldest(holder) for holder in self._held}
        self._heads = {holder: next(queue, None) for holder, queue in self._queues.items()}
        self._evict: list[Name] = []

    def plan(self) -> Plan[Name]:
        index, tenant = self._index, self._tenant
        while self._held[tenant] + self._num_bytes > index.quota_bytes:
            if not self._take([tenant]):
                return Plan(refused=NoRoom.PINNED)
        while self._used + self._num_bytes > index.limit_bytes:
            if self._held[tenant] + self._num_bytes <= self._share:
                found = self._take(self._above_share()) or self._take([tenant])
            else:
                found = self._take([tenant, *self._with_excess()])
            if not found:
                return Plan(refused=self._why_not())
        return Plan(tuple(self._evict))

    def _above_share(self) -> list[bytes]:
        return [t for t, held in self._held.items() if t != self._tenant and held > self._share]

    def _with_excess(self) -> list[bytes]:
        """Other tenants that keep their share without their oldest item."""
        others = ((t, head) for t, head in self._heads.items() if t != self._tenant and head is not None)
        return [t for t, (_, item) in others if self._held[t] - item.num_bytes >= self._share]

    def _take(self, holders: list[bytes]) -> bool:
        """Evicts the least recently used item of these tenants, if there is one that may go."""
        heads = ((t, self._heads[t]) for t in holders)
        candidates = [(item.used, t, name, item) for t, head in heads if head for name, item in [head]]
        if not candidates:
            return False
        _, holder, name, item = min(candidates, key=lambda candidate: candidate[0])
        self._evict.append(name)
        self._held[holder] -= item.num_bytes
        self._used -= item.num_bytes
        self._heads[holder] = next(self._queues[holder], None)
        return True

    def _why_not(self) -> NoRoom:
        """With what is free and what others hold within their shares, could it have come at all?"""
        others = sum(min(held, self._share) for t, held in self._held.items() if t != self._tenant)
        return NoRoom.SHARES if others + self._num_bytes > self._index.limit_bytes else NoRoom.PINNED
