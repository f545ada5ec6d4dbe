"""Several clients at one request: attaching, leaving, resuming, falling behind."""

from collections.abc import AsyncIterator

import grpc
import pytest

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from tests.integration.router_harness import STOP, Harness, running_router
from tests.integration.scripted_worker import ScriptedWorker

pytestmark = pytest.mark.integration


@pytest.fixture
async def router() -> AsyncIterator[Harness]:
    async with running_router() as harness:
        yield harness


@pytest.fixture
async def worker(router: Harness) -> ScriptedWorker:
    return await router.worker("b", worker_pb2.ROLE_BOTH)


async def begin(router: Harness, worker: ScriptedWorker, text: str = "", **fields):
    """A running request `one` whose answer so far is `text`."""
    stream = router.generate(request_id="one", **fields)
    reserve = await worker.expect("reserve")
    worker.grant(reserve)
    if text:
        worker.say(reserve.key, 0, text[:1])
        worker.say(reserve.key, 1, text[1:])
        await stream.until(text)
    return stream, reserve.key


async def test_the_same_call_again_attaches_and_gets_the_whole_answer(router, worker):
    first, key = await begin(router, worker, "abc")
    second = router.generate(request_id="one")
    await second.until("abc")
    worker.say(key, 3, "d", finish=STOP)
    one, two = await first.end(), await second.end()
    assert one.text == two.text == {0: "abcd"}
    assert one.accepted == two.accepted and one.done == two.done
    assert worker.pending().count("reserve") == 0


async def test_a_client_attaches_at_the_index_that_it_wants(router, worker):
    _, key = await begin(router, worker, "abc")
    late = router.generate(request_id="one", next_index=1)
    await late.until("bc")
    worker.say(key, 3, "d", finish=STOP)
    answer = await late.end()
    assert answer.first_index == {0: 1} and bytes(answer.token_ids[0]) == b"bcd"


async def test_a_finished_answer_can_be_read_again(router, worker):
    first, key = await begin(router, worker, "abc")
    worker.say(key, 3, "d", finish=STOP)
    await first.end()
    again = await router.generate(request_id="one", next_index=3).end()
    assert again.text == {0: "d"} and again.finished[0].num_tokens == 4
    assert again.done == (await first.end()).done
    state = await router.get("one")
    assert (state.state, list(state.completion_tokens)) == (pb.REQUEST_STATE_FINISHED, [4])


@pytest.mark.parametrize(
    "changed",
    [
        {"text": "other"},
        {"sampling": pb.SamplingParams(seed=3)},
        {"text": None, "token_ids": pb.TokenIds(ids=[1])},
    ],
)
async def test_the_same_id_with_another_body_already_exists(router, worker, changed):
    stream, key = await begin(router, worker, "a", sampling=pb.SamplingParams(seed=2))
    fields = {"sampling": pb.SamplingParams(seed=2)} | changed
    answer = await router.generate(request_id="one", **fields).end()
    assert (answer.code, answer.error.cause) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS")
    worker.say(key, 1, "b", finish=STOP)
    assert (await stream.end()).text == {0: "ab"}


async def test_another_time_allowance_is_no_other_body(router, worker):
    _, key = await begin(router, worker, "a", timeout_s=100)
    again = router.generate(request_id="one", timeout_s=50, resumable=True)
    worker.say(key, 1, "b", finish=STOP)
    assert (await again.end()).text == {0: "ab"}


async def test_a_request_goes_on_while_one_of_its_clients_stays(router, worker):
    first, key = await begin(router, worker, "a")
    second = router.generate(request_id="one")
    await second.until("a")
    await first.leave()
    worker.say(key, 1, "b", finish=STOP)
    assert (await second.end()).text == {0: "ab"}


async def test_a_resumable_request_waits_for_its_client_to_come_back():
    async with running_router(resume_grace_s=60.0) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        stream, key = await begin(router, worker, "abc", resumable=True)
        await stream.leave()
        worker.say(key, 3, "d")
        back = router.generate(request_id="one", resumable=True, next_index=3)
        await back.until("d")
        worker.say(key, 4, "e", finish=STOP)
        assert (await back.end()).text == {0: "de"}
        assert worker.pending().count("cancel") == 0


async def test_a_resumable_request_ends_when_nobody_comes_back(router, worker):
    stream, key = await begin(router, worker, "abc", resumable=True)
    await stream.leave()
    assert (await worker.expect("cancel")).key == key
    assert (await router.get("one")).state == pb.REQUEST_STATE_CANCELLED


async def test_a_cancelled_request_stays_cancelled(router, worker):
    stream, _ = await begin(router, worker, "abc")
    await router.cancel("one")
    await stream.end()
    again = await router.generate(request_id="one").end()
    assert (again.code, again.error.cause) == (grpc.StatusCode.CANCELLED, "CLIENT_CANCELLED")
    assert again.text == {0: "abc"}


async def test_a_request_whose_client_vanished_begins_anew_with_its_seed(router, worker):
    stream, key = await begin(router, worker, "abc")
    seed = stream.answer.accepted.seed
    await stream.leave()
    assert (await worker.expect("cancel")).key == key
    again = router.generate(request_id="one", next_index=3)
    reserve = await worker.expect("reserve")
    assert reserve.key.attempt == key.attempt + 1
    assert reserve.task.sampling.seed == seed
    worker.grant(reserve)
    worker.say(reserve.key, 0, "ab")
    worker.say(reserve.key, 2, "c")
    worker.say(reserve.key, 3, "d", finish=STOP)
    answer = await again.end()
    assert answer.first_index == {0: 3} and answer.text == {0: "d"}


