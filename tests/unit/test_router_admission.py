"""What the router refuses at the door, and what it fills in."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.v1 import inference_pb2 as pb
from router.core import admission
from router.core.admission import Limits
from router.core.failures import Code, Rejection, Stage
from router.prompts import ChatPrompt, TextPrompt, TokenPrompt, body_digest

pytestmark = pytest.mark.unit

LIMITS = Limits(model="tiny", max_context=128, vocab_size=1000)


def rejected(check, *args) -> Rejection:
    with pytest.raises(Rejection) as caught:
        check(*args)
    assert caught.value.failure.stage is Stage.ADMISSION
    assert not caught.value.failure.retryable
    return caught.value


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.01}, "min_p"),
        ({"min_p": 1.01}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": 2.01}, "presence_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": -2.01}, "frequency_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {5: 100.5}}, "logit_bias[5]"),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5]"),
        ({"logit_bias": {1000: 1.0}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"n": 17}, "n is 17"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x"] * 5000}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["é" * 129]}, "stop[0]"),
        ({"stop_token_ids": range(65)}, "stop_token_ids"),
        ({"stop_token_ids": [1000]}, "stop_token_ids"),
    ],
)
def test_sampling_outside_its_range_is_refused_by_name(fields, named):
    rejection = rejected(admission.check_sampling, pb.SamplingParams(**fields), LIMITS)
    assert rejection.failure.code is Code.INVALID_ARGUMENT
    assert f"sampling.{named}" in rejection.failure.message


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0, "top_p": 1.0, "min_p": 0.0, "top_k": 2**32 - 1},
        {"top_p": 1e-9, "min_p": 1.0, "repetition_penalty": 1e-9},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"logit_bias": {0: -100.0, 999: 100.0}},
        {"max_tokens": 1, "min_tokens": 1, "n": 16, "logprobs": 20},
        {"stop": ["é" * 128] * 16, "stop_token_ids": range(64)},
        {"seed": 2**64 - 1, "ignore_eos": True, "max_tokens": 2**31 - 1},
    ],
)
def test_sampling_at_the_edge_of_its_range_is_taken(fields):
    admission.check_sampling(pb.SamplingParams(**fields), LIMITS)


@pytest.mark.parametrize("request_id", ["x" * 129, "line\nbreak", "\x00", "\x1b[31m"])
def test_request_ids_that_are_long_or_unprintable_are_refused(request_id):
    rejected(admission.check_request_id, request_id)


@pytest.mark.parametrize("request_id", ["", "x" * 128, "Grüße-42"])
def test_request_ids_that_can_be_printed_are_taken(request_id):
    admission.check_request_id(request_id)


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -1.0])
def test_a_timeout_that_is_no_length_of_time_is_refused(timeout_s):
    rejected(admission.check_timeout, timeout_s)


def test_another_model_is_not_found():
    assert rejected(admission.check_model, "other", LIMITS).failure.code is Code.NOT_FOUND
    admission.check_model("", LIMITS)
    admission.check_model("tiny", LIMITS)


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        (TextPrompt(""), "EMPTY_PROMPT"),
        (TextPrompt("x" * (10 << 20)), "PROMPT_TOO_LONG"),
        (TextPrompt("é" * (128 * 32 + 1)), "PROMPT_TOO_LONG"),
        (TokenPrompt([]), "EMPTY_PROMPT"),
        (TokenPrompt([1] * 128), "PROMPT_TOO_LONG"),
        (TokenPrompt([999, 1000]), "BAD_TOKEN_ID"),
        (ChatPrompt([]), "EMPTY_PROMPT"),
        (ChatPrompt([pb.ChatMessage(role="root", content="x")]), "BAD_ROLE"),
        (ChatPrompt([pb.ChatMessage(role="user", content="x" * 9000)]), "PROMPT_TOO_LONG"),
        (ChatPrompt([pb.ChatMessage(role="user")] * 129), "PROMPT_TOO_LONG"),
    ],
)
def test_prompts_that_can_never_be_served_are_refused_before_they_are_tokenized(prompt, cause):
    assert rejected(prompt.check, LIMITS).failure.cause == cause


def test_prompts_that_may_fit_are_taken():
    TextPrompt("é" * 128 * 32).check(LIMITS)
    TokenPrompt([0, 999] * 63).check(LIMITS)
    ChatPrompt([pb.ChatMessage(role="system"), pb.ChatMessage(role="user", content="hi")]).check(LIMITS)


@pytest.mark.parametrize("num_tokens", [0, 128, 129])
def test_a_tokenized_prompt_must_leave_room_for_one_token_of_answer(num_tokens):
    rejected(admission.check_prompt_length, num_tokens, LIMITS)
    admission.check_prompt_length(127, LIMITS)


def test_completed_sampling_has_every_default_and_keeps_what_was_asked():
    asked = pb.SamplingParams(temperature=0.0, stop=["\n"], logit_bias={3: 1.5}, min_tokens=2)
    complete = admission.complete_sampling(asked, 100, LIMITS, seed=7)
    assert complete.HasField("temperature") and complete.temperature == 0.0
    assert (complete.top_p, complete.repetition_penalty, complete.n, complete.seed) == (1.0, 1.0, 1, 7)
    assert complete.max_tokens == 28
    assert list(complete.stop) == ["\n"] and dict(complete.logit_bias) == {3: 1.5}
    assert not complete.HasField("logprobs")
    assert asked == pb.SamplingParams(temperature=0.0, stop=["\n"], logit_bias={3: 1.5}, min_tokens=2)


@settings(deadline=None, max_examples=50)
@given(
    num_prompt=st.integers(1, 127),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
)
def test_an_answer_never_outgrows_the_context_and_an_asked_seed_is_kept(num_prompt, max_tokens, seed):
    complete = admission.complete_sampling(
        pb.SamplingParams(max_tokens=max_tokens, seed=seed),
        num_prompt,
        LIMITS,
        seed=1 if seed is None else seed,
    )
    left = LIMITS.max_context - num_prompt
    assert complete.max_tokens == (left if max_tokens is None else min(max_tokens, left))
    assert complete.seed == (1 if seed is None else seed)


def test_more_obligatory_tokens_than_the_context_leaves_are_refused():
    asked = pb.SamplingParams(min_tokens=29)
    assert rejected(admission.complete_sampling, asked, 100, LIMITS, 0).failure.cause == "BAD_MIN_TOKENS"


def test_only_seeded_and_greedy_requests_are_repeatable():
    assert admission.is_repeatable(pb.SamplingParams(seed=0))
    assert admission.is_repeatable(pb.SamplingParams(temperature=0.0))
    assert not admission.is_repeatable(pb.SamplingParams())
    assert not admission.is_repeatable(pb.SamplingParams(temperature=0.5))


def test_the_body_digest_tells_apart_what_determines_the_answer():
    greedy, seeded = pb.SamplingParams(temperature=0.0), pb.SamplingParams(seed=1)
    bias = pb.SamplingParams(logit_bias=dict.fromkeys(range(20), 1.0))
    bias_again = pb.SamplingParams(logit_bias=dict.fromkeys(reversed(range(20)), 1.0))
    digests = [
        body_digest("m", TextPrompt("a"), greedy),
        body_digest("m", TextPrompt("a"), seeded),
        body_digest("m", TextPrompt("b"), greedy),
        body_digest("n", TextPrompt("a"), greedy),
        body_digest("m", TokenPrompt([97]), greedy),
        body_digest("m", ChatPrompt([pb.ChatMessage(role="user", content="a")]), greedy),
        body_digest("m", TextPrompt("a"), bias),
    ]
    assert len(set(digests)) == len(digests)
    assert body_digest("m", TextPrompt("a"), bias_again) == digests[-1]
