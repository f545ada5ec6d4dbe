"""A request's states: what leads where, and where the time went."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import inference_pb2 as pb
from router.core.failures import Stage
from router.core.lifecycle import TRANSITIONS, IllegalTransition, Lifecycle, RequestState

pytestmark = pytest.mark.unit

S = RequestState


def test_states_are_those_of_the_contract():
    names = {f"REQUEST_STATE_{state}" for state in RequestState} | {"REQUEST_STATE_UNSPECIFIED"}
    assert names == set(pb.RequestState.keys())
    assert set(TRANSITIONS) == set(RequestState)


def test_an_end_leads_nowhere_and_every_other_state_can_be_cancelled_or_fail():
    for state, next_states in TRANSITIONS.items():
        if state in (S.FINISHED, S.CANCELLED, S.FAILED):
            assert not next_states
        else:
            assert {S.CANCELLED, S.FAILED} <= next_states


@settings(deadline=None, max_examples=200)
@given(
    steps=st.lists(st.tuples(st.sampled_from(RequestState), st.floats(0, 100)), max_size=30),
    start=st.floats(0, 1e6),
)
def test_only_the_table_is_walked_and_no_time_is_lost_or_negative(steps, start):
    now = start
    life = Lifecycle(now)
    for target, seconds in steps:
        before = life.state
        now += seconds
        if target in TRANSITIONS[before]:
            life.move(target, now)
            assert life.state is target
        else:
            with pytest.raises(IllegalTransition):
                life.move(target, now)
            assert life.state is before
        times = life.times(now)
        assert min(times.queue_s, times.reserve_s, times.prefill_s, times.total_s) >= 0
        assert times.queue_s + times.reserve_s + times.prefill_s <= times.total_s + 1e-6
    assert life.is_over == (not TRANSITIONS[life.state])


def test_times_of_a_disaggregated_request():
    life = Lifecycle(0.0)
    for state, at in [(S.PLACED, 1), (S.RESERVED, 3), (S.PREFILLING, 3), (S.DECODING, 10)]:
        life.move(state, at)
    life.committed(10)
    life.tokens_arrived(0, 10)
    life.tokens_arrived(1, 12)
    life.tokens_arrived(2, 13)
    life.move(S.FINISHED, 14)
    times = life.times(99)
    assert (times.queue_s, times.reserve_s, times.prefill_s) == (1, 2, 7)
    assert (times.ttft_s, times.decode_s, times.first_step_s, times.total_s) == (10, 3, 2, 14)


def test_a_refused_reservation_adds_up_the_time_in_the_queue():
    life = Lifecycle(0.0)
    for state, at in [(S.PLACED, 1), (S.QUEUED, 2), (S.PLACED, 5)]:
        life.move(state, at)
    assert life.times(7).queue_s == 4
    assert life.times(7).reserve_s == 3


def test_a_token_that_overtakes_the_commit_takes_no_time():
    life = Lifecycle(0.0)
    life.tokens_arrived(1, 5)
    life.committed(6)
    assert life.times(7).first_step_s == 0


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ([], Stage.QUEUE),
        ([S.PLACED], Stage.RESERVE),
        ([S.PLACED, S.RESERVED], Stage.PREFILL),
        ([S.PLACED, S.RESERVED, S.PREFILLING], Stage.PREFILL),
        ([S.PLACED, S.RESERVED, S.PREFILLING, S.DECODING], Stage.DECODE),
    ],
)
def test_each_state_has_a_stage_to_fail_in(path, stage):
    life = Lifecycle(0.0)
    for state in path:
        life.move(state, 0.0)
    assert life.stage is stage
