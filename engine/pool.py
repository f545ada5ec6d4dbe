"""Which KV block belongs to whom.

Knows block numbers, owners, keys and ranks; knows no tensors, no sequences and no clock. A block is in exactly
one of three places (design §3.1):

    free      nobody's, its contents mean nothing
    private   one owner's, being filled or not worth sharing
    cached    full and named; any number of owners hold a pin on it, and at 0 pins it waits to be
              evicted, least recently used first (engine/shares.py)

A cached block is named by its key and a rank: 0 where its contents are exact, more where they were lossy on the
way here or were computed on top of such (the order of kvtransfer.codecs.Fidelity; design §4). A look-up takes for
each key the best rank within a bound, so that bound 0 never sees a lossy block. An owner's rank is the worst of
what it took from the cache and of what landed under it, and all that it seals afterwards bears it.

An owner is a lease, or one choice of it: opaque bytes. Nothing leaves an owner but by `close`.

Where a model has windows, an owner that computes has a window slot too, and a prefix is taken up only where a record
of the windows is (engine/windows.py); a record is given up with its block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from engine.shares import TenantShares
from engine.windows import Filling, Name, TakenUp, WindowPool, WindowUse


class PoolCorrupted(AssertionError):
    """An invariant of the pool does not hold: a bug in Headrace, never the caller's input."""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A count of blocks in each place, and of pins over all cached blocks."""

    total: int
    free: int
    private: int
    cached: int
    evictable: int
    pins: int
    owners: int

    @property
    def available(self) -> int:
        """Blocks that an owner could be given now: free, or cached without a pin."""
        return self.free + self.evictable


@dataclass(slots=True)
class _Holding:
    """One owner's blocks in order of position, and the keys of the leading ones that are full."""

    tenant: Hashable
    rank: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    sealed: list[bool] = field(default_factory=list)  # False: the key was taken, the block stays private
    num_matching: int = 0  # leading blocks that were cached, with or without a record at their end


