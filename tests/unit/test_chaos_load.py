"""What is asked under fire: a seed's own, within the model's context, of many shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.chaos_load import LoadSizes, conversations

pytestmark = pytest.mark.unit

TEXT = list(range(5000))
SIZES = LoadSizes(longest_prompt=1000, longest_answer=100, num_conversations=20)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_the_longest_prompt_of_a_chat_is_within_the_limit(seed: int) -> None:
    asked = conversations(seed, TEXT, SIZES)
    assert asked == conversations(seed, TEXT, SIZES)
    assert len(asked) == SIZES.num_conversations
    for turns in asked:
        prompt = 0
        for turn in turns:
            prompt += len(turn.new_tokens)
            assert SIZES.shortest_prompt <= len(turn.new_tokens)
            assert prompt <= SIZES.longest_prompt
            assert turn.sampling["max_tokens"] <= SIZES.longest_answer
            prompt += turn.sampling["max_tokens"]
            assert turn.deadline_s is None or len(turns) == 1, "a turn that may fail has no turn after it"


def test_there_is_something_of_everything() -> None:
    turns = [turn for seed in range(20) for turns in conversations(seed, TEXT, SIZES) for turn in turns]
    options = {name for turn in turns for name in turn.sampling}
    assert {"n", "stop", "repetition_penalty", "frequency_penalty", "logprobs", "top_p"} <= options
    assert {turn.sampling["temperature"] == 0.0 for turn in turns} == {True, False}
    assert {turn.by_sdk for turn in turns} == {True, False}
    assert any(turn.deadline_s for turn in turns)
    assert any(len(turns) > 1 for turns in conversations(1, TEXT, SIZES))


def test_some_prompts_begin_alike() -> None:
    heads = [turns[0].new_tokens[: SIZES.shared_head] for turns in conversations(3, TEXT, SIZES)]
    whole = [head for head in heads if len(head) == SIZES.shared_head]
    assert len(set(whole)) < len(whole)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompts of 1000"):
        conversations(1, TEXT[:500], SIZES)
