"""Answers that go on behind the tokens of an earlier attempt, against the same answers that were never interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from decode.answers import Answer
from engine.request import Drawn
from headrace.v1 import worker_pb2
from tests.scripted_router import Choice, SessionClient, generate_locally, hand_over, request_key, task
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import (
    StepGate,
    assert_nothing_held,
    prefill_decode_and_alone,
    random_prompt,
    session,
    three_sessions,
    wait_until,
    worker,
)
from text.tokenizer import Tokenizer
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

NUM_TOKENS = 90  # behind prompts of 70: 58 known ones end a block
SEEDED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}
VARIANTS = {
    "greedy": {},
    "seeded": SEEDED,
    "penalties": {**SEEDED, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "at least": {**SEEDED, "min_tokens": 80},
    "logprobs": {**SEEDED, "logprobs": 4},
}
Clients = tuple[SessionClient, SessionClient, SessionClient]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def nodes(model_dir: Path) -> Iterator[tuple[WorkerNode, WorkerNode, WorkerNode]]:
    """A prefill worker, a decode worker, and one that is never interrupted."""
    with prefill_decode_and_alone(model_dir) as nodes:
        yield nodes


@pytest.fixture
def clients(nodes: tuple[WorkerNode, WorkerNode, WorkerNode]) -> Iterator[Clients]:
    with three_sessions(nodes) as clients:
        yield clients


def going_on(
    work: worker_pb2.GenerationTask, whole: Sequence[Choice], known: Sequence[int]
) -> worker_pb2.GenerationTask:
    """The task of another attempt, when `known[i]` tokens of choice i are there."""
    resumed = worker_pb2.GenerationTask()
    resumed.CopyFrom(work)
    for choice, num_tokens in zip(whole, known, strict=True):
        resumed.so_far.add(
            token_ids=choice.token_ids[:num_tokens], finished=num_tokens == len(choice.token_ids)
        )
    return resumed


def text_of(model_dir: Path, work: worker_pb2.GenerationTask, token_ids: Sequence[int]) -> str:
    """What comes with the first tokens of an answer: it may lag them."""
    answer = Answer(request_key("text"), Tokenizer.open(model_dir), work)
    for token_id in token_ids:
        answer.choices[0].feed(Drawn(token_id))
    return "".join(output.delta.text for output in answer.take())


@pytest.mark.parametrize(
    ("variant", "num_known", "is_local"),
    [
        *((variant, num_known, False) for variant in VARIANTS for num_known in (1, 58, 89)),
        *((variant, 47, True) for variant in VARIANTS),
    ],
)
def test_an_answer_goes_on_as_if_never_interrupted(
    clients, model_dir, variant, num_known: int, is_local: bool
) -> None:
    prefill, decode, alone = clients
    work = task(random_prompt(3, 70), max_tokens=NUM_TOKENS, ignore_eos=True, **VARIANTS[variant])
    key = request_key(f"{variant}-{num_known}-{is_local}")
    (whole,) = generate_locally(alone, key, work)
    assert len(whole.token_ids) == NUM_TOKENS
    resumed = going_on(work, [whole], [num_known])
    if is_local:
        (rest,) = generate_locally(decode, key, resumed)
    else:
        hand_over(prefill, decode, key, resumed)
        (rest,) = decode.answer(key)
    assert rest.token_ids == whole.token_ids[num_known:]
    assert rest.logprobs == whole.logprobs[num_known:]
    assert rest.finished == whole.finished
    assert text_of(model_dir, work, whole.token_ids[:num_known]) + rest.text == whole.text


@pytest.mark.parametrize("is_local", [False, True], ids=["handed over", "local"])
@pytest.mark.parametrize("known", [(5, 5, 5), (1, 40, 0), (90, 3, 90), (0, 90, 12), (0, 0, 1)])
def test_choices_go_on_each_from_its_own_place(
    clients, model_dir, known: tuple[int, ...], is_local: bool
) -> None:
    prefill, decode, alone = clients
    work = task(
        random_prompt(4, 100), max_tokens=NUM_TOKENS, ignore_eos=True, n=3, frequency_penalty=0.3, **SEEDED
    )
    key = request_key(f"choices-{known}-{is_local}")
    whole = generate_locally(alone, key, work)
    resumed = going_on(work, whole, known)
    going = [choice for choice, num_tokens in enumerate(known) if num_tokens < NUM_TOKENS]
    if is_local:
        decode.send(reserve=worker_pb2.Reserve(key=key, task=resumed, remaining_s=60.0, local_prefill=True))
    else:
        hand_over(prefill, decode, key, resumed)
    decode.wait(
        lambda: sum(choice.finished is not None for choice in decode.so_far(key).values()) == len(going),
        "the choices that go on",
    )
    rest = decode.so_far(key)
    assert sorted(rest) == going
    for choice in going:
        assert rest[choice].token_ids == whole[choice].token_ids[known[choice] :]
        assert rest[choice].finished == whole[choice].finished
        shown = text_of(model_dir, work, whole[choice].token_ids[: known[choice]])
        assert shown + rest[choice].text == whole[choice].text


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_stop_string_that_had_begun_still_ends_the_answer(clients, before: int) -> None:
    prefill, decode, alone = clients
    prompt = random_prompt(5, 40)
    (free,) = generate_locally(
        alone, request_key(f"free-{before}"), task(prompt, max_tokens=40, ignore_eos=True)
    )
    stop = free.text[10:14]
    work = task(prompt, max_tokens=40, ignore_eos=True, stop=[stop])
    (whole,) = generate_locally(alone, request_key(f"stopped-{before}"), work)
    assert whole.finished.stop == stop
    key = request_key(f"stopped-again-{before}")
    hand_over(prefill, decode, key, going_on(work, [whole], [len(whole.token_ids) - before]))
    (rest,) = decode.answer(key)
    assert rest.token_ids == whole.token_ids[-before:]
    assert rest.finished == whole.finished


@pytest.mark.parametrize("when", ["while it is written", "after its end"])
def test_another_router_goes_on_with_an_answer_from_its_first_token(nodes, when: str) -> None:
    _, decode, alone = nodes
    work = task(random_prompt(9, 70), max_tokens=60, ignore_eos=True, n=2, logprobs=1, **SEEDED)
    work.resumable = True
    name = f"taken over {when}"
    first, second = request_key(name), request_key(name, attempt=2)
    gate = StepGate(decode.engine)
    with session(alone) as to_alone, session(decode) as to_decode, session(decode, "other") as other:
        whole = generate_locally(to_alone, first, work)
        to_decode.send(reserve=worker_pb2.Reserve(key=first, task=work, remaining_s=60.0, local_prefill=True))
        gate.allow(20)
        to_decode.wait(lambda: to_decode.num_tokens(first) >= 10, "some tokens")
        to_decode.acknowledge(first, 0, 10)
        if when == "after its end":
            gate.open()
            for choice, answer in enumerate(to_decode.answer(first, 2)):
                to_decode.acknowledge(first, choice, len(answer.token_ids))
        other.send(take_over=worker_pb2.TakeOver(key=second))
        other.send(take_over=worker_pb2.TakeOver(key=second))  # a repeat begins again, and nothing else
        assert other.reserved(second).cached_tokens == to_decode.reserved(first).cached_tokens
        if when == "while it is written":
            assert to_decode.failed(first).cause == "TAKEN_OVER"
        to_decode.send(cancel=worker_pb2.CancelAttempt(key=first, cause="too late"))
        gate.open()
        answer = last_replay(other, second, 2)
        assert [(c.token_ids, c.text, c.logprobs) for c in answer] == [
            (c.token_ids, c.text, c.logprobs) for c in whole
        ]
    assert_nothing_held(decode)


def last_replay(client: SessionClient, key: worker_pb2.RequestKey, num_choices: int) -> list[Choice]:
    """The whole answer, from where it was sent from its first token for the last time."""

    def read() -> list[Choice]:
        choices = [Choice() for _ in range(num_choices)]
        for message in list(client.messages):
            for output in (o for o in message.step.outputs if o.key == key):
                delta, choice = output.delta, choices[output.delta.choice]
                if delta.first_index == 0:
                    choices[delta.choice] = choice = Choice()
                assert delta.first_index == len(choice.token_ids)
                choice.token_ids.extend(delta.token_ids)
                choice.text += delta.text
                choice.logprobs.extend(delta.logprobs)
                choice.finished = output.finished if output.HasField("finished") else None
        return choices

    client.wait(lambda: all(choice.finished is not None for choice in read()), "an answer")
    return read()


@pytest.mark.parametrize("why", ["unknown", "not kept", "older"])
def test_an_answer_that_cannot_be_taken_over_is_refused(clients, why: str) -> None:
    _, decode, _ = clients
    work = task(random_prompt(10, 40), max_tokens=5, ignore_eos=True)
    work.resumable = why == "older"
    key = request_key(f"refused {why}", attempt=3)
    if why != "unknown":
        generate_locally(decode, key, work)
    other = request_key(f"refused {why}", attempt=2 if why == "older" else 4)
    decode.send(take_over=worker_pb2.TakeOver(key=other))
    failure = decode.failed(other)
    assert (failure.cause, failure.retryable) == ("UNKNOWN_REQUEST", True)


def test_the_router_of_an_older_attempt_is_told_that_another_one_begins_anew(nodes) -> None:
    _, decode, _ = nodes
    work = task(random_prompt(11, 40), max_tokens=400, ignore_eos=True)
    first, second = request_key("begun anew"), request_key("begun anew", attempt=2)
    with session(decode) as to_decode, session(decode, "other") as other:
        to_decode.send(reserve=worker_pb2.Reserve(key=first, task=work, remaining_s=60.0, local_prefill=True))
        to_decode.reserved(first)
        other.send(reserve=worker_pb2.Reserve(key=second, task=work, remaining_s=60.0, local_prefill=True))
        other.reserved(second)
        assert to_decode.failed(first).cause == "TAKEN_OVER"
        other.send(cancel=worker_pb2.CancelAttempt(key=second, cause="CANCELLED"))
        assert_nothing_held(decode)


def test_an_attempt_is_that_of_the_router_that_asked_for_it(nodes) -> None:
    """Two routers that do not know of each other may count alike."""
    prefill, decode, alone = nodes
    work = task(random_prompt(13, 150), max_tokens=40, ignore_eos=True)
    key = request_key("counted alike")
    gate = StepGate(prefill.engine)
    with (
        session(alone) as to_alone,
        two_routers(prefill, decode) as (to_prefill, to_decode, other_prefill, other_decode),
    ):
        whole = generate_locally(to_alone, key, work)
        lease = hand_over(to_prefill, to_decode, key, work)
        other_decode.send(reserve=worker_pb2.Reserve(key=key, task=work, remaining_s=60.0))
        assert other_decode.failed(key).cause == "STALE_ATTEMPT"
        start = worker_pb2.StartPrefill(key=key, task=work, remaining_s=60.0, lease=lease)
        other_prefill.send(start_prefill=start)
        assert other_prefill.failed(key).cause == "STALE_ATTEMPT"
        for other in (other_prefill, other_decode):
            other.send(cancel=worker_pb2.CancelAttempt(key=key, cause="CLIENT_DISCONNECTED"))
            other.send(resume=worker_pb2.ResumeStream(key=key))
            other.wait(
                lambda other=other: has_failed(other, key, "TAKEN_OVER"), "the word that it is another's"
            )
        gate.open()
        answer = to_decode.answer(key)
        assert [choice.token_ids for choice in answer] == [choice.token_ids for choice in whole]


@contextmanager
def two_routers(prefill: WorkerNode, decode: WorkerNode) -> Iterator[tuple[SessionClient, ...]]:
    """Two streams of one router and two of another, after which the workers hold nothing."""
    with (
        session(prefill) as to_prefill,
        session(decode) as to_decode,
        session(prefill, "other") as other_prefill,
        session(decode, "other") as other_decode,
    ):
        yield to_prefill, to_decode, other_prefill, other_decode
    assert_nothing_held(prefill, decode)


def has_failed(client: SessionClient, key: worker_pb2.RequestKey, cause: str) -> bool:
    return any(m.failed.key == key and m.failed.error.cause == cause for m in list(client.messages))


def test_the_router_of_a_prompt_is_told_that_another_one_goes_on_with_it(nodes) -> None:
    prefill, decode, _ = nodes
    work = task(random_prompt(14, 300), max_tokens=5)
    first, second = request_key("gone on with"), request_key("gone on with", attempt=2)
    gate = StepGate(prefill.engine)
    with two_routers(prefill, decode) as (to_prefill, to_decode, other_prefill, other_decode):
        hand_over(to_prefill, to_decode, first, work)
        gate.allow(1)
        gate.wait_until_held()
        hand_over(other_prefill, other_decode, second, work)
        assert to_prefill.failed(first).cause == to_decode.failed(first).cause == "TAKEN_OVER"
        gate.open()
        other_decode.answer(second)


def test_a_resumed_answer_that_is_too_long_or_of_other_choices_is_refused(clients) -> None:
    _, decode, _ = clients
    work = task(random_prompt(6, 500), max_tokens=100)
    work.so_far.add(token_ids=[1] * 20)
    decode.send(reserve=worker_pb2.Reserve(key=request_key("long"), task=work, remaining_s=60.0))
    assert decode.failed(request_key("long")).cause == "INVALID_TASK"
    work = task(random_prompt(6, 50), max_tokens=100)
    work.so_far.add(token_ids=[1])
    work.so_far.add(token_ids=[2])
    decode.send(reserve=worker_pb2.Reserve(key=request_key("others"), task=work, remaining_s=60.0))
    assert "2 choices so far of 1" in decode.failed(request_key("others")).message


def test_what_had_landed_of_a_broken_transfer_is_named_in_the_next_grant(model_dir: Path) -> None:
    """The prefill worker stops for good in mid-prompt; the blocks that arrived whole need not travel again."""
    with (
        worker(model_dir, WorkerRole.PREFILL, worker_id="p-1", codec="raw") as first,
        worker(model_dir, WorkerRole.PREFILL, worker_id="p-2", codec="raw") as second,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(first) as to_first,
        session(second) as to_second,
        session(decode) as to_decode,
    ):
        gate = StepGate(first.engine)
        prompt = random_prompt(8, 400)
        work = task(prompt)
        gate.allow(3)  # 192 of the 400 tokens
        hand_over(to_first, to_decode, request_key("r"), work)
        gate.wait_until_held()
        wait_until(
            lambda: landed_bytes(decode) >= decode.engine.layout.num_bytes(192), "what was computed to land"
        )
        to_decode.send(cancel=worker_pb2.CancelAttempt(key=request_key("r"), cause="SUPERSEDED"))
        again = request_key("r", attempt=2)
        lease = hand_over(to_second, to_decode, again, work)
        assert lease.cached_tokens == 192
        answer = to_decode.answer(again)
        finished = to_second.prefill_finished(again)
        assert finished.transferred_tokens == 400 - 192
        gate.open()
        with worker(model_dir, WorkerRole.BOTH) as alone, session(alone) as to_alone:
            (whole,) = generate_locally(to_alone, request_key("r"), work)
        assert answer[0].token_ids == whole.token_ids
        to_first.send(cancel=worker_pb2.CancelAttempt(key=request_key("r"), cause="SUPERSEDED"))
        assert_nothing_held(first, second, decode)


def landed_bytes(node: WorkerNode) -> int:
    """Bytes that have landed in a worker's open leases."""
    with node.engine.lock:
        tables = [keeper._table for keeper in node._keepers]
        leases = [lease for table in tables for lease in table._leases.values() if lease.state.is_open]
        return sum(record.raw_bytes for lease in leases for record, _ in lease.landed.values())


