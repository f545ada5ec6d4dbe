"""Carrier `nixl`: the sender writes into slots of the receiver by RDMA, or by whatever UCX finds.

One WRITE for a frame; its completion is the fence, and the gRPC frame that follows the notification. Memory:
at most `max_bytes` of slots at a receiver, MAX_STAGING_BYTES at a sender. What was given up after an
unclean end keeps only its addresses (nixl_agent.py), at most MAX_ABANDONED times; then NIXL is not used any more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from kvtransfer.transports.carriers import (
    DEFAULT_CARRIER_BYTES,
    DEFAULT_NUM_SLOTS,
    DEFAULT_SLOT_BYTES,
    CarrierFailed,
    check_slot,
)
from kvtransfer.transports.nixl_agent import WriteStuck, process_agent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtransfer.transports.nixl_agent import NixlAgent, Region

MAX_ABANDONED = 4096
MAX_STAGING_BYTES = DEFAULT_CARRIER_BYTES
_PAGE_BYTES = 4096


class RegionPool:
    """Registered regions of one size, kept for the next stream. Safe to call from several threads."""

    def __init__(self, region_bytes: int, max_bytes: int) -> None:
        self._region_bytes = region_bytes
        self._max_regions = max_bytes // region_bytes
        self._lock = threading.Lock()
        self._idle: list[Region] = []
        self._stuck: list[Region] = []
        self._num_regions = 0

    def take(self, agent: NixlAgent) -> Region:
        """Raises CarrierFailed when the budget is used up."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._num_regions >= self._max_regions:
                raise CarrierFailed(f"{self._num_regions} regions of {self._region_bytes} bytes are in use")
            if agent.num_abandoned >= MAX_ABANDONED:
                raise CarrierFailed(f"{agent.num_abandoned} transfers over NIXL ended badly")
            region = agent.register(self._region_bytes)
            self._num_regions += 1
            return region

    def put_back(self, region: Region) -> None:
        with self._lock:
            self._idle.append(region)

    def abandon(self, region: Region, agent: NixlAgent) -> None:
        """Somebody may still write into it."""
        with self._lock:
            self._num_regions -= 1
        agent.abandon(region)

    def keep(self, region: Region) -> None:
        """The transport still reads it: it stays as it is, and counts."""
        with self._lock:
            self._stuck.append(region)


class NixlLanding:
    """The receiver's end of all streams. `slot_bytes` is rounded up to whole pages. Raises CarrierFailed."""

    def __init__(self, *, num_slots: int, slot_bytes: int, max_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = -(-slot_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._agent = process_agent()
        self._pool = RegionPool(num_slots * self.slot_bytes, max_bytes)

    def open(self) -> NixlSlots:
        """Slots for one stream. Raises CarrierFailed."""
        region = self._pool.take(self._agent)
        try:
            metadata = self._agent.metadata(region)
        except CarrierFailed:
            self._pool.put_back(region)
            raise
        return NixlSlots(self._agent, self._pool, region, metadata, self.num_slots, self.slot_bytes)


class NixlSlots:
    """`LandingSlots` in one registered region."""

    def __init__(
        self,
        agent: NixlAgent,
        pool: RegionPool,
        region: Region,
        metadata: bytes,
        num_slots: int,
        slot_bytes: int,
    ) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._agent = agent
        self._pool = pool
        self._metadata = metadata
        self._lock = threading.Lock()
        self._region: Region | None = region
        agent.start_polling()

    def offer(self) -> dict[str, Any]:
        address = self._open_region().address
        offer = _Offer(self._agent.name, self._metadata, address, self.num_slots, self.slot_bytes)
        return offer.pack()

    def read(self, slot: int, num_bytes: int) -> memoryview:
        region = self._open_region()
        self._agent.note_landing()
        check_slot(self, slot, num_bytes)
        start = slot * self.slot_bytes
        return region.array[start : start + num_bytes].data.toreadonly()

    def close(self, *, clean: bool) -> None:
        with self._lock:
            region, self._region = self._region, None
        if region is None:
            return
        self._agent.stop_polling()
        if clean:
            self._pool.put_back(region)
        else:
            self._pool.abandon(region, self._agent)

    def _open_region(self) -> Region:
        region = self._region
        if region is None:
            raise CarrierFailed("the stream's slots are closed")
        return region


class NixlWriter:
    """`SlotWriter` by way of a staging region, which NIXL has registered. Raises CarrierFailed.

    Its slots are as many and as large as both the offer and the staging region have.
    """

    def __init__(self, offer: Mapping[str, Any]) -> None:
        self._offer = _Offer.parse(offer)
        self.num_slots = min(self._offer.num_slots, DEFAULT_NUM_SLOTS)
        self.slot_bytes = min(self._offer.slot_bytes, DEFAULT_SLOT_BYTES)
        self._agent = process_agent()
        self._lock = threading.Lock()
        self._is_stuck = False
        self._staging: Region | None = _staging.take(self._agent)
        try:
            self._agent.connect(self._offer.agent, self._offer.metadata)
        except CarrierFailed:
            _staging.put_back(self._staging)
            raise

    def buffer(self, slot: int) -> torch.Tensor:
        check_slot(self, slot, self.slot_bytes)
        start = slot * DEFAULT_SLOT_BYTES
        return torch.from_numpy(self._open_staging().array[start : start + self.slot_bytes])

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        check_slot(self, slot, num_bytes)
        source = self._open_staging().address + slot * DEFAULT_SLOT_BYTES
        target = self._offer.address + slot * self._offer.slot_bytes
        try:
            self._agent.write(source, self._offer.agent, target, num_bytes, deadline)
        except WriteStuck:
            self._is_stuck = True
            raise

    def close(self) -> None:
        """Not while a `flush` is running."""
        with self._lock:
            staging, self._staging = self._staging, None
        if staging is None:
            return
        self._agent.disconnect(self._offer.agent)
        if self._is_stuck:
            _staging.keep(staging)
        else:
            _staging.put_back(staging)

    def _open_staging(self) -> Region:
        staging = self._staging
        if staging is None:
            raise CarrierFailed("the writer is closed")
        return staging


# What all of this process's writers stage in.
_staging = RegionPool(DEFAULT_NUM_SLOTS * DEFAULT_SLOT_BYTES, MAX_STAGING_BYTES)


@dataclass(frozen=True, slots=True)
class _Offer:
    """`address`: of slot 0 at the receiver. `slot_bytes` is a multiple of the page size."""

    agent: str
    metadata: bytes
    address: int
    num_slots: int
    slot_bytes: int

    def pack(self) -> dict[str, Any]:
        return {
            "kind": "nixl",
            "agent": self.agent,
            "meta": self.metadata,
            "at": self.address,
            "slots": self.num_slots,
            "bytes": self.slot_bytes,
        }

    @staticmethod
    def parse(offer: Mapping[str, Any]) -> _Offer:
        """Raises CarrierFailed for anything that `pack` does not give."""
        agent, metadata = offer.get("agent"), offer.get("meta")
        numbers = [offer.get(key) for key in ("at", "slots", "bytes")]
        if (
            not isinstance(agent, str)
            or not isinstance(metadata, bytes)
            or not all(type(number) is int and 0 < number < 1 << 63 for number in numbers)
        ):
            raise CarrierFailed("the offer of NIXL slots is malformed")
        return _Offer(agent, metadata, *cast("list[int]", numbers))
