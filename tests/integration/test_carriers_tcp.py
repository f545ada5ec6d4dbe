"""Landing slots that are filled over TCP: whose payload lies where, and what is left when an end stops or lies."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from kvtransfer.transports import tcp, tcp_writer
from kvtransfer.transports.carriers import CarrierFailed
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.tcp import HEAD, TcpLanding
from kvtransfer.transports.tcp_writer import TcpLinks, TcpWriter
from tests.integration.peer_process import PeerProcess
from tests.integration.test_kvtransfer_carriers import (
    FRAME_BYTES,
    GQA,
    TOKENS,
    ReceivingWorker,
    Sender,
    landed,
    open_session,
    push,
    sending,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtransfer.transports.tcp import TcpSlots

pytestmark = pytest.mark.integration

HOST, SLOTS, SLOT_BYTES = "127.0.0.1", 4, 8192
SOON = 5.0


@pytest.fixture
def landing() -> Iterator[TcpLanding]:
    made = TcpLanding(HOST, num_slots=SLOTS, slot_bytes=SLOT_BYTES, max_bytes=2 * SLOTS * SLOT_BYTES)
    yield made
    made.close()


@pytest.fixture
def links() -> Iterator[TcpLinks]:
    made = TcpLinks()
    yield made
    made.close()


def write(writer: TcpWriter, slot: int, value: int, num_bytes: int = SLOT_BYTES) -> None:
    writer.buffer(slot).fill_(value)
    writer.flush(slot, num_bytes, time.monotonic() + SOON)


def head(slots: TcpSlots, slot: int, num_bytes: int) -> bytes:
    return HEAD.pack(slots.token, slot, num_bytes)


def connect(landing: TcpLanding) -> socket.socket:
    return socket.create_connection((HOST, landing.port), SOON)


def is_closed_by_peer(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# ---- data


def test_every_slot_has_what_was_written_into_it(landing: TcpLanding, links: TcpLinks) -> None:
    slots = landing.open()
    writer = links.open_writer(slots.offer(), HOST)
    for again in range(3):
        for slot in range(SLOTS):
            write(writer, slot, 10 * again + slot, 100 + slot)
        for slot in reversed(range(SLOTS)):
            assert bytes(slots.read(slot, 100 + slot)) == bytes([10 * again + slot]) * (100 + slot)


def test_reading_waits_for_a_payload_that_is_under_way(landing: TcpLanding) -> None:
    slots, found = landing.open(), []
    reader = threading.Thread(target=lambda: found.append(bytes(slots.read(1, 6))))
    reader.start()
    with connect(landing) as connection:
        for part in (head(slots, 1, 6)[:7], head(slots, 1, 6)[7:], b"abc", b"def"):
            assert not found
            connection.sendall(part)
            time.sleep(0.02)
        reader.join(SOON)
    assert found == [b"abcdef"]


def test_streams_share_a_connection(landing: TcpLanding, links: TcpLinks) -> None:
    streams = [landing.open(), landing.open()]
    writers = [links.open_writer(slots.offer(), HOST) for slots in streams]
    for value, writer in enumerate(writers):
        write(writer, 0, value, 8)
    assert [bytes(slots.read(0, 8)) for slots in streams] == [bytes([value] * 8) for value in (0, 1)]
    assert len({slots.connection for slots in streams}) == 1


# ---- ends


def test_a_late_payload_reaches_nothing_and_the_connection_goes_on(
    landing: TcpLanding, links: TcpLinks
) -> None:
    old = landing.open()
    zombie = links.open_writer(old.offer(), HOST)
    write(zombie, 0, 1)
    old.read(0, SLOT_BYTES)
    old.close(clean=False)
    fresh = landing.open()
    writer = links.open_writer(fresh.offer(), HOST)
    write(writer, 0, 2)
    assert bytes(fresh.read(0, SLOT_BYTES)) == b"\2" * SLOT_BYTES
    write(zombie, 0, 9)
    write(writer, 1, 3)
    assert bytes(fresh.read(1, SLOT_BYTES)) == b"\3" * SLOT_BYTES
    assert bytes(fresh._memory[:SLOT_BYTES]) == b"\2" * SLOT_BYTES


def test_memory_in_which_a_payload_is_landing_serves_nobody_else(landing: TcpLanding) -> None:
    slots = landing.open()
    with connect(landing) as connection:
        connection.sendall(head(slots, 0, 100) + bytes(50))
        wait_until(lambda: slots._num_lent == 1)
        slots.close(clean=False)
        assert landing.memory.num_taken == 1
        connection.sendall(bytes(50))
        wait_until(lambda: landing.memory.num_taken == 0)


def test_the_receivers_bound_holds_and_what_is_closed_serves_again(landing: TcpLanding) -> None:
    first, second = landing.open(), landing.open()
    with pytest.raises(CarrierFailed, match="in use"):
        landing.open()
    first.close(clean=True)
    first.close(clean=True)
    third = landing.open()
    with pytest.raises(CarrierFailed, match="in use"):
        landing.open()
    for slots in (second, third):
        slots.close(clean=False)
    assert landing.memory.num_taken == 0


def test_a_connection_that_ends_fails_those_who_wait_for_it(landing: TcpLanding) -> None:
    slots, other = landing.open(), landing.open()
    with connect(landing) as connection:
        connection.sendall(head(slots, 0, 4) + b"abcd" + head(slots, 1, 100) + bytes(50))
        wait_until(lambda: slots._num_lent == 1)
    with pytest.raises(CarrierFailed, match="its connection has ended"):
        slots.read(1, 100)
    assert bytes(slots.read(0, 4)) == b"abcd"  # this one is here
    assert not other._failed


def test_a_payload_that_never_comes_is_given_up(landing: TcpLanding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "PATIENCE_S", 0.05)
    with pytest.raises(CarrierFailed, match="did not come"):
        landing.open().read(0, 1)


def test_a_payload_of_another_length_is_not_the_one_that_a_frame_names(landing: TcpLanding) -> None:
    slots = landing.open()
    with connect(landing) as connection:
        connection.sendall(head(slots, 0, 4) + b"abcd")
        with pytest.raises(CarrierFailed, match="4 bytes came for slot 0, the frame names 5"):
            slots.read(0, 5)


@pytest.mark.parametrize(("slot", "num_bytes"), [(-1, 1), (SLOTS, 1), (0, SLOT_BYTES + 1), (0, -1)])
def test_nothing_outside_of_a_slot_is_read_or_written(
    landing: TcpLanding, links: TcpLinks, slot: int, num_bytes: int
) -> None:
    slots = landing.open()
    writer = links.open_writer(slots.offer(), HOST)
    with pytest.raises(CarrierFailed):
        slots.read(slot, num_bytes)
    with pytest.raises(CarrierFailed):
        writer.flush(slot, num_bytes, time.monotonic() + SOON)


# ---- strangers


@pytest.mark.parametrize(
    "first", [bytes(HEAD.size), b"GET / HTTP/1.1\r\nHost: headrace\r\n\r\n", b"\xff" * 100]
)
def test_a_stranger_is_not_listened_to(landing: TcpLanding, first: bytes) -> None:
    with connect(landing) as connection:
        connection.sendall(first)
        assert is_closed_by_peer(connection)


def test_a_stranger_who_says_nothing_is_sent_away(
    landing: TcpLanding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "PATIENCE_S", 0.05)
    with connect(landing) as connection:
        assert is_closed_by_peer(connection)


@pytest.mark.parametrize(("slot", "num_bytes"), [(SLOTS, 1), (0, SLOT_BYTES + 1), (2**32 - 1, 2**32 - 1)])
def test_a_sender_that_names_what_is_not_there_is_cut_off(
    landing: TcpLanding, slot: int, num_bytes: int
) -> None:
    slots = landing.open()
    with connect(landing) as connection:
        connection.sendall(head(slots, 0, 4) + b"abcd" + head(slots, slot, num_bytes))
        assert is_closed_by_peer(connection)
    assert bytes(slots.read(0, 4)) == b"abcd"
    assert landing.memory.num_taken == 1


def test_noise_lands_nowhere(landing: TcpLanding) -> None:
    slots = landing.open()
    before = bytes(slots._memory)
    chance = random.Random(1)
    for _ in range(200):
        with connect(landing) as connection:
            connection.sendall(chance.randbytes(chance.randrange(1, 300)))
    wait_until(lambda: not landing._connections)
    assert bytes(slots._memory) == before
    assert not slots._arrived


def test_more_connections_than_a_cluster_has_are_refused(
    landing: TcpLanding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "_MAX_CONNECTIONS", 2)
    held = [connect(landing) for _ in range(2)]
    wait_until(lambda: len(landing._connections) == 2)
    with connect(landing) as connection:
        assert is_closed_by_peer(connection)
    for connection in held:
        connection.close()


@pytest.mark.parametrize("key", ["port", "token", "slots", "bytes"])
def test_a_malformed_offer_is_refused(links: TcpLinks, key: str) -> None:
    offer = {"kind": "tcp", "port": 1, "token": bytes(16), "slots": 1, "bytes": 4096}
    for value in (None, -1, "", b"short", 1 << 32, True):
        with pytest.raises(CarrierFailed, match="malformed"):
            links.open_writer({**offer, key: value}, HOST)
    assert links.staging.num_taken == 0


# ---- the sender's connections


def test_an_address_that_cannot_be_reached_is_not_tried_for_every_stream(
    links: TcpLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    offer = {"kind": "tcp", "port": port, "token": bytes(16), "slots": 1, "bytes": 4096}
    with pytest.raises(CarrierFailed, match="cannot be reached"):
        links.open_writer(offer, HOST)
    with pytest.raises(CarrierFailed, match="a moment ago"):
        links.open_writer(offer, HOST)
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic() + tcp_writer.UNREACHABLE_S: now)
    with pytest.raises(CarrierFailed, match="cannot be reached"):
        links.open_writer(offer, HOST)
    assert links.staging.num_taken == 0


def test_a_broken_connection_says_so_and_the_next_stream_has_a_new_one(
    landing: TcpLanding, links: TcpLinks
) -> None:
    slots = landing.open()
    writer = links.open_writer(slots.offer(), HOST)
    write(writer, 0, 1)
    slots.read(0, SLOT_BYTES)
    assert slots.connection is not None
    slots.connection.shutdown(socket.SHUT_RDWR)

    def is_broken() -> bool:
        try:
            write(writer, 0, 2)
        except CarrierFailed:
            return True
        return False

    wait_until(is_broken)
    writer.close()
    assert links.staging.num_taken == 0
    fresh = landing.open()
    write(links.open_writer(fresh.offer(), HOST), 3, 3)
    assert bytes(fresh.read(3, SLOT_BYTES)) == b"\3" * SLOT_BYTES


def test_a_connection_without_streams_ends(
    landing: TcpLanding, links: TcpLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_writer, "IDLE_S", 0.02)
    slots = landing.open()
    writer = links.open_writer(slots.offer(), HOST)
    time.sleep(0.1)
    write(writer, 0, 1)  # in use, it stays
    slots.read(0, SLOT_BYTES)
    assert len(landing._connections) == 1
    writer.close()
    wait_until(lambda: not landing._connections)
    again = links.open_writer(landing.open().offer(), HOST)
    write(again, 0, 1)


def test_a_receiver_that_takes_nothing_holds_up_its_own_stream_only_so_long(
    links: TcpLinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_writer, "PATIENCE_S", 0.1)
    with socket.create_server((HOST, 0), backlog=1) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        offer = {
            "kind": "tcp",
            "port": server.getsockname()[1],
            "token": bytes(16),
            "slots": 4,
            "bytes": 4 << 20,
        }
        writer = links.open_writer(offer, HOST)

        def gives_up() -> bool:
            try:
                for slot in range(4):
                    writer.flush(slot, 4 << 20, time.monotonic() + SOON)
            except CarrierFailed:
                return True
            return False

        wait_until(gives_up)
        writer.close()
        assert links.staging.num_taken == 0


def test_staging_is_bounded(landing: TcpLanding, links: TcpLinks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links.staging, "_max_regions", 1)
    offer = landing.open().offer()
    writer = links.open_writer(offer, HOST)
    with pytest.raises(CarrierFailed, match="in use"):
        links.open_writer(offer, HOST)
    writer.close()
    links.open_writer(offer, HOST).close()


# ---- whole pushes


@pytest.fixture
def worker(directory: Path) -> Iterator[ReceivingWorker]:
    made = ReceivingWorker(directory, GQA, "tcp")
    yield made
    made.close()


@pytest.fixture
def sender(worker: ReceivingWorker) -> Iterator[Sender]:
    made = Sender(worker.receiver, TOKENS)
    yield made
    made.close()


def test_pushes_follow_each_other_on_one_connection(worker: ReceivingWorker, sender: Sender) -> None:
    carriers = sending("tcp")
    for number in range(5):
        grant = worker.receiver.grant(TOKENS, request=f"r{number}")
        assert push(sender, grant, carriers).carriers.keys() == {"tcp"}
        assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)
        with worker.receiver.desk.change() as table:
            table.release(grant.lease_id)
    landing = worker.host._tcp
    assert landing is not None
    assert len(landing._connections) == 1
    wait_until(lambda: landing.memory.num_taken == 0)
    carriers.close()
    wait_until(lambda: not landing._connections)


def test_a_connection_that_breaks_midway_leaves_the_rest_to_grpc_within_the_same_lease(
    worker: ReceivingWorker, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    carriers, num_payloads = sending("tcp"), 0
    write_payload = tcp_writer._Link._write

    def fail_at_the_fourth(link: Any, payload: Any) -> None:
        nonlocal num_payloads
        num_payloads += 1
        if num_payloads == 4:
            link._connection.sendall(payload.head + bytes(payload.content[:100]))
            raise OSError("the cable was pulled")
        write_payload(link, payload)

    monkeypatch.setattr(tcp_writer._Link, "_write", fail_at_the_fourth)
    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, carriers)
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)
    assert stats.num_resent >= 1
    assert stats.carriers["inline"] >= stats.kv_bytes - 8 * FRAME_BYTES
    landing = worker.host._tcp
    assert landing is not None
    wait_until(lambda: landing.memory.num_taken == 0)
    assert carriers._links.staging.num_taken == 0


def test_an_aborted_push_leaves_nothing(worker: ReceivingWorker, sender: Sender) -> None:
    carriers = sending("tcp")
    session = open_session(sender, worker.receiver.grant(TOKENS), carriers)
    session.advance(TOKENS // 4)
    wait_until(lambda: session.stats().carriers.get("tcp", 0) > 0)
    session.abort("the client left")
    landing = worker.host._tcp
    assert landing is not None
    wait_until(lambda: landing.memory.num_taken == 0)
    wait_until(lambda: carriers._links.staging.num_taken == 0)


def test_a_receiver_that_cannot_be_reached_beside_grpc_gets_all_of_it_inline(
    worker: ReceivingWorker, sender: Sender
) -> None:
    landing = worker.host._tcp
    assert landing is not None
    landing.close()
    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, sending("tcp"))
    assert stats.carriers == {"inline": stats.kv_bytes}
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)


def test_shared_memory_is_preferred_and_tcp_offered_beside_it(directory: Path) -> None:
    host = CarrierHost(CarrierOptions(directory=directory, tcp_host=HOST, num_slots=1, slot_bytes=4096))
    for carriers, kinds in (
        (sending("shm tcp"), ["shm", "tcp"]),
        (sending("tcp"), ["tcp"]),
        (sending(""), []),
    ):
        streams = host.open_slots(carriers.metadata())
        assert [slots.offer()["kind"] for slots in streams] == kinds
        for slots in streams:
            slots.close(clean=True)
    host.close()


def test_a_host_that_cannot_listen_says_so_and_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    host = CarrierHost(CarrierOptions(shm=False, tcp_host="192.0.2.1"))
    assert host.open_slots(SenderCarriers().metadata()) == []
    assert "goes without TCP" in caplog.text


# ---- a sender in another process that is killed

_writers: list[TcpWriter] = []


def begin_payload(offer: dict[str, Any]) -> None:
    """Half of a payload, then nothing."""
    writer = TcpLinks().open_writer(offer, HOST)
    _writers.append(writer)
    write(writer, 0, 5, 16)
    wait_until(lambda: not writer._num_unsent)
    writer._link._connection.sendall(struct.pack("<16sII", offer["token"], 1, 100) + bytes(50))


def test_a_sender_that_is_killed_fails_its_slots_at_once(
    landing: TcpLanding,
) -> None:
    slots, sender = landing.open(), PeerProcess()
    sender.call(partial(begin_payload, slots.offer()))
    assert bytes(slots.read(0, 16)) == b"\5" * 16
    sender.kill()
    with pytest.raises(CarrierFailed, match="its connection has ended"):
        slots.read(1, 100)
    slots.close(clean=False)
    assert landing.memory.num_taken == 0
