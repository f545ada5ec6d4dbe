"""Direct streams on a real cluster: the relay's tokens, also where the worker is killed in mid-answer."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from headrace import AsyncClient, Client
from tests.e2e.conftest import Home
from tests.e2e.long_answers import ANSWER_TOKENS, LongAnswer, ask, decode_workers
from tests.e2e.test_killed_worker import PROFILE as KILLED

# Slow, for the sake of `make test`: `make chaos` runs it.
pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

PROFILE = KILLED.replace("router: {", "router: {streaming: direct, ").replace("name: killed", "name: direct")
NUM_REQUESTS = 8


async def answers(address: str, *, direct: bool, kill: bool = False) -> list[LongAnswer]:
    """All at once; with `kill`, the decode worker that writes most of them is killed once each is under way."""
    begun = asyncio.Semaphore(0)
    async with AsyncClient(address, direct=direct) as client:
        tasks = [
            asyncio.create_task(ask(client, number, begun, begun_at=20)) for number in range(NUM_REQUESTS)
        ]
        for _ in tasks:
            await asyncio.wait_for(begun.acquire(), 60)
        if kill:
            workers = decode_workers(await client.status()).values()
            os.kill(max(workers, key=lambda each: each.report.running_sequences).hello.pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)


def said(found: list[LongAnswer]) -> list[tuple[list[int], str]]:
    return [(answer.token_ids, answer.text) for answer in found]


def test_direct_is_relay_and_survives_its_worker(home: Home) -> None:
    started = home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    address = home.state().router_address
    with Client(address) as client:
        workers = decode_workers(client.status())
        assert all(worker.hello.direct_address for worker in workers.values())
        relayed = said(asyncio.run(answers(address, direct=False)))
        assert said(asyncio.run(answers(address, direct=True))) == relayed
        disturbed = asyncio.run(answers(address, direct=True, kill=True))
        assert said(disturbed) == relayed
        assert max(answer.attempts for answer in disturbed) > 1, "nothing ran on the worker that was killed"
        assert all(len(answer.token_ids) == ANSWER_TOKENS for answer in disturbed)
        status = client.status()
        assert (status.failed_requests, status.finished_requests) == (0, 3 * NUM_REQUESTS)
