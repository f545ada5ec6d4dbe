"""Whole pushes with landing slots, in one process and between two: what travels how, and what is done when it fails."""

from __future__ import annotations

import importlib.util
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvtransfer.choice import FixedCodec
from kvtransfer.codecs import CODECS, Fidelity, newest_codec
from kvtransfer.transports.carriers import CarrierFailed
from kvtransfer.transports.choose_carrier import CarrierHost, CarrierOptions, SenderCarriers
from kvtransfer.transports.grpc_push import PushOptions, PushSession
from tests.integration.kvtransfer_harness import (
    GQA,
    MIXED,
    Peer,
    Receiver,
    Sender,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from kvtransfer.codecs import Codec
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.lease_types import Grant
    from kvtransfer.transports.carriers import SlotWriter
    from kvtransfer.transports.seam import PushStats
    from tests.integration.peer_process import PeerProcess

pytestmark = pytest.mark.integration

SLOTS, SLOT_BYTES, FRAME_BYTES = 4, 8192, 4096
TOKENS = 256
HERE = "127.0.0.1:0"
LAYOUTS = {"gqa": GQA, "mixed": MIXED}


class ReceivingWorker:
    """A receiver with carriers. Lives here, or in the other process under the name `_worker`."""

    def __init__(self, directory: Path, layout: CacheLayout, carriers: str = "shm") -> None:
        options = CarrierOptions(
            shm="shm" in carriers,
            nixl="nixl" in carriers,
            tcp_host="127.0.0.1" if "tcp" in carriers else "",
            directory=directory,
            num_slots=SLOTS,
            slot_bytes=SLOT_BYTES,
        )
        self.host = CarrierHost(options)
        self.receiver = Receiver(layout, open_slots=self.host.open_slots)

    def close(self) -> None:
        self.receiver.close()
        self.host.close()


def sending(carriers: str) -> SenderCarriers:
    return SenderCarriers(shm="shm" in carriers, nixl="nixl" in carriers, tcp="tcp" in carriers)


def open_session(
    sender: Sender,
    grant: Grant,
    carriers: SenderCarriers,
    open_writer: Callable[[Any], SlotWriter] | None = None,
    codec: Codec | None = None,
) -> PushSession:
    return PushSession(
        channel=sender.channel,
        lease=sender.ref(grant),
        ttl_s=grant.ttl_s,
        remaining_s=30.0,
        cache=sender.store,
        layout=sender.layout,
        chooser=FixedCodec(codec or newest_codec("raw"), "the test's"),
        owner=sender.OWNER,
        metadata=carriers.metadata(),
        open_writer=open_writer or partial(carriers.open_writer, address=HERE),
        options=PushOptions(frame_bytes=FRAME_BYTES),
    )


def push(
    sender: Sender,
    grant: Grant,
    carriers: SenderCarriers,
    open_writer: Callable[[Any], SlotWriter] | None = None,
    codec: Codec | None = None,
) -> PushStats:
    session = open_session(sender, grant, carriers, open_writer, codec)
    outcome = sender.push_all(session, TOKENS)
    assert outcome.is_committed, outcome
    return session.stats()


@pytest.fixture
def worker(directory: Path) -> Iterator[ReceivingWorker]:
    made = ReceivingWorker(directory, GQA)
    yield made
    made.close()


@pytest.fixture
def sender(worker: ReceivingWorker) -> Iterator[Sender]:
    made = Sender(worker.receiver, TOKENS)
    yield made
    made.close()


def landed(worker: ReceivingWorker, grant: Grant) -> dict[str, bytes]:
    return worker.receiver.store.read(grant.lease_id, TOKENS)


# ---- in one process


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
@pytest.mark.parametrize("layout", [GQA, MIXED], ids=["gqa", "mixed"])
def test_a_push_travels_by_its_carrier(directory: Path, layout: CacheLayout, carrier: str) -> None:
    worker = ReceivingWorker(directory, layout, carrier)
    sender = Sender(worker.receiver, TOKENS, layout)
    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, sending(carrier))
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)
    assert stats.carriers == {carrier: stats.kv_bytes}
    sender.close()
    worker.close()
    # The stream's thread may end a moment later.
    wait_until(lambda: not directory.exists() or list(directory.iterdir()) == [])


