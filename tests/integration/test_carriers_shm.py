"""Landing slots in shared memory, with a sender in another process: whose memory it is, and when it serves again."""

from __future__ import annotations

import json
import os
import resource
import secrets
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kvtransfer.layouts import DEFAULT_PIECE_BYTES
from kvtransfer.transports import shm_segment
from kvtransfer.transports.carriers import CarrierFailed
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.shm import SegmentPool, ShmWriter
from kvtransfer.transports.shm_segment import (
    PAGE_BYTES,
    Mapped,
    SegmentDirectory,
    SegmentOffer,
    open_segment,
    segment_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.integration.peer_process import PeerProcess

pytestmark = pytest.mark.integration

SLOTS, SLOT_BYTES = 4, 2 * PAGE_BYTES
SEGMENT = segment_bytes(SLOTS, SLOT_BYTES)
SOON = 5.0


# ---- the sender's side, called in the other process

_held: list[ShmWriter | torch.Tensor] = []


def send(offer: dict[str, Any], fills: dict[int, int]) -> None:
    writer = ShmWriter(offer)
    for slot, value in fills.items():
        writer.buffer(slot).fill_(value)
        writer.flush(slot, SLOT_BYTES, time.monotonic() + SOON)
    writer.close()


def hold(offer: dict[str, Any]) -> None:
    """Opens the slots and keeps a view of slot 0, as a sender that freezes while it fills it."""
    writer = ShmWriter(offer)
    _held[:] = [writer, writer.buffer(0)]


def wake_and_write(value: int) -> str:
    """The write that was begun, then the check; gives what the check says."""
    writer, buffer = _held
    assert isinstance(writer, ShmWriter) and isinstance(buffer, torch.Tensor)
    buffer.fill_(value)
    try:
        writer.flush(0, SLOT_BYTES, time.monotonic() + SOON)
    except CarrierFailed as error:
        return str(error)
    return ""


def let_go() -> None:
    writer = _held[0]
    assert isinstance(writer, ShmWriter)
    writer.close()
    _held.clear()


@pytest.fixture
def peer(peers: tuple[PeerProcess, PeerProcess]) -> PeerProcess:
    return peers[1]


@pytest.fixture
def pool(directory: Path) -> Iterator[SegmentPool]:
    made = make_pool(directory)
    yield made
    made.close()


def make_pool(directory: Path, max_segments: int = 2) -> SegmentPool:
    return SegmentPool(
        SegmentDirectory(directory), num_slots=SLOTS, slot_bytes=SLOT_BYTES, max_bytes=max_segments * SEGMENT
    )


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


# ---- data


def test_what_another_process_writes_is_read_here_without_a_copy(
    pool: SegmentPool, peer: PeerProcess
) -> None:
    slots = pool.open()
    before = slots.read(3, SLOT_BYTES)
    peer.call(send, slots.offer(), {0: 1, 3: 77})
    assert slots.read(0, SLOT_BYTES) == bytes([1]) * SLOT_BYTES
    assert slots.read(3, 5) == bytes([77]) * 5
    assert before == bytes([77]) * SLOT_BYTES
    assert before.readonly
    assert slots.read(1, SLOT_BYTES) == bytes(SLOT_BYTES)


def test_slots_begin_at_whole_pages_and_sizes_are_rounded_up(directory: Path) -> None:
    pool = SegmentPool(SegmentDirectory(directory), num_slots=2, slot_bytes=1_000, max_bytes=1 << 20)
    slots = pool.open()
    writer = ShmWriter(slots.offer())
    assert writer.slot_bytes == slots.slot_bytes == PAGE_BYTES
    assert writer.buffer(1).data_ptr() % PAGE_BYTES == 0
    assert len(writer.buffer(1)) == PAGE_BYTES
    writer.close()
    slots.close(clean=True)
    pool.close()


@pytest.mark.parametrize(("slot", "num_bytes"), [(SLOTS, 1), (-1, 1), (0, SLOT_BYTES + 1), (0, -1)])
def test_nothing_outside_of_a_slot_is_touched(pool: SegmentPool, slot: int, num_bytes: int) -> None:
    slots = pool.open()
    writer = ShmWriter(slots.offer())
    with pytest.raises(CarrierFailed, match="bytes in slot"):
        slots.read(slot, num_bytes)
    with pytest.raises(CarrierFailed, match="bytes in slot"):
        writer.flush(slot, num_bytes, time.monotonic() + SOON)
    writer.close()


# ---- reuse


def test_a_clean_end_hands_the_segment_to_the_next_stream(
    pool: SegmentPool, peer: PeerProcess, directory: Path
) -> None:
    first = pool.open()
    offer = first.offer()
    peer.call(send, offer, {0: 9})
    first.close(clean=True)
    second = pool.open()
    assert second.offer()["name"] == offer["name"]
    assert second.offer()["token"] != offer["token"]
    with pytest.raises(CarrierFailed, match="token"):
        peer.call(send, offer, {0: 10})
    peer.call(send, second.offer(), {0: 11})
    assert second.read(0, 1) == bytes([11])
    assert len(files(directory)) == 1


def test_a_zombie_that_writes_after_an_unclean_end_reaches_no_other_stream(
    directory: Path, peer: PeerProcess
) -> None:
    pool = make_pool(directory, max_segments=1)
    stream = pool.open()
    peer.call(hold, stream.offer())
    stream.close(clean=False)
    assert files(directory) == []
    # Its memory counts for as long as the zombie maps it: the bound holds.
    assert pool.num_bytes == SEGMENT
    with pytest.raises(CarrierFailed, match="in use"):
        pool.open()
    larger = make_pool(directory)
    after = larger.open()
    peer.call(send, after.offer() | {}, {0: 3})
    assert "taken the shared memory back" in peer.call(wake_and_write, 66)
    assert after.read(0, SLOT_BYTES) == bytes([3]) * SLOT_BYTES
    peer.call(let_go)
    fresh = pool.open()
    assert fresh.read(0, SLOT_BYTES) == bytes(SLOT_BYTES)
    for slots in (after, fresh):
        slots.close(clean=True)
    pool.close()
    larger.close()
    assert files(directory) == []


HOLDER = """
import json, sys, time
from kvtransfer.transports.shm_segment import SegmentOffer, open_segment
offer = json.loads(sys.argv[1])
held = open_segment(SegmentOffer.parse({**offer, "token": bytes.fromhex(offer["token"])}))
print("holding", flush=True)
time.sleep(60)
"""


def test_the_memory_of_a_sender_that_was_killed_is_free_at_once(directory: Path) -> None:
    pool = make_pool(directory, max_segments=1)
    stream = pool.open()
    offer = json.dumps(stream.offer() | {"token": stream.offer()["token"].hex()})
    with subprocess.Popen([sys.executable, "-c", HOLDER, offer], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holding\n"
        stream.close(clean=False)
        with pytest.raises(CarrierFailed, match="in use"):
            pool.open()
        holder.kill()
    pool.open().close(clean=True)
    pool.close()


def test_the_pool_keeps_its_bound_whatever_is_open_or_idle(pool: SegmentPool, directory: Path) -> None:
    streams = [pool.open(), pool.open()]
    with pytest.raises(CarrierFailed, match="not allowed"):
        pool.open()
    for stream in streams:
        stream.close(clean=True)
        stream.close(clean=False)
    assert pool.num_bytes == 2 * SEGMENT
    again = [pool.open(), pool.open()]
    assert len(files(directory)) == 2
    pool.close()
    assert len(files(directory)) == 2  # still in use
    for stream in again:
        stream.close(clean=True)
    assert files(directory) == []
    assert pool.num_bytes == 0
    with pytest.raises(CarrierFailed, match="closed"):
        pool.open()


def test_views_outlive_their_slots(pool: SegmentPool) -> None:
    slots = pool.open()
    writer = ShmWriter(slots.offer())
    view, buffer = slots.read(2, SLOT_BYTES), writer.buffer(2)
    buffer.fill_(5)
    slots.close(clean=False)
    writer.close()
    assert view == bytes([5]) * SLOT_BYTES
    buffer.fill_(6)
    assert view[0] == 6
    for use in (lambda: slots.read(2, 1), lambda: writer.buffer(2), lambda: writer.flush(2, 1, 0.0)):
        with pytest.raises(CarrierFailed, match="closed"):
            use()
    assert pool.num_bytes == SEGMENT  # the writer's view still maps it
    del buffer
    assert make_room(pool)


def make_room(pool: SegmentPool) -> bool:
    streams = [pool.open(), pool.open()]
    for stream in streams:
        stream.close(clean=True)
    return True


# ---- what a sender refuses


def _chmod(path: Path) -> None:
    path.chmod(0o640)


def _give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, -1)


def _truncate(path: Path) -> None:
    os.truncate(path, SEGMENT - 1)


def _link(path: Path) -> None:
    target = path.rename(path.with_name("elsewhere"))
    path.symlink_to(target)


def _second_name(path: Path) -> None:
    path.with_name("second").hardlink_to(path)


def _another_token(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"another token!!!")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _open_house(path: Path) -> None:
    path.parent.chmod(0o755)


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (_chmod, "mode 0640"),
        (_give_away, "belongs to user 12345"),
        (_truncate, "bytes, not"),
        (_link, "cannot be opened"),
        (_second_name, "one regular file"),
        (_another_token, "token"),
        (_pipe, "one regular file"),
        (_open_house, "mode 0700"),
        (Path.unlink, "cannot be opened"),
    ],
)
def test_a_segment_that_is_not_as_offered_is_left_alone(
    pool: SegmentPool, directory: Path, tamper: Callable[[Path], None], why: str
) -> None:
    slots = pool.open()
    tamper(directory / slots.offer()["name"])
    with pytest.raises(CarrierFailed, match=why):
        ShmWriter(slots.offer())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"boot": "00000000-0000-0000-0000-000000000000"}, "another host"),
        ({"dir": "/nowhere"}, "cannot be opened"),
        ({"name": "../../etc/passwd"}, "not the name of a segment"),
        ({"slots": SLOTS + 1}, "bytes, not"),
        ({"slots": SLOTS // 2, "bytes": 2 * SLOT_BYTES}, "token"),
    ],
)
def test_an_offer_that_does_not_fit_the_segment_is_refused(
    pool: SegmentPool, changes: dict[str, Any], why: str
) -> None:
    slots = pool.open()
    with pytest.raises(CarrierFailed, match=why):
        ShmWriter(slots.offer() | changes)


