"""Random deadlines and random cancels: each request ends in time, and nobody computes for one that is over.

The router is a process of its own; workers and clients live in this one, so that the engines can be watched.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from headrace import AsyncClient, DeadlineExceeded, FinishReason, ResourceExhausted, RetryPolicy
from router.config import RouterConfig
from router.server import run
from tests.tiny_model import make_tiny_model
from tests.worker_nodes import SECRET, assert_nothing_held, random_prompt, wait_until, worker
from worker.config import WorkerRole
from worker.node import WorkerNode

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

CONCURRENCY = 8
CHUNK_TOKENS = 64
SHORTEST_DEADLINE_S, LONGEST_DEADLINE_S = 0.005, 20.0
OVERDUE_S = 1.0
"""How late an end may reach the client: half of it is the SDK's own grace, after which it would stop waiting."""
PATIENCE_S = 30.0
ONCE = RetryPolicy(max_attempts=1)
FINISHED, PASSED, REFUSED = "finished", "passed", "refused"


@dataclass(frozen=True, slots=True)
class Cluster:
    """One prefill and one decode worker behind a router."""

    address: str
    prefill: WorkerNode
    decode: WorkerNode


@dataclass(frozen=True, slots=True)
class End:
    """How a request ended, how long after its beginning, and by whom."""

    how: str
    deadline_s: float
    took_s: float
    stage: str = ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, unused_tcp_port_factory: Any) -> Iterator[Cluster]:
    model_dir = make_tiny_model(tmp_path_factory.mktemp("model"))
    address = f"127.0.0.1:{unused_tcp_port_factory()}"
    options: dict[str, object] = {"routers": (address,), "chunk_tokens": CHUNK_TOKENS}
    with (
        router_process(model_dir, address),
        worker(model_dir, WorkerRole.PREFILL, **options) as prefill,
        worker(model_dir, WorkerRole.DECODE, **options) as decode,
    ):
        wait_until(lambda: sum(each.counters.granted for each in decode._keepers) > 0, "the router's trial")
        assert_nothing_held(prefill, decode)
        yield Cluster(address, prefill, decode)


@contextmanager
def router_process(model_dir: Path, address: str) -> Iterator[None]:
    config = RouterConfig(
        router_id="router", model_name="tiny", model_dir=model_dir, cluster_secret=SECRET, listen=address,
        max_context=512, policy="least-loaded",  # every prompt is handed over, short ones too
    )  # fmt: skip
    process = multiprocessing.get_context("spawn").Process(target=run, args=(config,))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# --- deadlines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_requests", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_each_request_ends_by_its_deadline_or_has_finished_before_it(
    cluster: Cluster, num_requests: int
) -> None:
    ends = asyncio.run(storm(cluster.address, num_requests))
    assert len(ends) == num_requests
    counts = Counter(end.how for end in ends)
    assert counts[FINISHED] > num_requests / 20, counts
    assert counts[PASSED] > num_requests / 20, counts
    assert [end for end in ends if end.took_s > end.deadline_s + OVERDUE_S] == []
    # The router ended them; a client that had lost patience would say so.
    assert [end for end in ends if end.how == PASSED and end.stage == "client"] == []
    assert_nothing_held(cluster.prefill, cluster.decode)
    assert cluster.prefill.report().running_sequences == cluster.decode.report().running_sequences == 0


async def storm(address: str, num_requests: int) -> list[End]:
    """Runs the requests, CONCURRENCY at a time, with deadlines of all orders of magnitude."""
    asyncio.get_running_loop().set_exception_handler(without_false_alarms)
    rng = random.Random(num_requests)
    gate = asyncio.Semaphore(CONCURRENCY)
    async with AsyncClient(address, retry=ONCE) as client:

        async def one(number: int, deadline_s: float, num_tokens: int, max_tokens: int) -> End:
            async with gate, asyncio.timeout(LONGEST_DEADLINE_S + PATIENCE_S):
                return await ask(client, random_prompt(number, num_tokens), deadline_s, max_tokens)

        return await asyncio.gather(
            *(
                one(number, log_uniform(rng), rng.randint(10, 400), rng.randint(2, 24))
                for number in range(num_requests)
            )
        )


