"""However streams come and go, what was told to all of them together stays within the budget."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.credit import CreditBook

pytestmark = pytest.mark.unit

FRAME = 10


@settings(max_examples=300, deadline=None)
@given(data=st.data(), budget=st.integers(20, 400))
def test_all_that_was_told_stays_within_the_budget(data: st.DataObject, budget: int) -> None:
    book = CreditBook(budget, FRAME)
    told: dict[int, int] = {}
    for step in data.draw(st.lists(st.integers(0, 9), max_size=60)):
        if step < 3:
            stream = book.open()
            assert (stream is None) == (len(told) == book.max_streams)
            if stream is not None:
                told[stream] = FRAME  # a sender that has heard nothing yet may have one frame in flight
        elif told:
            stream = data.draw(st.sampled_from(sorted(told)))
            if step < 8:
                told[stream] = book.credit(stream)
                assert told[stream] >= FRAME
            else:
                book.close(stream)
                del told[stream]
        assert sum(told.values()) <= budget
        assert book.num_streams == len(told)


def credit_of_new(book: CreditBook) -> tuple[int, int]:
    stream = book.open()
    assert stream is not None
    return stream, book.credit(stream)


def test_a_stream_alone_gets_most_and_two_end_with_equal_shares() -> None:
    book = CreditBook(1000, FRAME)
    first, _ = credit_of_new(book)
    alone = [book.credit(first) for _ in range(20)][-1]
    assert alone > 450
    second, at_once = credit_of_new(book)
    assert at_once >= FRAME
    both = [(book.credit(first), book.credit(second)) for _ in range(20)][-1]
    assert both[0] - both[1] in range(-5, 6)
    book.close(first)
    assert [book.credit(second) for _ in range(20)][-1] == alone


def test_a_stream_that_comes_late_finds_more_than_one_frame() -> None:
    """Those before it hold what they were told, and are idle."""
    book = CreditBook(1000, FRAME)
    credits = [credit_of_new(book)[1] for _ in range(4)]
    assert all(credit > 2 * FRAME for credit in credits)


def test_a_budget_below_two_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="two must fit"):
        CreditBook(19, FRAME)
