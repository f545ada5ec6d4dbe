"""The engine's plain values."""

from __future__ import annotations

import dataclasses

import pytest

from engine.request import Drawn, FinishReason, Logprobs, SamplingParams, Sequence, SequenceStatus

pytestmark = pytest.mark.unit


def make_sequence(prompt: list[int], answer: list[int]) -> Sequence:
    return Sequence(
        sequence_id=7,
        lease_id=b"lease",
        choice=0,
        tokens=prompt + answer,
        num_prompt=len(prompt),
        sampling=SamplingParams(),
    )


def test_a_sequence_tells_its_prompt_from_its_answer() -> None:
    sequence = make_sequence([5, 6, 7], [8, 9])
    assert sequence.num_tokens == 5
    assert sequence.num_generated == 2
    assert sequence.generated == [8, 9]


def test_the_answer_handed_out_is_a_copy() -> None:
    sequence = make_sequence([5], [8])
    sequence.generated.append(1)
    assert sequence.tokens == [5, 8]


def test_a_new_sequence_waits_with_nothing_computed() -> None:
    sequence = make_sequence([5], [])
    assert sequence.status is SequenceStatus.WAITING
    assert sequence.num_computed == 0
    assert sequence.num_generated == 0
    assert not sequence.prefill_only


def test_defaults_change_nothing_about_the_distribution() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert not params.greedy


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0.0).greedy


def test_ignore_eos_leaves_only_the_stop_tokens_that_were_asked_for() -> None:
    params = SamplingParams(stop_token_ids=frozenset({1, 2}), eos_token_ids=frozenset({2, 3}))
    assert params.stopping_token_ids == {1, 2, 3}
    assert dataclasses.replace(params, ignore_eos=True).stopping_token_ids == {1, 2}


@pytest.mark.parametrize("value", [SamplingParams(), Drawn(token_id=1), Logprobs(logprob=-1.0, top=())])
def test_values_cannot_be_changed(value: object) -> None:
    field = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 3)


def test_reasons_and_statuses_are_their_wire_words() -> None:
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "cancelled", "failed"]
    assert [str(status) for status in SequenceStatus] == [
        "waiting",
        "running",
        "preempted",
        "held",
        "finished",
    ]
