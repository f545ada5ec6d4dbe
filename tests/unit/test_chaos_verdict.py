"""What the campaign counts: every way in which an answer can be wrong must show in a number."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.chaos_verdict import DEADLINE_MARGIN_S, ChoiceSeen, End, Outcome, Tally, judge, recoveries

pytestmark = pytest.mark.unit

STEP_S = 0.1
LENGTH = (2, "", None)
TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=20)


def seen(tokens: Sequence[int], *, finished: bool = True) -> ChoiceSeen:
    text = "".join(f"{token} " for token in tokens)
    return ChoiceSeen(
        list(tokens), [(float(token), ()) for token in tokens], text, LENGTH if finished else None
    )


def outcome(*choices: ChoiceSeen, end: End = End.FINISHED, late_s: float = -10.0, **facts: object) -> Outcome:
    return Outcome(
        name="r",
        sent_s=0.0,
        deadline_s=100.0,
        choices=list(choices),
        end=end,
        ended_s=100.0 + late_s,
        **facts,
    )  # type: ignore[arg-type]


@given(st.lists(TOKENS, min_size=1, max_size=3))
def test_an_equal_answer_is_clean(answers: list[list[int]]) -> None:
    choices = [seen(tokens) for tokens in answers]
    assert judge(outcome(*choices), [seen(tokens) for tokens in answers], STEP_S) == Tally(requests=1)


@given(TOKENS, st.data())
def test_one_changed_token_is_counted(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens]
    changed[place] += 1
    tally = judge(outcome(seen(changed)), [seen(tokens)], STEP_S)
    assert (tally.different_tokens, tally.different_texts, tally.different_logprobs) == (1, 1, 1)
    assert not tally.is_clean


@given(TOKENS, st.data(), st.sampled_from([End.FINISHED, End.FAILED, End.DEADLINE]))
def test_missing_tokens_are_lost_whatever_the_end_says(
    tokens: list[int], data: st.DataObject, end: End
) -> None:
    kept = data.draw(st.integers(0, len(tokens) - 1))
    tally = judge(outcome(seen(tokens[:kept]), end=end), [seen(tokens)], STEP_S)
    assert tally.lost_tokens == len(tokens) - kept
    assert tally.failed_requests == (end is not End.FINISHED)


@given(TOKENS, st.integers(1, 5))
def test_tokens_behind_the_end_are_different(tokens: list[int], num_more: int) -> None:
    tally = judge(outcome(seen([*tokens, *[1] * num_more])), [seen(tokens)], STEP_S)
    assert tally.different_tokens == num_more


@given(TOKENS, st.data(), st.sampled_from([End.LEFT, End.DEADLINE]))
def test_a_part_is_enough_of_who_left_or_had_no_time(
    tokens: list[int], data: st.DataObject, end: End
) -> None:
    part = seen(tokens[: data.draw(st.integers(0, len(tokens)))], finished=False)
    assert judge(outcome(part, end=end, expects_deadline=True), [seen(tokens)], STEP_S).is_clean


def test_a_part_must_be_the_right_one() -> None:
    part = outcome(seen([1, 9], finished=False), end=End.LEFT)
    assert judge(part, [seen([1, 2, 3])], STEP_S).different_tokens == 1


def test_all_tokens_without_an_end_are_a_failed_request() -> None:
    tally = judge(outcome(seen([1, 2]), end=End.FAILED), [seen([1, 2])], STEP_S)
    assert (tally.failed_requests, tally.lost_tokens) == (1, 0)


def test_another_finish_a_shorter_text_and_missing_logprobs_show() -> None:
    expected = seen([1, 2])
    other = ChoiceSeen([1, 2], [(1.0, ())], "1", (1, "", None))
    tally = judge(outcome(other), [expected], STEP_S)
    assert (tally.different_finishes, tally.different_texts, tally.different_logprobs) == (1, 1, 1)


def test_repeats_gaps_and_changed_minds_of_connections_are_counted() -> None:
    tally = judge(outcome(seen([1]), num_repeated=2, num_skipped=3, num_changed=4), [seen([1])], STEP_S)
    assert (tally.duplicated_tokens, tally.lost_tokens, tally.different_tokens) == (2, 3, 4)


def test_a_request_is_overdue_a_step_and_the_margin_behind_its_deadline() -> None:
    limit_s = STEP_S + DEADLINE_MARGIN_S
    for late_s, ran_on, overdue in ((limit_s - 0.01, False, 0), (limit_s + 0.01, False, 1), (-1.0, True, 1)):
        late = outcome(seen([1]), end=End.DEADLINE, late_s=late_s, expects_deadline=True, ran_on=ran_on)
        assert judge(late, [seen([1])], STEP_S).overdue_requests == overdue


def test_choices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="1 choices beside 2"):
        judge(outcome(seen([1])), [seen([1]), seen([1])], STEP_S)


def test_a_tally_adds_up_and_is_clean_with_requests_alone() -> None:
    total = Tally()
    total.add(Tally(requests=3))
    assert total.is_clean
    total.add(Tally(requests=1, leaked_blocks=2))
    assert total == Tally(requests=4, leaked_blocks=2)
    assert not total.is_clean


def test_recovery_is_from_the_fault_to_the_next_token_of_streams_that_it_held_up() -> None:
    held_up = outcome(seen([1]), token_times=[1.0, 1.1, 1.2, 5.0, 5.1])
    went_on = outcome(seen([1]), token_times=[1.0, 1.1, 1.2, 1.3, 1.4])
    had_nothing = outcome(seen([1]), token_times=[6.0, 6.1])
    was_over = outcome(seen([1]), token_times=[0.1, 0.2])
    found = recoveries([held_up, went_on, had_nothing, was_over], [1.25])
    assert found == [[pytest.approx(3.75)]]


def test_a_gap_around_several_faults_is_the_first_ones() -> None:
    stream = outcome(seen([1]), token_times=[1.0, 1.1, 1.2, 5.0, 5.1, 5.2, 9.0])
    assert recoveries([stream], [3.0, 2.0, 6.0, 20.0]) == [[], [3.0], [3.0], []]
    assert recoveries([outcome(seen([1]), token_times=[1.0]), outcome(seen([1]))], [0.5]) == [[]]
