"""Whether a cached prefix is worth loading, and the measurements that say so."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.load_speeds import FORGET_S, MAX_SOURCES, LoadSpeeds, SourceSpeed
from kvtransfer.worth import LONG_PREFIX_TOKENS, MARGIN, LoadDecision, PrefixPart, decide_parts

pytestmark = pytest.mark.unit

KV_BYTES = 23_040  # of a token
HOST = 3e9
DISK = 400e6


def part(
    source: str, end_token: int, num_tokens: int, bytes_per_s: float | None, fixed_s: float = 1e-3
) -> PrefixPart:
    return PrefixPart(source, end_token, num_tokens * KV_BYTES, bytes_per_s, fixed_s)


def decide_load(
    here: int, found: int, num_bytes: int, bytes_per_s: float | None, fixed_s: float, prefill_s: float | None
) -> LoadDecision:
    """All of what was found from one source."""
    return decide_parts(here, [PrefixPart("source", found, num_bytes, bytes_per_s, fixed_s)], prefill_s)


def test_a_load_that_beats_computing_is_taken_with_its_reason() -> None:
    decision = decide_load(0, 1024, 1024 * KV_BYTES, DISK, 0.005, 1e-3)
    assert decision.load
    assert decision.num_tokens == 1024
    assert decision.predicted_load_s == pytest.approx(0.005 + 1024 * KV_BYTES / DISK)
    assert decision.predicted_compute_s == pytest.approx(1.024)
    assert decision.reason == "1024 tokens from source: 64 ms to load 23.6 MB at 369 MB/s, 1.02 s to compute"


def test_a_load_that_is_slower_than_computing_is_not() -> None:
    decision = decide_load(0, 1024, 1024 * KV_BYTES, 10e6, 0.0, 1e-3)
    assert not decision.load
    assert decision.num_tokens == 0
    assert "2.36 s to load" in decision.reason
    assert "1.02 s to compute" in decision.reason


def test_a_load_must_win_by_a_margin() -> None:
    compute_s = 1.0
    for load_s, wins in ((compute_s * (1 - MARGIN) - 0.01, True), (compute_s * (1 - MARGIN) + 0.01, False)):
        assert decide_load(0, 1000, 1000, 1000 / load_s, 0.0, compute_s / 1000).load is wins


def test_a_short_prefix_is_not_worth_what_every_load_costs() -> None:
    assert not decide_load(0, 64, 64 * KV_BYTES, HOST, 0.1, 1e-3).load
    assert decide_load(0, 1024, 1024 * KV_BYTES, HOST, 0.1, 1e-3).load


def test_only_what_is_not_here_yet_counts() -> None:
    decision = decide_load(960, 1024, 64 * KV_BYTES, HOST, 0.1, 1e-3)
    assert not decision.load
    assert decision.num_tokens == 960
    assert decision.predicted_compute_s == pytest.approx(0.064)
    nothing = decide_load(1024, 1024, 0, HOST, 0.0, 1e-3)
    assert (nothing.load, nothing.num_tokens) == (False, 1024)
    assert nothing.reason == "all that was found is here"


def test_the_part_on_the_host_may_be_worth_it_where_the_part_on_disk_is_not() -> None:
    parts = [part("host", 512, 512, HOST), part("disk", 2048, 1536, 10e6)]
    decision = decide_parts(0, parts, 1e-3)
    assert (decision.load, decision.num_tokens) == (True, 512)
    assert "not those from disk: 3.54 s to load" in decision.reason
    both = decide_parts(0, [part("host", 512, 512, HOST), part("disk", 2048, 1536, DISK)], 1e-3)
    assert both.num_tokens == 2048
    assert both.reason.startswith("2048 tokens from host and disk: ")


def test_a_bad_part_is_loaded_where_what_lies_behind_it_makes_up_for_it() -> None:
    parts = [part("disk", 64, 64, DISK, 0.1), part("host", 4096, 4032, HOST)]
    assert decide_parts(0, parts, 1e-3).num_tokens == 4096


@pytest.mark.parametrize(("rate", "prefill"), [(None, 1e-3), (HOST, None), (None, None)])
def test_an_unknown_speed_is_tried_on_a_long_prefix_only(rate: float | None, prefill: float | None) -> None:
    long, short = LONG_PREFIX_TOKENS, LONG_PREFIX_TOKENS - 64
    tried = decide_load(0, long, long * KV_BYTES, rate, 0.0, prefill)
    assert tried.load
    assert "never measured" in tried.reason
    assert not decide_load(0, short, short * KV_BYTES, rate, 0.0, prefill).load
    assert not decide_load(64, long, short * KV_BYTES, rate, 0.0, prefill).load


def test_an_unknown_part_behind_one_that_is_not_worth_it_is_left_alone() -> None:
    slow_first = [part("disk", 1024, 1024, 1e6), part("peer", 2048, 1024, None)]
    assert not decide_parts(0, slow_first, 1e-3).load
    good_first = [part("host", 1024, 1024, HOST), part("peer", 2048, 1024, None)]
    assert decide_parts(0, good_first, 1e-3).num_tokens == 2048


parts = st.lists(
    st.tuples(st.integers(1, 4096), st.one_of(st.none(), st.floats(1e5, 1e10)), st.floats(0, 1)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(parts, st.integers(0, 2000), st.one_of(st.none(), st.floats(1e-6, 1e-2)))
def test_every_decision_is_within_what_was_found_and_has_a_reason(
    sizes: list[tuple[int, float | None, float]], here: int, prefill: float | None
) -> None:
    end, found = here, []
    for i, (num_tokens, rate, fixed_s) in enumerate(sizes):
        end += num_tokens
        found.append(part(f"s{i}", end, num_tokens, rate, fixed_s))
    decision = decide_parts(here, found, prefill)
    assert decision.reason
    assert decision.num_tokens in {here, *(each.end_token for each in found)}
    assert decision.load == (decision.num_tokens > here)
    if decision.load and decision.predicted_load_s is not None and decision.predicted_compute_s is not None:
        assert decision.predicted_load_s < decision.predicted_compute_s * (1 - MARGIN) * (1 + 1e-9)


def test_speeds_are_means_of_what_was_measured_apart_from_what_every_load_costs() -> None:
    speeds = LoadSpeeds(lambda: 0.0)
    assert speeds.bytes_per_s("disk") is None
    assert speeds.prefill_s_per_token is None
    for _ in range(20):
        speeds.note_load("disk", 1000, 0.01)
        speeds.note_load("disk", 40_000_000, 0.11)
        speeds.note_prefill(1000, 2.0)
    assert speeds.fixed_s("disk") == pytest.approx(0.01)
    assert speeds.bytes_per_s("disk") == pytest.approx(400e6, rel=0.01)
    assert speeds.prefill_s_per_token == pytest.approx(2e-3)
    assert speeds.bytes_per_s("host") is None


def test_a_source_that_was_slow_once_is_unknown_again_after_a_while() -> None:
    now = [0.0]
    speeds = LoadSpeeds(lambda: now[0])
    speeds.note_load("disk", 40_000_000, 100.0)
    now[0] = FORGET_S
    assert speeds.bytes_per_s("disk") == pytest.approx(400e3)
    now[0] = FORGET_S + 1
    assert speeds.bytes_per_s("disk") is None
    speeds.note_load("disk", 40_000_000, 0.1)
    assert speeds.bytes_per_s("disk") == pytest.approx(400e6)


def test_sources_are_bounded_in_number() -> None:
    now = [0.0]
    speeds = LoadSpeeds(lambda: now[0])
    for number in range(MAX_SOURCES + 10):
        now[0] += 1e-3
        speeds.note_load(f"worker {number}", 40_000_000, 0.1)
    known = [n for n in range(MAX_SOURCES + 10) if speeds.bytes_per_s(f"worker {n}") is not None]
    assert known == list(range(10, MAX_SOURCES + 10))


def test_speeds_are_read_out_newest_first_as_far_as_they_are_known() -> None:
    now = [0.0]
    speeds = LoadSpeeds(lambda: now[0])
    speeds.note_load("forgotten", 2 << 20, 1.0)
    for now[0], source in ((FORGET_S, "old"), (FORGET_S + 1, "new")):
        speeds.note_load(source, 2 << 20, 0.5)
    speeds.note_load("new", 1 << 10, 0.25)
    speeds.note_load("only small ones", 1 << 10, 0.5)
    assert speeds.measured() == [
        SourceSpeed("new", 4 << 20, 0.25),
        SourceSpeed("old", 4 << 20, 0.0),
    ]


def test_the_last_few_tokens_of_a_prompt_count_as_few() -> None:
    speeds = LoadSpeeds(lambda: 0.0)
    for _ in range(5):
        speeds.note_prefill(128, 0.064)
        speeds.note_prefill(2, 0.006)  # six times as long a token
    assert speeds.prefill_s_per_token == pytest.approx(0.0005, rel=0.2)
