"""What goes wrong on the way: refusals, failures, lost workers, cancels and deadlines."""

from collections.abc import AsyncIterator

import grpc
import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from router.core.retries import MAX_WORKERS_LOST
from tests.integration.router_harness import STOP, Harness, Stream, running_router
from tests.integration.scripted_worker import ScriptedWorker

pytestmark = pytest.mark.integration

STATES = ["QUEUED", "PLACED", "PREFILLING", "DECODING"]


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with running_router() as harness:
        yield harness


async def advance(
    router: Harness, prefill: ScriptedWorker, decode: ScriptedWorker, state: str, **fields
) -> Stream:
    """A request `one` that has come as far as `state` on a pair of workers."""
    if state == "QUEUED":
        await router.tell_load(decode, free_blocks=0)
    stream = router.generate(request_id="one", **fields)
    await stream.until("accepted")
    if state in ("PREFILLING", "DECODING"):
        reserve = await decode.expect("reserve")
        decode.grant(reserve)
        await prefill.expect("start_prefill")
    elif state == "PLACED":
        await decode.expect("reserve")
    if state == "DECODING":
        decode.say(reserve.key, 0, "so far")
        await stream.until("so far")
    await router.until_state("one", pb.RequestState.Value(f"REQUEST_STATE_{state}"))
    return stream


async def is_idle(router: Harness, prefill: ScriptedWorker, decode: ScriptedWorker) -> None:
    """Shows that nothing is held: as many requests as a prefill worker takes are served at once."""
    await router.tell_load(decode, free_blocks=decode.hello.num_blocks)
    streams = [router.generate(request_id=f"after-{n}") for n in range(2)]
    for _ in streams:
        reserve = await decode.expect("reserve")
        decode.grant(reserve)
        start = await prefill.expect("start_prefill")
        prefill.finish_prefill(start.key)
        decode.say(reserve.key, 0, "x", finish=STOP)
    for stream in streams:
        assert (await stream.end()).text == {0: "x"}


@pytest.mark.parametrize("cause", ["NO_CAPACITY", "NOT_SERVING"])
async def test_a_refused_reservation_goes_back_to_the_head_of_the_queue(router: Harness, cause):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH, max_sequences=1)
    first = router.generate(request_id="first")
    reserve = await worker.expect("reserve")
    second = router.generate(request_id="second")
    await second.until("accepted")
    worker.fail(reserve.key, "reserve", cause, retryable=True)
    again = await worker.expect("reserve")
    assert (again.key.request_id, again.key.attempt) == ("first", 2)
    worker.grant(again)
    worker.say(again.key, 0, "x", finish=STOP)
    assert (await first.end()).text == {0: "x"}
    assert (await worker.expect("reserve")).key.request_id == "second"