def test_without_carriers_all_of_it_is_inline(worker: ReceivingWorker, sender: Sender) -> None:
    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, sending("nothing"))
    assert stats.carriers == {"inline": stats.kv_bytes}
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)


def test_a_codec_that_changes_the_bytes_goes_through_slots_too(
    worker: ReceivingWorker, sender: Sender
) -> None:
    codec = next(codec for codec in CODECS if codec.fidelity is Fidelity.EXACT and codec.name != "raw")
    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, SenderCarriers(), codec=codec)
    assert stats.carriers == {"shm": stats.kv_bytes}
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)


class FailingWriter:
    """A writer whose carrier breaks at its `good`-th flush or buffer, after which stray writes may still arrive."""

    def __init__(self, writer: SlotWriter, good: int, fails_in: str) -> None:
        self.num_slots, self.slot_bytes = writer.num_slots, writer.slot_bytes
        self._writer = writer
        self._good = good
        self._fails_in = fails_in
        self.num_closes = 0

    def buffer(self, slot: int) -> torch.Tensor:
        self._count("buffer")
        return self._writer.buffer(slot)

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        assert deadline > time.monotonic()
        self._count("flush")
        self._writer.flush(slot, num_bytes, deadline)

    def close(self) -> None:
        self.num_closes += 1
        self._writer.close()

    def _count(self, what: str) -> None:
        if what == self._fails_in:
            self._good -= 1
            if self._good < 0:
                raise CarrierFailed("the link went down")


@pytest.mark.parametrize("fails_in", ["buffer", "flush"])
def test_a_carrier_that_fails_midway_leaves_the_rest_to_grpc_within_the_same_lease(
    worker: ReceivingWorker, sender: Sender, directory: Path, fails_in: str
) -> None:
    carriers, writers = SenderCarriers(), []

    def open_failing(offer: Any) -> FailingWriter:
        writers.append(FailingWriter(carriers.open_writer(offer, HERE), 3, fails_in))
        return writers[-1]

    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, carriers, open_failing)
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)
    assert stats.carriers["shm"] == 3 * FRAME_BYTES
    assert stats.carriers["inline"] == stats.kv_bytes - 3 * FRAME_BYTES
    assert stats.num_resent == 0
    assert [writer.num_closes > 0 for writer in writers] == [True]
    # What may still be written to is not used again.
    wait_until(lambda: list(directory.iterdir()) == [])


def test_a_carrier_that_cannot_be_opened_costs_nothing(worker: ReceivingWorker, sender: Sender) -> None:
    def refuse(offer: Any) -> SlotWriter:
        raise CarrierFailed("another container")

    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, SenderCarriers(), refuse)
    assert stats.carriers == {"inline": stats.kv_bytes}


class DirtyWriter(FailingWriter):
    """What reaches the receiver differs from what was written, once."""

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        self._writer.flush(slot, num_bytes, deadline)
        self._good -= 1
        if self._good == 0:
            self.spoiled = self._writer.buffer(slot)

    def spoil(self) -> None:
        self.spoiled[0] ^= 1


def test_a_slot_that_was_overwritten_is_noticed_and_the_frame_goes_inline(
    worker: ReceivingWorker, sender: Sender
) -> None:
    carriers = SenderCarriers()
    opened: list[DirtyWriter] = []

    def open_dirty(offer: Any) -> DirtyWriter:
        opened.append(DirtyWriter(carriers.open_writer(offer, HERE), 2, "never"))
        return opened[-1]

    read_slot = spoil_before_reading(worker, opened)
    grant = worker.receiver.grant(TOKENS)
    stats = push(sender, grant, carriers, open_dirty)
    assert read_slot == ["spoiled"]
    assert landed(worker, grant) == sender.store.read(sender.OWNER, TOKENS)
    assert stats.num_resent == 1
    assert stats.carriers["shm"] + stats.carriers["inline"] == stats.kv_bytes + FRAME_BYTES


