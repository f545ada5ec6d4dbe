"""Long answers of a real cluster, and its decode workers: what tests that kill something ask for and look at."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from headrace import AsyncAnswer, AsyncClient, Client
from headrace.v1.cluster_pb2 import StatusResponse, WorkerStatus

ANSWER_TOKENS = 450


@dataclass(frozen=True, slots=True)
class LongAnswer:
    token_ids: list[int]
    text: str
    attempts: int


def begin(client: AsyncClient, number: int, prompt: Sequence[int], max_tokens: int) -> AsyncAnswer:
    """Of so many tokens; every second one is seeded."""
    return client.generate(
        prompt,
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=0.8 if number % 2 else 0.0,
        seed=number,
        timeout_s=120,
    )


async def ask(client: AsyncClient, number: int, begun: asyncio.Semaphore, begun_at: int = 1) -> LongAnswer:
    """A long answer. `begun` is released once `begun_at` of its tokens are here."""
    answer = begin(client, number, [5 + number, 6, 7], ANSWER_TOKENS)
    token_ids: list[int] = []
    async for delta in answer.deltas():
        if len(token_ids) < begun_at <= len(token_ids) + len(delta.token_ids):
            begun.release()
        assert delta.first_index == len(token_ids), "a token was lost or came twice"
        token_ids += delta.token_ids
    return LongAnswer(token_ids, answer.text, answer.timing.attempts)


def decode_workers(status: StatusResponse) -> dict[str, WorkerStatus]:
    return {
        worker.hello.worker_id: worker
        for worker in status.workers
        if worker.connected and worker.hello.worker_id.startswith("decode")
    }


def is_back(client: Client, old_epoch: int) -> bool:
    worker = decode_workers(client.status()).get("decode-1")
    return worker is not None and worker.hello.epoch != old_epoch
