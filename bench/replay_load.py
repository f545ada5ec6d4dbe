"""Asks a cluster for the requests of a replay, each at its time, and notes what came of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.prompts import distinct_prompt
from bench.replay_trace import Replay, ReplayRequest
from headrace import AsyncClient

TIMEOUT_S = 600.0
CALIBRATION_REQUESTS = 8
CALIBRATION_AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request got. `ttft_s`: at the client, from the call to the first token; `gaps_s`: between tokens."""

    prompt: tuple[int, ...]
    cached_tokens: int
    fetched_tokens: int
    ttft_s: float
    gaps_s: tuple[float, ...]
    is_local: bool
    """Whether the decode worker prefilled."""


async def ask(client: AsyncClient, prompt: Sequence[int], answer_tokens: int) -> Asked:
    """One answer, to its end. Raises HeadraceError."""
    began = time.perf_counter()
    answer = client.generate(
        prompt, max_tokens=answer_tokens, temperature=0.0, ignore_eos=True, timeout_s=TIMEOUT_S
    )
    came: list[float] = []
    async with answer:
        async for delta in answer.deltas():
            came += [time.perf_counter()] * len(delta.token_ids)
    return Asked(
        tuple(prompt),
        answer.usage.cached_tokens,
        answer.usage.fetched_tokens,
        came[0] - began,
        tuple(later - earlier for earlier, later in itertools.pairwise(came)),
        answer.timing.prefill_worker == answer.timing.decode_worker,
    )


async def requests_per_s(client: AsyncClient, prompt_tokens: int, answer_tokens: int) -> float:
    """What the cluster can do at most of prompts that nobody knows, some at a time; as many before it for warmth."""
    lock = asyncio.Semaphore(CALIBRATION_AT_A_TIME)

    async def one(seed: int) -> None:
        async with lock:
            await ask(client, distinct_prompt(prompt_tokens, seed), answer_tokens)

    async def several(first_seed: int) -> None:
        await asyncio.gather(*(one(first_seed + number) for number in range(CALIBRATION_REQUESTS)))

    await several(0)
    began = time.perf_counter()
    await several(CALIBRATION_REQUESTS)
    return CALIBRATION_REQUESTS / (time.perf_counter() - began)


async def replayed(
    client: AsyncClient, replay: Replay, speed: float, progress: Callable[[], None]
) -> list[Asked]:
    """Every request at its time divided by `speed`, in the order in which they were asked.

    A turn waits for the end of the one before it in its conversation, as whoever answers it did.
    """
    began = time.perf_counter()
    last_turns: dict[str, asyncio.Task[None]] = {}
    asked: list[Asked | None] = []

    async def one(request: ReplayRequest, turn_before: asyncio.Task[None] | None) -> None:
        await asyncio.sleep(request.at_s / speed - (time.perf_counter() - began))
        if turn_before is not None:
            await turn_before
        place = len(asked)
        asked.append(None)
        asked[place] = await ask(client, request.prompt, request.answer_tokens)
        progress()

    async with asyncio.TaskGroup() as tasks:
        for request in replay.requests:
            task = tasks.create_task(one(request, last_turns.get(request.session)))
            last_turns[request.session] = task
    return [each for each in asked if each is not None]
