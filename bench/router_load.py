"""The clients: calls to Generate, in a loop or at a rate, and what was seen of their answers.

Calls go over a few channels of one process. An answer with a token missing, repeated or too many ends the
benchmark.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from bench.prompts import documentation
from bench.router_settings import NUM_BYTES_PER_PROMPT
from headrace._direct import AsyncDirectChannels, TwoStreams
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

NUM_CHANNELS = 8
MAX_UNDER_WAY = 2048
"""Of paced calls. More would say that the router is not keeping up; the benchmark ends then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Calls for answers of `num_tokens` tokens: `concurrency` at a time, each followed by the next; or `rate` a
    second, whatever becomes of them. One of both is 0. `direct`: by clients that can stream from workers."""

    target: str
    num_tokens: int
    concurrency: int = 0
    rate: float = 0.0
    direct: bool = False

    def __post_init__(self) -> None:
        if (self.concurrency > 0) == (self.rate > 0):
            raise ValueError("a load has a concurrency or a rate, and not both")
        if self.num_tokens < 1:
            raise ValueError(f"an answer has at least one token, not {self.num_tokens}")


@dataclass(slots=True)
class Seen:
    """What came since the last look. `ttft_s`: from each call to its first token."""

    num_requests: int = 0
    num_tokens: int = 0
    num_messages: int = 0
    ttft_s: list[float] = field(default_factory=list)


class AnswerCheck:
    """Follows one answer. Raises RuntimeError for a token that is missing, repeated or too many."""

    def __init__(self, num_tokens: int) -> None:
        self._wanted = num_tokens
        self.num_tokens = 0
        self._is_done = False

    def take(self, message: pb.GenerateResponse) -> int:
        """How many tokens the message brought."""
        if message.HasField("done"):
            self._is_done = True
            return 0
        if not message.HasField("delta"):
            return 0
        if message.delta.first_index != self.num_tokens:
            raise RuntimeError(f"token {message.delta.first_index} came where {self.num_tokens} was due")
        self.num_tokens += len(message.delta.token_ids)
        return len(message.delta.token_ids)

    def end(self) -> None:
        """The stream has ended."""
        if not self._is_done or self.num_tokens != self._wanted:
            raise RuntimeError(f"an answer ended after {self.num_tokens} of {self._wanted} tokens")


class Prompts:
    """Pieces of English, of `NUM_BYTES_PER_PROMPT` bytes each, no two of which begin alike."""

    def __init__(self, seed: int = 0) -> None:
        self._text = " ".join(documentation().encode("ascii", "ignore").decode().split())
        self._generator = random.Random(seed)
        self._numbers = itertools.count()

    def next(self) -> str:
        start = self._generator.randrange(len(self._text) - NUM_BYTES_PER_PROMPT)
        piece = self._text[start : start + NUM_BYTES_PER_PROMPT]
        return f"{next(self._numbers):08d} {piece}"[:NUM_BYTES_PER_PROMPT]


class Clients:
    """Puts one load at a time on a target. Lives on one event loop."""

    def __init__(self, targets: dict[str, str]) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        self._channels = {
            name: [grpc.aio.insecure_channel(address, options=options) for _ in range(NUM_CHANNELS)]
            for name, address in targets.items()
        }
        self._direct_channels = AsyncDirectChannels()
        self._prompts = Prompts()
        self._seen = Seen()
        self._load_task: asyncio.Task[None] | None = None
        self._turn = itertools.count()

    def begin(self, load: Load) -> None:
        """Puts the load on, until `end`.

        Raises:
            RuntimeError: another one is on.
        """
        if self._load_task is not None:
            raise RuntimeError("one load at a time")
        self._seen = Seen()
        run = self._loop(load) if load.concurrency else self._pace(load)
        self._load_task = asyncio.create_task(run)

    def look(self) -> dict[str, Any]:
        """What came since the last look, and when this is; `failure` where the load ended by itself."""
        seen, self._seen = self._seen, Seen()
        return {
            "failure": self._failure(),
            "at_s": time.perf_counter(),
            "num_requests": seen.num_requests,
            "num_tokens": seen.num_tokens,
            "num_messages": seen.num_messages,
            "ttft_s": seen.ttft_s,
        }

    async def end(self) -> None:
        """Takes the load off; calls under way are cancelled."""
        task, self._load_task = self._load_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        await self.end()
        await self._direct_channels.aclose()
        for channel in itertools.chain(*self._channels.values()):
            await channel.close()

    def _failure(self) -> str:
        task = self._load_task
        error = task.exception() if task is not None and task.done() else None
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, grpc.aio.AioRpcError):
            return f"a call failed with {error.code().name}: {error.details()}"
        return "" if error is None else str(error)

    async def _loop(self, load: Load) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(load.concurrency):
                group.create_task(self._again_and_again(load))

    async def _again_and_again(self, load: Load) -> None:
        while True:
            await self._call(load)

    async def _pace(self, load: Load) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        under_way: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                await asyncio.sleep(began_s + number / load.rate - loop.time())
                if len(under_way) >= MAX_UNDER_WAY:
                    raise RuntimeError(
                        f"{load.rate:g} requests a second are too many: {MAX_UNDER_WAY} are under way"
                    )
                task = group.create_task(self._call(load))
                under_way.add(task)
                task.add_done_callback(under_way.discard)

    async def _call(self, load: Load) -> None:
        channels = self._channels[load.target]
        stub = inference_pb2_grpc.InferenceStub(channels[next(self._turn) % len(channels)])
        sampling = pb.SamplingParams(max_tokens=load.num_tokens, temperature=0.0)
        request = pb.GenerateRequest(text=self._prompts.next(), sampling=sampling, direct=load.direct)
        check, began_s = AnswerCheck(load.num_tokens), time.perf_counter()
        async for message in self._messages(stub.Generate(request)):
            num_new = check.take(message)
            if num_new and check.num_tokens == num_new:
                self._seen.ttft_s.append(time.perf_counter() - began_s)
            self._seen.num_tokens += num_new
            self._seen.num_messages += 1
        check.end()
        self._seen.num_requests += 1

    async def _messages(self, call: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Of the router's stream, and of a worker's beside it from where the router's stood: then tokens that came on
        one are left out of the other."""
        streams, num_tokens, has_two = TwoStreams(call, self._direct_channels), 0, False
        try:
            while isinstance(message := await streams.read(), pb.GenerateResponse):
                if message.HasField("ticket"):
                    streams.redeem(message.ticket, [num_tokens], None)
                    has_two = True
                if has_two and message.HasField("delta"):
                    num_known = max(0, num_tokens - message.delta.first_index)
                    del message.delta.token_ids[:num_known]
                    message.delta.first_index += num_known
                num_tokens += len(message.delta.token_ids)
                if message.delta.token_ids or not message.HasField("delta"):
                    yield message
        finally:
            streams.cancel()
