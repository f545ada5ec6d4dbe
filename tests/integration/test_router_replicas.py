"""Two routers of one cluster: a client goes on at the other when one of them dies, token for token."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
import pytest

from headrace import AsyncClient, Client, InvalidRequest
from headrace.v1 import worker_pb2
from router.config import RouterConfig
from router.server import run
from tests.integration.router_harness import STOP, running_router
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import SECRET, StepGate, assert_nothing_held, random_prompt, wait_until, worker
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = pytest.mark.integration

NUM_TOKENS = 120


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@contextmanager
def router_processes(model_dir: Path, addresses: list[str]) -> Iterator[list[BaseProcess]]:
    """A router process for each address."""
    spawn = multiprocessing.get_context("spawn")
    processes = []
    for number, address in enumerate(addresses):
        config = RouterConfig(
            router_id=f"router-{number}",
            model_name="tiny",
            model_dir=model_dir,
            cluster_secret=SECRET,
            listen=address,
            max_context=512,
        )
        processes.append(spawn.Process(target=run, args=(config,)))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def cluster(
    model_dir: Path, addresses: list[str]
) -> Iterator[tuple[WorkerNode, WorkerNode, list[BaseProcess]]]:
    """A prefill and a decode worker, known to both routers."""
    routers = tuple(addresses)
    with (
        router_processes(model_dir, addresses) as processes,
        worker(model_dir, WorkerRole.PREFILL, routers=routers) as prefill,
        worker(model_dir, WorkerRole.DECODE, routers=routers) as decode,
    ):
        wait_until(lambda: num_granted(decode) == len(addresses), "a trial by every router")
        assert_nothing_held(prefill, decode)
        yield prefill, decode, processes


def without_false_alarms(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """gRPC wakes every event loop of a process for each event, and the loops beside the one that it is for say so."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def num_granted(node: WorkerNode) -> int:
    return sum(keeper.counters.granted for keeper in node._keepers)


async def read(client: AsyncClient, number: int, begun: asyncio.Event, **options: object) -> list[int]:
    """A whole answer; its deltas must follow one another."""
    answer = client.generate(
        random_prompt(number, 70),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        seed=number,
        temperature=0.8 * (number % 2),
        request_id=f"request-{number}",
        **options,
    )
    token_ids: list[int] = []
    async for delta in answer.deltas():
        assert delta.first_index == len(token_ids), "a token was lost or came twice"
        token_ids += delta.token_ids
        if len(token_ids) > 10:
            begun.set()
    return token_ids


@pytest.mark.parametrize("resumable", [True, False])
def test_answers_go_on_at_the_other_router_when_theirs_is_killed(
    model_dir: Path, unused_tcp_port_factory, resumable: bool
) -> None:
    addresses = [f"127.0.0.1:{unused_tcp_port_factory()}" for _ in range(2)]

    async def disturbed(decode: WorkerNode, processes: list[BaseProcess]) -> list[list[int]]:
        asyncio.get_running_loop().set_exception_handler(without_false_alarms)
        gate = StepGate(decode.engine)
        async with AsyncClient(addresses) as client:
            routers = client._connection.routers
            events = [asyncio.Event() for _ in range(4)]
            tasks = [
                asyncio.create_task(read(client, number, begun, resumable=resumable))
                for number, begun in enumerate(events)
            ]
            while not all(event.is_set() for event in events):
                gate.allow(1)
                await asyncio.sleep(0.002)
            first = routers.current
            os.kill(processes[first].pid or 0, signal.SIGKILL)
            await asyncio.to_thread(processes[first].join)
            gate.open()
            answers = await asyncio.gather(*tasks)
            assert routers.current != first
            return answers

    async def undisturbed() -> list[list[int]]:
        asyncio.get_running_loop().set_exception_handler(without_false_alarms)
        async with AsyncClient(addresses) as client:
            numbers = range(4)
            return [await read(client, number, asyncio.Event()) for number in numbers]

    with cluster(model_dir, addresses) as (prefill, decode, processes):
        answers = asyncio.run(disturbed(decode, processes))
        assert [len(answer) for answer in answers] == [NUM_TOKENS] * 4
        num_leases = num_granted(decode) - len(addresses)
        assert num_leases == 4 if resumable else num_leases >= 8, "taken over, or else made anew"
        assert_nothing_held(prefill, decode)
    with cluster(model_dir, addresses) as (_, decode, _):
        assert answers == asyncio.run(undisturbed())


