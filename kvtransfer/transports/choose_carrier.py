"""Which carrier a stream gets: shared memory before NIXL before TCP before none (inline, over gRPC).

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
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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
from kvtransfer.transports.tcp import TcpLanding
from kvtransfer.transports.tcp_writer import TcpLinks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kvtransfer.transports.carriers import LandingSlots, SlotWriter

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_METADATA_KEY = "headrace-carriers"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CarrierOptions:
    """What a receiver offers.

    `nixl` is not on by itself: whoever reaches UCX's ports can write into the process (docs/transports.md).
    `directory`: where segments lie, /dev/shm/headrace-UID unless set. `spare_directory`: used where that is
    missing or too small, its parent must exist; None to do without shared memory then.
    `tcp_host`: the address to listen on for carrier `tcp`, which is not offered without one.
    `shm_bytes`, `nixl_bytes`, `tcp_bytes`: memory of all streams' slots, beside the gRPC receiver's own budget.
    """

    shm: bool = True
    nixl: bool = False
    tcp_host: str = ""
    directory: Path | None = None
    spare_directory: Path | None = None
    num_slots: int = DEFAULT_NUM_SLOTS
    slot_bytes: int = DEFAULT_SLOT_BYTES
    shm_bytes: int = DEFAULT_CARRIER_BYTES
    nixl_bytes: int = DEFAULT_CARRIER_BYTES
    tcp_bytes: int = DEFAULT_CARRIER_BYTES


class CarrierHost:
    """A receiver's landing slots for all of its streams. Safe to call from several threads.

    What cannot be used is said once in the log, and done without.
    """

    def __init__(self, options: CarrierOptions) -> None:
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._segments = self._try("shared memory", lambda: _make_segments(options)) if options.shm else None
        sizes = {"num_slots": options.num_slots, "slot_bytes": options.slot_bytes}
        self._nixl = (
            self._try("NIXL", lambda: NixlLanding(**sizes, max_bytes=options.nixl_bytes))
            if options.nixl
            else None
        )
        self._tcp = (
            self._try("TCP", lambda: TcpLanding(options.tcp_host, **sizes, max_bytes=options.tcp_bytes))
            if options.tcp_host
            else None
        )

    def open_slots(self, metadata: Sequence[tuple[str, str | bytes]]) -> list[LandingSlots]:
        """For one stream, by the metadata of its call: the preferred first; empty where it goes over gRPC alone."""
        said = next((str(value) for key, value in metadata if key == _METADATA_KEY), "").split()
        opened = (self._try(name, source.open) for word, name, source in self._sources() if word in said)
        return [slots for slots in opened if slots is not None]

    def close(self) -> None:
        """Removes the segments, ends the connections; streams that are open keep their memory until they end.
        Idempotent."""
        if self._segments is not None:
            self._segments.close()
        if self._tcp is not None:
            self._tcp.close()

    def _sources(self) -> Iterator[tuple[str, str, _SlotSource]]:
        """What a sender says that can use it, how people call it, and where the slots come from."""
        if self._segments is not None:
            yield _shm_word(self._segments.boot), "shared memory", self._segments
        if self._nixl is not None:
            yield "nixl", "NIXL", self._nixl
        if self._tcp is not None:
            yield "tcp", "TCP", self._tcp

    def _try(self, what: str, make: Callable[[], _T]) -> _T | None:
        try:
            return make()
        except CarrierFailed as error:
            self._say(what, error)
            return None

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

    def __init__(self, *, shm: bool = True, nixl: bool = False, tcp: bool = True) -> None:
        self._words: list[str] = []
        self._openers: dict[str, Callable[[Mapping[str, Any], str], SlotWriter]] = {}
        if shm:
            with suppress(CarrierFailed):
                self._words.append(_shm_word(boot_id()))
                self._openers["shm"] = lambda offer, _host: ShmWriter(offer)
        if nixl:
            try:
                process_agent()
                self._words.append("nixl")
                self._openers["nixl"] = lambda offer, _host: NixlWriter(offer)
            except CarrierFailed as error:
                _log.warning("KV goes without NIXL: %s", error)
        self._links = TcpLinks()
        if tcp:
            self._words.append("tcp")
            self._openers["tcp"] = self._links.open_writer

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To be sent with the call that opens the stream."""
        return ((_METADATA_KEY, " ".join(self._words)),) if self._words else ()

    def frame_bytes(self, address: str) -> int:
        """What frames to `address` (host:port) are best cut to: larger ones where they will likely be carried."""
        is_carried = not self._openers.keys().isdisjoint(("nixl", "tcp")) or self.shares_memory(address)
        return CARRIED_FRAME_BYTES if is_carried else DEFAULT_PIECE_BYTES

    def shares_memory(self, address: str) -> bool:
        """Whether frames to `address` will likely go through shared memory."""
        return "shm" in self._openers and _is_here(address)

    def open_writer(self, offer: Mapping[str, Any], address: str) -> SlotWriter:
        """`address`: host:port, as gRPC reaches the receiver. Raises CarrierFailed."""
        kind = offer.get("kind")
        open_writer = self._openers.get(kind) if isinstance(kind, str) else None
        if open_writer is None:
            raise CarrierFailed(f"landing slots of kind {kind!r} are not used here")
        return open_writer(offer, _host(address))

    def close(self) -> None:
        """Ends the connections."""
        self._links.close()


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _is_here(address: str) -> bool:
    """Whether a host:port is one of this host's own. A guess: names are not resolved."""
    host = _host(address)
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