class BlockPool:
    """Hands out `num_blocks` blocks of `block_tokens` tokens each; `tenant_share` as in engine/shares.py; `windows` for
    a model that has them.

    Not thread-safe; the engine's lock guards it.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, tenant_share: float = 1.0, windows: WindowPool | None = None
    ) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} of {block_tokens}")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.windows = windows
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holdings: dict[bytes, _Holding] = {}
        self._block_of: dict[tuple[bytes, int], int] = {}
        self._name_of: dict[int, tuple[bytes, int]] = {}
        self._pins: dict[int, int] = {}
        self._shares = TenantShares(num_blocks, tenant_share)
        self.on_named: Callable[[bytes, int], None] = lambda _key, _rank: None
        """Told the key and rank of each block that is cached; `on_forgotten` of each that is no longer."""
        self.on_forgotten: Callable[[bytes, int], None] = lambda _key, _rank: None

    # --- reading -------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_tokens)

    @property
    def num_available(self) -> int:
        """Blocks that are free or idle. A tenant at its share may be given fewer (`room`)."""
        return len(self._free) + self._shares.num_idle

    def room(self, tenant: Hashable = "") -> int:
        """Blocks that a tenant's owners could be given now."""
        return self._shares.room(tenant, len(self._free))

    def owns(self, owner: bytes) -> bool:
        """Whether `owner` holds anything here."""
        return owner in self._holdings

    def blocks(self, owner: bytes) -> list[int]:
        """The owner's blocks by position. The list is the pool's own: read it, do not keep it."""
        return self._holdings[owner].blocks

    def keys(self, owner: bytes) -> list[bytes]:
        """Keys of the owner's leading full blocks. The list is the pool's own: read it, do not keep it."""
        return self._holdings[owner].keys

    def rank(self, owner: bytes) -> int:
        """The worst rank of what the owner holds."""
        return self._holdings[owner].rank

    def lookup(self, keys: Sequence[bytes], bound: int = 0) -> int:
        """How many leading keys are cached with a rank of at most `bound`."""
        return len(self._hits(keys, bound))

    def slot(self, owner: bytes) -> int:
        """The owner's window slot; 0 for a model without windows. Raises KeyError for an owner without one."""
        return self.windows.slot(owner) if self.windows is not None else 0

    def taken_up(self, owner: bytes) -> TakenUp:
        """How an owner, just opened to compute, goes on from what it took from the cache."""
        num_blocks = len(self._holdings[owner].keys)
        num_tokens = num_blocks * self.block_tokens
        if self.windows is None or not num_blocks:
            return TakenUp(num_tokens)
        if self.windows.replay_tokens:
            return TakenUp(max(0, num_tokens - self.windows.replay_tokens), None, num_tokens)
        return TakenUp(
            num_tokens, self.windows.find(self._name_of[self._holdings[owner].blocks[num_blocks - 1]])
        )

    def junction(self, owner: bytes) -> int:
        """How many tokens of an owner's prefix were cached, where no record is at their end; 0 where one is."""
        return self._holdings[owner].num_matching * self.block_tokens

    def lookup_rank(self, key: bytes, bound: int) -> int | None:
        """The best rank of at most `bound` under which a key is cached."""
        return next((rank for rank in range(bound + 1) if (key, rank) in self._block_of), None)

    def resumable(self, keys: Sequence[bytes], bound: int = 0) -> int:
        """How many leading keys somebody could go on from: cached, and with a record at their end where the model has
        windows."""
        hits = self._hits(keys, bound)
        if self.windows is None or self.windows.replay_tokens:
            return len(hits)
        return self._resumable(hits)

    def frees_for(self, owner: bytes, other: bytes) -> bool:
        """Whether blocks that `other` gave up would be room for `owner` to grow into."""
        return self._shares.may_evict(self._holdings[owner].tenant, self._holdings[other].tenant)

    def stats(self) -> PoolStats:
        """Where the blocks are now."""
        cached = len(self._name_of)
        return PoolStats(
            total=self.num_blocks,
            free=len(self._free),
            private=self.num_blocks - len(self._free) - cached,
            cached=cached,
            evictable=self._shares.num_idle,
            pins=sum(self._pins.values()),
            owners=len(self._holdings),
        )

    # --- changing ------------------------------------------------------------------------------

    def open(
        self,
        owner: bytes,
        keys: Sequence[bytes],
        num_blocks: int,
        spare: int = 0,
        bound: int = 0,
        tenant: Hashable = "",
        use: WindowUse = WindowUse.COMPUTED,
    ) -> int | None:
        """Give a new owner the cached prefix named by `keys`, pinned, and private blocks up to `num_blocks`.

        Of the cached blocks only ranks up to `bound` are taken. `use` counts for a model with windows: who
        has a slot, and who needs a record where its prefix ends. Returns how many leading blocks were cached, or
        None, with nothing changed, where fewer than `spare` blocks would be left or the tenant may not have as
        many.
        """
        hits = self._hits(keys[:num_blocks], bound)
        takes_slot = self.windows is not None and use is not WindowUse.NONE
        if self.windows is not None and takes_slot and not self.windows.num_free_slots:
            return None
        num_matching = 0
        if self.windows is not None and use is WindowUse.COMPUTED and not self.windows.replay_tokens:
            resumable = self._resumable(hits)
            num_matching = len(hits) if resumable < len(hits) else 0
            hits = hits[:resumable]
        num_private = num_blocks - len(hits)
        idle = [block for _, block in hits if self._shares.is_idle(block)]  # and no longer, once taken
        if (
            self.num_available - len(idle) - num_private < spare
            or self._shares.room(tenant, len(self._free), idle) < num_private
        ):
            return None
        self._open(owner, tenant, hits)
        self._extend(owner, num_private)
        if self.windows is not None and takes_slot:
            self.windows.open(owner)
            self._holdings[owner].num_matching = num_matching
        return len(hits)

    def grow(self, owner: bytes, num_blocks: int) -> bool:
        """Give the owner private blocks until it has `num_blocks`; False, with nothing changed, if too few are left."""
        holding = self._holdings[owner]
        missing = num_blocks - len(holding.blocks)
        if missing > 0 and missing > self.room(holding.tenant):
            return False
        self._extend(owner, missing)
        return True

    def worsen(self, owner: bytes, rank: int) -> None:
        """Contents of at best this rank were written into the owner's blocks."""
        holding = self._holdings[owner]
        holding.rank = max(holding.rank, rank)

    def seal(self, owner: bytes, key: bytes) -> None:
        """Name the owner's next full block by `key` and the owner's rank, so that others may pin it.

        Where the key is cached already at that rank or a better one, the owner's block stays private: two
        sequences computed the same.
        """
        holding = self._holdings[owner]
        block = holding.blocks[len(holding.keys)]
        fresh = self._best(key, holding.rank) is None
        holding.keys.append(key)
        holding.sealed.append(fresh)
        if fresh:
            self._block_of[key, holding.rank] = block
            self._name_of[block] = (key, holding.rank)
            self._pins[block] = 1
            self.on_named(key, holding.rank)

    def fill_record(self, owner: bytes, boundary: int) -> Filling | None:
        """A record for the owner's windows at a boundary that its next step reaches; None where there is none."""
        return self.windows.fill(owner, boundary) if self.windows is not None else None

    def settle_records(self, owner: bytes, num_computed: int, supersedes: Callable[[int], bool]) -> None:
        """Keep the records that a step filled, up to `num_computed` tokens. `supersedes`: whether a boundary's record
        takes the place of the owner's last one of its kind."""
        if self.windows is not None:
            self.windows.settle(
                owner, num_computed, lambda boundary: self._name_at(owner, boundary), supersedes
            )

    def fork(self, source: bytes, owner: bytes, num_tokens: int) -> tuple[int, int] | None:
        """Open `owner` on the first `num_tokens` tokens of `source`, sharing its cached blocks.

        Returns (num_shared, num_blocks): the blocks at indices num_shared … num_blocks - 1 are private to the
        new owner, and the caller copies their contents. None, with nothing changed, where there are too few.
        """
        holding = self._holdings[source]
        num_blocks = self.blocks_for(num_tokens)
        if self.windows is not None and not self.windows.num_free_slots:
            return None
        num_shared = 0
        while (
            num_shared < min(num_tokens // self.block_tokens, len(holding.keys))
            and holding.sealed[num_shared]
        ):
            num_shared += 1
        if num_blocks - num_shared > self.room(holding.tenant):
            return None
        # The source's very blocks: a look-up might find the same keys at another rank.
        self._open(owner, holding.tenant, list(zip(holding.keys, holding.blocks, strict=False))[:num_shared])
        self.worsen(owner, holding.rank)
        self._extend(owner, num_blocks - num_shared)
        if self.windows is not None:
            self.windows.open(owner)
        return num_shared, num_blocks

    def close(self, owner: bytes, forget: bool = False) -> list[int]:
        """Take everything back: pins are dropped, private blocks become free.

        With `forget` the owner's cached blocks that nobody else pins leave the cache as well (their
        contents are not to be trusted). Returns the blocks that became free.
        """
        holding = self._holdings.pop(owner)
        if self.windows is not None:
            self.windows.close(owner)
        freed = []
        # Last block first: a prefix is worth more than what was computed on top of it.
        for index in range(len(holding.blocks) - 1, -1, -1):
            block = holding.blocks[index]
            if index < len(holding.keys) and holding.sealed[index]:
                self._unpin(block)
                if not forget or self._pins[block]:
                    continue
                self._forget(block)
            self._shares.give(block)
            self._free.append(block)
            freed.append(block)
        return freed

    # --- inside --------------------------------------------------------------------------------

    def _best(self, key: bytes, bound: int) -> int | None:
        """The block of a key with the best rank of at most `bound`."""
        for rank in range(bound + 1):
            block = self._block_of.get((key, rank))
            if block is not None:
                return block
        return None

    def _hits(self, keys: Sequence[bytes], bound: int) -> list[tuple[bytes, int]]:
        """The leading keys that are cached, with their blocks."""
        hits = []
        for key in keys:
            block = self._best(key, bound)
            if block is None:
                break
            hits.append((key, block))
        return hits

    def _resumable(self, hits: Sequence[tuple[bytes, int]]) -> int:
        """How many leading hits end at a record."""
        assert self.windows is not None
        for count in range(len(hits), 0, -1):
            if self.windows.has(self._name_of[hits[count - 1][1]]):
                return count
        return 0

    def _name_at(self, owner: bytes, boundary: int) -> Name | None:
        """The name of the cached block that ends at a boundary and is as good as what the owner computed."""
        holding = self._holdings[owner]
        index = boundary // self.block_tokens - 1
        if index >= len(holding.keys):
            return None
        name = (holding.keys[index], holding.rank)
        return name if name in self._block_of else None

    def _open(self, owner: bytes, tenant: Hashable, shared: Sequence[tuple[bytes, int]]) -> None:
        """A new owner with pins on cached blocks, given as (key, block)."""
        if owner in self._holdings:
            raise PoolCorrupted(f"owner {owner.hex()} is open already")
        holding = self._holdings[owner] = _Holding(tenant)
        for key, block in shared:
            self._pins[block] += 1
            self._shares.use(block)
            holding.blocks.append(block)
            holding.keys.append(key)
            holding.sealed.append(True)
            holding.rank = max(holding.rank, self._name_of[block][1])

    def _extend(self, owner: bytes, num_blocks: int) -> None:
        """More private blocks, for which there is room."""
        holding = self._holdings[owner]
        for _ in range(num_blocks):
            block = self._free.pop() if self._free else self._evict(holding.tenant)
            self._shares.take(block, holding.tenant)
            holding.blocks.append(block)

    def _evict(self, tenant: Hashable) -> int:
        block = self._shares.victim(tenant)
        if block is None:
            raise PoolCorrupted("there was room for a block that nobody can give up")
        self._forget(block)
        self._shares.give(block)
        return block

    def _forget(self, block: int) -> None:
        name = self._name_of.pop(block)
        del self._block_of[name]
        del self._pins[block]
        if self.windows is not None:
            self.windows.forget(name)
        self.on_forgotten(*name)

    def _unpin(self, block: int) -> None:
        self._pins[block] -= 1
        if self._pins[block] == 0:
            self._shares.rest(block)

    def check(self) -> None:
        """Raise PoolCorrupted unless every block is in exactly one place and every pin has an owner."""
        pins: dict[int, int] = {}
        private: list[int] = []
        for holding in self._holdings.values():
            for index, block in enumerate(holding.blocks):
                if index < len(holding.keys) and holding.sealed[index]:
                    pins[block] = pins.get(block, 0) + 1
                    if self._name_of[block][1] > holding.rank:
                        raise PoolCorrupted("an owner's rank is better than that of a block it holds")
                else:
                    private.append(block)
        places = [*self._free, *private, *self._name_of]
        if sorted(places) != list(range(self.num_blocks)):
            raise PoolCorrupted("a block is in two places or in none")
        if self._block_of != {name: block for block, name in self._name_of.items()}:
            raise PoolCorrupted("names and cached blocks do not match")
        if pins != {block: count for block, count in self._pins.items() if count}:
            raise PoolCorrupted("pins do not match their owners")
        wrong = self.windows.check(set(self._holdings)) if self.windows is not None else None
        if wrong is not None:
            raise PoolCorrupted(wrong)
        if set(self._shares.idle_blocks()) != {block for block, count in self._pins.items() if count == 0}:
            raise PoolCorrupted("the idle blocks do not match the pins")