def test_a_directory_that_is_not_this_users_alone_is_not_used(directory: Path, tmp_path: Path) -> None:
    directory.mkdir(mode=0o755)
    with pytest.raises(CarrierFailed, match="mode 0700"):
        SegmentDirectory(directory)
    link = tmp_path / "link"
    link.symlink_to(directory)
    with pytest.raises(CarrierFailed, match="cannot be opened"):
        SegmentDirectory(link)


# ---- memory that is not there, owners that are gone


def test_memory_that_cannot_be_backed_is_never_offered(directory: Path) -> None:
    pool = make_pool(directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT - PAGE_BYTES, limits[1]))
    try:
        with pytest.raises(CarrierFailed, match="a segment of"):
            pool.open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(directory) == []
    pool.open().close(clean=True)
    pool.close()


def test_without_room_a_segment_is_not_even_tried(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(directory)
    monkeypatch.setattr(shm_segment, "room_in", lambda where: SEGMENT - 1)
    with pytest.raises(CarrierFailed, match="has room for"):
        pool.open()
    assert files(directory) == []


OWNER = """
import sys, time
from pathlib import Path
from kvtransfer.transports.shm_segment import SegmentDirectory
segment = SegmentDirectory(Path(sys.argv[1])).create(int(sys.argv[2]))
print(segment.name, flush=True)
time.sleep(60)
"""


def test_segments_of_a_killed_owner_are_swept_and_those_of_a_living_one_stay(directory: Path) -> None:
    home = SegmentDirectory(directory)
    mine = home.create(SEGMENT)
    command = [sys.executable, "-c", OWNER, str(directory), str(SEGMENT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = owner.stdout.readline().strip()
        assert SegmentDirectory(directory).sweep() == 0
        assert {path.name for path in files(directory)} == {mine.name, theirs}
        owner.kill()
    other = directory / "not-a-segment"
    other.write_text("stays")
    assert SegmentDirectory(directory).sweep() == 1
    assert {path.name for path in files(directory)} == {mine.name, other.name}
    mine.retire()


def test_a_segment_is_swept_only_when_its_last_sender_is_gone_too(directory: Path) -> None:
    home = SegmentDirectory(directory)
    segment = home.create(SEGMENT)
    token = secrets.token_bytes(16)
    segment.memory.write_head(token, SLOTS, SLOT_BYTES)
    offer = SegmentOffer(shm_segment.boot_id(), str(directory), segment.name, token, SLOTS, SLOT_BYTES)
    mapped: Mapped = open_segment(offer)
    segment.memory.close()
    os.close(segment._fd)  # as if this process had died
    assert home.sweep() == 0
    mapped.close()
    assert home.sweep() == 1


# ---- the choice


def options(directory: Path, **changes: Any) -> CarrierOptions:
    base = CarrierOptions(directory=directory, num_slots=SLOTS, slot_bytes=SLOT_BYTES, shm_bytes=2 * SEGMENT)
    return replace(base, **changes)


def test_a_sender_that_says_it_is_here_gets_shared_memory(directory: Path) -> None:
    host = CarrierHost(options(directory))
    sender = SenderCarriers()
    (slots,) = host.open_slots(sender.metadata())
    writer = sender.open_writer(slots.offer(), "localhost:0")
    writer.buffer(0).fill_(8)
    assert slots.read(0, 2) == b"\x08\x08"
    writer.close()
    slots.close(clean=True)
    host.close()
    assert files(directory) == []


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        SenderCarriers(shm=False).metadata(),
        (("headrace-carriers", "shm:another-host"),),
        (("headrace-carriers", "teleport"), ("other", "shm")),
    ],
)
def test_a_sender_elsewhere_or_without_carriers_is_offered_nothing(
    directory: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    host = CarrierHost(options(directory))
    assert host.open_slots(metadata) == []
    assert files(directory) == []
    host.close()


def test_a_sender_refuses_kinds_that_it_does_not_use(directory: Path) -> None:
    host = CarrierHost(options(directory))
    (slots,) = host.open_slots(SenderCarriers().metadata())
    for offer in (slots.offer(), {"kind": "teleport"}, {}):
        with pytest.raises(CarrierFailed, match="not used here"):
            SenderCarriers(shm=False).open_writer(offer, "localhost:0")
    slots.close(clean=True)
    host.close()


def test_the_spare_directory_serves_where_the_first_cannot(directory: Path, tmp_path: Path) -> None:
    spare = tmp_path / "slots"
    host = CarrierHost(options(tmp_path / "missing" / "deep", spare_directory=spare))
    (slots,) = host.open_slots(SenderCarriers().metadata())
    assert slots.offer()["dir"] == str(spare)
    slots.close(clean=True)
    host.close()


def test_a_host_without_shared_memory_says_so_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = CarrierHost(options(tmp_path / "missing" / "deep"))
    assert host.open_slots(SenderCarriers().metadata()) == []
    assert host.open_slots(SenderCarriers().metadata()) == []
    assert caplog.text.count("goes without shared memory") == 1
    host.close()
    busy = CarrierHost(options(tmp_path / "own", shm_bytes=SEGMENT))
    (only,) = busy.open_slots(SenderCarriers().metadata())
    assert busy.open_slots(SenderCarriers().metadata()) == []
    assert busy.open_slots(SenderCarriers().metadata()) == []
    assert caplog.text.count("goes without shared memory") == 2
    only.close(clean=True)
    busy.close()


@pytest.mark.parametrize(
    ("address", "is_large"),
    [
        ("127.0.0.1:5000", True),
        ("localhost:5000", True),
        ("[::1]:5000", True),
        ("192.0.2.7:5000", False),
        ("some-host:5000", False),
        ("", False),
    ],
)
def test_frames_to_the_same_host_are_cut_larger(address: str, is_large: bool) -> None:
    assert (SenderCarriers(tcp=False).frame_bytes(address) > DEFAULT_PIECE_BYTES) is is_large
    assert SenderCarriers(shm=False, tcp=False).frame_bytes(address) == DEFAULT_PIECE_BYTES
