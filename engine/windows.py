"""Which window slot and which record belongs to whom. Pure: numbers, owners and names, no tensors.

A slot holds the last rows of one running sequence; a record the rows that were live at one boundary between blocks,
under the name of the block that ends there (engine/pool.py). A slot is free or one owner's. A record is free, one
owner's that fills it, or kept: immutable, and given up, least recently used first, when another is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

Name = tuple[bytes, int]
"""Of a cached block: its key and its rank."""


class WindowUse(Enum):
    """What an owner does with windows. COMPUTED: it has a slot, and goes on from a record. LANDING: it has a slot,
    whose rows come from elsewhere. NONE: it has blocks alone."""

    COMPUTED = "computed"
    LANDING = "landing"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class WindowPlace:
    """Where an owner's rows are: in a slot, or in a record."""

    number: int
    is_record: bool = False


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
    slot: int
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
        return self._holdings[owner].slot

    def open(self, owner: bytes) -> int:
        """A slot for a new owner; there must be a free one."""
        slot = self._free_slots.pop()
        self._holdings[owner] = _Holding(slot)
        return slot

    def close(self, owner: bytes) -> None:
        """Take a slot back, and the records that were being filled. An owner without a slot has nothing to give."""
        holding = self._holdings.pop(owner, None)
        if holding is not None:
            self._free_slots.append(holding.slot)
            self._free_records += [filling.record for filling in holding.filling]

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
            if not self._kept:
                return None
            self._free_records.append(self._kept.popitem(last=False)[1])
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
        be kept). Of boundaries within an answer only the last one is kept."""
        holding = self._holdings[owner]
        for filling in holding.filling:
            name = name_of(filling.boundary) if filling.boundary <= num_computed else None
            if name is None or name in self._kept:
                self._free_records.append(filling.record)
                continue
            self._kept[name] = filling.record
            if supersedes(filling.boundary):
                if holding.superseded is not None:
                    self.forget(holding.superseded)
                holding.superseded = name
        holding.filling.clear()

    def forget(self, name: Name) -> None:
        """Free the record under a name, if there is one."""
        record = self._kept.pop(name, None)
        if record is not None:
            self._free_records.append(record)

    def check(self, owners: set[bytes]) -> str | None:
        """What is wrong, if anything: every slot and record is in one place, and only `owners` have slots."""
        slots = [*self._free_slots, *(holding.slot for holding in self._holdings.values())]
        if sorted(slots) != list(range(self.num_slots)):
            return "a window slot is in two places or in none"
        filling = [each.record for holding in self._holdings.values() for each in holding.filling]
        if sorted([*self._free_records, *self._kept.values(), *filling]) != list(range(self.num_records)):
            return "a window record is in two places or in none"
        if not set(self._holdings) <= owners:
            return "a window slot belongs to nobody"
        return None
