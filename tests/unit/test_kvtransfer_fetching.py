"""The books of a fetch: when it is too late, what may be committed, what is in flight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.fetch_messages import Served
from kvtransfer.fetching import (
    MAX_DAMAGED,
    MAX_FETCH_S,
    FetchBook,
    FetchCause,
    Fetched,
    FetchFailed,
    ServingBook,
    paged_part,
)
from kvtransfer.frames import Ack, AckFault, FrameRecord, LeaseRef
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane, Window, pieces_for
from kvtransfer.lease_types import LeaseState, Outcome, Ready, Refusal, Refused, Waiting
from kvtransfer.ledger import FrameRefused
from kvtransfer.sources import FetchRequest

pytestmark = pytest.mark.unit

LAYOUT = CacheLayout(
    (
        Plane("k", 4, Paged(1), 2, (Field("k", 8, "bfloat16"),)),
        Plane("latent", 2, Paged(4), 1, (Field("x", 8, "uint8"),)),
        Plane("window", 2, Window(8, 1), 1, (Field("w", 4, "float32"),)),
    ),
    block_tokens=16,
)
LEASE = LeaseRef(b"the asker's own!", 1, 2, 3)
REQUEST = FetchRequest(
    lease=LEASE,
    keys=tuple(bytes([i]) * 16 for i in range(4)),
    first_block=2,
    block_tokens=32,
    layout=LAYOUT.identity(),
    dtypes=tuple(plane.dtypes for plane in LAYOUT.planes),
    fidelity=1,
    codecs=(("raw", 1),),
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_book(clock: Clock, remaining_s: float = 10.0, stall_s: float = 2.0) -> FetchBook:
    return FetchBook(REQUEST, LAYOUT, remaining_s=remaining_s, stall_s=stall_s, clock=clock)


def pieces(num_blocks: int) -> tuple[Piece, ...]:
    return tuple(pieces_for(LAYOUT, range(64, 64 + 32 * num_blocks), 500))


def cause_of(book: FetchBook, served: Served, verdict: Ready | Waiting | Outcome | Refused) -> str:
    with pytest.raises(FetchFailed) as caught:
        book.judge(served, verdict)
    return caught.value.cause


# ---- the asker's


def test_what_landed_whole_may_be_committed(clock: Clock) -> None:
    book = make_book(clock)
    for num_blocks in (1, 4):
        ready = Ready(LEASE.lease_id, 64, pieces(num_blocks), fidelity=1)
        assert book.judge(Served(num_blocks, {}), ready) == Fetched(LEASE.lease_id, num_blocks, 1)
    clock.now += 3
    book.begin_message(500)
    outcome = book.outcome(Fetched(LEASE.lease_id, 4, 1), kv_bytes=400)
    assert (outcome.num_blocks, outcome.kv_bytes, outcome.wire_bytes, outcome.fetch_s) == (4, 400, 500, 3.0)
    assert outcome.is_committed


def test_nothing_less_and_nothing_else_may_be_committed(clock: Clock) -> None:
    book = make_book(clock)
    whole = pieces(2)
    for landed, num_blocks in (
        (whole[1:], 2),  # a gap
        ((*whole, whole[0]), 2),  # twice
        (whole, 1),  # more than was served
        (whole, 3),  # less
        (pieces(4), 5),  # more than was asked for
        ((*whole, Piece("window", range(2), range(1), range(8))), 2),
        ((), 1),
    ):
        ready = Ready(LEASE.lease_id, 64, tuple(landed))
        assert cause_of(book, Served(num_blocks, {}), ready) == FetchCause.INCOMPLETE
    misplaced = Ready(LEASE.lease_id, 32, whole)
    assert cause_of(book, Served(2, {}), misplaced) == FetchCause.INCOMPLETE


def test_the_lease_tables_verdict_comes_first(clock: Clock) -> None:
    book, served = make_book(clock), Served(1, {})
    assert cause_of(book, served, Waiting(LeaseState.FILLING, (3,), 1.0)) == FetchCause.INCOMPLETE
    assert cause_of(book, served, Outcome(LeaseState.EXPIRED, "TTL")) == FetchCause.LEASE_LOST
    refused = Refused(Refusal.MANIFEST_MISMATCH, "no", LeaseState.FILLING)
    assert cause_of(book, served, refused) == Refusal.MANIFEST_MISMATCH
    outcome = book.outcome(FetchFailed("X", "why"))
    assert (outcome.num_blocks, outcome.cause, outcome.is_committed) == (0, "X", False)


def test_a_silent_source_is_given_up_but_not_for_what_landing_takes(clock: Clock) -> None:
    book = make_book(clock)
    clock.now += 1.9
    book.check_time()
    assert not book.has_heard
    book.begin_message(10)
    assert book.has_heard
    clock.now += 5  # landing is paced, say
    book.check_time()
    assert book.wake_at == book.deadline == 110.0
    book.end_message()
    assert book.wake_at == pytest.approx(clock.now + 2)
    clock.now += 2
    with pytest.raises(FetchFailed) as caught:
        book.check_time()
    assert caught.value.cause == FetchCause.SOURCE_STALLED


def test_the_deadline_holds_while_a_frame_is_landing_too(clock: Clock) -> None:
    book = make_book(clock)
    book.begin_message(10)
    clock.now += 10
    with pytest.raises(FetchFailed) as caught:
        book.check_time()
    assert caught.value.cause == FetchCause.DEADLINE_EXCEEDED
    assert make_book(clock, remaining_s=1e9).deadline == clock.now + MAX_FETCH_S


def test_some_frames_may_come_damaged_but_none_may_be_refused_for_good(clock: Clock) -> None:
    book = make_book(clock)
    damaged = Ack(None, ok=False, cause=AckFault.DAMAGED_FRAME, message="x")
    for _ in range(MAX_DAMAGED):
        book.take(damaged)
        book.take(Ack(0, ok=True))
    with pytest.raises(FetchFailed) as caught:
        book.take(damaged)
    assert caught.value.cause == AckFault.DAMAGED_FRAME
    with pytest.raises(FetchFailed) as caught:
        make_book(clock).take(Ack(3, ok=False, cause="LEASE_CLOSED"))
    assert caught.value.cause == "LEASE_CLOSED"


def test_only_planes_with_blocks_travel() -> None:
    assert [plane.name for plane in paged_part(LAYOUT).planes] == ["k", "latent"]


# ---- the answerer's


def ack(number: int | None, *, credit: int = 100, cause: str = "") -> Ack:
    return Ack(number, ok=not cause, cause=cause, landing_s=0.5, credit=credit)


def test_in_flight_is_bounded_by_window_and_credit_but_one_frame_always_goes(clock: Clock) -> None:
    book = ServingBook(window_bytes=100, credit=50, max_resends=2, clock=clock)
    assert book.may_go_on(500)
    book.note_sent(FrameRecord(1, 1), 40)
    assert book.may_go_on(10)
    assert not book.may_go_on(11)
    book.note_sent(FrameRecord(2, 2), 10)
    book.acknowledge(ack(0, credit=1000))
    assert book.may_go_on(90)
    assert not book.may_go_on(91)  # its own window
    book.acknowledge(ack(1, credit=0))
    assert book.may_go_on(500)
    assert book.may_go_on(None)
    assert book.manifest() == {0: FrameRecord(1, 1), 1: FrameRecord(2, 2)}


def test_a_damaged_frame_goes_again_before_any_other_and_not_for_ever(clock: Clock) -> None:
    book = ServingBook(window_bytes=100, credit=100, max_resends=2, clock=clock)
    for number in range(3):
        book.note_sent(FrameRecord(number, number), 30)
    book.acknowledge(ack(None, cause="DAMAGED_FRAME"))
    assert not book.may_go_on(1)
    assert book.next_resend() == 0
    assert book.next_resend() is None
    book.acknowledge(ack(1))
    book.acknowledge(ack(2))
    assert not book.may_go_on(None)
    book.acknowledge(ack(0, cause="FRAME_LANDING"))
    assert book.next_resend() == 0
    with pytest.raises(FrameRefused) as caught:
        book.acknowledge(ack(0, cause="DAMAGED_FRAME"))
    assert caught.value.cause == "DAMAGED_FRAME"


def test_a_frame_to_send_again_waits_for_room_too(clock: Clock) -> None:
    book = ServingBook(window_bytes=100, credit=100, max_resends=2, clock=clock)
    book.note_sent(FrameRecord(0, 0), 60)
    book.note_sent(FrameRecord(1, 1), 40)
    book.acknowledge(ack(0, cause="DAMAGED_FRAME", credit=50))
    assert book.next_resend() is None
    book.acknowledge(ack(1, credit=50))
    assert book.next_resend() == 0


def test_acknowledgements_out_of_order_or_final_end_it(clock: Clock) -> None:
    for word in (ack(1), ack(5), ack(0, cause="FIDELITY_EXCEEDED")):
        book = ServingBook(window_bytes=100, credit=100, max_resends=2, clock=clock)
        book.note_sent(FrameRecord(0, 0), 10)
        book.note_sent(FrameRecord(1, 1), 10)
        with pytest.raises(FrameRefused):
            book.acknowledge(word)
    with pytest.raises(FrameRefused):
        ServingBook(100, 100, 2, clock).acknowledge(ack(None, cause="DAMAGED_FRAME"))


def test_times_are_told_as_a_chooser_wants_them(clock: Clock) -> None:
    book = ServingBook(window_bytes=100, credit=100, max_resends=2, clock=clock)
    book.note_sent(FrameRecord(0, 0), 10)
    clock.now += 1
    book.note_sent(FrameRecord(1, 1), 10)
    assert book.silent_since == 100.0
    clock.now += 2
    landed = book.acknowledge(ack(0))
    assert landed is not None
    assert (landed.number, landed.in_flight_s, landed.landing_s) == (0, 3.0, 0.5)
    clock.now += 0.25
    landed = book.acknowledge(ack(1))
    assert landed is not None
    assert landed.in_flight_s == 0.25  # since the one before it was acknowledged
    clock.now += 9
    assert book.silent_since == clock.now  # nothing is due
    book.note_sent(FrameRecord(2, 2), 10)
    assert book.silent_since == clock.now


@given(st.data())
def test_whatever_is_acknowledged_the_window_holds_and_all_frames_land(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    window, credit = data.draw(st.integers(1, 150)), data.draw(st.integers(0, 150))
    book = ServingBook(window, credit, max_resends=99, clock=Clock())
    in_flight: list[int] = []
    landed: list[int] = []
    num_sent = num_damaged = 0
    while len(landed) < len(sizes):
        again = book.next_resend()
        if again is not None:
            in_flight.append(again)
        elif num_sent < len(sizes) and book.may_go_on(sizes[num_sent]):
            book.note_sent(FrameRecord(num_sent, num_sent), sizes[num_sent])
            in_flight.append(num_sent)
            num_sent += 1
        else:
            credit = data.draw(st.integers(0, 150))
            is_damaged = num_damaged < 20 and data.draw(st.booleans())
            num_damaged += is_damaged
            number = in_flight.pop(0)
            book.acknowledge(ack(number, credit=credit, cause="DAMAGED_FRAME" if is_damaged else ""))
            landed += [] if is_damaged else [number]
            continue
        flying = sum(sizes[number] for number in in_flight)
        assert flying == book.in_flight_bytes
        assert flying <= min(window, credit) or len(in_flight) == 1
    assert book.may_go_on(None)
    assert sorted(landed) == list(range(len(sizes)))
