"""The sender's books: what goes next, within the window, and what goes again."""

import pytest

from kvtransfer.frames import Ack, FrameRecord
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane, pieces_for
from kvtransfer.ledger import FrameLedger, FrameRefused

pytestmark = pytest.mark.unit

LAYOUT = CacheLayout((Plane("k", 1, Paged(1), 1, (Field("k", 25, "float32"),)),), 16)


class Books:
    """A ledger of 100-byte frames, and a clock."""

    def __init__(self, num_frames: int, window_bytes: int = 250, max_resends: int = 2) -> None:
        self.now = 0.0
        self.ledger = FrameLedger(LAYOUT, window_bytes, max_resends, lambda: self.now)
        self.ledger.add(pieces_for(LAYOUT, range(num_frames), 100))

    def send(self) -> int | None:
        number = self.ledger.take()
        if number is not None:
            self.ledger.note_sent(number, checksum=number + 1000, wire_bytes=110)
        return number

    def send_all(self) -> list[int]:
        return list(iter(self.send, None))

    def acknowledge(self, number: int | None, cause: str = "") -> None:
        self.ledger.acknowledge(Ack(number, ok=not cause, cause=cause))


def test_frames_go_in_order_within_the_window() -> None:
    books = Books(5)
    assert books.send_all() == [0, 1]
    assert books.ledger.in_flight_bytes == 200
    books.acknowledge(0)
    assert books.send_all() == [2]
    books.acknowledge(1)
    books.acknowledge(2)
    assert books.send_all() == [3, 4]
    assert not books.ledger.is_settled
    books.acknowledge(3)
    books.acknowledge(4)
    assert books.ledger.is_settled
    assert books.ledger.manifest() == {n: FrameRecord(100, n + 1000) for n in range(5)}


def test_a_frame_larger_than_the_window_goes_alone() -> None:
    books = Books(2, window_bytes=10)
    assert books.send_all() == [0]
    books.acknowledge(0)
    assert books.send_all() == [1]


def test_a_damaged_frame_goes_again_before_new_ones() -> None:
    books = Books(4)
    assert books.send_all() == [0, 1]
    books.acknowledge(None, "DAMAGED_FRAME")
    assert books.send_all() == [0]
    books.acknowledge(1)
    assert books.send_all() == [2]
    assert books.ledger.totals().num_resent == 1


def test_a_broken_stream_sends_what_was_not_acknowledged_again_in_order() -> None:
    books = Books(5, window_bytes=400)
    assert books.send_all() == [0, 1, 2, 3]
    books.acknowledge(0)
    books.ledger.lose_in_flight()
    assert books.ledger.in_flight_bytes == 0
    assert books.send_all() == [1, 2, 3, 4]


def test_missing_frames_go_again() -> None:
    books = Books(1)
    books.send_all()
    books.acknowledge(0)
    books.ledger.send_missing([0])
    assert not books.ledger.is_settled
    assert books.send_all() == [0]
    with pytest.raises(FrameRefused, match="never sent"):
        books.ledger.send_missing([7])


def test_a_frame_refused_too_often_or_for_good_ends_the_transfer() -> None:
    books = Books(2, max_resends=2)
    for _ in range(2):
        books.send()
        books.acknowledge(0, "DAMAGED_FRAME")
    books.send()
    with pytest.raises(FrameRefused, match="refused 3 times"):
        books.acknowledge(0, "DAMAGED_FRAME")
    books.send()
    with pytest.raises(FrameRefused) as refused:
        books.acknowledge(1, "STALE_EPOCH")
    assert refused.value.cause == "STALE_EPOCH"


@pytest.mark.parametrize("number", [1, 9])
def test_an_acknowledgement_out_of_order_is_a_protocol_error(number: int) -> None:
    books = Books(2)
    books.send_all()
    with pytest.raises(FrameRefused, match="PROTOCOL_ERROR"):
        books.acknowledge(number)


def test_an_acknowledgement_of_nothing_is_a_protocol_error() -> None:
    with pytest.raises(FrameRefused, match="PROTOCOL_ERROR"):
        Books(1).acknowledge(0)


def test_overlapping_frames_count_their_time_once() -> None:
    books = Books(3)
    books.send_all()  # 0 and 1 at 0 s
    books.now = 2.0
    books.acknowledge(0)
    books.now = 3.0
    books.acknowledge(1)
    books.now = 10.0  # nothing in flight from 3 s to 10 s
    books.send_all()
    books.now = 14.0
    books.acknowledge(2)
    totals = books.ledger.totals()
    assert totals.frame_s == 7.0
    assert totals.transfer_s == 14.0
    assert (totals.num_frames, totals.kv_bytes, totals.wire_bytes) == (3, 300, 330)
