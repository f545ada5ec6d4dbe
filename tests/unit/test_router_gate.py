"""What comes in, and what is refused at arrival: with which word, and without locking anybody out."""

from __future__ import annotations

import pytest

from router.core.failures import Code
from router.core.fleet import Demand, Role, WorkerState
from router.core.placement import Placement
from router.core.queue import TokenQueue
from router.core.shedding import Shedder
from router.core.tenants import Tenant, TenantLimits
from router.gate import Gate
from router.requests import Request, RequestKey
from tests.unit.test_router_placer import Fleet

pytestmark = pytest.mark.unit


class BusyOnce(TokenQueue[RequestKey]):
    """A queue that has drained 10,000 tokens a second, when there was something to drain."""

    service_rate = 10_000.0


class Door:
    """A gate before a fleet with one prefill and one decode worker, at time 0."""

    def __init__(self, slo_ttft_s: float | None = None, **tenants: Tenant) -> None:
        self.fleet = Fleet()
        self.queue: TokenQueue[RequestKey] = BusyOnce(1000)
        self.limits = TenantLimits(tenants)
        self.shedder = Shedder(slo_ttft_s)
        self.gate = Gate(self.queue, self.limits, self.shedder, self.fleet.placer, lambda: 0.0)
        self.num_requests = 0

    def staff(self) -> None:
        for worker_id, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
            self.fleet.placement.report(
                self.fleet.join(worker_id, role),
                state=WorkerState.SERVING,
                free_blocks=64,
                num_sequences=0,
                step_s=0.01,
                prefill_s_per_token=0.001,
            )

    def request(self) -> Request:
        self.num_requests += 1
        return self.fleet.request(f"r{self.num_requests}")


def test_nobody_there_is_unavailable_and_the_tenant_is_not_charged() -> None:
    door = Door()
    failure = door.gate.admit(door.request())
    assert (failure.code, failure.cause) == (Code.UNAVAILABLE, "NO_WORKERS")
    assert door.limits.num_running("t") == 0 and len(door.queue) == 0


def test_what_fits_nobody_is_an_invalid_argument() -> None:
    door = Door()
    door.staff()
    request = door.request()
    request.demand = Demand(num_prompt_tokens=5000, max_total_tokens=5001)
    failure = door.gate.admit(request)
    assert (failure.code, failure.cause) == (Code.INVALID_ARGUMENT, "TOO_LARGE")


def test_a_tenants_limit_is_resource_exhausted_and_is_given_back_at_the_end() -> None:
    door = Door(t=Tenant(name="t", max_concurrent=1))
    door.staff()
    first, second = door.request(), door.request()
    assert door.gate.admit(first) is None
    failure = door.gate.admit(second)
    assert (failure.code, failure.cause) == (Code.RESOURCE_EXHAUSTED, "TENANT_CONCURRENCY")
    assert failure.retryable and failure.retry_after_s > 0
    door.gate.ended(first)
    door.gate.ended(first)
    assert door.gate.admit(second) is None


def test_priorities_are_capped_by_what_the_tenant_may_ask_for() -> None:
    door = Door(t=Tenant(name="t", max_priority=2))
    door.staff()
    request = door.request()
    request.priority = 7
    assert door.gate.admit(request) is None
    assert door.queue.head().priority == 2


def test_idle_workers_refuse_nobody_for_the_service_level_whatever_was_learned() -> None:
    """Predictions that were far too low, under load that is gone, must not keep everybody out for ever."""
    door = Door(slo_ttft_s=0.3)
    door.staff()
    for _ in range(200):  # each took twenty times as long as predicted
        forecast = door.shedder.forecast(100, door.queue.ahead("t"), 1000.0, placed_s=0.4, idle_s=0.1)
        door.shedder.observed(forecast, 8.0)
    for number in range(20):
        request = door.request()
        assert door.gate.admit(request) is None, f"request {number} was refused on idle workers"
        assert isinstance(request.choice, Placement)
        door.gate.ended(request)


def test_a_deadline_that_no_idle_cluster_could_meet_is_told_as_such() -> None:
    door = Door()
    door.staff()
    request = door.request()
    request.deadline_s = 0.01  # the prompt alone takes 0.1 s
    failure = door.gate.admit(request)
    assert (failure.code, failure.cause) == (Code.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")


def test_a_prompt_behind_many_others_is_refused_with_the_time_to_come_again() -> None:
    door = Door(slo_ttft_s=0.5)
    door.staff()
    for _ in range(12):
        request = door.request()
        placement = door.fleet.placement.place(request.demand, 0.0)
        if isinstance(placement, Placement):
            door.fleet.placement.charge(request.key, placement, request.demand)
    failures = [door.gate.admit(door.request()) for _ in range(3)]
    refused = [failure for failure in failures if failure is not None]
    assert refused and all(failure.cause == "PREDICTED_LATE" for failure in refused)
    assert all(failure.code is Code.RESOURCE_EXHAUSTED and failure.retry_after_s > 0 for failure in refused)


def test_a_first_burst_is_judged_by_what_the_workers_say_of_themselves() -> None:
    """Nobody has waited yet, so that nothing was seen of how fast the line moves."""
    door = Door(slo_ttft_s=2.0)
    door.queue = door.gate._queue = TokenQueue(100_000)
    door.staff()
    failures = [door.gate.admit(door.request()) for _ in range(60)]
    admitted = failures.index(None), sum(failure is None for failure in failures)
    assert door.queue.service_rate is None
    assert admitted[0] == 0 and 2 <= admitted[1] <= 40  # two workers, 0.1 s each, in 2 s
    assert {failure.cause for failure in failures if failure is not None} == {"PREDICTED_LATE"}
