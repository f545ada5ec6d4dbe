"""Whether and when a call is sent again."""

import math

import pytest

from headrace import (
    Cancelled,
    DeadlineExceeded,
    HeadraceError,
    InvalidRequest,
    ResourceExhausted,
    RetryPolicy,
    Unavailable,
)
from headrace._retry import Attempts

pytestmark = pytest.mark.unit

LOST = Unavailable("gone", retryable=True)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(
    policy: RetryPolicy, timeout_s: float | None = None, drawn: float = 1.0
) -> tuple[Attempts, FakeClock]:
    clock = FakeClock()
    return Attempts(policy, timeout_s, clock=clock, draw=lambda: drawn), clock


def test_the_wait_doubles_up_to_its_cap() -> None:
    retries, _ = attempts(RetryPolicy(max_attempts=6, base_delay_s=1, max_delay_s=5))
    assert [retries.delay_s(LOST) for _ in range(6)] == [1, 2, 4, 5, 5, None]


def test_jitter_takes_at_most_half_of_the_wait() -> None:
    retries, _ = attempts(RetryPolicy(max_attempts=4, base_delay_s=1, max_delay_s=5), drawn=0.0)
    assert [retries.delay_s(LOST) for _ in range(3)] == [0.5, 1, 2]


def test_progress_starts_the_count_anew() -> None:
    retries, _ = attempts(RetryPolicy(max_attempts=3, base_delay_s=1, max_delay_s=5))
    assert [retries.delay_s(LOST), retries.delay_s(LOST)] == [1, 2]
    retries.progressed()
    assert [retries.delay_s(LOST), retries.delay_s(LOST), retries.delay_s(LOST)] == [1, 2, None]


def test_one_attempt_means_no_repeat() -> None:
    retries, _ = attempts(RetryPolicy(max_attempts=1))
    assert retries.delay_s(LOST) is None


@pytest.mark.parametrize(
    "error",
    [
        HeadraceError("no"),
        Unavailable("a worker is gone for good", retryable=False),
        Cancelled("cancelled", retryable=True),
        DeadlineExceeded("too late", retryable=True),
    ],
)
def test_what_a_repeat_cannot_help_is_not_repeated(error: HeadraceError) -> None:
    retries, _ = attempts(RetryPolicy())
    assert retries.delay_s(error) is None


def test_the_wait_that_the_cluster_asks_for_comes_on_top() -> None:
    retries, _ = attempts(RetryPolicy(base_delay_s=1, max_delay_s=5))
    assert retries.delay_s(HeadraceError("full", retryable=True, retry_after_s=4)) == 5


def test_a_tenant_that_used_up_its_limit_comes_back_when_told() -> None:
    retries, _ = attempts(RetryPolicy(base_delay_s=1, max_delay_s=5), timeout_s=10, drawn=0.0)
    limited = ResourceExhausted("too many", cause="TENANT_RATE", retryable=True, retry_after_s=3.25)
    assert retries.delay_s(limited) == 3.75


def test_a_wait_longer_than_the_policy_allows_is_the_callers_to_decide() -> None:
    retries, _ = attempts(RetryPolicy(base_delay_s=1, max_delay_s=5))
    assert retries.delay_s(HeadraceError("full", retryable=True, retry_after_s=6)) is None


def test_nothing_is_repeated_past_the_deadline() -> None:
    retries, clock = attempts(RetryPolicy(base_delay_s=1, max_delay_s=5), timeout_s=10)
    assert retries.delay_s(LOST) == 1
    clock.now_s += 8
    assert retries.remaining_s() == 2
    assert retries.delay_s(LOST) is None
    clock.now_s += 50
    assert retries.remaining_s() == 0


def test_without_a_timeout_there_is_no_deadline() -> None:
    retries, clock = attempts(RetryPolicy())
    clock.now_s += 1e9
    assert retries.remaining_s() is None
    assert retries.delay_s(LOST) is not None


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf])
def test_a_timeout_must_be_a_positive_number_of_seconds(timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s must be a positive number of seconds"):
        Attempts(RetryPolicy(), timeout_s)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0},
        {"base_delay_s": -1.0},
        {"base_delay_s": 2.0, "max_delay_s": 1.0},
        {"max_delay_s": math.inf},
        {"base_delay_s": math.nan},
        {"factor": 0.5},
        {"factor": math.nan},
    ],
)
def test_a_policy_out_of_range_is_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        RetryPolicy(**arguments)


def test_many_failures_do_not_overflow_the_wait() -> None:
    policy = RetryPolicy(base_delay_s=1, max_delay_s=5, factor=1e300)
    assert policy.backoff_s(1000, 1.0) == 5