def test_an_attempt_number_that_is_used_again_for_another_lease_is_another_attempt(clients) -> None:
    """A router that was restarted counts from where its handle had been."""
    prefill, decode, _ = clients
    work = task(random_prompt(12, 100))
    key = request_key("counted again")
    hand_over(prefill, decode, key, work)
    decode.answer(key)
    assert prefill.prefill_finished(key)
    lease = worker_pb2.Reserved(key=key, lease_id=b"another lease 16", kv_address="127.0.0.1:1")
    prefill.send(start_prefill=worker_pb2.StartPrefill(key=key, task=work, remaining_s=60.0, lease=lease))
    assert prefill.failed(key).cause == "LEASE_CLOSED"


def test_an_attempt_number_that_is_used_again_while_its_prompt_is_computed_leaves_that_alone(
    model_dir: Path,
) -> None:
    """The router is told to count on."""
    with (
        worker(model_dir, WorkerRole.PREFILL, codec="raw") as prefill,
        worker(model_dir, WorkerRole.DECODE) as decode,
        session(prefill) as to_prefill,
        session(decode) as to_decode,
    ):
        gate = StepGate(prefill.engine)
        work, key = task(random_prompt(13, 400)), request_key("counted again")
        gate.allow(1)
        lease = hand_over(to_prefill, to_decode, key, work)
        gate.wait_until_held()
        other = worker_pb2.Reserved()
        other.CopyFrom(lease)
        other.lease_id = b"another lease 16"
        to_prefill.send(
            start_prefill=worker_pb2.StartPrefill(key=key, task=work, remaining_s=60.0, lease=other)
        )
        assert to_prefill.failed(key).cause == "STALE_ATTEMPT"
        gate.open()
        assert to_decode.answer(key)
        assert to_prefill.prefill_finished(key)
        assert_nothing_held(prefill, decode)
