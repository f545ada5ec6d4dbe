"""What a process has loaded is left out of the garbage collector's rounds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from cluster import garbage

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class Ring:
    """Refers to itself, so that only the collector ends it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_looked_at_no_more_and_what_comes_later_is() -> None:
    garbage.settle()
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 1000
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None


def test_rubbish_of_the_start_is_cleared_away_first() -> None:
    gc.disable()
    earlier = weakref.ref(Ring())
    gc.enable()
    garbage.settle()
    assert earlier() is None


def test_rounds_over_the_newest_objects_are_rare() -> None:
    _, *older = gc.get_threshold()
    garbage.settle()
    assert gc.get_threshold() == (garbage.NEW_OBJECTS, *older)
