"""What comes after what when an accelerator's cache is copied beside its steps: streams that keep books, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.cache import PagedCache
from engine.copy_lane import CopyLane
from engine.models.layouts import gqa_layout
from kvtransfer.layouts import Piece

pytestmark = pytest.mark.integration

STEPS, COPIES = "steps", "copies"
LAYOUT = gqa_layout(2, 1, 8, "float32", 4)
PIECE = Piece("k", range(2), range(1), range(1, 7))


class BookEvent:
    def __init__(self, books: Books) -> None:
        self._books = books
        self.point: tuple[str, int] | None = None

    def record(self) -> None:
        self.point = (self._books.current, len(self._books.work[self._books.current]))

    def wait(self) -> None:
        if self.point is not None:  # one that nobody has recorded holds nobody up
            self._books.add(self.point)

    def synchronize(self) -> None:
        assert self.point is not None
        self._books.finished.append(self.point)


class Books:
    """Streams of work: what is in each, in order, and which points of other streams it waits for."""

    def __init__(self) -> None:
        self.current = STEPS
        self.work: dict[str, list[str | tuple[str, int]]] = {STEPS: [], COPIES: []}
        self.finished: list[tuple[str, int]] = []

    def add(self, work: str | tuple[str, int]) -> None:
        self.work[self.current].append(work)

    def before(self, stream: str, end: int) -> set[str]:
        """Work that is done when the first `end` entries of a stream are."""
        found: set[str] = set()
        for entry in self.work[stream][:end]:
            found |= {entry} if isinstance(entry, str) else self.before(*entry)
        return found

    def before_now(self, stream: str) -> set[str]:
        return self.before(stream, len(self.work[stream]))

    def event(self) -> BookEvent:
        return BookEvent(self)

    @contextmanager
    def beside(self) -> Iterator[None]:
        outer, self.current = self.current, COPIES
        yield
        self.current = outer

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def on_device(self, staged: torch.Tensor) -> torch.Tensor:
        return staged.clone()


def doing(books: Books, name: str) -> Callable[..., torch.Tensor]:
    def work(*_: object) -> torch.Tensor:
        books.add(name)
        return torch.zeros(4, dtype=torch.uint8)

    return work


def test_a_copy_out_waits_for_what_was_written_and_not_for_what_follows() -> None:
    books = Books()
    lane = CopyLane(books)
    books.add("layers 0 to 4")
    lane.steps_wrote()
    books.add("layers 5 to 9")
    lane.to_host(doing(books, "gather"))
    assert books.before_now(COPIES) == {"layers 0 to 4", "gather"}


def test_the_caller_has_the_bytes_when_it_gets_them() -> None:
    books = Books()
    CopyLane(books).to_host(doing(books, "gather"))
    assert "gather" in books.before(*books.finished[-1])


def test_a_step_after_the_fence_waits_for_every_copy_in() -> None:
    books = Books()
    lane = CopyLane(books)
    for name in ("first", "second"):
        lane.to_card(torch.zeros(4, dtype=torch.uint8), doing(books, name))
    assert not books.before_now(STEPS)
    lane.fence()
    books.add("step")
    assert books.before_now(STEPS) == {"first", "second", "step"}


def test_a_copy_in_does_not_overtake_steps_that_may_read_the_block() -> None:
    books = Books()
    lane = CopyLane(books)
    books.add("step of the block's last owner")
    lane.steps_wrote()
    lane.to_card(torch.zeros(4, dtype=torch.uint8), doing(books, "scatter"))
    assert "step of the block's last owner" in books.before_now(COPIES)


def test_nothing_put_is_nothing_waited_for() -> None:
    books = Books()
    CopyLane(books).fence()
    assert books.work == {STEPS: [], COPIES: []}


def test_a_cache_copied_through_a_lane_gives_and_takes_what_one_in_host_memory_does() -> None:
    def cache(lane: CopyLane | None) -> PagedCache:
        return PagedCache(LAYOUT, 4, torch.device("cpu"), lambda owner: [2, 0], lane)

    books = Books()
    plain, laned, target = cache(None), cache(CopyLane(books)), cache(CopyLane(books))
    numbers = torch.randn(plain.planes["k"].shape, generator=torch.Generator().manual_seed(1))
    for each in (plain, laned):
        each.planes["k"].copy_(numbers)
    wire = LAYOUT.plane("k")
    bits = laned.gather(b"x", PIECE, wire)
    assert torch.equal(bits, plain.gather(b"x", PIECE, wire))
    into = torch.empty_like(bits)
    assert torch.equal(laned.gather(b"x", PIECE, wire, into), into)
    target.scatter(b"x", PIECE, wire, bits)
    target.fence()
    assert torch.equal(target.gather(b"x", PIECE, wire), bits)
