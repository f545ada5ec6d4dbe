"""What is predicted from what waits, who is refused for it, and what is learned from first tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.failures import Code
from router.core.queue import Ahead, TokenQueue
from router.core.rates import STALE_S, ArrivalRate, ServiceRate
from router.core.shedding import MAX_CORRECTION, Forecast, Shedder, wait_s

pytestmark = pytest.mark.unit

NOBODY = Ahead(class_tokens=0, above_tokens=0, turn_tokens=0, others_rate=0, above_rate=0)


def waiting(class_tokens, above_tokens=0, turn_tokens=0.0, others_rate=0.0, above_rate=0.0):
    return Ahead(
        class_tokens=class_tokens,
        above_tokens=above_tokens,
        turn_tokens=turn_tokens,
        others_rate=others_rate,
        above_rate=above_rate,
    )


def test_the_wait_is_the_shorter_of_the_share_s_and_the_line_s():
    assert wait_s(NOBODY, 100) == 0
    assert wait_s(waiting(50, turn_tokens=500), 100) == 0.5  # nobody else comes
    assert wait_s(waiting(50, turn_tokens=500, others_rate=75), 100) == 2.0  # others bring 3 of 4 tokens
    assert wait_s(waiting(50, turn_tokens=100, others_rate=99), 100) == 1.0  # they may, but it has a share
    assert wait_s(waiting(50, above_tokens=200, turn_tokens=50), 100) == 2.5
    assert wait_s(waiting(50, above_tokens=200, turn_tokens=50, above_rate=50), 100) == 5.0
    assert wait_s(waiting(1, turn_tokens=1, above_rate=1e9), 100) == pytest.approx(0.2)  # never without end


def test_the_queue_says_what_is_ahead():
    queue = TokenQueue(10_000)
    for key, tenant, tokens, priority in (("1", "a", 100, 0), ("2", "b", 300, 0), ("3", "b", 50, 2)):
        queue.offer(key, tokens, 99, 0, tenant, priority, weight={"a": 1, "b": 3}[tenant])
    of_a = queue.ahead("a", 0, 1)
    assert (of_a.class_tokens, of_a.above_tokens, of_a.turn_tokens) == (400, 50, 400)
    assert queue.ahead("b", 0, 3).turn_tokens == 400
    assert queue.ahead("new", 0, 1).turn_tokens == 0
    assert queue.ahead("b", 2, 3).above_tokens == 0
    assert queue.ahead("b", 1, 3) == waiting(0, above_tokens=50, above_rate=queue.ahead("b", 1, 3).above_rate)


def test_what_a_tenant_was_served_ahead_of_others_is_waited_for():
    queue = TokenQueue(10_000)
    queue.offer("large", 1000, 99, 0, "a")
    queue.offer("other", 10, 99, 0, "b")
    assert queue.take(0).key == "large"
    assert queue.ahead("a").turn_tokens == 2000
    queue.served("a", 100)  # an answer of 100 tokens is charged 200
    # Of what is charged to a, and so of what the class is charged, 5 of 6 are prompts.
    assert queue.ahead("a").turn_tokens == pytest.approx(2000)


def test_nothing_is_predicted_while_too_little_is_known():
    shedder = Shedder(1.0)
    assert shedder.forecast(10, waiting(1000), None, placed_s=5.0) is None
    assert shedder.forecast(10, NOBODY, None) is None
    assert shedder.judge(None, 0.0) is None
    assert shedder.forecast(10, NOBODY, None, placed_s=5.0, idle_s=2.0) == Forecast(2.0, 3.0)
    assert shedder.forecast(10, NOBODY, 100) == Forecast(0.1, 0.0)
    assert shedder.forecast(10, waiting(100, turn_tokens=100), 100, 0.5, 0.25) == Forecast(0.25, 1.25)


def test_a_prediction_later_than_the_service_level_is_refused_with_its_numbers():
    shed = Shedder(2.0).judge(Forecast(0.5, 4.0), remaining_s=60)
    assert (shed.code, shed.cause, shed.retryable) == (Code.RESOURCE_EXHAUSTED, "PREDICTED_LATE", True)
    assert "2.00 s" in shed.message and "4.80 s" in shed.message
    assert shed.retry_after_s == pytest.approx(3.0)
    assert Shedder(2.0).judge(Forecast(0.5, 0.5), remaining_s=60) is None
    assert Shedder(None).judge(Forecast(0.5, 4.0), remaining_s=60) is None


def test_a_prediction_later_than_the_deadline_is_refused():
    shed = Shedder(None).judge(Forecast(0.5, 4.0), remaining_s=3)
    assert (shed.code, shed.cause) == (Code.RESOURCE_EXHAUSTED, "PREDICTED_LATE")
    assert shed.retry_after_s == pytest.approx(1.5)
    assert Shedder(None).judge(Forecast(0.5, 4.0), remaining_s=5) is None


def test_what_an_idle_cluster_could_not_do_in_time_is_not_called_contention():
    shed = Shedder(2.0).judge(Forecast(4.0, 0.0), remaining_s=3)
    assert (shed.code, shed.cause) == (Code.DEADLINE_EXCEEDED, "DEADLINE_TOO_SHORT")
    assert (shed.retryable, shed.retry_after_s) == (False, 0)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.1, 100))
@settings(deadline=None)
def test_the_service_level_refuses_nothing_that_an_idle_cluster_would_serve_no_better(idle_s, load_s, slo_s):
    shedder = Shedder(slo_s)
    shed = shedder.judge(Forecast(idle_s, load_s), remaining_s=1e9)
    if load_s == 0:
        assert shed is None
    if shed is not None:
        assert idle_s + MAX_CORRECTION * load_s > 0.9 * slo_s


@given(st.floats(1.01, 100), st.floats(0.1, 100))
@settings(deadline=None)
def test_what_breaks_the_service_level_by_itself_may_wait_as_long_as_that_allows(times, slo_s):
    shedder = Shedder(slo_s)
    assert (
        shedder.judge(Forecast(times * slo_s, 0.9 * slo_s / MAX_CORRECTION / 1.01), remaining_s=1e9) is None
    )
    shed = shedder.judge(Forecast(times * slo_s, 2 * slo_s), remaining_s=1e9)
    assert shed is not None and shed.code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0, 3.0])
def test_systematic_error_is_learned(slower):
    shedder = Shedder(2.0)
    for number in range(400):
        load_s = 0.2 + number % 10 / 10
        shedder.observed(Forecast(0.1, load_s), 0.1 + slower * load_s)
    fits = [tenth / 10 for tenth in range(60) if shedder.judge(Forecast(0.1, tenth / 10), 1e9) is None]
    assert 1.0 <= slower * max(fits) <= 1.8  # of load; the service level leaves 1.9


def test_what_is_learned_is_bounded():
    shedder = Shedder(2.0)
    for _ in range(1000):
        shedder.observed(Forecast(0.1, 0.1), 1000.0)
    assert shedder.judge(Forecast(0.1, 0.4), 1e9) is None
    assert shedder.judge(Forecast(0.1, 0.5), 1e9) is not None
    for _ in range(2000):
        shedder.observed(Forecast(0.1, 10.0), 0.1)
    assert shedder.judge(Forecast(0.1, 10.0), 1e9) is not None


def test_classes_learn_for_themselves():
    shedder = Shedder(2.0)
    for _ in range(200):
        shedder.observed(Forecast(0.1, 1.0, priority=0), 3.1)
        shedder.observed(Forecast(0.1, 1.0, priority=1), 1.1)
    assert shedder.judge(Forecast(0.1, 1.0, priority=0), 1e9) is not None
    assert shedder.judge(Forecast(0.1, 1.0, priority=1), 1e9) is None


def test_the_rate_of_arrivals_fades():
    rate = ArrivalRate()
    assert rate.per_s(5.0) == 0
    for tenth in range(200):
        rate.add(10, tenth / 10)
    assert rate.per_s(20.0) == pytest.approx(100, rel=0.05)
    assert rate.per_s(23.0) == pytest.approx(37, rel=0.1)
    young = ArrivalRate()
    for tenth in range(11):
        young.add(10, tenth / 10)
    assert young.per_s(1.0) == pytest.approx(110, rel=0.1)


def test_the_service_rate_of_several_servers_is_that_of_all():
    rate = ServiceRate()
    for number in range(200):  # four at a time, each for a second
        rate.took(number, 25, max(0, number - 3) / 4)
    assert rate.per_s(50.0) == pytest.approx(100, rel=1e-3)


def test_the_service_rate_follows_a_change():
    rate = ServiceRate()
    for number in range(100):
        rate.took(number, 10, number * 0.1)
    for number in range(100):
        rate.took(number, 10, 10 + number * 0.4)
    assert rate.per_s(50.0) == pytest.approx(25, rel=0.05)


def test_those_who_come_at_once_and_leave_at_once_say_nothing_of_the_rate_of_service():
    rate = ServiceRate()
    for number in range(20):
        rate.took(2 * number, 500, number)
        rate.took(2 * number + 1, 500, number + 0.001)  # there was room for both
        rate.emptied()
    assert rate.per_s(20.0) is None
    for tenth in range(200):
        rate.took(100 + tenth, 500, 20 + tenth / 10)
    assert rate.per_s(40.0) == pytest.approx(5_000, rel=0.05)


def test_a_service_rate_is_no_bound_any_more_once_nobody_has_waited_for_a_while():
    rate = ServiceRate()
    for number in range(100):
        rate.took(number, 10, number * 0.1)
    assert rate.per_s(60.0) == pytest.approx(100, rel=0.05)  # somebody waits all the while
    rate.emptied()
    assert rate.per_s(10.0 + 0.9 * STALE_S) is not None
    assert rate.per_s(10.0 + 1.1 * STALE_S) is None


def test_a_service_level_must_be_a_time():
    with pytest.raises(ValueError, match="above 0"):
        Shedder(0.0)
