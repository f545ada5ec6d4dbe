"""Sampling: when an answer ends, its log-probabilities, and rows that no token can be drawn from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from engine.request import Drawn, FinishReason
from engine.sampling import SampleFailure, sample
from tests.sampling_rows import draw, draws, failure, make_row, random_logits

pytestmark = pytest.mark.integration


# Stopping.


def test_an_answer_stops_at_its_stop_tokens() -> None:
    logits = np.array([0, 9, 0], dtype=np.float32)

    def finish(**params: Any) -> FinishReason | None:
        return draw(logits, make_row(temperature=0.0, **params)).finish

    assert finish() is None
    assert finish(stop_token_ids=frozenset({1})) is FinishReason.STOP
    assert finish(eos_token_ids=frozenset({1})) is FinishReason.STOP
    assert finish(eos_token_ids=frozenset({1}), ignore_eos=True) is None
    assert finish(stop_token_ids=frozenset({1}), ignore_eos=True) is FinishReason.STOP
    assert finish(stop_token_ids=frozenset({1}), max_tokens=1) is FinishReason.STOP


def test_an_answer_ends_at_its_length_or_at_the_context() -> None:
    logits = np.array([0, 9, 0], dtype=np.float32)
    row = make_row(tokens=[1, 2, 2], num_prompt=1, temperature=0.0, max_tokens=3)
    assert draw(logits, row).finish is FinishReason.LENGTH
    assert draw(logits, make_row(tokens=[1, 2], num_prompt=1, temperature=0.0, max_tokens=3)).finish is None
    assert draw(logits, make_row(temperature=0.0, left=1)).finish is FinishReason.LENGTH
    assert draw(logits, make_row(temperature=0.0, left=2)).finish is None


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    logits = np.array([0, 9, 3], dtype=np.float32)
    params: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "eos_token_ids": frozenset({1})}
    early = draw(logits, make_row(tokens=[5, 2], num_prompt=1, **params))
    assert (early.token_id, early.finish) == (2, None)
    late = draw(logits, make_row(tokens=[5, 2, 2], num_prompt=1, **params))
    assert (late.token_id, late.finish) == (1, FinishReason.STOP)


def test_a_stop_token_outside_the_vocabulary_is_never_met() -> None:
    logits = np.array([0, 9, 3], dtype=np.float32)
    row = make_row(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({77}))
    assert draw(logits, row).token_id == 1


# Log-probabilities.


def test_logprobs_come_from_the_raw_logits() -> None:
    logits = random_logits(1, 200)[0]
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
    row = make_row(logprobs=5, temperature=0.2, top_k=40, logit_bias=((17, 50.0),), repetition_penalty=1.5)
    drawn = draw(logits, row)
    assert drawn.token_id == 17
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(expected[17], abs=1e-6)
    best = np.argsort(-expected)[:5]
    assert [token for token, _ in drawn.logprobs.top] == best.tolist()
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(expected[best].tolist(), abs=1e-6)


def test_likeliest_tokens_that_tie_come_by_id() -> None:
    drawn = draw(np.array([1, 5, 0, 5, 5, 1], dtype=np.float32), make_row(logprobs=4))
    assert drawn.logprobs is not None
    assert [token for token, _ in drawn.logprobs.top] == [1, 3, 4, 0]


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (2, 2), (20, 3)])
def test_as_many_likeliest_tokens_as_asked_for_and_there(asked: int, given: int) -> None:
    drawn = draw(np.array([1, 5, 0], dtype=np.float32), make_row(logprobs=asked))
    assert drawn.logprobs is not None
    assert len(drawn.logprobs.top) == given


def test_rows_that_do_not_ask_get_no_logprobs() -> None:
    assert draw(np.array([1, 5, 0], dtype=np.float32), make_row()).logprobs is None


# What cannot be drawn.


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"repetition_penalty": 1.2}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_fails_and_the_others_do_not(params: dict[str, Any], bad: float) -> None:
    logits = random_logits(3, 50)
    rows = [make_row(seed=seed, **params) for seed in range(3)]
    first, _, last = sample(logits, rows)
    logits[1, 33] = bad
    results = sample(logits, rows)
    assert isinstance(results[1], SampleFailure)
    assert results[1].cause == "NAN_LOGITS"
    assert "token 33" in results[1].message
    assert [results[0], results[2]] == [first, last]


def test_a_row_of_minus_infinity_fails() -> None:
    assert failure(np.full(9, -np.inf, dtype=np.float32), make_row()).cause == "NAN_LOGITS"


def test_tokens_at_minus_infinity_are_never_drawn() -> None:
    logits = np.full(3000, -np.inf, dtype=np.float32)
    logits[[5, 2000]] = 1.0
    for params in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 0.01}, {"logprobs": 3}):
        assert set(draws(logits, 40, **params)) == {5, 2000}


def test_forbidding_every_token_fails_the_row() -> None:
    row = make_row(min_tokens=1, stop_token_ids=frozenset(range(4)))
    assert failure(np.zeros(4, dtype=np.float32), row).cause == "NO_TOKEN_LEFT"


@pytest.mark.parametrize("token", [-1, 4, 2**40])
def test_a_bias_outside_the_vocabulary_fails_the_row(token: int) -> None:
    result = failure(np.zeros(4, dtype=np.float32), make_row(logit_bias=((token, 1.0),)))
    assert result.cause == "INVALID_LOGIT_BIAS"
    assert str(token) in result.message


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300},
        {"frequency_penalty": 1e300},
        {"logit_bias": ((1, 1e300),)},
        {"top_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 10**12},
    ],
)
def test_extreme_parameters_draw_or_fail_without_a_warning(params: dict[str, Any]) -> None:
    logits = np.array([-3, 2, 80, -80], dtype=np.float32)
    (result,) = sample(logits[None], [make_row(tokens=[0, 1, 2, 3], num_prompt=2, **params)])
    assert isinstance(result, Drawn) or result.cause == "NO_TOKEN_LEFT"


def test_misshapen_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 9\) do not fit 1 rows"):
        sample(np.zeros((2, 9), dtype=np.float32), [make_row()])
    with pytest.raises(ValueError, match="logits are float64"):
        sample(np.zeros((1, 9), dtype=np.float64), [make_row()])


def test_no_rows_draw_nothing() -> None:
    assert sample(np.zeros((0, 9), dtype=np.float32), []) == []
