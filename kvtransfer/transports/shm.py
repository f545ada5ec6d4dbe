"""Carrier `shm`: slots in memory that both processes map. Same host, same user; nothing is copied in between.

Memory: at most `max_bytes` for all streams of a receiver, segments that a sender still maps after its stream
ended badly included. A stream that finds none left goes over gRPC alone.
"""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Any

import torch

from kvtransfer.transports.carriers import CarrierFailed, check_slot
from kvtransfer.transports.shm_segment import (
    PAGE_BYTES,
    TOKEN_BYTES,
    Segment,
    SegmentOffer,
    boot_id,
    open_segment,
    segment_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtransfer.transports.shm_segment import SegmentDirectory


class SegmentPool:
    """Segments for the streams of one receiver, made when they are needed and kept for the next stream.

    `slot_bytes` is rounded up to whole pages. Safe to call from several threads.
    """

    def __init__(
        self, directory: SegmentDirectory, *, num_slots: int, slot_bytes: int, max_bytes: int
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES
        self.max_bytes = max_bytes
        self._segment_bytes = segment_bytes(num_slots, self.slot_bytes)
        self._directory = directory
        self.boot = boot_id()
        self._lock = threading.Lock()
        self._idle: list[Segment] = []
        self._retired: list[Segment] = []  # some sender may still map them
        self._num_lent = 0
        self._is_closed = False

    @property
    def num_bytes(self) -> int:
        """Shared memory held now: lent, idle, and retired while a sender maps it."""
        with self._lock:
            return self._count() * self._segment_bytes

    def open(self) -> ShmSlots:
        """Slots for one stream. Raises CarrierFailed when the budget or the memory is used up."""
        with self._lock:
            if self._is_closed:
                raise CarrierFailed("the pool of segments is closed")
            segment = self._idle.pop() if self._idle else self._make()
            self._num_lent += 1
        token = secrets.token_bytes(TOKEN_BYTES)
        segment.memory.write_head(token, self.num_slots, self.slot_bytes)
        directory = str(self._directory.path)
        offer = SegmentOffer(self.boot, directory, segment.name, token, self.num_slots, self.slot_bytes)
        return ShmSlots(self, segment, offer)

    def take_back(self, segment: Segment, *, clean: bool) -> None:
        """What ShmSlots.close does. After an unclean end a sender that wakes up may write at any time, so that
        the memory serves nobody again."""
        with self._lock:
            self._num_lent -= 1
            if clean and not self._is_closed:
                self._idle.append(segment)
            else:
                segment.retire()
                self._retired.append(segment)
                self._forget_freed()

    def close(self) -> None:
        """Removes the files; streams that are still open keep their memory until they end. Idempotent."""
        with self._lock:
            self._is_closed = True
            while self._idle:
                segment = self._idle.pop()
                segment.retire()
                self._retired.append(segment)
            self._forget_freed()

    def _make(self) -> Segment:
        self._forget_freed()
        if (self._count() + 1) * self._segment_bytes > self.max_bytes:
            text = f"{self._count()} segments of {self._segment_bytes} bytes are in use"
            raise CarrierFailed(f"{text}, more than {self.max_bytes} bytes are not allowed")
        return self._directory.create(self._segment_bytes)

    def _count(self) -> int:
        return self._num_lent + len(self._idle) + len(self._retired)

    def _forget_freed(self) -> None:
        self._retired = [segment for segment in self._retired if not segment.is_free()]


class ShmSlots:
    """`LandingSlots` in one segment."""

    def __init__(self, pool: SegmentPool, segment: Segment, offer: SegmentOffer) -> None:
        self.num_slots = offer.num_slots
        self.slot_bytes = offer.slot_bytes
        self._pool = pool
        self._offer = offer
        self._lock = threading.Lock()
        self._segment: Segment | None = segment

    def offer(self) -> dict[str, Any]:
        return self._offer.pack()

    def read(self, slot: int, num_bytes: int) -> memoryview:
        segment = self._segment
        if segment is None:
            raise CarrierFailed("the stream's slots are closed")
        start = slot_start(self, slot, num_bytes)
        return segment.memory.array[start : start + num_bytes].data.toreadonly()

    def close(self, *, clean: bool) -> None:
        with self._lock:
            segment, self._segment = self._segment, None
        if segment is not None:
            self._pool.take_back(segment, clean=clean)


class ShmWriter:
    """`SlotWriter` into an offered segment. Raises CarrierFailed where that cannot be mapped."""

    def __init__(self, offer: Mapping[str, Any]) -> None:
        self._offer = SegmentOffer.parse(offer)
        self.num_slots = self._offer.num_slots
        self.slot_bytes = self._offer.slot_bytes
        self._memory = open_segment(self._offer)

    def buffer(self, slot: int) -> torch.Tensor:
        start = slot_start(self, slot, self.slot_bytes)
        return torch.from_numpy(self._memory.array[start : start + self.slot_bytes])

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        """The receiver sees what is written as it is written; the frame that names the slot comes after it."""
        slot_start(self, slot, num_bytes)
        if self._memory.token != self._offer.token:
            raise CarrierFailed("the receiver has taken the shared memory back")

    def close(self) -> None:
        self._memory.close()


def slot_start(slots: ShmSlots | ShmWriter, slot: int, num_bytes: int) -> int:
    """Offset of a slot in the segment. Raises CarrierFailed for what is not within one."""
    check_slot(slots, slot, num_bytes)
    return PAGE_BYTES + slot * slots.slot_bytes
