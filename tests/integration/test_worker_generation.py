"""A prompt computed on one worker and answered on another, against the same prompt on one worker alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.v1 import inference_pb2
from tests.scripted_router import Choice, SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    prefill_decode_and_alone,
    random_prompt,
    three_sessions,
)
from text.tokenizer import Tokenizer
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

SEEDED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
VARIANTS = {
    "greedy": {},
    "seeded": SEEDED,
    "penalties": {**SEEDED, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "three choices": {**SEEDED, "n": 3},
    "logprobs": {**SEEDED, "logprobs": 4},
    "biased": {**SEEDED, "logit_bias": {65: 3.0, 66: -100.0}, "min_p": 0.01},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nodes(model_dir: Path) -> Iterator[tuple[WorkerNode, WorkerNode, WorkerNode]]:
    """A prefill worker, a decode worker, and one that does both, for comparison."""
    with prefill_decode_and_alone(model_dir) as nodes:
        yield nodes


@pytest.fixture
def clients(
    nodes: tuple[WorkerNode, WorkerNode, WorkerNode],
) -> Iterator[tuple[SessionClient, SessionClient, SessionClient]]:
    with three_sessions(nodes) as clients:
        yield clients


def _same(one: list[Choice], other: list[Choice]) -> bool:
    return [(c.token_ids, c.text, c.logprobs, c.finished) for c in one] == [
        (c.token_ids, c.text, c.logprobs, c.finished) for c in other
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_prompt", [1, 63, 64, 200])
def test_a_handed_over_answer_equals_the_local_one(clients, variant: str, num_prompt: int) -> None:
    prefill, decode, alone = clients
    work = task(random_prompt(num_prompt, num_prompt), max_tokens=20, **VARIANTS[variant])
    key = request_key(f"{variant}-{num_prompt}")
    lease = hand_over(prefill, decode, key, work)
    handed_over = decode.answer(key, work.sampling.n)
    assert _same(handed_over, generate_locally(alone, key, work))
    assert [choice.finished.reason for choice in handed_over] == [
        inference_pb2.FINISH_REASON_LENGTH
    ] * work.sampling.n
    assert all(len(choice.token_ids) == 20 for choice in handed_over)
    finished = prefill.prefill_finished(key)
    assert finished.computed_tokens + finished.cached_tokens == num_prompt
    assert finished.transferred_tokens + lease.cached_tokens == num_prompt
    assert finished.kv_bytes < finished.wire_bytes


def test_answers_that_run_together_equal_those_that_run_alone(clients) -> None:
    prefill, decode, alone = clients
    keys = [request_key(f"together-{number}") for number in range(6)]
    works = [
        task(random_prompt(100 + number, 30 + 41 * number), max_tokens=24, **(SEEDED if number % 2 else {}))
        for number in range(6)
    ]
    for key, work in zip(keys, works, strict=True):
        hand_over(prefill, decode, key, work)
    together = [decode.answer(key) for key in keys]
    alone_each = [generate_locally(alone, key, work) for key, work in zip(keys, works, strict=True)]
    assert all(_same(*pair) for pair in zip(together, alone_each, strict=True))


def test_a_prefix_that_the_decode_worker_holds_does_not_travel_again(clients) -> None:
    prefill, decode, _ = clients
    prompt = random_prompt(1, 150)
    first, second = request_key("turn-1"), request_key("turn-2")
    hand_over(prefill, decode, first, task(prompt))
    answer = decode.answer(first)
    longer = task([*prompt, *random_prompt(2, 50)])
    lease = hand_over(prefill, decode, second, longer)
    decode.answer(second)
    finished = prefill.prefill_finished(second)
    assert lease.cached_tokens == 128
    assert finished.transferred_tokens == 200 - 128
    assert finished.cached_tokens == 128
    assert len(answer[0].token_ids) == 16


def test_another_tenant_finds_no_prefix(clients) -> None:
    _, decode, _ = clients
    work = task(random_prompt(3, 150))
    generate_locally(decode, request_key("mine", tenant="a"), work)
    generate_locally(decode, request_key("mine again", tenant="a"), work)
    generate_locally(decode, request_key("theirs", tenant="b"), work)
    cached = [
        decode.prefill_finished(request_key(name, tenant=tenant)).cached_tokens
        for name, tenant in (("mine", "a"), ("mine again", "a"), ("theirs", "b"))
    ]
    assert cached == [0, 128, 0]


def test_a_local_prefill_reports_no_wire_bytes(clients) -> None:
    _, decode, _ = clients
    key = request_key("local")
    generate_locally(decode, key, task(random_prompt(4, 100)))
    finished = decode.prefill_finished(key)
    assert (finished.computed_tokens, finished.kv_bytes, finished.wire_bytes) == (100, 0, 0)
    assert finished.prefill_s > 0


def test_a_first_token_that_ends_the_answer_is_the_whole_of_it(clients) -> None:
    prefill, decode, _ = clients
    key = request_key("one token")
    hand_over(prefill, decode, key, task(random_prompt(5, 80), max_tokens=1))
    [choice] = decode.answer(key)
    assert (len(choice.token_ids), choice.finished.num_tokens) == (1, 1)


def test_a_stop_token_ends_the_answer_and_is_not_shown(clients, model_dir: Path) -> None:
    prefill, decode, alone = clients
    prompt = random_prompt(6, 80)
    [free] = generate_locally(alone, request_key("free"), task(prompt))
    stop = free.token_ids[4]
    expected = free.token_ids[: free.token_ids.index(stop) + 1]
    key = request_key("stop token")
    hand_over(prefill, decode, key, task(prompt, eos=[stop]))
    [choice] = decode.answer(key)
    assert choice.token_ids == expected
    assert choice.finished.reason == inference_pb2.FINISH_REASON_STOP
    assert choice.finished.stop_token_id == stop
    shown = Tokenizer.open(model_dir)
    assert choice.text == shown.decode(expected[:-1])


def test_a_stop_string_ends_the_answer_before_it(clients) -> None:
    prefill, decode, alone = clients
    prompt = random_prompt(7, 80)
    [free] = generate_locally(alone, request_key("free 2"), task(prompt, max_tokens=40))
    stop = free.text[len(free.text) // 2 :][:3]
    key = request_key("stop string")
    hand_over(prefill, decode, key, task(prompt, max_tokens=40, stop=[stop, "never to be seen"]))
    [choice] = decode.answer(key)
    assert choice.text == free.text[: free.text.index(stop)]
    assert (choice.finished.reason, choice.finished.stop) == (inference_pb2.FINISH_REASON_STOP, stop)
    assert choice.token_ids == free.token_ids[: choice.finished.num_tokens]
    assert choice.finished.num_tokens < 40


def test_one_choice_may_stop_while_the_others_go_on(clients) -> None:
    prefill, decode, alone = clients
    prompt = random_prompt(8, 80)
    sampling = {**SEEDED, "n": 3}
    free = generate_locally(alone, request_key("free 3"), task(prompt, **sampling))
    stop = free[1].token_ids[3]
    key = request_key("one stops")
    hand_over(prefill, decode, key, task(prompt, eos=[stop], **sampling))
    answers = decode.answer(key, 3)
    for choice, unbounded in zip(answers, free, strict=True):
        ids = unbounded.token_ids
        assert choice.token_ids == (ids[: ids.index(stop) + 1] if stop in ids else ids)
