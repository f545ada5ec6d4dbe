"""Which workers hold which cached blocks.

One integer for each block key, whose bits are the workers that hold the block; workers are known by small numbers
(*slots*) that the caller gives. Walking a prompt is then one look-up and one AND for each of its blocks, whatever the
number of workers: those that drop out at a block have as many leading blocks as were walked before it. Beside it one
set of keys for each slot, so that a worker is forgotten in time proportional to what it held, and its slot can be
used again at once.

An entry (one block on one worker) takes 140 to 160 bytes, measured with 1,000 workers and a million entries;
`max_entries` bounds them. What would exceed it is refused whole: what is known of that worker is then worth little,
and the caller goes on without (router/core/index_feed.py).
"""

from collections.abc import Iterable, Sequence, Set

from kvtransfer.key_digest import key_digest

MAX_ENTRIES = 4_000_000


class IndexFull(Exception):
    """There is no room for these entries; nothing was changed."""


class PrefixIndex:
    """Sets of block keys (16 bytes each) by slot. Sizes are counts of blocks."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        if max_entries < 1:
            raise ValueError(f"an index needs room for at least one entry, not {max_entries}")
        self.max_entries = max_entries
        self.num_entries = 0
        """Blocks of all workers; one that several workers hold counts for each of them."""
        self._masks: dict[bytes, int] = {}
        self._held: dict[int, set[bytes]] = {}
        self._digests: dict[int, int] = {}
        self._bits: dict[int, int] = {}  # one object for all the blocks that one worker alone holds

    # --- reading -----------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes], beside: "PrefixIndex | None" = None) -> list[tuple[int, int]]:
        """Who holds how many leading blocks of a prompt, as (bits of the slots, number of blocks), longest first.

        No slot is in two of them, and those without the first block are in none. `beside`: an index whose
        blocks count as if they were in this one.
        """
        found: list[tuple[int, int]] = []
        ours = self._masks.get
        theirs = beside._masks.get if beside is not None and beside._masks else None
        alive = -1  # before the first block: everybody
        count = 0
        for count, key in enumerate(keys):
            holders = ours(key, 0) if theirs is None else ours(key, 0) | theirs(key, 0)
            still = alive & holders
            if still != alive:
                if count:
                    found.append((alive ^ still, count))
                alive = still
                if not alive:
                    break
        else:
            if keys:
                found.append((alive, count + 1))
        found.reverse()
        return found

    def num_blocks(self, slot: int) -> int:
        """How many blocks a worker holds."""
        return len(self._held.get(slot, ()))

    def digest(self, slot: int) -> int:
        """The digest of the keys that a worker holds (kvtransfer/key_digest.py)."""
        return self._digests.get(slot, 0)

    def keys_of(self, slot: int) -> Set[bytes]:
        """The keys that a worker holds. The set is the index's own: read it, do not keep it."""
        return self._held.get(slot, frozenset())

    # --- changing ----------------------------------------------------------------------------------------

    def add(self, slot: int, keys: Iterable[bytes]) -> None:
        """A worker has these blocks now; those that it had before change nothing.

        Raises:
            IndexFull: `max_entries` would be exceeded; nothing was changed.
            ValueError: a slot below 0, or a key that is not 16 bytes long.
        """
        if slot < 0:
            raise ValueError(f"a slot is a bit's number, not {slot}")
        held: Set[bytes] = self._held.get(slot, frozenset())
        fresh = set(keys).difference(held)
        if self.num_entries + len(fresh) > self.max_entries:
            raise IndexFull(
                f"{self.num_entries} of {self.max_entries} entries are taken, {len(fresh)} more would not fit"
            )
        digest = key_digest(fresh)
        if not fresh:
            return
        self._held.setdefault(slot, set()).update(fresh)
        self._digests[slot] = self._digests.get(slot, 0) ^ digest
        self.num_entries += len(fresh)
        bit = self._bits.setdefault(slot, 1 << slot)
        masks = self._masks
        for key in fresh:
            mask = masks.get(key)
            masks[key] = bit if mask is None else mask | bit

    def remove(self, slot: int, keys: Iterable[bytes]) -> None:
        """A worker has these blocks no longer; those that it did not have change nothing."""
        held = self._held.get(slot)
        if held is None:
            return
        gone = held.intersection(keys)
        held.difference_update(gone)
        self._digests[slot] ^= key_digest(gone)
        self._unmark(slot, gone)
        if not held:
            self._drop(slot)

    def keep_only(self, slot: int, keys: Set[bytes]) -> None:
        """A worker has none but these of the blocks that it had."""
        self.remove(slot, self.keys_of(slot) - keys)

    def clear(self, slot: int) -> None:
        """A worker has nothing; its slot may be given to another one."""
        self._unmark(slot, self._held.get(slot, ()))
        self._drop(slot)

    def _unmark(self, slot: int, keys: Set[bytes] | tuple[()]) -> None:
        masks, bit = self._masks, 1 << slot
        self.num_entries -= len(keys)
        for key in keys:
            mask = masks[key] ^ bit
            if mask:
                masks[key] = mask
            else:
                del masks[key]

    def _drop(self, slot: int) -> None:
        self._held.pop(slot, None)
        self._digests.pop(slot, None)
        self._bits.pop(slot, None)