async def test_a_handle_takes_an_answer_to_another_router(router, worker):
    stream, key = await begin(router, worker, "abc")
    accepted = stream.answer.accepted
    async with running_router(router_id="other") as other:
        replica = await other.worker("b", worker_pb2.ROLE_BOTH)
        again = other.generate(request_id="one", next_index=2, resume_handle=accepted.resume_handle)
        reserve = await replica.expect("reserve")
        assert reserve.key.attempt == key.attempt + 1
        assert reserve.task.sampling.seed == accepted.seed
        replica.grant(reserve)
        for index, character in enumerate("abcd"):
            replica.say(reserve.key, index, character, finish=STOP if character == "d" else None)
        assert (await again.end()).text == {0: "cd"}

        for fields in ({"request_id": "two"}, {"request_id": "three", "text": "changed"}):
            answer = await other.generate(resume_handle=accepted.resume_handle, **fields).end()
            assert (answer.code, answer.error.cause) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "BAD_RESUME_HANDLE",
            )


async def test_an_unknown_answer_cannot_be_attached_to_unless_it_can_be_repeated(router, worker):
    answer = await router.generate(request_id="one", next_index=2).end()
    assert (answer.code, answer.error.cause) == (grpc.StatusCode.NOT_FOUND, "REQUEST_UNKNOWN")
    greedy = router.generate(request_id="one", next_index=2, sampling=pb.SamplingParams(temperature=0))
    reserve = await worker.expect("reserve")
    worker.grant(reserve)
    worker.say(reserve.key, 0, "a")
    worker.say(reserve.key, 1, "b")
    worker.say(reserve.key, 2, "c", finish=STOP)
    assert (await greedy.end()).text == {0: "c"}


async def test_tenants_do_not_see_each_others_requests():
    async with running_router(api_keys={"key-a": "a", "key-b": "b"}) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        as_a, as_b = ((("authorization", f"Bearer key-{tenant}"),) for tenant in "ab")
        first = router.generate(request_id="one", metadata=as_a)
        assert (await worker.expect("reserve")).key.tenant == "a"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.inference.Get(pb.GetRequest(request_id="one"), metadata=as_b)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        cancel = pb.CancelRequest(request_id="one")
        assert not (await router.inference.Cancel(cancel, metadata=as_b)).was_running
        router.generate("another body", request_id="one", metadata=as_b)
        assert (await worker.expect("reserve")).key.tenant == "b"
        assert (await router.inference.Cancel(cancel, metadata=as_a)).was_running
        assert (await first.end()).code == grpc.StatusCode.CANCELLED


STEP_BYTES = 500_000
NUM_STEPS = 40  # together more than the transport and the outbox of a client hold


def say_much(worker: ScriptedWorker, key, index: int) -> str:
    """One step of a long answer; returns what its text ends with."""
    mark = f"<{index}>"
    delta = pb.Delta(first_index=index, token_ids=[120], text="x" * STEP_BYTES + mark)
    output = worker_pb2.ChoiceOutput(key=key, delta=delta)
    if index == NUM_STEPS - 1:
        output.finished.CopyFrom(pb.ChoiceFinished(reason=STOP, num_tokens=NUM_STEPS))
    worker.send(step=worker_pb2.StepOutput(outputs=[output]))
    return mark


async def test_a_slow_client_is_dropped_and_the_others_get_all_of_it():
    async with running_router(outbox_bytes=1_000_000) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        quick = router.generate(request_id="one")
        reserve = await worker.expect("reserve")
        slow = router.generate(request_id="one", paused=True)
        await quick.until("accepted")
        worker.grant(reserve)
        for index in range(NUM_STEPS):
            await quick.until(say_much(worker, reserve.key, index))
        assert (await quick.end()).done.usage.completion_tokens == NUM_STEPS
        slow.resume()
        dropped = await slow.end()
        assert (dropped.code, dropped.error.cause) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "CLIENT_TOO_SLOW",
        )
        assert "cancel" not in worker.pending()


async def test_a_request_whose_only_client_is_too_slow_is_cancelled():
    async with running_router(outbox_bytes=1_000_000) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        slow = router.generate(request_id="one", paused=True)
        reserve = await worker.expect("reserve")
        worker.grant(reserve)
        for index in range(NUM_STEPS - 1):
            say_much(worker, reserve.key, index)
        assert (await worker.expect("cancel")).cause == "CLIENT_TOO_SLOW"
        slow.resume()
        assert (await slow.end()).error.cause == "CLIENT_TOO_SLOW"


async def test_a_client_that_takes_nothing_is_dropped_even_without_news():
    async with running_router(stalled_client_s=0.3, outbox_bytes=100 << 20) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        stuck = router.generate(request_id="one", paused=True)
        reserve = await worker.expect("reserve")
        worker.grant(reserve)
        for index in range(NUM_STEPS - 1):
            say_much(worker, reserve.key, index)
        assert (await worker.expect("cancel")).cause == "CLIENT_TOO_SLOW"
        stuck.resume()
        assert (await stuck.end()).error.cause == "CLIENT_TOO_SLOW"


async def test_ended_requests_are_forgotten_when_their_room_is_needed():
    async with running_router(retention_bytes=15_000) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        for name in "abcd":
            stream = router.generate(request_id=name)
            reserve = await worker.expect("reserve")
            worker.grant(reserve)
            worker.say(reserve.key, 0, "x" * 1000, finish=STOP)
            await stream.end()
        assert (await router.get("d")).state == pb.REQUEST_STATE_FINISHED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.get("a")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_ended_requests_are_forgotten_after_a_while():
    async with running_router(retention_s=0.1) as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        stream = router.generate(request_id="one")
        reserve = await worker.expect("reserve")
        worker.grant(reserve)
        worker.say(reserve.key, 0, "x", finish=STOP)
        await stream.end()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.until_state("one", pb.REQUEST_STATE_UNSPECIFIED)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