async def ask(client: AsyncClient, prompt: Any, deadline_s: float, max_tokens: int) -> End:
    """One request and its end. An answer must be whole, or end in the way that a deadline ends it."""
    began = time.monotonic()
    stage = ""
    try:
        answer = client.generate(prompt, max_tokens=max_tokens, ignore_eos=True, timeout_s=deadline_s)
        token_ids = [token_id async for delta in answer.deltas() for token_id in delta.token_ids]
        assert answer.finish_reason is FinishReason.LENGTH
        assert len(token_ids) == max_tokens
        how = FINISHED
    except DeadlineExceeded as error:
        how, stage = PASSED, error.stage
    except ResourceExhausted as error:
        assert error.cause == "PREDICTED_LATE"
        how, stage = REFUSED, error.stage
    return End(how, deadline_s, time.monotonic() - began, stage)


def log_uniform(rng: random.Random) -> float:
    """Seconds."""
    return math.exp(rng.uniform(math.log(SHORTEST_DEADLINE_S), math.log(LONGEST_DEADLINE_S)))


# --- cancels ---------------------------------------------------------------------------------------------

PROMPT_TOKENS = 450
NUM_CHUNKS = math.ceil(PROMPT_TOKENS / CHUNK_TOKENS)


class ChunkGate:
    """Counts what an engine computes, and holds it inside one chunk until a test lets it go on."""

    def __init__(self, engine: Engine, held_chunk: int) -> None:
        self.num_chunks = 0
        self.held_chunk = held_chunk
        self.reached, self._opened = threading.Event(), threading.Event()
        self._runner, self._forward = engine.runner, engine.runner.forward
        engine.runner.forward = self._gated  # type: ignore[method-assign]

    def open(self) -> None:
        """Let it compute."""
        self._opened.set()

    def close(self) -> None:
        """Let it compute, unwatched."""
        self.open()
        self._runner.forward = self._forward  # type: ignore[method-assign]

    def _gated(self, *arguments: Any) -> Any:
        self.num_chunks += 1
        if self.num_chunks == self.held_chunk:
            self.reached.set()
            assert self._opened.wait(PATIENCE_S)
        return self._forward(*arguments)


@pytest.mark.parametrize("way", ["cancel", "hang up", "deadline"])
@pytest.mark.parametrize("held_chunk", [1, NUM_CHUNKS - 1])
def test_prefill_stops_with_the_chunk_in_which_it_was_cancelled(
    cluster: Cluster, way: str, held_chunk: int
) -> None:
    with closing(ChunkGate(cluster.prefill.engine, held_chunk)) as gate:
        asyncio.run(end_within_a_chunk(cluster, gate, way))
        gate.open()
        assert_nothing_held(cluster.prefill, cluster.decode)
        # The chunk it was in has been applied, since the engine has let go of the sequence: no other can follow.
        assert gate.num_chunks == held_chunk


async def end_within_a_chunk(cluster: Cluster, gate: ChunkGate, way: str) -> None:
    """Ends a request while the prefill worker is in the middle of it; returns when the worker knows."""
    asyncio.get_running_loop().set_exception_handler(without_false_alarms)
    timeout_s = 1.0 if way == "deadline" else PATIENCE_S
    async with AsyncClient(cluster.address, retry=ONCE) as client:
        prompt = random_prompt(random.Random(way).getrandbits(32) + gate.held_chunk, PROMPT_TOKENS)
        answer = client.generate(prompt, max_tokens=8, timeout_s=timeout_s)
        reading = asyncio.ensure_future(answer.read())
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        if way == "cancel":
            await client.cancel(answer.request_id)
        elif way == "hang up":
            await answer.close()
        await asyncio.to_thread(
            wait_until, lambda: cluster.prefill.report().leases == 0, "the cancel at the prefill worker"
        )
        await asyncio.gather(reading, return_exceptions=True)


def without_false_alarms(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """gRPC wakes every event loop of a process for each event, and the loops beside the one that it is for say so."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
