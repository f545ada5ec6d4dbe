"""Which records a tier holds under a key. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from kvtransfer.layouts import convertible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtransfer.tiers.records import RecordId, Shape

Place = TypeVar("Place")

NEAR = 1  # the fidelity rank of content whose numbers changed their dtype


class Catalog(Generic[Place]):
    """Records by name, each with the place where it lies, and their names by key."""

    def __init__(self) -> None:
        self._places: dict[RecordId, Place] = {}
        self._by_key: dict[bytes, set[RecordId]] = {}

    def __contains__(self, record: RecordId) -> bool:
        return record in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, record: RecordId, place: Place) -> None:
        """A record that is held already gets a new place."""
        self._places[record] = place
        self._by_key.setdefault(record.key, set()).add(record)

    def remove(self, record: RecordId) -> Place | None:
        """The place it had, or None."""
        place = self._places.pop(record, None)
        if place is not None:
            names = self._by_key[record.key]
            names.discard(record)
            if not names:
                del self._by_key[record.key]
        return place

    def get(self, record: RecordId) -> Place | None:
        return self._places.get(record)

    def under(self, key: bytes) -> Iterable[RecordId]:
        """All records of a key: of any fidelity and shape."""
        return self._by_key.get(key, ())

    def items(self) -> Iterable[tuple[RecordId, Place]]:
        return self._places.items()


def best_of(records: Iterable[RecordId], bound: int, shape: Shape) -> RecordId | None:
    """The record that a reader with `shape` and a fidelity `bound` takes: the best rank, of equals the one that
    need not be converted; None when none will do."""
    ranked = [
        (rank, record.shape != shape, record) for record in records for rank in [rank_for(record, shape)]
    ]
    usable = [entry for entry in ranked if entry[0] is not None and entry[0] <= bound]
    return min(usable, key=lambda entry: (entry[0] or 0, entry[1]))[2] if usable else None


def rank_for(record: RecordId, shape: Shape) -> int | None:
    """The fidelity rank that a record has for a reader with `shape`; None where it cannot be read there."""
    mine = record.shape
    if mine == shape:
        return record.fidelity
    if (mine.layout, mine.block_tokens) != (shape.layout, shape.block_tokens):
        return None
    if len(mine.dtypes) != len(shape.dtypes):
        return None
    for here, there in zip(mine.dtypes, shape.dtypes, strict=True):
        if len(here) != len(there) or not all(map(convertible, here, there)):
            return None
    return max(record.fidelity, NEAR)
