"""Landing slots that NIXL writes into, between two other processes: UCX over TCP and within the host, no RDMA here."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

import pytest

from kvtransfer.transports import nixl, nixl_agent
from kvtransfer.transports.carriers import DEFAULT_SLOT_BYTES, CarrierFailed
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.nixl import NixlLanding, NixlSlots, NixlWriter, RegionPool
from tests.integration.peer_process import PeerProcess

pytestmark = pytest.mark.integration
needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="the extra `nixl` is not installed: make nixl-test"
)

SLOTS, SLOT_BYTES = 4, 1 << 20
FLUSH_S = 20.0

# ---- called in the other processes

_landing: list[NixlLanding] = []
_slots: dict[str, NixlSlots] = {}
_writers: dict[str, NixlWriter] = {}


def start(transports: str = "tcp,sm,self") -> None:
    os.environ.setdefault("UCX_TLS", transports)
    nixl_agent.process_agent()


def open_slots(name: str, num_regions: int = 2) -> dict[str, Any]:
    if not _landing:
        max_bytes = num_regions * SLOTS * SLOT_BYTES
        _landing.append(NixlLanding(num_slots=SLOTS, slot_bytes=SLOT_BYTES, max_bytes=max_bytes))
    _slots[name] = _landing[0].open()
    return _slots[name].offer()


def read(name: str, slot: int, num_bytes: int) -> bytes:
    return bytes(_slots[name].read(slot, num_bytes))


def close_slots(name: str, clean: bool) -> int:
    _slots.pop(name).close(clean=clean)
    return num_abandoned()


def num_abandoned() -> int:
    return nixl_agent.process_agent().num_abandoned


def open_writer(name: str, offer: dict[str, Any]) -> tuple[int, int]:
    _writers[name] = NixlWriter(offer)
    return _writers[name].num_slots, _writers[name].slot_bytes


def write(name: str, slot: int, value: int, num_bytes: int = SLOT_BYTES, within_s: float = FLUSH_S) -> str:
    """What went wrong; empty where nothing did."""
    try:
        _writers[name].buffer(slot).fill_(value)
        _writers[name].flush(slot, num_bytes, time.monotonic() + within_s)
    except CarrierFailed as error:
        return str(error)
    return ""


def close_writer(name: str) -> None:
    _writers.pop(name).close()


@pytest.fixture(scope="module")
def ends(peers: tuple[PeerProcess, PeerProcess]) -> tuple[PeerProcess, PeerProcess]:
    """Receiver and sender."""
    for end in peers:
        end.call(start)
    return peers


# ---- tests


@needs_nixl
def test_what_is_flushed_lies_in_the_receivers_slot(ends: tuple[PeerProcess, PeerProcess]) -> None:
    receiver, sender = ends
    shape = sender.call(open_writer, "a", receiver.call(open_slots, "a"))
    assert shape == (SLOTS, SLOT_BYTES)
    assert sender.call(write, "a", 0, 1) == ""
    assert sender.call(write, "a", 3, 77, 1000) == ""
    assert receiver.call(read, "a", 0, SLOT_BYTES) == bytes([1]) * SLOT_BYTES
    assert receiver.call(read, "a", 3, 1001) == bytes([77]) * 1000 + b"\0"
    assert "in slot" in sender.call(write, "a", 0, 1, SLOT_BYTES + 1)
    assert "in slot" in sender.call(write, "a", SLOTS, 1)
    sender.call(close_writer, "a")
    before = receiver.call(num_abandoned)
    assert receiver.call(close_slots, "a", True) == before


@needs_nixl
def test_a_clean_end_hands_the_region_on_and_the_bound_holds(ends: tuple[PeerProcess, PeerProcess]) -> None:
    receiver, sender = ends
    first = receiver.call(open_slots, "a")
    second = receiver.call(open_slots, "b")
    assert first["at"] != second["at"]
    with pytest.raises(CarrierFailed, match="in use"):
        receiver.call(open_slots, "c")
    receiver.call(close_slots, "b", True)
    again = receiver.call(open_slots, "b")
    assert again["at"] == second["at"]
    sender.call(open_writer, "b", again)
    assert sender.call(write, "b", 1, 5) == ""
    assert receiver.call(read, "b", 1, 2) == b"\5\5"
    sender.call(close_writer, "b")
    for name in ("a", "b"):
        receiver.call(close_slots, name, True)


@needs_nixl
def test_a_zombie_that_writes_after_an_unclean_end_reaches_no_other_stream(
    ends: tuple[PeerProcess, PeerProcess],
) -> None:
    """UCX lets the write through although the memory is deregistered: only the addresses protect the others."""
    receiver, sender = ends
    offer = receiver.call(open_slots, "old")
    sender.call(open_writer, "zombie", offer)
    assert sender.call(write, "zombie", 0, 1) == ""
    before = receiver.call(num_abandoned)
    assert receiver.call(close_slots, "old", False) == before + 1
    streams = {name: receiver.call(open_slots, name) for name in ("x", "y")}
    for name, fresh in streams.items():
        assert abs(fresh["at"] - offer["at"]) >= SLOTS * SLOT_BYTES
        sender.call(open_writer, name, fresh)
        assert sender.call(write, name, 0, 2) == ""
    sender.call(write, "zombie", 0, 99)
    for name in streams:
        assert receiver.call(read, name, 0, SLOT_BYTES) == bytes([2]) * SLOT_BYTES
        sender.call(close_writer, name)
        receiver.call(close_slots, name, True)
    sender.call(close_writer, "zombie")


def write_closed() -> str:
    slots = NixlLanding(num_slots=1, slot_bytes=DEFAULT_SLOT_BYTES, max_bytes=DEFAULT_SLOT_BYTES).open()
    writer = _writers["closed"] = NixlWriter(slots.offer())
    writer.close()
    writer.close()
    slots.close(clean=True)
    return write("closed", 0, 1)


@needs_nixl
def test_a_closed_writer_says_so(ends: tuple[PeerProcess, PeerProcess]) -> None:
    assert "closed" in ends[1].call(write_closed)


def write_to_itself() -> bytes:
    slots = NixlLanding(num_slots=2, slot_bytes=SLOT_BYTES, max_bytes=2 * SLOT_BYTES).open()
    _writers["self"] = NixlWriter(slots.offer())
    failed = write("self", 1, 4)
    close_writer("self")
    content = failed.encode() or bytes(slots.read(1, 3))
    slots.close(clean=True)
    return content


@needs_nixl
def test_a_process_can_push_to_itself(ends: tuple[PeerProcess, PeerProcess]) -> None:
    assert ends[1].call(write_to_itself) == b"\4\4\4"


def choose() -> list[list[str]]:
    """Kinds that are offered, for senders that have both, NIXL alone, and neither."""
    host = CarrierHost(CarrierOptions(nixl=True, num_slots=1))
    both, remote, none = (
        SenderCarriers(nixl=True),
        SenderCarriers(shm=False, nixl=True),
        SenderCarriers(shm=False),
    )
    found = []
    for sender in (both, remote, none):
        streams = host.open_slots(sender.metadata())
        found.append([slots.offer()["kind"] for slots in streams])
        for slots in streams:
            sender.open_writer(slots.offer(), "localhost:0").close()
            slots.close(clean=True)
    host.close()
    return found


@needs_nixl
def test_shared_memory_is_preferred_and_nixl_needs_both_ends(ends: tuple[PeerProcess, PeerProcess]) -> None:
    assert ends[1].call(choose) == [["shm", "nixl"], ["nixl"], []]


@needs_nixl
def test_a_receiver_that_dies_fails_the_carrier_within_the_deadline(
    ends: tuple[PeerProcess, PeerProcess],
) -> None:
    receiver, sender = PeerProcess(), ends[1]
    receiver.call(start)
    sender.call(open_writer, "d", receiver.call(open_slots, "d"))
    assert sender.call(write, "d", 0, 1) == ""
    receiver.kill()
    assert "the write" in sender.call(write, "d", 0, 2, SLOT_BYTES, 2.0)
    sender.call(close_writer, "d")


@pytest.mark.parametrize("key", ["agent", "meta", "at", "slots", "bytes"])
def test_a_malformed_offer_is_refused_before_anything_is_loaded(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "process_agent", lambda: pytest.fail("not before the offer is checked"))
    offer = {"kind": "nixl", "agent": "a", "meta": b"m", "at": 4096, "slots": 1, "bytes": 4096}
    for value in (None, -1, "" if key != "agent" else b"", 1 << 64):
        with pytest.raises(CarrierFailed, match="malformed"):
            NixlWriter({**offer, key: value})


def test_without_the_extra_it_says_how_to_get_it_and_goes_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setattr(nixl_agent, "_process_agent", None)
    monkeypatch.setattr(nixl_agent, "_process_failure", "")
    host = CarrierHost(CarrierOptions(shm=False, nixl=True))
    sender = SenderCarriers(shm=False, nixl=True, tcp=False)
    assert sender.metadata() == ()
    assert host.open_slots((("headrace-carriers", "nixl"),)) == []
    assert "pip install 'headrace-server[nixl]'" in caplog.text


class _ScriptedAgent:
    """Registers nothing; counts."""

    num_abandoned = 0

    def register(self, num_bytes: int) -> Any:
        return object()

    def abandon(self, region: Any) -> None:
        self.num_abandoned += 1


def test_regions_that_were_given_up_end_the_use_of_nixl_in_the_end() -> None:
    agent: Any = _ScriptedAgent()
    pool = RegionPool(4096, 4096)
    for _ in range(nixl.MAX_ABANDONED):
        pool.abandon(pool.take(agent), agent)
    with pytest.raises(CarrierFailed, match="ended badly"):
        pool.take(agent)


def test_a_stuck_staging_region_stays_and_counts() -> None:
    agent: Any = _ScriptedAgent()
    pool = RegionPool(4096, 4096)
    pool.keep(pool.take(agent))
    with pytest.raises(CarrierFailed, match="in use"):
        pool.take(agent)
    assert agent.num_abandoned == 0
