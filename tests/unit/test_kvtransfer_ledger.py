"""The sender's books: what goes next, within the window, and what goes again."""

import pytest

from kvtransfer.codecs.raw import RawCodec
from kvtransfer.frames import Ack, FrameRecord
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane, pieces_for
from kvtransfer.ledger import FrameCoding, FrameLedger, FrameRefused, LandedFrame

pytestmark = pytest.mark.unit

LAYOUT = CacheLayout((Plane("k", 1, Paged(1), 1, (Field("k", 25, "float32"),)),), 16)
CREDIT = 1 << 20


class Books:
    """A ledger of 100-byte frames, and a clock."""

    def __init__(self, num_frames: int, window_bytes: int = 250, max_resends: int = 2) -> None:
        self.now = 0.0
        self.message_bytes = 110
        self.ledger = FrameLedger(LAYOUT, window_bytes, max_resends, lambda: self.now)
        self.ledger.credit = CREDIT
        self.ledger.add(pieces_for(LAYOUT, range(num_frames), 100))

    def send(self) -> int | None:
        number = self.ledger.take()
        if number is not None:
            if self.ledger.coding(number) is None:
                self.ledger.note_coding(number, FrameCoding(RawCodec(), "only one", 0))
            self.ledger.note_built(number, number + 1000, payload_bytes=100, wire_bytes=self.message_bytes)
        return number

    def send_all(self) -> list[int]:
        return list(iter(self.send, None))

    def acknowledge(self, number: int | None, cause: str = "", credit: int = CREDIT) -> LandedFrame | None:
        return self.ledger.acknowledge(Ack(number, ok=not cause, cause=cause, credit=credit))


def test_frames_go_in_order_within_the_window() -> None:
    books = Books(5)
    assert books.send_all() == [0, 1]
    assert books.ledger.in_flight_bytes == 220
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


def test_the_receivers_credit_bounds_the_window_too() -> None:
    books = Books(6, window_bytes=1000)
    books.ledger.credit = 0
    assert books.send_all() == [0]
    books.ledger.credit = 330
    assert books.send_all() == [1, 2]
    books.acknowledge(0, credit=150)
    assert books.send_all() == []
    books.acknowledge(1)
    assert books.send_all() == [3, 4, 5]


def test_a_frame_counts_with_what_its_message_has_once_it_is_built() -> None:
    books = Books(6, window_bytes=250)
    books.message_bytes = 40
    assert books.send_all() == [0, 1, 2, 3]  # 160 in flight, one more might be 100
    assert books.ledger.bytes_left == 200


def test_a_frame_sent_again_is_made_with_the_codec_of_the_first_time() -> None:
    books = Books(1)
    books.send()
    coding = books.ledger.coding(0)
    books.acknowledge(0, "DAMAGED_FRAME")
    assert books.ledger.take() == 0
    assert books.ledger.coding(0) is coding


def test_the_time_in_flight_begins_when_the_frame_is_handed_over_or_the_one_before_has_landed() -> None:
    books = Books(2)
    books.send_all()
    books.now = 1.0
    books.ledger.note_handed(0)
    books.ledger.note_handed(1)
    books.now = 1.5
    first = books.acknowledge(0)
    books.now = 1.75
    second = books.acknowledge(1)
    assert first == LandedFrame("raw", 100, 100, 0.5)
    assert second == LandedFrame("raw", 100, 100, 0.25)


def test_an_acknowledgement_of_a_frame_that_was_not_made_yet_is_a_protocol_error() -> None:
    books = Books(1)
    assert books.ledger.take() == 0
    with pytest.raises(FrameRefused, match="not sent yet"):
        books.acknowledge(0)


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
    books = Books(5, window_bytes=450)
    assert books.send_all() == [0, 1, 2, 3]
    books.acknowledge(0)
    books.ledger.lose_in_flight()
    assert books.ledger.in_flight_bytes == 0
    assert books.send_all() == [1]  # the new stream has not told its credit yet
    books.ledger.credit = CREDIT
    assert books.send_all() == [2, 3, 4]


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
    assert (totals.codecs, totals.reason) == ({"raw": 300}, "only one")