def spoil_before_reading(worker: ReceivingWorker, opened: list[DirtyWriter]) -> list[str]:
    """Flips a bit between the sender's checksum and the receiver's look, in the one slot."""
    done: list[str] = []
    lander, land = worker.receiver.lander, worker.receiver.lander.land

    def spoiled_land(message: Any, read_slot: Any = None) -> Any:
        if not done and opened and hasattr(opened[0], "spoiled"):
            done.append("spoiled")
            opened[0].spoil()
        return land(message, read_slot)

    lander.land = spoiled_land  # type: ignore[method-assign]
    return done


def test_clean_pushes_share_segments_and_an_aborted_one_gives_its_own_up(
    worker: ReceivingWorker, sender: Sender, directory: Path
) -> None:
    num_pushes, names = 6, set()
    for number in range(num_pushes):
        grant = worker.receiver.grant(TOKENS, request=f"r{number}")
        push(sender, grant, SenderCarriers())
        names |= {path.name for path in directory.iterdir()}
        with worker.receiver.desk.change() as table:
            table.release(grant.lease_id)
    # Not one: a commit may be answered, and the stream cancelled, before the receiver has read its end.
    assert len(names) < num_pushes
    carriers, opened = SenderCarriers(), []

    def open_writer(offer: dict[str, Any]) -> SlotWriter:
        opened.append(directory / offer["name"])
        return carriers.open_writer(offer, HERE)

    grant = worker.receiver.grant(TOKENS, request="aborted")
    session = open_session(sender, grant, carriers, open_writer)
    session.advance(TOKENS // 4)
    wait_until(lambda: session.stats().carriers.get("shm", 0) > 0)
    (in_use,) = opened
    assert in_use.exists()
    session.abort("the client left")
    wait_until(lambda: not in_use.exists())


# ---- between two processes

_worker: list[ReceivingWorker] = []
_grants: list[Grant] = []


def start_worker(directory: Path, layout: str, carrier: str) -> Peer:
    os.environ.setdefault("UCX_TLS", "tcp,sm,self")
    while _worker:
        _worker.pop().close()
    _worker.append(ReceivingWorker(directory, LAYOUTS[layout], carrier))
    return Peer(_worker[0].receiver.address, _worker[0].receiver.epoch)


def grant_there() -> Grant:
    _grants[:] = [_worker[0].receiver.grant(TOKENS)]
    return _grants[0]


def landed_there() -> dict[str, bytes]:
    return landed(_worker[0], _grants[0])


def send_from_here(peer: Peer, layout: str, grant: Grant, carrier: str) -> tuple[PushStats, dict[str, bytes]]:
    os.environ.setdefault("UCX_TLS", "tcp,sm,self")
    sender = Sender(peer, TOKENS, LAYOUTS[layout])
    stats = push(sender, grant, sending(carrier))
    content = sender.store.read(sender.OWNER, TOKENS)
    sender.close()
    return stats, content


@pytest.mark.parametrize("layout", ["gqa", "mixed"])
@pytest.mark.parametrize("carrier", ["shm", "nixl", "tcp"])
def test_a_push_to_another_process_arrives_by_its_carrier(
    peers: tuple[PeerProcess, PeerProcess], directory: Path, layout: str, carrier: str
) -> None:
    if carrier == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("the extra `nixl` is not installed: make nixl-test")
    there, here = peers
    peer = there.call(start_worker, directory, layout, carrier)
    grant = there.call(grant_there)
    stats, content = here.call(send_from_here, peer, layout, grant, carrier)
    assert there.call(landed_there) == content
    assert stats.carriers == {carrier: stats.kv_bytes}
