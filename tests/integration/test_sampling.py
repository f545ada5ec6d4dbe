"""Sampling: processors against oracles, the draw against its distribution, rows against batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine import sampling
from engine.request import Drawn
from engine.sampling import SampleRow, sample
from tests.sampling_rows import Logits, draw, draws, make_row, random_logits

pytestmark = pytest.mark.integration


def assert_distributed(tokens: list[int], probabilities: npt.NDArray[np.float64]) -> None:
    """Pearson's chi-square within 5 standard deviations; cells that expect less than 5 are pooled."""
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    assert not counts[probabilities == 0].any(), "a token was drawn that must not be"
    expected = probabilities * len(tokens)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = max(len(expected) - 1, 1)
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)


# Greedy.


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-30}])
def test_greedy_takes_the_likeliest_token(params: dict[str, Any]) -> None:
    logits = random_logits(8, 500)
    results = sample(logits, [make_row(**params) for _ in range(8)])
    assert [result.token_id for result in results if isinstance(result, Drawn)] == logits.argmax(1).tolist()


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_of_equal_logits_the_lowest_id_is_taken(params: dict[str, Any]) -> None:
    logits = np.array([0, 7, 3, 7, 7], dtype=np.float32)
    assert draw(logits, make_row(**params)).token_id == 1


# The draw.


def test_draws_follow_the_softmax() -> None:
    logits = random_logits(1, 12)[0]
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64) / 1.7, 0).numpy()
    assert_distributed(draws(logits, 10_000, temperature=1.7), probabilities)


def test_draws_from_a_large_vocabulary_follow_the_softmax() -> None:
    logits = random_logits(1, 3000)[0]
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
    assert_distributed(draws(logits, 3_000), probabilities)


@pytest.mark.parametrize("varied", ["seed", "choice", "position"])
def test_neighbouring_draws_are_independent(varied: str) -> None:
    def row(index: int) -> SampleRow:
        if varied == "position":
            return make_row(tokens=range(index), seed=7)
        return make_row(seed=index) if varied == "seed" else make_row(choice=index, seed=7)

    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    results = sample(np.repeat(logits[None], 6000, axis=0), [row(index) for index in range(1, 6001)])
    tokens = [result.token_id for result in results if isinstance(result, Drawn)]
    pairs = [4 * first + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    probabilities = np.exp(logits.astype(np.float64))
    assert_distributed(pairs, np.outer(probabilities, probabilities).ravel() / probabilities.sum() ** 2)


def test_the_draw_is_pinned() -> None:
    # An answer may be resumed by a worker of another version: the numbers must stay what they are.
    logits = random_logits(1, 4000, seed=5)[0]
    rows = [make_row(tokens=[0] * position, choice=position % 2, seed=1234) for position in range(1, 9)]
    results = sample(np.repeat(logits[None], 8, axis=0), rows)
    assert [result.token_id for result in results if isinstance(result, Drawn)] == [
        2522,
        3782,
        2174,
        2522,
        643,
        3500,
        3297,
        639,
    ]


def test_the_largest_seed_is_drawn_from() -> None:
    assert draw(random_logits(1, 50)[0], make_row(seed=2**64 - 1)).token_id in range(50)


@pytest.mark.parametrize(
    ("constant", "value"),
    # No screen; one that nothing passes; one that often passes only what cannot win.
    [("_SCREEN_FROM_TOKENS", 10**9), ("_SCREEN_SLACK", -30.0), ("_SCREEN_SLACK", 0.0)],
)
def test_the_screen_changes_no_draw(constant: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(800, 2500)
    logits[400:] = -np.inf
    logits[400:, [7, 1900]] = np.log([0.1, 0.9])
    rows = [make_row(seed=seed, temperature=0.1 + 0.1 * (seed % 40)) for seed in range(400)]
    rows += [make_row(seed=seed) for seed in range(400)]
    screened = sample(logits, rows)
    monkeypatch.setattr(sampling, constant, value)
    assert sample(logits, rows) == screened


# Rows and batches.

sampling_params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 50, 5000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.3, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "logit_bias": st.sampled_from([(), ((3, 5.0), (8, -100.0))]),
        "min_tokens": st.sampled_from([0, 10]),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({4, 5})]),
        "seed": st.integers(0, 2**64 - 1),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.sampled_from([9, 100, 2500]),
    params=st.lists(sampling_params, min_size=2, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 15),
)
def test_a_row_draws_the_same_alone_and_in_any_batch(
    vocabulary: int, params: list[dict[str, Any]], seed: int, offset: int
) -> None:
    # Rounded, so that there are ties.
    logits = np.round(random_logits(len(params), vocabulary, seed), 1)
    tokens = [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, 20)]
    rows = [
        make_row(tokens=tokens[: 8 + index], num_prompt=6, choice=index, **each)
        for index, each in enumerate(params)
    ]
    together = sample(logits, rows)
    assert sample(logits[::-1], rows[::-1]) == together[::-1]
    for values, row, expected in zip(logits, rows, together, strict=True):
        elsewhere = np.empty(vocabulary + offset, dtype=np.float32)[offset:]  # in memory of another alignment
        elsewhere[:] = values
        assert sample(elsewhere[None], [row]) == [expected]


