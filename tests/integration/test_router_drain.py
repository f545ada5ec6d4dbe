"""Workers that leave, as the router sees them: orders passed on, nothing new placed, nothing lost."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from headrace.v1 import cluster_pb2, inference_pb2, worker_pb2
from kvtransfer.cluster_token import cluster_token
from router.auth import CLUSTER_TOKEN_KEY
from tests.integration.router_harness import WAIT_S, Harness, error_detail, running_router
from tests.integration.scripted_worker import SECRET, ScriptedWorker

pytestmark = pytest.mark.integration

SERVING = worker_pb2.WORKER_STATE_SERVING
NO_NEW = worker_pb2.WORKER_STATE_NO_NEW
GONE = worker_pb2.WORKER_STATE_GONE
STOP = inference_pb2.FINISH_REASON_STOP
TOKEN = ((CLUSTER_TOKEN_KEY, cluster_token(SECRET)),)


async def set_state(
    harness: Harness, worker_id: str, state: int, metadata: tuple[tuple[str, str], ...] = TOKEN
) -> cluster_pb2.SetWorkerStateResponse:
    request = cluster_pb2.SetWorkerStateRequest(worker_id=worker_id, state=state)
    return await harness.cluster.SetWorkerState(request, metadata=metadata)


async def until_told(harness: Harness, worker: ScriptedWorker, state: int) -> None:
    """Has a worker say where it is, and waits until the router has heard it."""
    worker.tell_load(state=state)
    async with asyncio.timeout(WAIT_S):
        while (await harness.status(worker.hello.worker_id)).report.state != state:
            await asyncio.sleep(0.01)


async def test_an_order_reaches_the_worker_and_is_answered_with_where_it_is() -> None:
    async with running_router() as harness:
        prefill, _ = await harness.pair()
        assert (await set_state(harness, "p", NO_NEW)).state == SERVING
        assert (await prefill.expect("set_state")).state == NO_NEW


@pytest.mark.parametrize(
    ("worker_id", "state", "metadata", "code", "cause"),
    [
        ("p", NO_NEW, (), grpc.StatusCode.UNAUTHENTICATED, "BAD_CLUSTER_TOKEN"),
        ("q", NO_NEW, TOKEN, grpc.StatusCode.NOT_FOUND, "UNKNOWN_WORKER"),
        ("p", 0, TOKEN, grpc.StatusCode.INVALID_ARGUMENT, "BAD_WORKER_STATE"),
        ("p", 99, TOKEN, grpc.StatusCode.INVALID_ARGUMENT, "BAD_WORKER_STATE"),
    ],
)
async def test_an_order_that_cannot_be_passed_on_says_why(
    worker_id: str,
    state: int,
    metadata: tuple[tuple[str, str], ...],
    code: grpc.StatusCode,
    cause: str,
) -> None:
    async with running_router() as harness:
        prefill, _ = await harness.pair()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await set_state(harness, worker_id, state, metadata)
        assert raised.value.code() == code
        detail = error_detail(raised.value)
        assert detail is not None and detail.cause == cause
        assert "set_state" not in prefill.pending()


async def test_a_worker_that_is_away_is_not_told() -> None:
    async with running_router(link_grace_s=30.0) as harness:
        prefill, _ = await harness.pair()
        prefill.refuses_sessions = True
        prefill.break_stream()
        async with asyncio.timeout(WAIT_S):
            while (await harness.status("p")).connected:
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError, match="no worker"):
            await set_state(harness, "p", NO_NEW)


async def test_a_prompt_that_its_prefill_worker_will_not_take_goes_to_another() -> None:
    """It began to drain between placement and StartPrefill."""
    async with running_router() as harness:
        first, decode = await harness.pair()
        second = await harness.worker("p2", worker_pb2.ROLE_PREFILL)
        stream = harness.generate()
        decode.grant(await decode.expect("reserve"))
        async with asyncio.timeout(WAIT_S):
            asked = [asyncio.create_task(each.expect("start_prefill")) for each in (first, second)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        refusing, other = (first, second) if asked[0] in done else (second, first)
        key = done.pop().result().key
        await until_told(harness, refusing, NO_NEW)
        refusing.fail(key, "prefill", "NOT_SERVING", retryable=True)
        decode.grant(await decode.expect("reserve"))
        again = await (asked[1] if refusing is first else asked[0])
        assert again.key.attempt > key.attempt
        assert "start_prefill" not in refusing.pending()
        other.finish_prefill(again.key)
        decode.say(again.key, 0, "well", finish=STOP)
        assert (await stream.end()).text[0] == "well"


async def test_an_answer_that_is_handed_back_goes_on_behind_its_tokens_elsewhere() -> None:
    async with running_router() as harness:
        workers = {name: await harness.worker(name, worker_pb2.ROLE_BOTH) for name in ("one", "two")}
        stream = harness.generate()
        asked = {asyncio.create_task(worker.expect("reserve")): name for name, worker in workers.items()}
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        reserve, name = next(iter(done)).result(), asked[next(iter(done))]
        draining, other = workers.pop(name), workers.popitem()[1]
        draining.grant(reserve)
        draining.say(reserve.key, 0, "half ")
        await stream.until("half ")
        await until_told(harness, draining, NO_NEW)
        draining.fail(reserve.key, "decode", "DRAINED", retryable=True)
        [waiting] = [task for task in asked if task not in done]
        again = await waiting
        assert "".join(map(chr, again.task.so_far[0].token_ids)) == "half "
        other.grant(again)
        other.say(again.key, 5, "way", finish=STOP)
        assert (await stream.end()).text[0] == "half way"


async def test_a_worker_that_said_it_goes_is_given_up_at_once() -> None:
    """Any other one whose stream ends is waited for: half a minute here."""
    async with running_router(link_grace_s=30.0) as harness:
        prefill, decode = await harness.pair()
        both = await harness.worker("b", worker_pb2.ROLE_BOTH)
        await until_told(harness, decode, NO_NEW)
        stream = harness.generate()
        reserve = await both.expect("reserve")
        both.grant(reserve)
        await until_told(harness, both, GONE)
        both.refuses_sessions = True
        both.break_stream()
        async with asyncio.timeout(WAIT_S):
            while (await harness.status("b")).connected:
                await asyncio.sleep(0.01)
        assert (await harness.status("b")).last_error == "it has left"
        await until_told(harness, decode, SERVING)
        again = await decode.expect("reserve")
        assert again.key.attempt > reserve.key.attempt
        both.hello.epoch = 2
        both.hello.state = SERVING
        both.refuses_sessions = False
        await both.join(harness.server.address)
        assert (await harness.status("b")).connected
        await stream.leave()
        assert prefill.hello.worker_id == "p"
