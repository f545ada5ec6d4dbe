"""Which carrier a stream gets: shared memory before NIXL before none (inline, over gRPC).

    sender                                            receiver
    opens the stream, its metadata says     ───────▶  offers slots of the carriers that both have, shared memory
      which carriers it has, and its host             only to the same host, the better one first
    takes the first offer that works        ◀───────

That both run on one kernel is said here and proven when the sender opens the segment (shm_segment.py).
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from kvtransfer.layouts import DEFAULT_PIECE_BYTES
from kvtransfer.transports.carriers import (
    CARRIED_FRAME_BYTES,
    DEFAULT_CARRIER_BYTES,
    DEFAULT_NUM_SLOTS,
    DEFAULT_SLOT_BYTES,
    CarrierFailed,
)
from kvtransfer.transports.nixl import NixlLanding, NixlWriter
from kvtransfer.transports.nixl_agent import process_agent
from kvtransfer.transports.shm import SegmentPool, ShmWriter
from kvtransfer.transports.shm_segment import SegmentDirectory, boot_id, segment_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtransfer.transports.carriers import LandingSlots, SlotWriter

_log = logging.getLogger(__name__)

_METADATA_KEY = "headrace-carriers"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierOptions:
    """What a receiver offers.

    `nixl` is not on by itself: whoever reaches UCX's ports can write into the process (docs/transports.md).
    `directory`: where segments lie, /dev/shm/headrace-UID unless set. `spare_directory`: used where that is
    missing or too small, its parent must exist; None to do without shared memory then.
    `shm_bytes`, `nixl_bytes`: memory of all streams' slots together, beside the gRPC receiver's own budget.
    """

    shm: bool = True
    nixl: bool = False
    directory: Path | None = None
    spare_directory: Path | None = None
    num_slots: int = DEFAULT_NUM_SLOTS
    slot_bytes: int = DEFAULT_SLOT_BYTES
    shm_bytes: int = DEFAULT_CARRIER_BYTES
    nixl_bytes: int = DEFAULT_CARRIER_BYTES


class CarrierHost:
    """A receiver's landing slots for all of its streams. Safe to call from several threads.

    What cannot be used is said once in the log, and done without.
    """

    def __init__(self, options: CarrierOptions) -> None:
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._segments: SegmentPool | None = None
        self._landing: NixlLanding | None = None
        if options.shm:
            try:
                self._segments = _make_segments(options)
            except CarrierFailed as error:
                self._say("shared memory", error)
        if options.nixl:
            try:
                self._landing = NixlLanding(
                    num_slots=options.num_slots, slot_bytes=options.slot_bytes, max_bytes=options.nixl_bytes
                )
            except CarrierFailed as error:
                self._say("NIXL", error)

    def open_slots(self, metadata: Sequence[tuple[str, str | bytes]]) -> list[LandingSlots]:
        """For one stream, by the metadata of its call: the preferred first; empty where it goes over gRPC alone."""
        said = next((str(value) for key, value in metadata if key == _METADATA_KEY), "").split()
        slots = []
        if self._segments is not None and _shm_word(self._segments.boot) in said:
            slots += self._try_open("shared memory", self._segments)
        if self._landing is not None and "nixl" in said:
            slots += self._try_open("NIXL", self._landing)
        return slots

    def close(self) -> None:
        """Removes the segments; streams that are open keep theirs until they end. Idempotent."""
        if self._segments is not None:
            self._segments.close()

    def _try_open(self, what: str, source: _SlotSource) -> list[LandingSlots]:
        try:
            return [source.open()]
        except CarrierFailed as error:
            self._say(what, error)
            return []

    def _say(self, what: str, error: CarrierFailed) -> None:
        with self._lock:
            if what in self._said:
                return
            self._said.add(what)
        _log.warning("KV goes without %s for now: %s", what, error)


class _SlotSource(Protocol):
    def open(self) -> LandingSlots: ...


class SenderCarriers:
    """Which carriers a sender has, and how it takes an offer up. Without NIXL installed, `nixl` has no effect."""

    def __init__(self, *, shm: bool = True, nixl: bool = False) -> None:
        self._words: list[str] = []
        self._kinds: dict[str, type[ShmWriter] | type[NixlWriter]] = {}
        if shm:
            with suppress(CarrierFailed):
                self._words.append(_shm_word(boot_id()))
                self._kinds["shm"] = ShmWriter
        if nixl:
            try:
                process_agent()
                self._words.append("nixl")
                self._kinds["nixl"] = NixlWriter
            except CarrierFailed as error:
                _log.warning("KV goes without NIXL: %s", error)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To be sent with the call that opens the stream."""
        return ((_METADATA_KEY, " ".join(self._words)),) if self._words else ()

    def frame_bytes(self, address: str) -> int:
        """What frames to `address` (host:port) are best cut to: larger ones where they will likely be carried."""
        is_carried = "nixl" in self._kinds or self.shares_memory(address)
        return CARRIED_FRAME_BYTES if is_carried else DEFAULT_PIECE_BYTES

    def shares_memory(self, address: str) -> bool:
        """Whether frames to `address` will likely go through shared memory."""
        return "shm" in self._kinds and _is_here(address)

    def open_writer(self, offer: Mapping[str, Any]) -> SlotWriter:
        """Raises CarrierFailed."""
        kind = offer.get("kind")
        make = self._kinds.get(kind) if isinstance(kind, str) else None
        if make is None:
            raise CarrierFailed(f"landing slots of kind {kind!r} are not used here")
        return make(offer)


def _is_here(address: str) -> bool:
    """Whether a host:port is one of this host's own. A guess: names are not resolved."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or host in _own_addresses()
    except ValueError:
        return False


def _own_addresses() -> set[str]:
    entries = itertools.chain.from_iterable(psutil.net_if_addrs().values())
    return {entry.address.partition("%")[0] for entry in entries}


def _shm_word(boot: str) -> str:
    return f"shm:{boot}"


def _make_segments(options: CarrierOptions) -> SegmentPool:
    wanted = options.directory or _SHARED_MEMORY / f"headrace-{os.geteuid()}"
    try:
        directory = _roomy(wanted, options)
    except CarrierFailed:
        if options.spare_directory is None:
            raise
        directory = _roomy(options.spare_directory, options)
    return SegmentPool(
        directory, num_slots=options.num_slots, slot_bytes=options.slot_bytes, max_bytes=options.shm_bytes
    )


def _roomy(path: Path, options: CarrierOptions) -> SegmentDirectory:
    directory = SegmentDirectory(path)
    directory.sweep()
    needed = segment_bytes(options.num_slots, options.slot_bytes)
    if directory.room() < needed:
        raise CarrierFailed(f"{path} has room for {max(0, directory.room())} bytes, a segment takes {needed}")
    return directory
