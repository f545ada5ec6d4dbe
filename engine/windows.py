"""Which window slot and which record belongs to whom. Pure: numbers, owners and names, no tensors.

A slot holds the last rows of one running sequence; a record the rows that were live at one boundary between blocks,
under the name of the block that ends there (engine/pool.py). A slot is free or one owner's. A record is free, one
owner's that fills it, or kept: immutable, and given up, least recently used first, when another is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from kvtransfer.keys import KEY_BYTES

Name = tuple[bytes, int]
"""Of a cached block: its key and its rank."""


def window_key(block: bytes) -> bytes:
    """The key of the windows at the end of a block, from the block's."""
    return hashlib.blake2b(block, digest_size=KEY_BYTES, person=b"headrace-window").digest()


class WindowUse(Enum):
    """What an owner does with windows. COMPUTED: it has a slot, and goes on from a record. LANDING: it has a slot,
    whose rows come from elsewhere. NONE: it has blocks alone."""

    COMPUTED = "computed"
    LANDING = "landing"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Filling:
    """A record that a step fills with the rows live at `boundary`."""

    boundary: int
    record: int


@dataclass(frozen=True, slots=True)
class TakenUp:
    """How an owner goes on from a cached prefix: its first `num_tokens` need not be computed; `record` fills its
    window slot, or without one the tokens up to `replayed_to` are computed for their windows alone."""

    num_tokens: int
    record: int | None = None
    replayed_to: int = 0


@dataclass(slots=True)
class _Holding:
    """`slot` is None, and `reading` may be a record's name, for who moves records only."""

    slot: int | None
    reading: Name | None = None
    filling: list[Filling] = field(default_factory=list)
    superseded: Name | None = None


