"""How often a failed attempt is made again: few lost workers a request, and no storm over all of them."""

import pytest

from router.core.retries import (
    EARNED_PER_REQUEST,
    MAX_FAILED_ATTEMPTS,
    MAX_WORKERS_LOST,
    RetryBudget,
    Setbacks,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("worker_lost", "limit"), [(True, MAX_WORKERS_LOST), (False, MAX_FAILED_ATTEMPTS)])
def test_a_request_has_so_many_setbacks_and_no_more(worker_lost: bool, limit: int) -> None:
    budget, setbacks = RetryBudget(), Setbacks()
    assert [budget.refusal(setbacks, worker_lost) for _ in range(limit)] == [None] * limit
    assert budget.refusal(setbacks, worker_lost) is not None
    assert (budget.num_granted, budget.num_refused) == (limit, 1)


def test_both_kinds_are_counted_apart() -> None:
    budget, setbacks = RetryBudget(), Setbacks()
    for _ in range(MAX_WORKERS_LOST):
        assert budget.refusal(setbacks, worker_lost=True) is None
        assert budget.refusal(setbacks, worker_lost=False) is None


def test_a_burst_passes_and_a_storm_is_held_to_what_new_requests_earn() -> None:
    budget = RetryBudget(burst=8)
    assert [budget.refusal(Setbacks(), worker_lost=True) for _ in range(8)] == [None] * 8
    assert "no recoveries left" in budget.refusal(Setbacks(), worker_lost=True)
    num_requests = 50
    granted = 0
    for _ in range(num_requests):
        budget.earn()
        granted += budget.refusal(Setbacks(), worker_lost=True) is None
    assert granted == pytest.approx(num_requests * EARNED_PER_REQUEST, abs=1)


def test_what_is_earned_does_not_pile_up_beyond_the_burst() -> None:
    budget = RetryBudget(burst=2)
    for _ in range(1000):
        budget.earn()
    refusals = [budget.refusal(Setbacks(), worker_lost=True) for _ in range(3)]
    assert refusals[:2] == [None, None] and refusals[2] is not None