@pytest.mark.parametrize("cause", ["TAKEN_OVER", "SUPERSEDED"])
async def test_the_worker_that_writes_the_answer_is_asked_for_it(cause: str) -> None:
    """The router that had it before is told by that worker, or by one whose lease a later attempt has ended."""
    async with running_router(router_id="one") as first, running_router(router_id="two") as second:
        decode = await first.worker("b", worker_pb2.ROLE_BOTH)
        stream = first.generate(request_id="r", resumable=True)
        reserve = await decode.expect("reserve")
        assert reserve.task.resumable
        decode.grant(reserve)
        decode.say(reserve.key, 0, "so far")
        answer = await stream.until("so far")
        assert answer.handles[-1] != answer.accepted.resume_handle
        again = await second.worker("b", worker_pb2.ROLE_BOTH)  # the same worker, as that router knows it
        other = second.generate(request_id="r", resumable=True, resume_handle=answer.handles[-1])
        taken = await again.expect("take_over")
        assert taken.key.attempt == reserve.key.attempt + 1
        again.send(reserved=worker_pb2.Reserved(key=taken.key))
        again.say(taken.key, 0, "so far and on", finish=STOP)
        decode.fail(reserve.key, "decode", cause)
        ended = await stream.end()
        assert (ended.code, ended.error.cause) == (grpc.StatusCode.UNAVAILABLE, "TAKEN_OVER")
        assert ended.error.retryable
        assert (await other.end()).text == {0: "so far and on"}


@pytest.mark.parametrize("why", ["it has none", "it is not here"])
async def test_where_nobody_writes_the_answer_it_is_made_anew(why: str) -> None:
    async with running_router(router_id="one") as first, running_router(router_id="two") as second:
        decode = await first.worker("b", worker_pb2.ROLE_BOTH)
        stream = first.generate(request_id="r", resumable=True)
        reserve = await decode.expect("reserve")
        decode.grant(reserve)
        decode.say(reserve.key, 0, "so far")
        handle = (await stream.until("so far")).handles[-1]
        heir = await second.worker("b" if why == "it has none" else "c", worker_pb2.ROLE_BOTH)
        other = second.generate(request_id="r", resumable=True, resume_handle=handle)
        if why == "it has none":
            taken = await heir.expect("take_over")
            heir.fail(taken.key, "decode", "UNKNOWN_REQUEST", retryable=True)
        anew = await heir.expect("reserve")
        assert anew.key.attempt > reserve.key.attempt
        assert anew.task.sampling.seed == reserve.task.sampling.seed
        heir.grant(anew)
        heir.say(anew.key, 0, "so far and on", finish=STOP)
        ended = await other.end()
        assert ended.text == {0: "so far and on"}
        assert ended.done.timing.attempts == 1


async def test_a_handle_of_another_request_is_refused() -> None:
    async with running_router() as router:
        worker = await router.worker("b", worker_pb2.ROLE_BOTH)
        stream = router.generate(request_id="r", resumable=True)
        worker.grant(await worker.expect("reserve"))
        handle = (await stream.until("accepted")).accepted.resume_handle
        refused = await router.generate(request_id="s", resume_handle=handle).end()
        assert refused.error.cause == "BAD_RESUME_HANDLE"


def test_no_address_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="HOST:PORT"):
        Client([])
