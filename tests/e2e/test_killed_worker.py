"""A decode worker killed in mid-answer: its requests fail with stage and cause, the others go on, it comes back."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from headrace import AsyncClient, Client, HeadraceError, RetryPolicy, Unavailable
from headrace.v1.cluster_pb2 import WorkerStatus
from tests.e2e.conftest import Home, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

PROFILE = """
version: 1
name: killed
model: {path: tiny}
prefill: {replicas: 1, kv_memory: 64MiB}
decode: {replicas: 2, kv_memory: 64MiB}
router: {grpc: "127.0.0.1:0"}
"""
NUM_REQUESTS = 8
ANSWER_TOKENS = 450


@pytest.fixture
def address(home: Home) -> str:
    started = home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    return home.state().router_address


def decode_workers(client: Client) -> dict[str, WorkerStatus]:
    return {
        worker.hello.worker_id: worker
        for worker in client.status().workers
        if worker.connected and worker.hello.worker_id.startswith("decode")
    }


async def ask(client: AsyncClient, number: int, begun: asyncio.Semaphore) -> int | HeadraceError:
    """Tokens of a long answer, or how it failed."""
    answer = client.generate(
        [5 + number, 6, 7], max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0.0, timeout_s=120
    )
    num_tokens = 0
    try:
        async for delta in answer.deltas():
            if num_tokens == 0:
                begun.release()
            num_tokens += len(delta.token_ids)
    except HeadraceError as error:
        return error
    return num_tokens


async def kill_in_mid_answer(address: str, pid: int) -> list[int | HeadraceError]:
    begun = asyncio.Semaphore(0)
    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:
        tasks = [asyncio.create_task(ask(client, number, begun)) for number in range(NUM_REQUESTS)]
        for _ in tasks:
            await asyncio.wait_for(begun.acquire(), 60)
        os.kill(pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)


def test_only_the_killed_workers_requests_fail_and_it_comes_back(address: str) -> None:
    with Client(address) as client:
        before = decode_workers(client)
        victim = before["decode-1"].hello
        results = asyncio.run(kill_in_mid_answer(address, victim.pid))
        failures = [result for result in results if isinstance(result, HeadraceError)]
        assert 0 < len(failures) < NUM_REQUESTS
        for failure in failures:
            assert isinstance(failure, Unavailable)
            assert (failure.stage, failure.cause, failure.retryable) == ("decode", "WORKER_LOST", True)
        assert [r for r in results if isinstance(r, int)] == [ANSWER_TOKENS] * (NUM_REQUESTS - len(failures))
        wait_until(lambda: is_back(client, victim.epoch), "the killed worker's return")
        assert decode_workers(client)["decode-0"].hello.epoch == before["decode-0"].hello.epoch
        assert len(client.generate([5, 6, 7], max_tokens=8, ignore_eos=True).token_ids) == 8


def is_back(client: Client, old_epoch: int) -> bool:
    worker = decode_workers(client).get("decode-1")
    return worker is not None and worker.hello.epoch != old_epoch