def test_threads_draw_what_one_thread_draws() -> None:
    logits = random_logits(16, 4000)
    rows = [make_row(seed=seed, top_p=0.9 if seed % 2 else 1.0) for seed in range(16)]
    expected = sample(logits, rows)
    with ThreadPoolExecutor(4) as threads:
        assert all(result == expected for result in threads.map(lambda _: sample(logits, rows), range(8)))


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(1, 100)
    before = logits.copy()
    sample(logits, [make_row(repetition_penalty=2.0, logit_bias=((1, 5.0),), min_tokens=3, top_p=0.5)])
    assert np.array_equal(logits, before)


def test_a_seed_gives_other_tokens_at_other_positions_and_choices() -> None:
    logits = np.zeros((30, 1000), dtype=np.float32)
    by_position = sample(logits, [make_row(tokens=[0] * n) for n in range(1, 31)])
    by_choice = sample(logits, [make_row(choice=choice) for choice in range(30)])
    by_seed = sample(logits, [make_row(seed=seed) for seed in range(30)])
    for results in (by_position, by_choice, by_seed):
        assert len({result.token_id for result in results if isinstance(result, Drawn)}) > 20


# Processors, against a reference written from the contract and against transformers.


def reference_probabilities(logits: Logits, row: SampleRow) -> npt.NDArray[np.float64]:
    """The contract of inference.proto, token by token in float64, without regard to speed."""
    params, answer = row.params, list(row.tokens[row.num_prompt :])
    scores = {token: float(value) for token, value in enumerate(logits)}
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(row.tokens):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, times in Counter(answer).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * times
    if len(answer) < params.min_tokens:
        for token in params.stop_token_ids | (frozenset() if params.ignore_eos else params.eos_token_ids):
            scores[token] = -math.inf
    order = sorted(scores, key=lambda token: (-scores[token], token))
    weights = {token: math.exp((scores[token] - scores[order[0]]) / params.temperature) for token in order}
    kept = order[: params.top_k] if params.top_k else order
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if mass < params.top_p * total or params.top_p == 1.0:
            nucleus.append(token)
        mass += weights[token]
    final = [token for token in nucleus if weights[token] >= params.min_p]
    probabilities = np.zeros(len(logits))
    probabilities[final] = [weights[token] for token in final]
    total_kept: float = probabilities.sum()
    return probabilities / total_kept