class WindowPool:
    """Hands out `num_slots` slots and `num_records` records. `replay_tokens`: computing so many tokens again, with what
    is cached of them, brings windows back without a record; 0 where that is not done. Not thread-safe; the engine's
    lock guards it."""

    def __init__(self, num_slots: int, num_records: int, replay_tokens: int = 0) -> None:
        self.num_slots, self.num_records = num_slots, num_records
        self.replay_tokens = replay_tokens
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._free_records = list(range(num_records - 1, -1, -1))
        self._holdings: dict[bytes, _Holding] = {}
        self._kept: OrderedDict[Name, int] = OrderedDict()
        self._by_window_key: dict[Name, Name] = {}
        self._pins: dict[Name, int] = {}
        self._forgotten: dict[Name, int] = {}  # records that are still being read

    @property
    def num_free_slots(self) -> int:
        """Owners that could be opened now."""
        return len(self._free_slots)

    @property
    def num_kept(self) -> int:
        """Records that a prefix may be taken up from."""
        return len(self._kept)

    def slot(self, owner: bytes) -> int:
        """Raises KeyError for an owner without one."""
        slot = self._holdings[owner].slot
        if slot is None:
            raise KeyError(f"owner {owner.hex()} has no window slot")
        return slot

    def open(self, owner: bytes) -> int:
        """A slot for a new owner; there must be a free one."""
        slot = self._free_slots.pop()
        self._holdings[owner] = _Holding(slot)
        return slot

    def close(self, owner: bytes) -> None:
        """Take a slot back, and the records that were being filled. An owner without a slot has nothing to give."""
        holding = self._holdings.pop(owner, None)
        if holding is None:
            return
        if holding.slot is not None:
            self._free_slots.append(holding.slot)
        self._free_records += [filling.record for filling in holding.filling]
        if holding.reading is not None:
            self._unpin(holding.reading)

    def find(self, name: Name) -> int | None:
        """The record under a name; looking it up counts as use."""
        record = self._kept.get(name)
        if record is not None:
            self._kept.move_to_end(name)
        return record

    def has(self, name: Name) -> bool:
        """Whether there is a record under a name."""
        return name in self._kept

    def fill(self, owner: bytes, boundary: int) -> Filling | None:
        """A record for the owner's next step to fill; None where there is none to give up."""
        if not self._free_records:
            idle = next((name for name in self._kept if name not in self._pins), None)
            if idle is None:
                return None
            self.forget(idle)
        filling = Filling(boundary, self._free_records.pop())
        self._holdings[owner].filling.append(filling)
        return filling

    def settle(
        self,
        owner: bytes,
        num_computed: int,
        name_of: Callable[[int], Name | None],
        supersedes: Callable[[int], bool],
    ) -> None:
        """Keep what the owner's step filled up to `num_computed` tokens, under the name of each boundary (None: not to
        be kept). Of the boundaries for which `supersedes` holds, only the last one stays."""
        holding = self._holdings[owner]
        for filling in holding.filling:
            name = name_of(filling.boundary) if filling.boundary <= num_computed else None
            if self._keep_or_free(name, filling.record) and supersedes(filling.boundary):
                if holding.superseded is not None:
                    self.forget(holding.superseded)
                holding.superseded = name
        holding.filling.clear()

    def forget(self, name: Name) -> None:
        """Free the record under a name, if there is one, once nobody reads it."""
        record = self._kept.pop(name, None)
        if record is None:
            return
        del self._by_window_key[window_key(name[0]), name[1]]
        if name in self._pins:
            self._forgotten[name] = record
        else:
            self._free_records.append(record)

    # --- records that travel -----------------------------------------------------------------------

    def read(self, owner: bytes, key: bytes, bound: int) -> int | None:
        """Keep the record with the window key `key` and a rank of at most `bound` for an owner; returns its rank, or
        None where it is not kept."""
        for rank in range(bound + 1):
            name = self._by_window_key.get((key, rank))
            if name is not None:
                self._holdings[owner] = _Holding(None, name)
                self._pins[name] = self._pins.get(name, 0) + 1
                return rank
        return None

    def land(self, owner: bytes) -> bool:
        """A record for an owner to fill from elsewhere; False where there is none to give up."""
        self._holdings[owner] = _Holding(None)
        if self.fill(owner, 0) is None:
            del self._holdings[owner]
            return False
        return True

    def landed(self, owner: bytes, name: Name | None) -> None:
        """Keep what an owner filled under a name, where it has one that is not taken."""
        [filling] = self._holdings[owner].filling
        self._holdings[owner].filling.clear()
        self._keep_or_free(name, filling.record)

    def record_of(self, owner: bytes) -> int:
        """Which record an owner reads or fills. Raises KeyError for one that does neither."""
        holding = self._holdings[owner]
        if holding.reading is not None:
            return self._kept.get(holding.reading, self._forgotten.get(holding.reading, -1))
        if holding.slot is None and holding.filling:
            return holding.filling[0].record
        raise KeyError(f"owner {owner.hex()} moves no record")

    def _keep_or_free(self, name: Name | None, record: int) -> bool:
        """Keep a filled record under its name; False, and the record free again, without one or where it is taken."""
        if name is None or name in self._kept or name in self._forgotten:
            self._free_records.append(record)
            return False
        self._kept[name] = record
        self._by_window_key[window_key(name[0]), name[1]] = name
        return True

    def _unpin(self, name: Name) -> None:
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]
            if name in self._forgotten:
                self._free_records.append(self._forgotten.pop(name))

    def check(self, owners: set[bytes]) -> str | None:
        """What is wrong, if anything: every slot and record is in one place, and only `owners` have slots."""
        taken = {owner: each.slot for owner, each in self._holdings.items() if each.slot is not None}
        slots = [*self._free_slots, *taken.values()]
        if sorted(slots) != list(range(self.num_slots)):
            return "a window slot is in two places or in none"
        filling = [each.record for holding in self._holdings.values() for each in holding.filling]
        records = [*self._free_records, *self._kept.values(), *self._forgotten.values(), *filling]
        if sorted(records) != list(range(self.num_records)):
            return "a window record is in two places or in none"
        if set(self._by_window_key.values()) != set(self._kept):
            return "window keys do not match the records that are kept"
        if not set(taken) <= owners:
            return "a window slot belongs to nobody"
        return None
