"""How an answer goes on: what its choices share is computed once, and each goes on from its own end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.resumption import NOTHING, SoFar

pytestmark = pytest.mark.unit

PROMPT = [7, 8, 9]
choices_strategy = st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4)


def test_nothing_so_far_is_the_prompt_and_every_choice_draws_at_its_end() -> None:
    assert NOTHING.head(PROMPT) == PROMPT
    assert NOTHING.num_shared == 0
    assert all(NOTHING.draws(choice) and NOTHING.rest(choice) == () for choice in range(3))


def test_one_choice_is_computed_whole_with_the_prompt() -> None:
    so_far = SoFar.of([[1, 2, 3]])
    assert so_far.head(PROMPT) == [7, 8, 9, 1, 2, 3]
    assert so_far.draws(0) and so_far.rest(0) == ()


@given(choices=choices_strategy, data=st.data())
def test_head_and_rest_are_the_known_tokens_and_the_head_is_as_long_as_it_can_be(choices, data) -> None:
    ended = data.draw(st.frozensets(st.integers(0, len(choices) - 1), max_size=len(choices) - 1))
    so_far = SoFar.of(choices, ended)
    going = [choice for choice in range(len(choices)) if choice not in ended]
    for choice in going:
        assert [*so_far.head(PROMPT), *so_far.rest(choice)] == [*PROMPT, *choices[choice]]
        assert so_far.draws(choice) == (len(choices[choice]) == so_far.num_shared)
    assert not any(so_far.draws(choice) for choice in ended)
    rests = [so_far.rest(choice) for choice in going]
    assert not all(rests) or len({rest[0] for rest in rests}) > 1


@pytest.mark.parametrize(
    ("choices", "ended"), [([], frozenset()), ([[1]], frozenset({0})), ([[1], [2]], frozenset({5}))]
)
def test_an_answer_that_cannot_go_on_is_refused(choices, ended) -> None:
    with pytest.raises(ValueError, match="none of them goes on"):
        SoFar.of(choices, ended)
