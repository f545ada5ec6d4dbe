"""Direct streams on a real cluster: the relay's tokens, also where the worker is killed in mid-answer."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from headrace import AsyncClient, Client
from tests.e2e.conftest import Home
from tests.e2e.test_killed_worker import PROFILE as KILLED
from tests.e2e.test_killed_worker import decode_workers

# Slow, so not in `make test`: all answers may be placed on the worker that lives, and then nothing is shown.
pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(300)]

PROFILE = KILLED.replace("router: {", "router: {streaming: direct, ").replace("name: killed", "name: direct")
NUM_REQUESTS = 8
ANSWER_TOKENS = 450


async def ask(client: AsyncClient, number: int, begun: asyncio.Semaphore) -> tuple[list[int], str, int]:
    """Tokens, text and attempts of a long answer; every second one is seeded."""
    answer = client.generate(
        [5 + number, 6, 7],
        max_tokens=ANSWER_TOKENS,
        ignore_eos=True,
        temperature=0.8 if number % 2 else 0.0,
        seed=number,
        timeout_s=120,
    )
    token_ids: list[int] = []
    async for delta in answer.deltas():
        if len(token_ids) < 20 <= len(token_ids) + len(delta.token_ids):
            begun.release()
        assert delta.first_index == len(token_ids), "a token was lost or came twice"
        token_ids += delta.token_ids
    return token_ids, answer.text, answer.timing.attempts


async def answers(
    address: str, *, direct: bool, victim: int | None = None
) -> tuple[list[tuple[list[int], str]], list[int]]:
    """All at once; with `victim`, that process is killed once each of them is under way."""
    begun = asyncio.Semaphore(0)
    async with AsyncClient(address, direct=direct) as client:
        tasks = [asyncio.create_task(ask(client, number, begun)) for number in range(NUM_REQUESTS)]
        for _ in tasks:
            await asyncio.wait_for(begun.acquire(), 60)
        if victim is not None:
            os.kill(victim, signal.SIGKILL)
        found = await asyncio.gather(*tasks)
    return [(token_ids, text) for token_ids, text, _ in found], [attempts for *_, attempts in found]


def test_direct_is_relay_and_survives_its_worker(home: Home) -> None:
    started = home.up(PROFILE)
    assert started.returncode == 0, started.stderr
    address = home.state().router_address
    with Client(address) as client:
        workers = decode_workers(client)
        assert all(worker.hello.direct_address for worker in workers.values())
        relayed, _ = asyncio.run(answers(address, direct=False))
        assert asyncio.run(answers(address, direct=True))[0] == relayed
        disturbed, attempts = asyncio.run(answers(address, direct=True, victim=workers["decode-1"].hello.pid))
        assert disturbed == relayed
        assert max(attempts) > 1, "nothing ran on the worker that was killed"
        assert all(len(token_ids) == ANSWER_TOKENS for token_ids, _ in disturbed)
        status = client.status()
        assert (status.failed_requests, status.finished_requests) == (0, 3 * NUM_REQUESTS)
