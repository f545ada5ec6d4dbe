"""Leases under fire: several workers, a router and a bad network, in every interleaving that hypothesis finds.

What must hold is checked by the simulated workers themselves, after every event and once everything has come to
rest (tests/lease_world). The long version runs longer and more stories: `make leases-long`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.lease_world.world import World

NUM_STORIES = 120
NUM_STORIES_LONG = 30_000
STORY_BYTES = 300
TOLD_EVENTS = 60

unhurried = settings(deadline=None, report_multiple_bugs=False, suppress_health_check=[HealthCheck.too_slow])


def live_through(decisions: bytes) -> World:
    world = World(decisions)
    try:
        world.run()
    except BaseException:
        note("\n".join(world.story[-TOLD_EVENTS:]))
        raise
    return world


@pytest.mark.unit
@pytest.mark.timeout(900)  # making a failing story short takes minutes
@settings(unhurried, max_examples=NUM_STORIES)
@given(st.binary(min_size=STORY_BYTES, max_size=STORY_BYTES))
def test_whatever_happens_leases_and_memory_stay_right(decisions: bytes) -> None:
    live_through(decisions)


@pytest.mark.unit
@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(unhurried, max_examples=NUM_STORIES_LONG)
@given(st.binary(min_size=2 * STORY_BYTES, max_size=2 * STORY_BYTES))
def test_whatever_happens_for_long_leases_and_memory_stay_right(decisions: bytes) -> None:
    live_through(decisions)


@pytest.mark.unit
def test_without_trouble_a_request_is_answered_in_one_attempt() -> None:
    """The simulation itself works: a world in which nothing goes wrong hands prompts over and fetches prefixes."""
    world = World(bytes(3))
    world.submit_to("worker 0", prefill="worker 1")
    world.settle()
    assert world.router.num_finished == 1
    assert world.router.attempts == [1]
    world.fetch_from("worker 0", asker="worker 2")
    world.settle()
    assert world.workers["worker 2"].memory.pool.stats().cached == 2
    world.run()
