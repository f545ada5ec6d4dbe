"""When a tier that can fail is used, left alone, and tried again."""

from __future__ import annotations

import pytest

from kvtransfer.tiers.health import TierHealth, TierState
from tests.tier_blocks import Clock

pytestmark = pytest.mark.unit


def make() -> tuple[TierHealth, Clock]:
    clock = Clock()
    return TierHealth(clock, slow_s=2.0, retry_s=30.0), clock


def fail_a_write(health: TierHealth, reason: str = "No space left on device") -> None:
    health.end(health.begin(write=True), write=True, failure=reason)


def test_after_a_failed_write_reading_goes_on() -> None:
    health, clock = make()
    fail_a_write(health)
    clock.now += 3
    assert (health.may_read(), health.may_write()) == (True, False)
    status = health.status()
    assert (status.state, status.reason, status.since_s) == (
        TierState.READ_ONLY,
        "No space left on device",
        3.0,
    )


def test_after_a_while_one_write_is_let_through_and_decides() -> None:
    health, clock = make()
    fail_a_write(health)
    clock.now += 30
    assert health.may_write()
    trial = health.begin(write=True)
    assert not health.may_write()
    health.end(trial, write=True, failure="Input/output error")
    assert not health.may_write()
    assert health.status().since_s == 30.0  # in trouble all the time
    clock.now += 30
    health.end(health.begin(write=True), write=True)
    assert health.may_write()
    assert health.status().state is TierState.SERVING


def test_a_slow_operation_stops_both_until_one_is_fast_again() -> None:
    health, clock = make()
    slow = health.begin(write=False)
    clock.now += 2.5
    health.end(slow, write=False)
    assert (health.may_read(), health.may_write()) == (False, False)
    assert health.status().state is TierState.DEGRADED
    assert "2.5 s" in health.status().reason
    clock.now += 30
    assert health.may_read()
    health.end(health.begin(write=False), write=False)
    assert health.status().state is TierState.SERVING


def test_an_operation_that_hangs_counts_before_it_ends() -> None:
    health, clock = make()
    health.begin(write=True)
    clock.now += 1.9
    assert health.may_read()
    clock.now += 0.2
    assert not health.may_read()
    clock.now += 100  # and no retry is let through behind it
    assert not health.may_read()
    assert health.status().state is TierState.DEGRADED


def test_a_failed_read_says_nothing_of_the_tier() -> None:
    health, _ = make()
    health.end(health.begin(write=False), write=False, failure="Input/output error")
    assert health.status().state is TierState.SERVING
