"""Plans of faults: a seed's own, in order, with no more kills than their share, and lengths around the limits."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos_plan import (
    KILLS,
    Kind,
    Limits,
    Pace,
    kinds_of,
    plan,
    round_seed,
    share_of_kills,
)

pytestmark = pytest.mark.unit

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = st.integers(1, 60)


@given(SEEDS, NUMBERS)
def test_a_seed_gives_the_same_plan_again(seed: int, num_faults: int) -> None:
    kinds = kinds_of(seed, num_faults)
    assert kinds == kinds_of(seed, num_faults)
    assert plan(seed, kinds) == plan(seed, kinds)
    assert [fault.kind for fault in plan(seed, kinds)] == kinds
    assert len(kinds) == num_faults


@given(SEEDS, NUMBERS)
def test_faults_come_in_order_with_the_gaps_of_the_pace(seed: int, num_faults: int) -> None:
    pace = Pace(shortest_gap_s=0.5, longest_gap_s=2.0, longest_fault_s=3.0)
    faults = plan(seed, kinds_of(seed, num_faults), pace=pace)
    times = [0.0, *(fault.at_s for fault in faults)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert all(0.499 <= gap <= 2.001 for gap in gaps)
    assert all(0 <= fault.lasts_s <= 3.0 for fault in faults)


@given(SEEDS, NUMBERS)
def test_at_most_every_second_fault_is_a_kill(seed: int, num_faults: int) -> None:
    kinds = kinds_of(seed, num_faults)
    assert sum(kind in KILLS for kind in kinds) <= (num_faults + 1) // 2
    assert share_of_kills(kinds[: num_faults // 2 * 2]) <= 0.5


@given(SEEDS)
def test_a_long_campaign_has_every_kind(seed: int) -> None:
    assert set(kinds_of(seed, 60)) == set(Kind)


@given(SEEDS, NUMBERS)
def test_what_is_cut_or_frozen_is_so_for_less_or_longer_than_the_limits(seed: int, num_faults: int) -> None:
    limits = Limits(link_grace_s=1.0, dead_after_s=4.0)
    for fault in plan(seed, kinds_of(seed, num_faults), limits):
        if fault.kind in (Kind.CUT_WORKER, Kind.FREEZE_WORKER):
            assert fault.lasts_s < 0.81 or 1.19 < fault.lasts_s < 3.61 or 4.39 < fault.lasts_s < 8.01


def test_kills_and_clients_name_targets_that_exist() -> None:
    for fault in plan(7, kinds_of(7, 200)):
        assert (fault.target == "") == (fault.kind in (Kind.CLIENT_RETURNS, Kind.CLIENT_VANISHES))
        if fault.kind in KILLS:
            assert fault.kind.removeprefix("kill_") == fault.target.partition("-")[0]


def test_rounds_have_seeds_of_their_own() -> None:
    seeds = [round_seed(5, number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert seeds[3] == round_seed(5, 3) != round_seed(6, 3)


def test_a_campaign_without_faults_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one fault"):
        kinds_of(1, 0)