async def test_a_reservation_that_is_always_refused_ends_with_the_deadline(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one", timeout_s=0.8)
    worker.fail((await worker.expect("reserve")).key, "reserve", "NO_CAPACITY", retryable=True)
    worker.fail((await worker.expect("reserve")).key, "reserve", "NO_CAPACITY", retryable=True)
    answer = await stream.end()
    assert answer.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert answer.error.cause == "DEADLINE_EXCEEDED"


async def test_an_id_that_a_worker_remembers_gets_a_higher_attempt(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    attempts = []
    for cause in ("LEASE_CLOSED", "STALE_ATTEMPT", "CANCELLED"):
        reserve = await worker.expect("reserve")
        attempts.append(reserve.key.attempt)
        worker.fail(reserve.key, "reserve", cause)
    reserve = await worker.expect("reserve")
    attempts.append(reserve.key.attempt)
    assert attempts == sorted(set(attempts))
    worker.grant(reserve)
    worker.say(reserve.key, 0, "x", finish=STOP)
    assert (await stream.end()).text == {0: "x"}


@pytest.mark.parametrize(
    ("stage", "cause", "retryable", "code"),
    [
        ("prefill", "NAN_LOGITS", False, grpc.StatusCode.INTERNAL),
        ("prefill", "OUT_OF_VOCABULARY", False, grpc.StatusCode.INTERNAL),
        ("handoff", "DEADLINE_EXCEEDED", False, grpc.StatusCode.DEADLINE_EXCEEDED),
        ("prefill", "INVALID_TASK", False, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_failed_prefill_reaches_the_client_with_stage_and_cause(
    router: Harness, stage, cause, retryable, code
):
    prefill, decode = await router.pair()
    stream = router.generate(request_id="one")
    decode.grant(await decode.expect("reserve"))
    start = await prefill.expect("start_prefill")
    prefill.fail(start.key, stage, cause, "it broke", retryable=retryable)
    answer = await stream.end()
    assert answer.code == code
    assert answer.error == pb.ErrorDetail(
        request_id="one", stage=stage, cause=cause, message="it broke", retryable=retryable, attempt=1
    )
    for worker in (prefill, decode):
        cancel = await worker.expect("cancel")
        assert (cancel.key, cancel.cause) == (start.key, cause)
    await is_idle(router, prefill, decode)


async def test_a_failure_in_mid_answer_comes_after_the_tokens_before_it(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    worker.grant(reserve)
    worker.say(reserve.key, 0, "so far")
    worker.fail(reserve.key, "decode", "NAN_LOGITS")
    answer = await stream.end()
    assert answer.text == {0: "so far"}
    assert (answer.error.stage, answer.error.cause) == ("decode", "NAN_LOGITS")
    assert list((await router.get("one")).completion_tokens) == [6]


async def test_a_prefill_worker_that_fails_after_the_handoff_changes_nothing(router: Harness):
    prefill, decode = await router.pair()
    stream = await advance(router, prefill, decode, "DECODING")
    key = worker_pb2.RequestKey(tenant="default", request_id="one", attempt=1)
    prefill.fail(key, "handoff", "COMMIT_UNANSWERED")
    await prefill.stop()
    decode.say(key, 6, "!", finish=STOP)
    assert (await stream.end()).text == {0: "so far!"}


@pytest.mark.parametrize("state", ["PLACED", "PREFILLING", "DECODING"])
@pytest.mark.parametrize("lost", ["prefill", "decode"])
async def test_requests_of_a_lost_worker_go_on_elsewhere_behind_the_tokens_that_came(state, lost):
    async with running_router(link_grace_s=0.2) as router:
        prefill, decode = await router.pair()
        stream = await advance(router, prefill, decode, state)
        other = await router.worker("b", worker_pb2.ROLE_BOTH)
        await (prefill if lost == "prefill" else decode).stop()
        survivor = decode if lost == "prefill" else prefill
        if (state, lost) == ("DECODING", "prefill"):
            key = worker_pb2.RequestKey(tenant="default", request_id="one", attempt=1)
            decode.say(key, 6, "!", finish=STOP)
            assert (await stream.end()).text == {0: "so far!"}
            return
        assert (await survivor.expect("cancel")).cause == "WORKER_LOST"
        reserve = await other.expect("reserve")
        known = b"so far" if state == "DECODING" else b""
        assert reserve.key.attempt == 2
        assert [bytes(choice.token_ids) for choice in reserve.task.so_far] == [known][: len(known)]
        other.grant(reserve)
        other.say(reserve.key, len(known), "!", finish=STOP)
        answer = await stream.end()
        assert answer.text == {0: known.decode() + "!"}
        assert answer.done.timing.attempts == 2
        assert answer.done.timing.decode_worker == other.hello.worker_id


async def test_a_request_that_takes_its_workers_down_ends_after_few_of_them():
    async with running_router(link_grace_s=60.0) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH, epoch=1)
        stream = router.generate(request_id="poison")
        for epoch in range(2, MAX_WORKERS_LOST + 3):
            reserve = await worker.expect("reserve")
            assert reserve.key.attempt == epoch - 1
            worker = await router.worker("b", worker_pb2.ROLE_BOTH, epoch=epoch)
        answer = await stream.end()
        assert answer.code == grpc.StatusCode.UNAVAILABLE
        assert (answer.error.stage, answer.error.cause) == ("reserve", "WORKER_LOST")
        assert f"it has lost {MAX_WORKERS_LOST + 1} workers" in answer.error.message
        assert "reserve" not in worker.pending()


async def test_another_attempt_follows_a_transfer_that_failed(router: Harness):
    prefill, decode = await router.pair()
    stream = router.generate(request_id="one")
    decode.grant(await decode.expect("reserve"))
    start = await prefill.expect("start_prefill")
    prefill.fail(start.key, "transfer", "LEASE_EXPIRED", "it broke", retryable=True)
    assert (await decode.expect("cancel")).key == start.key
    again = await decode.expect("reserve")
    assert (again.key.attempt, len(again.task.so_far)) == (2, 0)
    assert again.local_prefill  # the prefill worker is avoided, and there is no other
    decode.grant(again)
    decode.say(again.key, 0, "x", finish=STOP)
    assert (await stream.end()).text == {0: "x"}


async def test_what_an_older_attempt_says_is_not_heard(router: Harness):
    first = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await first.expect("reserve")
    first.grant(reserve)
    first.say(reserve.key, 0, "so far")
    await stream.until("so far")
    first.fail(reserve.key, "decode", "ENGINE_FAILED", retryable=True)
    again = await first.expect("reserve")
    first.say(reserve.key, 6, " from the grave")
    first.grant(again)
    first.say(again.key, 6, "!", finish=STOP)
    assert (await stream.end()).text == {0: "so far!"}


async def test_a_new_incarnation_takes_over_the_requests_of_the_old_one_at_once():
    async with running_router(link_grace_s=60.0) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        stream = router.generate(request_id="one")
        await worker.expect("reserve")
        again = await router.worker("b", worker_pb2.ROLE_BOTH, epoch=2)
        reserve = await again.expect("reserve")
        assert reserve.key.attempt == 2
        again.grant(reserve)
        again.say(reserve.key, 0, "x", finish=STOP)
        assert (await stream.end()).text == {0: "x"}


async def test_a_restarted_process_at_the_same_address_is_not_taken_for_the_old_one():
    async with running_router(link_grace_s=60.0) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        stream = router.generate(request_id="one")
        await worker.expect("reserve")
        await worker.stop()
        restarted = ScriptedWorker("b", worker_pb2.ROLE_BOTH, epoch=2)
        await restarted.start(worker.port)
        router.workers.append(restarted)
        await router.until_state("one", pb.REQUEST_STATE_QUEUED)
        assert "reserve" not in restarted.pending()
        await restarted.join(router.server.address)
        reserve = await restarted.expect("reserve")
        assert reserve.key.attempt == 2
        restarted.grant(reserve)
        restarted.say(reserve.key, 0, "x", finish=STOP)
        assert (await stream.end()).text == {0: "x"}


async def test_a_broken_stream_is_resumed_and_no_token_is_lost_or_repeated(router: Harness):
    prefill, decode = await router.pair()
    stream = await advance(router, prefill, decode, "DECODING")
    key = worker_pb2.RequestKey(tenant="default", request_id="one", attempt=1)
    prefill.finish_prefill(key)
    decode.break_stream()
    resume = await decode.expect("resume")
    assert resume.key == key and list(resume.next_index) == [6]
    assert decode.router_hellos[0] == decode.router_hellos[1]
    decode.say(key, 9, "late")  # these two overtook the replay: nothing of them can be used yet
    decode.say(key, 4, "ar and")
    decode.say(key, 6, " and late", finish=STOP)
    answer = await stream.end()
    assert answer.text == {0: "so far and late"}
    assert bytes(answer.token_ids[0]) == b"so far and late"
    assert decode.pending().count("reserve") == 0


async def test_a_replay_that_crosses_with_news_is_asked_for_again(router: Harness):
    prefill, decode = await router.pair()
    stream = await advance(router, prefill, decode, "DECODING")
    key = worker_pb2.RequestKey(tenant="default", request_id="one", attempt=1)
    decode.break_stream()
    assert list((await decode.expect("resume")).next_index) == [6]
    decode.say(key, 6, "!")
    decode.say(key, 6, "!?")  # the replay from 6, with what came since: its text cannot be cut
    assert list((await decode.expect("resume")).next_index) == [7]
    decode.say(key, 7, "?", finish=STOP)
    assert (await stream.end()).text == {0: "so far!?"}


async def test_missing_tokens_are_asked_for_again(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    worker.grant(reserve)
    worker.say(reserve.key, 0, "ab")
    worker.say(reserve.key, 3, "d")
    worker.say(reserve.key, 4, "e")
    assert list((await worker.expect("resume")).next_index) == [2]
    worker.say(reserve.key, 2, "cde", finish=STOP)
    assert (await stream.end()).text == {0: "abcde"}
    assert "resume" not in worker.pending()


async def test_what_was_under_way_when_a_stream_broke_is_said_again(router: Harness):
    prefill, decode = await router.pair()
    stream = router.generate(request_id="one")
    first = await decode.expect("reserve")
    decode.break_stream()
    again = await decode.expect("reserve")
    assert (again.key, again.task) == (first.key, first.task)
    decode.grant(again)
    start = await prefill.expect("start_prefill")
    prefill.break_stream()
    repeated = await prefill.expect("start_prefill")
    assert (repeated.key, repeated.lease) == (start.key, start.lease)
    prefill.finish_prefill(start.key)
    decode.say(start.key, 0, "x", finish=STOP)
    assert (await stream.end()).text == {0: "x"}


async def test_a_cancel_while_the_worker_is_out_of_touch_reaches_it_when_it_is_back(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    worker.refuses_sessions = True
    worker.break_stream()
    other = router.generate(request_id="other")
    await other.until("accepted")
    assert await router.cancel("one")
    assert (await stream.end()).code == grpc.StatusCode.CANCELLED
    worker.refuses_sessions = False
    assert (await worker.expect("cancel")).key == reserve.key
    assert (await worker.expect("reserve")).key.request_id == "other"


@pytest.mark.parametrize("state", STATES)
async def test_a_cancel_reaches_both_workers_in_every_state(router: Harness, state):
    prefill, decode = await router.pair()
    stream = await advance(router, prefill, decode, state)
    assert await router.cancel("one")
    answer = await stream.end()
    assert answer.code == grpc.StatusCode.CANCELLED
    assert (answer.error.request_id, answer.error.cause) == ("one", "CLIENT_CANCELLED")
    assert (await router.get("one")).state == pb.REQUEST_STATE_CANCELLED
    assert not await router.cancel("one")
    if state != "QUEUED":
        for worker in (prefill, decode):
            cancel = await worker.expect("cancel")
            assert (cancel.key.request_id, cancel.key.attempt) == ("one", 1)
    await is_idle(router, prefill, decode)


@pytest.mark.parametrize("state", STATES)
async def test_a_client_that_leaves_cancels_its_request_in_every_state(router: Harness, state):
    prefill, decode = await router.pair()
    stream = await advance(router, prefill, decode, state)
    await stream.leave()
    await router.until_state("one", pb.REQUEST_STATE_CANCELLED)
    assert (await router.get("one")).error.cause == "CLIENT_DISCONNECTED"
    if state != "QUEUED":
        for worker in (prefill, decode):
            assert (await worker.expect("cancel")).key.request_id == "one"
    await is_idle(router, prefill, decode)


@pytest.mark.parametrize("state", STATES)
async def test_a_deadline_ends_the_request_in_every_state(router: Harness, state):
    prefill, decode = await router.pair()
    stream = await advance(router, prefill, decode, state, timeout_s=0.5)
    answer = await stream.end()
    assert answer.code == grpc.StatusCode.DEADLINE_EXCEEDED
    stages = {"QUEUED": "queue", "PLACED": "reserve", "PREFILLING": "prefill", "DECODING": "decode"}
    assert (answer.error.stage, answer.error.cause) == (stages[state], "DEADLINE_EXCEEDED")
    if state != "QUEUED":
        for worker in (prefill, decode):
            assert (await worker.expect("cancel")).cause == "DEADLINE_EXCEEDED"
    await is_idle(router, prefill, decode)


async def test_the_deadline_of_the_call_counts_too(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    router.generate(request_id="one", timeout=0.4, timeout_s=100)
    # Clients round the time they give a call up, to the next step of `grpc-timeout`.
    assert (await worker.expect("reserve")).remaining_s <= 0.41
    assert (await worker.expect("cancel")).cause in ("DEADLINE_EXCEEDED", "CLIENT_DISCONNECTED")


async def test_a_grant_that_comes_after_the_cancel_is_given_back(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    reserve = await worker.expect("reserve")
    await router.cancel("one")
    await stream.end()
    assert (await worker.expect("cancel")).key == reserve.key
    worker.grant(reserve)
    assert (await worker.expect("cancel")).cause == "SUPERSEDED"


async def test_a_stopping_router_tells_its_clients_and_workers(router: Harness):
    worker = await router.worker("b", worker_pb2.ROLE_BOTH)
    stream = router.generate(request_id="one")
    await worker.expect("reserve")
    await router.server.stop()
    answer = await stream.end()
    assert (answer.code, answer.error.cause) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert answer.error.retryable
    assert (await worker.expect("cancel")).cause == "SHUTTING_DOWN"
