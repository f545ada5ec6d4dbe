"""Two threads with a short queue between: nothing is lost, nothing runs far ahead, every end is noticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvtransfer.read_ahead import ReadAhead

pytestmark = pytest.mark.unit


def test_items_come_in_order_and_an_error_behind_them() -> None:
    def items() -> Iterator[int]:
        yield from range(50)
        raise OSError("the source broke")

    taken = []
    with pytest.raises(OSError, match="the source broke"):
        for item in ReadAhead(items(), 2, "test"):
            taken.append(item)
    assert taken == list(range(50))
    assert list(ReadAhead(iter(range(3)), 2, "test")) == [0, 1, 2]


def test_no_more_is_made_than_waits_and_one_in_the_hand() -> None:
    made: list[int] = []
    fourth = threading.Event()

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            if item == 3:
                fourth.set()
            yield item

    ahead = ReadAhead(items(), 2, "test")
    assert next(ahead) == 0
    assert fourth.wait(5)  # 1 and 2 wait, 3 is in the thread's hand
    assert not any(item > 3 for item in made)
    assert next(ahead) == 1
    ahead.close()


def test_closing_ends_a_taker_that_waits() -> None:
    never = threading.Event()

    def nothing() -> Iterator[int]:
        never.wait(10)
        yield 1

    ahead = ReadAhead(nothing(), 1, "test")
    taken: list[list[int]] = []
    taker = threading.Thread(target=lambda: taken.append(list(ahead)))
    taker.start()
    ahead.close()
    taker.join(5)
    assert taken == [[]]
    never.set()
