"""Payloads beside the stream: landing slots that are used, that fail, that are misused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch

from kvtransfer.frames import SlotRef, decode_ack, decode_frame, encode_frame
from kvtransfer.layouts import Piece, pieces_for
from kvtransfer.transports.carriers import CarrierFailed
from kvtransfer.transports.grpc_push import PushOptions, PushSession
from tests.integration.kvtransfer_harness import GQA, Receiver, Sender, raw_push

pytestmark = pytest.mark.integration

SLOT_BYTES = 4096 + 256


class MemorySlots:
    """Slots that both ends find in this process."""

    def __init__(self, name: str, num_slots: int = 3) -> None:
        self.name = name
        self.num_slots = num_slots
        self.slot_bytes = SLOT_BYTES
        self.memory = [bytearray(SLOT_BYTES) for _ in range(num_slots)]
        self.num_reads = 0
        self.unreadable: set[int] = set()  # ordinals of reads that fail
        self.closed: list[bool] = []

    def offer(self) -> dict[str, Any]:
        return {"kind": "memory", "name": self.name}

    def read(self, slot: int, num_bytes: int) -> memoryview:
        self.num_reads += 1
        if self.num_reads in self.unreadable:
            raise CarrierFailed("the segment is gone")
        return memoryview(self.memory[slot])[:num_bytes]

    def close(self, *, clean: bool) -> None:
        self.closed.append(clean)


class MemoryWriter:
    """Breaks at its `breaks_at`-th flush."""

    def __init__(self, slots: MemorySlots, breaks_at: int | None) -> None:
        self.num_slots = slots.num_slots
        self.slot_bytes = slots.slot_bytes
        self.num_flushes = 0
        self.num_closes = 0
        self._slots = slots
        self._breaks_at = breaks_at

    def buffer(self, slot: int) -> torch.Tensor:
        return torch.frombuffer(self._slots.memory[slot], dtype=torch.uint8)

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        self.num_flushes += 1
        if self.num_flushes == self._breaks_at:
            raise CarrierFailed("the link is down")

    def close(self) -> None:
        self.num_closes += 1


class Carrier:
    """Both ends of all streams. `kinds`: how many offers each stream gets; those in `refused` do not open."""

    def __init__(self, *, kinds: int = 1, refused: int = 0, breaks_at: int | None = None) -> None:
        self.slots: list[MemorySlots] = []
        self.writers: list[MemoryWriter] = []
        self._kinds = kinds
        self._refused = refused
        self._breaks_at = breaks_at
        self.prepare: Callable[[MemorySlots], None] = lambda slots: None

    def open_slots(self, metadata: object) -> Sequence[MemorySlots]:
        made = [MemorySlots(f"{len(self.slots) + i}") for i in range(self._kinds)]
        for slots in made:
            self.prepare(slots)
        self.slots += made
        return made

    def open_writer(self, offer: dict[str, Any]) -> MemoryWriter:
        number = int(offer["name"])
        if number % self._kinds < self._refused:
            raise CarrierFailed("not on this host")
        self.writers.append(MemoryWriter(self.slots[number], self._breaks_at))
        return self.writers[-1]


class Pair:
    """A receiver and a sender with a carrier between them."""

    def __init__(self, carrier: Carrier, pace: Callable[[int], None] | None = None) -> None:
        self.carrier = carrier
        self.receiver = Receiver(open_slots=carrier.open_slots, pace=pace)
        self.sender = Sender(self.receiver, 200)
        self.grant = self.receiver.grant(200)

    def session(self, options: PushOptions | None = None) -> PushSession:
        return self.sender.session(self.grant, open_writer=self.carrier.open_writer, options=options)

    def push(self) -> PushSession:
        session = self.session()
        assert self.sender.push_all(session, 200).is_committed
        wanted = self.sender.store.read(self.sender.OWNER, 200)
        assert self.receiver.store.read(self.grant.lease_id, 200) == wanted
        return session

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def pair_with() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(carrier: Carrier, **options: Any) -> Pair:
        pairs.append(Pair(carrier, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def test_payloads_travel_in_slots_and_land_the_same(pair_with: Callable[..., Pair]) -> None:
    carrier = Carrier()
    stats = pair_with(carrier).push().stats()
    (slots,), (writer,) = carrier.slots, carrier.writers
    # What was sent before the opening came went in messages.
    assert stats.num_frames / 2 < slots.num_reads == writer.num_flushes <= stats.num_frames
    assert stats.kv_bytes < stats.wire_bytes < 1.2 * stats.kv_bytes
    assert slots.closed == [True]
    assert writer.num_closes == 1


def test_the_first_offer_that_opens_is_used(pair_with: Callable[..., Pair]) -> None:
    carrier = Carrier(kinds=3, refused=1)
    pair_with(carrier).push()
    assert [slots.num_reads > 0 for slots in carrier.slots] == [False, True, False]
    assert [slots.closed for slots in carrier.slots] == [[True]] * 3


def test_without_an_offer_that_opens_the_stream_carries_everything(pair_with: Callable[..., Pair]) -> None:
    carrier = Carrier(kinds=2, refused=2)
    pair_with(carrier).push()
    assert [slots.num_reads for slots in carrier.slots] == [0, 0]


@pytest.mark.parametrize("breaks_at", [1, 2, 7])
def test_a_carrier_that_breaks_mid_way_goes_on_inline_in_the_same_lease(
    pair_with: Callable[..., Pair], breaks_at: int
) -> None:
    carrier = Carrier(breaks_at=breaks_at)
    stats = pair_with(carrier).push().stats()
    assert carrier.writers[0].num_flushes == breaks_at
    assert carrier.slots[0].num_reads == breaks_at - 1
    assert len(carrier.slots) == 1  # one stream
    assert stats.num_resent == 0


def test_a_slot_that_the_receiver_cannot_read_is_sent_again_inline(pair_with: Callable[..., Pair]) -> None:
    carrier = Carrier()
    carrier.prepare = lambda slots: slots.unreadable.update({1, 4})
    stats = pair_with(carrier).push().stats()
    assert stats.num_resent == 2


def test_receivers_without_slots_and_senders_without_a_carrier_get_on(pair_with: Callable[..., Pair]) -> None:
    def broken(metadata: object) -> Sequence[MemorySlots]:
        raise OSError("no shared memory here")

    carrier = Carrier()
    carrier.open_slots = broken  # type: ignore[method-assign]
    pair_with(carrier).push()
    offering = pair_with(Carrier())
    assert offering.sender.push_all(offering.sender.session(offering.grant), 200).is_committed
    assert offering.carrier.slots[0].num_reads == 0


def test_a_slot_is_not_filled_again_before_its_frame_is_acknowledged(pair_with: Callable[..., Pair]) -> None:
    """Landing stands still for a while: the sender stops when all slots are taken."""
    gate, landings = threading.Event(), count()

    def pace(num_bytes: int) -> None:
        if next(landings) >= 2:
            gate.wait(20)

    carrier = Carrier()
    pair = pair_with(carrier, pace=pace)
    session = pair.session()
    session.advance(200)
    while next(landings) < 4:  # also what this asks counts
        gate.wait(0.01)
    gate.wait(0.2)  # room to overrun
    taken = carrier.writers[0].num_flushes - max(0, carrier.slots[0].num_reads - 1) if carrier.writers else 0
    assert taken <= 4  # three slots, and one whose frame landed and is not acknowledged yet
    gate.set()
    assert session.commit(pair.sender.handoff(200), 20.0).is_committed
    wanted = pair.sender.store.read(pair.sender.OWNER, 200)
    assert pair.receiver.store.read(pair.grant.lease_id, 200) == wanted


def test_a_stream_that_ends_otherwise_says_so_to_its_slots(pair_with: Callable[..., Pair]) -> None:
    pair = pair_with(Carrier())
    session = pair.session(PushOptions(frame_bytes=4096, reconnect_s=10.0))
    session.advance(100)
    while pair.receiver.store.num_scatters < 4:
        threading.Event().wait(0.01)
    pair.receiver.restart_server()
    assert pair.sender.push_all(session, 200).is_committed
    ends = [slots.closed for slots in pair.carrier.slots]
    assert ends[0] == [False]
    assert ends[-1] == [True]
    assert all(writer.num_closes == 1 for writer in pair.carrier.writers)


# ---- misuse, by hand


def slot_frame(pair: Pair, number: int, piece: Piece, ref: SlotRef) -> bytes:
    """The message for a payload that was put into the slot, or should have been."""
    inline, _ = pair.sender.frame(pair.sender.ref(pair.grant), number, piece)
    frame = decode_frame(inline)
    return encode_frame(frame.header, frame.payload, ref)[0]


def test_slots_that_are_not_there_too_long_or_changed_are_damaged_frames(
    pair_with: Callable[..., Pair],
) -> None:
    pair = pair_with(Carrier())
    piece = pieces_for(GQA, range(64), 4096)[0]
    plane = GQA.plane(piece.plane)
    payload = pair.sender.store.gather(pair.sender.OWNER, piece, plane).numpy().tobytes()

    def prepare(slots: MemorySlots) -> None:
        slots.memory[1][: len(payload)] = payload

    pair.carrier.prepare = prepare
    good = SlotRef(0, 1, len(payload))
    refs = [
        SlotRef(0, 3, len(payload)),  # no such slot
        SlotRef(1, 1, len(payload)),  # no such offer
        SlotRef(0, 1, SLOT_BYTES + 1),  # longer than a slot
        SlotRef(0, 1, len(payload) - 1),  # shorter than what was summed
        SlotRef(0, 2, len(payload)),  # a slot with other bytes: foreign, or filled again too soon
        good,
    ]
    messages = [slot_frame(pair, number, piece, ref) for number, ref in enumerate(refs)]
    acks = [decode_ack(message) for message in raw_push(pair.sender.channel, messages)]
    assert [ack.cause for ack in acks] == ["DAMAGED_FRAME"] * 5 + [""]
    assert set(pair.receiver.lease(pair.grant).landed) == {5}


def test_a_frame_that_landed_from_a_slot_and_comes_again_inline_is_a_repeat(
    pair_with: Callable[..., Pair],
) -> None:
    """Its acknowledgement was lost with the stream; the next stream has no slots."""
    pair = pair_with(Carrier())
    piece = pieces_for(GQA, range(64), 4096)[0]
    plane = GQA.plane(piece.plane)
    payload = pair.sender.store.gather(pair.sender.OWNER, piece, plane).numpy().tobytes()

    def prepare(slots: MemorySlots) -> None:
        slots.memory[0][: len(payload)] = payload

    pair.carrier.prepare = prepare
    in_slot = slot_frame(pair, 0, piece, SlotRef(0, 0, len(payload)))
    inline, _ = pair.sender.frame(pair.sender.ref(pair.grant), 0, piece)
    for message in (in_slot, inline):
        (ack,) = raw_push(pair.sender.channel, [message])
        assert decode_ack(ack).ok
    assert pair.receiver.store.num_scatters == 1
    assert pair.receiver.table.counters.repeated == 1
