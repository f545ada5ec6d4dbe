"""One decision of `auto`: which codec is predicted to land the rest first."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.codec_plan import TIE, Candidate, Situation, make_plan

pytestmark = pytest.mark.unit

MB = 1_000_000
RAW = Candidate("raw", 0.2e-9, 0.3e-9, 1.0)
SPLIT = Candidate("split", 3e-9, 2e-9, 0.68)
PACKED = Candidate("packed", 4e-9, 2.5e-9, 0.24)


def situation(bytes_per_s: float, **changes: float) -> Situation:
    facts = {"bytes_left": 94 * MB, "frame_bytes": MB, "bytes_per_s": bytes_per_s}
    return Situation(**(facts | changes))  # type: ignore[arg-type]


def pick(bytes_per_s: float, *candidates: Candidate, in_use: str = "", **changes: float) -> str:
    plan = make_plan(candidates or (RAW, SPLIT), situation(bytes_per_s, **changes), in_use)
    return plan.pick.candidate.name


def test_a_slow_link_is_worth_the_work_of_a_codec_and_a_fast_one_is_not() -> None:
    assert pick(12 * MB) == "split"
    assert pick(1200 * MB) == "raw"
    assert pick(12 * MB, RAW, SPLIT, PACKED) == "packed"


def test_a_transfer_takes_its_slowest_stage_and_one_frame_through_the_others() -> None:
    plan = make_plan([SPLIT], situation(100 * MB, round_trip_s=0.5))
    wire_s, others_s = 94 * 0.0068, 0.003 + 0.002
    assert plan.pick.landed_s == pytest.approx(wire_s + others_s + 0.5)


def test_the_reason_has_the_numbers_and_the_runner_up() -> None:
    plan = make_plan([RAW, SPLIT, PACKED], situation(12 * MB))
    assert plan.reason == "packed: 1.89 s predicted over 12 MB/s, split 5.33 s"


def test_equal_predictions_go_to_the_codec_that_costs_less_work() -> None:
    lean = Candidate("lean", 1e-9, 1e-9, 0.70)
    heavy = Candidate("heavy", 8e-9, 8e-9, 0.69)
    assert pick(10 * MB, heavy, lean) == "lean"
    assert pick(10 * MB, Candidate("heavy", 8e-9, 8e-9, 0.60), lean) == "heavy"


def test_busy_cores_make_a_codec_less_worth() -> None:
    assert pick(220 * MB) == "split"
    assert pick(220 * MB, busy=1.0) == "raw"


def test_what_keeps_up_with_the_prompt_is_taken_for_the_work_that_it_saves() -> None:
    # At 12 MB/s nothing but the strongest keeps up, at 120 all do.
    coming = {"bytes_left": 2 * MB, "bytes_to_come": 90 * MB, "computed_in_s": 3.0}
    assert pick(12 * MB, RAW, SPLIT, PACKED, **coming) == "packed"
    assert pick(23 * MB, RAW, SPLIT, PACKED, **coming) == "packed"
    assert pick(29 * MB, RAW, SPLIT, PACKED, **coming) == "split"
    assert pick(120 * MB, RAW, SPLIT, PACKED, **coming) == "raw"
    plan = make_plan([RAW, SPLIT], situation(120 * MB, **coming))
    assert plan.reason == (
        "raw: hidden behind the prompt, 0.77 s of work over 120 MB/s in 3.00 s, "
        "split 0.52 s and more of the cores"
    )


def test_the_codec_in_use_may_keep_up_more_narrowly_than_one_that_would_take_its_place() -> None:
    coming = {"bytes_left": 2 * MB, "bytes_to_come": 90 * MB, "computed_in_s": 3.0}
    assert pick(32 * MB, RAW, SPLIT, in_use="split", **coming) == "split"
    assert pick(32 * MB, RAW, SPLIT, in_use="raw", **coming) == "raw"


def test_where_nothing_keeps_up_work_on_busy_cores_delays_the_prompt_too() -> None:
    coming = {"bytes_left": 2 * MB, "bytes_to_come": 400 * MB, "computed_in_s": 1.0}
    heavy = Candidate("heavy", 9e-9, 1e-9, 0.4)
    assert pick(150 * MB, RAW, heavy, **coming) == "raw"
    assert pick(60 * MB, RAW, heavy, **coming) == "heavy"
    assert pick(60 * MB, RAW, heavy, busy=1.0, **coming) == "raw"


costs = st.floats(1e-11, 1e-7)
candidates = st.lists(st.tuples(costs, costs, st.floats(0.05, 1.1)), min_size=1, max_size=5).map(
    lambda many: [Candidate(f"c{i}", *each) for i, each in enumerate(many)]
)
situations = st.builds(
    Situation,
    bytes_left=st.integers(1, 1 << 31),
    frame_bytes=st.integers(1, 1 << 21),
    bytes_per_s=st.floats(1e4, 1e11),
    round_trip_s=st.floats(0, 0.3),
    busy=st.floats(0, 1),
    bytes_to_come=st.integers(0, 1 << 31),
    computed_in_s=st.floats(0, 100),
)


@settings(max_examples=60, deadline=None)
@given(candidates, situations)
def test_the_pick_is_never_worse_than_a_tie_and_has_a_reason(
    choices: list[Candidate], now: Situation
) -> None:
    plan = make_plan(choices, now)
    assert plan.reason.startswith(f"{plan.pick.candidate.name}: ")
    assert set(plan.forecasts) == {candidate.name for candidate in choices}
    if plan.pick.is_hidden:
        assert plan.pick.slowest_s <= now.computed_in_s
    else:
        first_s = min(forecast.landed_s for forecast in plan.forecasts.values())
        assert plan.pick.landed_s <= first_s * (1 + TIE)
        assert not any(forecast.is_hidden for forecast in plan.forecasts.values())


@settings(max_examples=60, deadline=None)
@given(candidates, situations, st.floats(1.01, 1000))
def test_a_slower_link_never_makes_it_take_a_codec_that_shrinks_less_but_for_a_tie(
    choices: list[Candidate], now: Situation, slower: float
) -> None:
    now = replace(now, bytes_to_come=0)
    before = make_plan(choices, now).pick.candidate
    after = make_plan(choices, replace(now, bytes_per_s=now.bytes_per_s / slower))
    if after.pick.candidate.payload > before.payload:
        assert after.forecasts[before.name].landed_s >= after.pick.landed_s / (1 + TIE)
        assert after.forecasts[before.name].landed_s <= after.pick.landed_s * (1 + TIE)
