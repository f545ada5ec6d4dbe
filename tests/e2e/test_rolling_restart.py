"""Every worker restarted in turn while clients go on asking: each answer comes whole, and is the one of a quiet day."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from headrace import AsyncClient, Client, RetryPolicy
from tests.e2e.conftest import Home
from tests.e2e.long_answers import begin

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

PROFILE = """
version: 1
name: rolling
model: {path: tiny}
prefill: {replicas: 2, kv_memory: 64MiB}
decode: {replicas: 2, kv_memory: 64MiB}
router: {grpc: "127.0.0.1:0"}
"""
NUM_CLIENTS = 8
ANSWER_TOKENS = 300
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture
def running(home: Home) -> Home:
    started = home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    return home


async def ask(client: AsyncClient, number: int) -> list[int]:
    """The tokens of an answer."""
    answer = begin(client, number, [5 + number, *range(10, 150)], ANSWER_TOKENS)
    token_ids: list[int] = []
    async for delta in answer.deltas():
        assert delta.first_index == len(token_ids), "a token was lost or came twice"
        token_ids += delta.token_ids
    return token_ids


async def ask_until(client: AsyncClient, number: int, over: asyncio.Event, expected: Sequence[int]) -> int:
    """One client: asks the same again and again; returns how often."""
    num_answers = 0
    while not over.is_set():
        assert await ask(client, number) == expected
        num_answers += 1
    return num_answers


async def under_load(home: Home, *commands: Sequence[str]) -> int:
    """Runs the commands while all clients ask; returns the number of answers, all as expected."""
    over = asyncio.Event()
    async with AsyncClient(home.state().router_address, retry=RetryPolicy(max_attempts=1)) as client:
        expected = await asyncio.gather(*(ask(client, number) for number in range(NUM_CLIENTS)))
        clients = [
            asyncio.create_task(ask_until(client, number, over, expected[number]))
            for number in range(NUM_CLIENTS)
        ]
        results = [await asyncio.to_thread(home.run, *command) for command in commands]
        over.set()
        num_answers = await asyncio.gather(*clients)
    for done in results:
        assert done.returncode == 0, done.stderr
    assert min(num_answers) > 0
    return NUM_CLIENTS + sum(num_answers)


def test_a_rolling_restart_under_load_loses_nothing(running: Home) -> None:
    before = running.workers()
    finishing = ("restart", "prefill-0", "decode-0")
    handing_back = ("restart", "prefill-1", "decode-1", "--timeout", "0")
    num_answers = asyncio.run(under_load(running, finishing, handing_back))
    after = running.workers()
    assert set(after) == set(WORKERS)
    for worker in WORKERS:
        assert after[worker]["hello"]["epoch"] != before[worker]["hello"]["epoch"]
        assert after[worker]["report"]["state"] == "WORKER_STATE_SERVING"
    with Client(running.state().router_address) as client:
        status = client.status()
    assert (status.failed_requests, status.finished_requests) == (0, num_answers)
