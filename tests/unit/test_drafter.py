"""A drafter guesses what followed before; whatever it guesses, it is a fold over the tokens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.drafter import MATCHED_TOKENS, Drafter, DraftState, worthwhile

pytestmark = pytest.mark.unit

TOKENS = st.lists(st.integers(0, 3), max_size=120)


def expected_follow(tokens: list[int]) -> int | None:
    """The definition, without haste: after each token go on where it was foretold, else look for the newest three."""
    follows: int | None = None
    for end in range(1, len(tokens) + 1):
        seen = tokens[:end]
        if follows is not None and tokens[follows] == seen[-1]:
            follows += 1
            continue
        newest = seen[-MATCHED_TOKENS:]
        starts = [
            s for s in range(end - MATCHED_TOKENS) if seen[s : s + MATCHED_TOKENS] == newest
        ]  # none for fewer tokens
        follows = starts[-1] + MATCHED_TOKENS if starts and end > MATCHED_TOKENS else None
    return follows


@given(TOKENS)
def test_it_follows_the_newest_place_where_the_last_tokens_were(tokens: list[int]) -> None:
    drafter = Drafter((), DraftState())
    for token in tokens:
        drafter.observe(token)
    assert drafter.state.follows == expected_follow(tokens)


@given(TOKENS, TOKENS)
def test_a_drafter_goes_on_from_a_state_as_the_one_that_gave_it(prompt: list[int], answer: list[int]) -> None:
    one = Drafter(prompt)
    other = Drafter(prompt, one.state)
    twin = one.copy()
    for token in answer:
        for drafter in (one, other, twin):
            drafter.observe(token)
    assert one.state == other.state == twin.state
    assert one.draft(9) == other.draft(9) == twin.draft(9)
    one.state.check(len(prompt) + len(answer))


@given(TOKENS, st.integers(0, 12))
def test_guesses_are_what_it_would_see_if_they_were_right(tokens: list[int], count: int) -> None:
    drafter = Drafter(tokens)
    drafts = drafter.draft(count)
    assert len(drafts) == (0 if drafter.state.follows is None else count)
    hits = drafter.state.hits
    for index, token in enumerate(drafts):
        assert drafter.draft(count - index) == drafts[index:]
        drafter.observe(token)
        hits = 0.9 * hits + 1
    assert drafter.state.hits == pytest.approx(hits)


def test_a_repeated_phrase_is_told_to_its_end_and_over_again() -> None:
    drafter = Drafter([7, 1, 2, 3, 4, 5, 1, 2, 3])
    assert drafter.draft(7) == [4, 5, 1, 2, 3, 4, 5]


def test_token_ids_are_not_found_between_others() -> None:
    """In bytes the ids 1 and 256 side by side hold each other's bytes, out of step."""
    drafter = Drafter([256, 256, 256, 256, 9, 1, 1, 1])
    assert drafter.state.follows is None


def test_the_hit_rate_learns_what_was_not_computed_too() -> None:
    drafter = Drafter([])
    for _ in range(30):
        for token in (5, 6, 7, 8):
            drafter.observe(token)
    assert drafter.hit_rate > 0.9
    for token in range(100, 400):
        drafter.observe(token)
        drafter.observe(6), drafter.observe(7), drafter.observe(8)  # what comes next is never what came
    assert drafter.hit_rate < 0.6


@pytest.mark.parametrize(
    "state",
    [
        DraftState(3),
        DraftState(-1),
        DraftState(hits=0.0),
        DraftState(misses=math.nan),
        DraftState(hits=math.inf),
    ],
)
def test_a_state_that_is_not_of_the_tokens_is_refused(state: DraftState) -> None:
    with pytest.raises(ValueError, match=r"drafter"):
        Drafter([1, 2, 3], state)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8)), min_size=1, max_size=12),
    st.floats(1e-4, 1),
    st.floats(1e-5, 1),
    st.integers(0, 40),
)
def test_only_guesses_that_pay_are_worthwhile(
    sequences: list[tuple[float, int]], step_s: float, row_s: float, budget: int
) -> None:
    rates, limits = [rate for rate, _ in sequences], [limit for _, limit in sequences]
    counts = worthwhile(rates, limits, step_s, row_s, budget)
    assert all(0 <= count <= limit for count, limit in zip(counts, limits, strict=True))
    assert sum(counts) <= budget

    def tokens_per_s(counts: list[int]) -> float:
        gained = sum(
            sum(rate**i for i in range(1, count + 1)) for rate, count in zip(rates, counts, strict=True)
        )
        return (len(rates) + gained) / (step_s + row_s * sum(counts))

    assert tokens_per_s(counts) >= tokens_per_s([0] * len(rates)) * (1 - 1e-9)
    if sum(counts) < budget:
        for index in range(len(counts)):
            if counts[index] < limits[index]:
                more = [count + (i == index) for i, count in enumerate(counts)]
                assert tokens_per_s(more) <= tokens_per_s(counts) * (1 + 1e-9)


def test_nothing_is_worthwhile_before_a_step_was_measured() -> None:
    assert worthwhile([1.0], [8], 0.0, 0.0, 100) == [0]


def test_a_crowded_step_asks_for_better_guesses() -> None:
    alone = worthwhile([0.5], [8], 0.012, 0.0008, 100)
    assert alone[0] >= 3
    assert worthwhile([0.5] * 16, [8] * 16, 0.030, 0.0012, 100) == [0] * 16
