"""A decode worker killed in mid-answer: its answers go on elsewhere, token for token, and it comes back."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from headrace import AsyncClient, Client, RetryPolicy
from tests.e2e.conftest import Home, wait_until
from tests.e2e.long_answers import ANSWER_TOKENS, ask, decode_workers, is_back

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


@pytest.fixture
def address(home: Home) -> str:
    started = home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    return home.state().router_address


async def answers(address: str, victim: int | None = None) -> list[list[int]]:
    """All answers at once; with `victim`, that process is killed once each of them has begun."""
    begun = asyncio.Semaphore(0)
    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:
        tasks = [asyncio.create_task(ask(client, number, begun)) for number in range(NUM_REQUESTS)]
        for _ in tasks:
            await asyncio.wait_for(begun.acquire(), 60)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        return [answer.token_ids for answer in await asyncio.gather(*tasks)]


def test_no_answer_of_a_killed_worker_is_lost_and_it_comes_back(address: str) -> None:
    with Client(address) as client:
        before = decode_workers(client.status())
        victim = before["decode-1"].hello
        disturbed = asyncio.run(answers(address, victim.pid))
        wait_until(lambda: is_back(client, victim.epoch), "the killed worker's return")
        assert disturbed == asyncio.run(answers(address))
        assert all(len(token_ids) == ANSWER_TOKENS for token_ids in disturbed)
        assert decode_workers(client.status())["decode-0"].hello.epoch == before["decode-0"].hello.epoch
        status = client.status()
        assert (status.failed_requests, status.finished_requests) == (0, 2 * NUM_REQUESTS)
