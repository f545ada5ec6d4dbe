"""Requests cancelled at random moments and deadlines that pass: nothing hangs, nothing stays held."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from headrace import AsyncClient, Cancelled, Client, DeadlineExceeded, FinishReason, ResourceExhausted
from headrace.v1.cluster_pb2 import WorkerStatus
from headrace.v1.worker_pb2 import WORKER_STATE_SERVING
from tests.real_prompts import real_prompts

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

CONCURRENCY = 16
LIMIT_S = 300.0  # of one request: beyond it something hangs
SETTLE_S = 20.0


@pytest.mark.parametrize("num_requests", [32, pytest.param(200, marks=pytest.mark.slow)])
def test_cancels_and_deadlines_leave_nothing_behind(
    laptop_address: str, laptop_client: Client, num_requests: int
) -> None:
    before = {worker.hello.worker_id: worker.hello.epoch for worker in laptop_client.status().workers}
    ends = asyncio.run(storm(laptop_address, num_requests))
    assert sum(ends.values()) == num_requests
    assert set(ends) <= {"finished", "cancelled", "deadline"}
    assert ends["finished"] > num_requests / 3
    assert ends["cancelled"] > num_requests / 8
    assert ends["deadline"] > 0
    for worker in settled(laptop_client):
        assert worker.hello.state == WORKER_STATE_SERVING
        assert worker.hello.epoch == before[worker.hello.worker_id]
        assert held(worker) == (0, 0, 0, 0, 0)
    assert laptop_client.generate("Still there?", max_tokens=4, temperature=0.0).finish_reason is not None


async def storm(address: str, num_requests: int) -> Counter[str]:
    """Runs the requests, CONCURRENCY at a time; how many ended in which way."""
    rng = random.Random(20)
    prompts = [prompt for prompt in real_prompts() if len(prompt) < 2500]
    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncClient(address) as client:

        async def one(number: int) -> str:
            kind = "cancel" if number % 3 == 0 else "deadline" if number % 10 == 1 else "finish"
            wait_s = rng.uniform(0.0, 4.0)
            async with gate, asyncio.timeout(LIMIT_S):
                return await request(client, f"{number}: {rng.choice(prompts)}", kind, wait_s)

        return Counter(await asyncio.gather(*(one(number) for number in range(num_requests))))


async def request(client: AsyncClient, prompt: str, kind: str, wait_s: float) -> str:
    """One request and its end: finished, cancelled or deadline."""
    timeout_s = max(0.05, wait_s / 4) if kind == "deadline" else LIMIT_S
    answer = client.generate(prompt, max_tokens=24, temperature=0.7, ignore_eos=True, timeout_s=timeout_s)
    if kind == "cancel":
        asyncio.get_running_loop().call_later(
            wait_s, lambda: tasks.append(asyncio.ensure_future(answer.cancel()))
        )
    tasks: list[asyncio.Future[None]] = []
    try:
        async with answer:
            await answer.read()
    except Cancelled:
        return "cancelled"
    except DeadlineExceeded:
        return "deadline"
    except ResourceExhausted as refused:
        # What could not have its first token in time is refused at arrival.
        return "deadline" if refused.cause == "PREDICTED_LATE" and kind == "deadline" else refused.cause
    finally:
        await asyncio.gather(*tasks)
    return "cancelled" if answer.finish_reason is FinishReason.CANCELLED else "finished"


def settled(client: Client) -> list[WorkerStatus]:
    """The workers once they hold nothing any more, or as they are when that takes too long."""
    end = time.monotonic() + SETTLE_S
    while True:
        workers = list(client.status().workers)
        if time.monotonic() > end or all(not any(held(worker)) for worker in workers):
            return workers
        time.sleep(0.2)


def held(worker: WorkerStatus) -> tuple[int, int, int, int, int]:
    """Leases, pins, private blocks, running and waiting sequences."""
    report = worker.report
    return (
        report.leases,
        report.pins,
        report.private_blocks,
        report.running_sequences,
        report.waiting_sequences,
    )
