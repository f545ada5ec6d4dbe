"""Which KV block belongs to whom.

Knows block numbers, owners and keys; knows no tensors, no sequences and no clock. A block is in exactly
one of three places (design §3.1):

    free      nobody's, its contents mean nothing
    private   one owner's, being filled or not worth sharing
    cached    full and keyed; any number of owners hold a pin on it, and at 0 pins it waits in
              least-recently-used order to be evicted

An owner is a lease, or one choice of it: opaque bytes. Nothing leaves an owner but by `close`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


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
    """One owner's blocks in order of position, and the keys of the leading ones that are cached."""

    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    sealed: list[bool] = field(default_factory=list)  # False: the key was taken, the block stays private


class BlockPool:
    """Hands out `num_blocks` blocks of `block_tokens` tokens each.

    Not thread-safe; the engine's lock guards it.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, not {num_blocks} of {block_tokens}")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holdings: dict[bytes, _Holding] = {}
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._pins: dict[int, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()

    # --- reading -------------------------------------------------------------------------------

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_tokens)

    @property
    def num_available(self) -> int:
        """Blocks that could be handed out now."""
        return len(self._free) + len(self._evictable)

    def owns(self, owner: bytes) -> bool:
        """Whether `owner` holds anything here."""
        return owner in self._holdings

    def blocks(self, owner: bytes) -> list[int]:
        """The owner's blocks by position. The list is the pool's own: read it, do not keep it."""
        return self._holdings[owner].blocks

    def keys(self, owner: bytes) -> list[bytes]:
        """Keys of the owner's leading full blocks. The list is the pool's own: read it, do not keep it."""
        return self._holdings[owner].keys

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are cached."""
        for index, key in enumerate(keys):
            if key not in self._block_of_key:
                return index
        return len(keys)

    def stats(self) -> PoolStats:
        """Where the blocks are now."""
        cached = len(self._key_of_block)
        return PoolStats(
            total=self.num_blocks,
            free=len(self._free),
            private=self.num_blocks - len(self._free) - cached,
            cached=cached,
            evictable=len(self._evictable),
            pins=sum(self._pins.values()),
            owners=len(self._holdings),
        )

    # --- changing ------------------------------------------------------------------------------

    def open(self, owner: bytes, keys: Sequence[bytes], num_blocks: int, spare: int = 0) -> int | None:
        """Give a new owner the cached prefix named by `keys`, pinned, and private blocks up to `num_blocks`.

        Returns how many leading blocks were cached, or None, with nothing changed, where fewer than
        `spare` blocks would be left.
        """
        if owner in self._holdings:
            raise PoolCorrupted(f"owner {owner.hex()} is open already")
        num_hit = min(self.lookup(keys), num_blocks)
        hits = [self._block_of_key[key] for key in keys[:num_hit]]
        num_unpinned = sum(1 for block in hits if block in self._evictable)
        if self.num_available - num_unpinned - (num_blocks - num_hit) < spare:
            return None
        holding = self._holdings[owner] = _Holding()
        for block, key in zip(hits, keys, strict=False):
            self._pin(block)
            holding.blocks.append(block)
            holding.keys.append(key)
            holding.sealed.append(True)
        holding.blocks.extend(self._take() for _ in range(num_blocks - num_hit))
        return num_hit

    def grow(self, owner: bytes, num_blocks: int) -> bool:
        """Give the owner private blocks until it has `num_blocks`; False, with nothing changed, if too few are left."""
        blocks = self._holdings[owner].blocks
        missing = num_blocks - len(blocks)
        if missing > self.num_available:
            return False
        blocks.extend(self._take() for _ in range(missing))
        return True

    def seal(self, owner: bytes, key: bytes) -> None:
        """Key the owner's next full block, so that others may pin it.

        Where the key is cached already, the owner's block stays private: two sequences computed the same.
        """
        holding = self._holdings[owner]
        index = len(holding.keys)
        block = holding.blocks[index]
        fresh = key not in self._block_of_key
        holding.keys.append(key)
        holding.sealed.append(fresh)
        if fresh:
            self._block_of_key[key] = block
            self._key_of_block[block] = key
            self._pins[block] = 1

    def fork(self, source: bytes, owner: bytes, num_tokens: int) -> tuple[int, int] | None:
        """Open `owner` on the first `num_tokens` tokens of `source`, sharing its cached blocks.

        Returns (num_shared, num_blocks): the blocks at indices num_shared … num_blocks - 1 are private to the
        new owner, and the caller copies their contents. None, with nothing changed, where there are too few.
        """
        holding = self._holdings[source]
        num_blocks = self.blocks_for(num_tokens)
        num_shared = 0
        while (
            num_shared < min(num_tokens // self.block_tokens, len(holding.keys))
            and holding.sealed[num_shared]
        ):
            num_shared += 1
        if num_blocks - num_shared > self.num_available:
            return None
        self.open(owner, holding.keys[:num_shared], num_blocks)
        return num_shared, num_blocks

    def close(self, owner: bytes, forget: bool = False) -> list[int]:
        """Take everything back: pins are dropped, private blocks become free.

        With `forget` the owner's cached blocks that nobody else pins leave the cache as well (their
        contents are not to be trusted). Returns the blocks that became free.
        """
        holding = self._holdings.pop(owner)
        freed = []
        # Last block first: a prefix is worth more than what was computed on top of it.
        for index in range(len(holding.blocks) - 1, -1, -1):
            block = holding.blocks[index]
            if index < len(holding.keys) and holding.sealed[index]:
                self._unpin(block)
                if not (forget and block in self._evictable):
                    continue
                del self._evictable[block]
                self._forget(block)
            self._free.append(block)
            freed.append(block)
        return freed

    # --- inside --------------------------------------------------------------------------------

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._evictable.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        del self._block_of_key[self._key_of_block.pop(block)]
        del self._pins[block]

    def _pin(self, block: int) -> None:
        self._pins[block] += 1
        self._evictable.pop(block, None)

    def _unpin(self, block: int) -> None:
        self._pins[block] -= 1
        if self._pins[block] == 0:
            self._evictable[block] = None

    def check(self) -> None:
        """Raise PoolCorrupted unless every block is in exactly one place and every pin has an owner."""
        pins: dict[int, int] = {}
        private: list[int] = []
        for holding in self._holdings.values():
            for index, block in enumerate(holding.blocks):
                if index < len(holding.keys) and holding.sealed[index]:
                    pins[block] = pins.get(block, 0) + 1
                else:
                    private.append(block)
        places = [*self._free, *private, *self._key_of_block]
        if sorted(places) != list(range(self.num_blocks)):
            raise PoolCorrupted("a block is in two places or in none")
        if pins != {block: count for block, count in self._pins.items() if count}:
            raise PoolCorrupted("pins do not match their owners")
        if set(self._evictable) != {block for block, count in self._pins.items() if count == 0}:
            raise PoolCorrupted("the eviction order does not match the pins")
