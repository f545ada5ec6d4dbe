"""Which cached block is given up when one is needed: least recently used, within the tenants' shares.

Pure books over block numbers. A tenant holds the blocks that are private to its owners and those that its
owners put into the cache. A block is given to a tenant by the first of these that finds one:

    1. the least recently used idle block of the tenants that hold more than their share
    2. where the tenant itself holds less than its share: the least recently used idle block of all
    3. its own least recently used idle block

(idle: cached without a pin). So once a tenant holds its share, nothing that it does takes a cached block from
another that keeps within its own, however many prompts it sends; and what it holds beyond goes first. With
at most 1/share tenants, one that holds less than its share finds another above it, so that 2 takes from those
within theirs only while what is above is in use. A share of the whole pool makes all of them one tenant:
plain least recently used, and the books cost nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence


class TenantShares:
    """Blocks by the tenant that holds them, and the idle ones in the order in which they became so.

    `share` of `num_blocks`, in (0, 1], is the same for every tenant. Not thread-safe.
    """

    def __init__(self, num_blocks: int, share: float) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"a tenant's share of the pool must be in (0, 1], not {share}")
        self.quota = max(1, int(share * num_blocks))
        self._divided = share < 1.0
        self._tenant_of: dict[int, Hashable] = {}
        self._held: dict[Hashable, int] = {}
        self._idle: dict[Hashable, OrderedDict[int, int]] = {}  # block → when it became idle, counted
        self._serial = 0

    # --- reading -------------------------------------------------------------------------------

    def held(self, tenant: Hashable) -> int:
        """Blocks of a tenant, private and cached."""
        return self._held.get(self._name(tenant), 0)

    def idle_blocks(self) -> Iterable[int]:
        """Every idle block, in no order."""
        return (block for blocks in self._idle.values() for block in blocks)

    @property
    def num_idle(self) -> int:
        """Idle blocks of all tenants."""
        return sum(len(blocks) for blocks in self._idle.values())

    def is_idle(self, block: int) -> bool:
        """Whether a held block is idle."""
        return block in self._idle.get(self._tenant_of[block], ())

    def may_evict(self, tenant: Hashable, other: Hashable) -> bool:
        """Whether `tenant` would be given an idle block of `other` now."""
        tenant, other = self._name(tenant), self._name(other)
        return tenant == other or self.held(other) > self.quota or self.held(tenant) < self.quota

    def room(self, tenant: Hashable, num_free: int, pinned: Sequence[int] = ()) -> int:
        """How many blocks a tenant would be given one after the other, with `num_free` that are nobody's and
        the idle blocks `pinned` in use."""
        tenant = self._name(tenant)
        idle = {other: len(blocks) for other, blocks in self._idle.items()}
        for block in pinned:
            idle[self._tenant_of[block]] -= 1
        own = idle.pop(tenant, 0)
        above = sum(min(count, max(0, self._held[other] - self.quota)) for other, count in idle.items())
        within = sum(idle.values()) - above
        entitled = max(0, self.quota - self.held(tenant) - num_free - above)
        return num_free + above + own + min(within, entitled)

    # --- changing ------------------------------------------------------------------------------

    def take(self, block: int, tenant: Hashable) -> None:
        """A block that was nobody's is the tenant's, and in use."""
        tenant = self._name(tenant)
        self._tenant_of[block] = tenant
        self._held[tenant] = self._held.get(tenant, 0) + 1

    def give(self, block: int) -> None:
        """A block, idle or not, is nobody's."""
        self.use(block)
        tenant = self._tenant_of.pop(block)
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def rest(self, block: int) -> None:
        """A block becomes idle."""
        self._serial += 1
        self._idle.setdefault(self._tenant_of[block], OrderedDict())[block] = self._serial

    def use(self, block: int) -> None:
        """A block is idle no longer, or was not."""
        tenant = self._tenant_of[block]
        blocks = self._idle.get(tenant)
        if blocks is None:
            return
        blocks.pop(block, None)
        if not blocks:
            del self._idle[tenant]

    def victim(self, tenant: Hashable) -> int | None:
        """The idle block to give up for a tenant; None where `room` without free blocks is 0."""
        tenant = self._name(tenant)
        above = [other for other in self._idle if self._held[other] > self.quota]
        if above:
            return self._oldest(above)
        if self.held(tenant) < self.quota:
            return self._oldest(self._idle)
        return self._oldest([tenant] if tenant in self._idle else [])

    # --- inside --------------------------------------------------------------------------------

    def _name(self, tenant: Hashable) -> Hashable:
        return tenant if self._divided else ""

    def _oldest(self, tenants: Iterable[Hashable]) -> int | None:
        firsts = (next(iter(self._idle[tenant].items())) for tenant in tenants)
        return min(firsts, key=lambda first: first[1], default=(None, 0))[0]