HISTORY = [3, 3, 7, 1, 5, 5, 5, 9]
CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_k_and_top_p": {"top_k": 5, "top_p": 0.8, "temperature": 1.5},
    "top_p_then_min_p": {"top_p": 0.95, "min_p": 0.1, "temperature": 2.0},
    "repetition": {"repetition_penalty": 1.8},
    "repetition_reward": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "negative_penalties": {"presence_penalty": -0.5, "frequency_penalty": -0.5},
    "bias": {"logit_bias": ((0, 3.0), (6, -100.0))},
    "bias_then_repetition": {"logit_bias": ((3, -4.0), (9, 6.0)), "repetition_penalty": 1.5},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": frozenset({2}), "eos_token_ids": frozenset({5, 8})},
    "min_tokens_ignoring_eos": {"min_tokens": 6, "eos_token_ids": frozenset({5, 8}), "ignore_eos": True},
    "min_tokens_reached": {"min_tokens": 5, "eos_token_ids": frozenset({5, 8}), "presence_penalty": 0.1},
    "all": {
        "logit_bias": ((0, 2.0),),
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "min_tokens": 6,
        "stop_token_ids": frozenset({2}),
        "temperature": 1.4,
        "top_k": 8,
        "top_p": 0.9,
        "min_p": 0.05,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_processors_do_what_the_contract_says(case: str) -> None:
    for seed in range(2):
        logits = random_logits(1, 12, seed)[0]
        row = make_row(tokens=HISTORY, num_prompt=3, **CASES[case])
        expected = reference_probabilities(logits, row)
        assert_distributed(draws(logits, 1_500, tokens=HISTORY, num_prompt=3, **CASES[case]), expected)


def hf_processors(params: dict[str, Any]) -> LogitsProcessorList:
    makers: dict[str, Callable[[Any], Any]] = {
        "logit_bias": lambda bias: SequenceBiasLogitsProcessor([[[token], value] for token, value in bias]),
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "min_tokens": lambda count: MinNewTokensLengthLogitsProcessor(3, count, [5, 8], device="cpu"),
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList([make(params[name]) for name, make in makers.items() if name in params])


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((0, 3.0), (6, -9.0)), "repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.6},
        {"min_tokens": 6, "temperature": 0.8, "min_p": 0.2},
        {"repetition_penalty": 1.3, "min_tokens": 6, "temperature": 1.5, "top_k": 9, "top_p": 0.9},
    ],
)
def test_processors_do_what_transformers_does(params: dict[str, Any]) -> None:
    logits = random_logits(1, 12, seed=11)[0]
    processed = hf_processors(params)(torch.LongTensor([HISTORY]), torch.FloatTensor(logits[None]))
    expected = torch.softmax(processed[0].double(), 0).numpy()
    ours = params | {"eos_token_ids": frozenset({5, 8})}
    assert_distributed(draws(logits, 3_000, tokens=HISTORY, num_prompt=3, **ours), expected)


@pytest.mark.parametrize(
    ("vocabulary", "params", "num_kept"),
    [
        (30, {"top_k": 3}, 3),
        (5000, {"top_k": 3}, 3),
        (32, {"top_p": 0.125}, 4),
        (4096, {"top_p": 0.125}, 512),
        (4096, {"top_k": 32, "top_p": 0.25, "min_p": 1.0}, 8),
    ],
)
def test_ties_at_the_cut_keep_the_lower_ids(vocabulary: int, params: dict[str, Any], num_kept: int) -> None:
    drawn = draws(np.zeros(vocabulary, dtype=np.float32), 200, **params)
    assert max(drawn) < num_kept
    assert max(drawn) >= num_kept * 3 // 4


def test_a_nucleus_wider_than_the_first_guess_is_found() -> None:
    drawn = draws(np.zeros(40_000, dtype=np.float32), 50, top_p=0.5)
    assert 1024 < max(drawn) < 20_000


@pytest.mark.parametrize("top_p", [np.nextafter(1.0, 0.0), 0.9999999])
def test_a_nucleus_of_nearly_everything_excludes_nothing_likely(top_p: float) -> None:
    logits = random_logits(1, 3000)[0]
    assert draws(logits, 20, top_p=float(top_p)) == draws(logits, 20)
