"""The load of `headrace bench overload`: requests of several tenants, at a rate whatever becomes of them, or in a loop.

Lengths and times are drawn before the load begins, and prompts are made then, so that the process that asks does
little else than ask. Nothing is asked twice: what is refused stays refused.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

ERROR_DETAIL_KEY = "headrace-error-bin"
SHORTEST_PROMPT, MEDIAN_PROMPT, LONGEST_PROMPT = 100, 250, 600
PROMPT_SIGMA = 0.5
ANSWER_TOKENS = 16
PATIENCE_S = 120.0
"""How long after its last request a load may take to end."""

DrawPrompt = Callable[[int, int], list[int]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to make, `at_s` after the load begins."""

    at_s: float
    tenant: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a request. Times count from the beginning of the load.

    Attributes:
        due_s: when it should have been sent; `sent_s` less this is how far the clients lagged.
        ttft_s: from the call to its first token; None where none came.
        cause: why it failed; empty for an answer that came whole.
        accepted: let in. A request that failed and was not is refused.
    """

    tenant: str
    prompt_tokens: int
    due_s: float
    sent_s: float
    ended_s: float
    ttft_s: float | None
    answer_tokens: int
    accepted: bool
    cause: str

    @property
    def is_refused(self) -> bool:
        """Turned away before anything was done for it."""
        return bool(self.cause) and not self.accepted


def prompt_length(rng: random.Random) -> int:
    """Tokens: lognormal, cut to what prompts here have."""
    drawn = round(MEDIAN_PROMPT * math.exp(rng.gauss(0.0, PROMPT_SIGMA)))
    return min(max(drawn, SHORTEST_PROMPT), LONGEST_PROMPT)


def poisson(seed: int, rate: float, seconds: float, tenants: Sequence[str]) -> list[Arrival]:
    """Requests at `rate` per second of all tenants together, each of whom offers as much as any other.

    Raises:
        ValueError: a rate or a duration that is not positive, or no tenant.
    """
    if not rate > 0 or not seconds > 0 or not tenants:
        raise ValueError(
            f"a load needs a rate and seconds above 0 and somebody who asks, "
            f"not {rate:g} per second for {seconds:g} s of {list(tenants)}"
        )
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    for tenant in tenants:
        at_s = rng.expovariate(rate / len(tenants))
        while at_s < seconds:
            arrivals.append(Arrival(at_s, tenant, prompt_length(rng)))
            at_s += rng.expovariate(rate / len(tenants))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


class Clients:
    """A channel per tenant, all of one event loop.

    `api_keys` by tenant; `draw_prompt` gives token ids for a length and a seed, that begin as no others do.
    """

    def __init__(self, address: str, api_keys: Mapping[str, str], draw_prompt: DrawPrompt) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        self._channels = {tenant: grpc.aio.insecure_channel(address, options=options) for tenant in api_keys}
        self._stubs = {
            tenant: inference_pb2_grpc.InferenceStub(channel) for tenant, channel in self._channels.items()
        }
        self._metadata = {tenant: (("authorization", f"Bearer {key}"),) for tenant, key in api_keys.items()}
        self._draw_prompt = draw_prompt
        self._seeds = itertools.count()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, address: str, api_keys: Mapping[str, str], draw_prompt: DrawPrompt
    ) -> AsyncIterator[Clients]:
        """Closed at the end."""
        clients = cls(address, api_keys, draw_prompt)
        try:
            yield clients
        finally:
            for channel in clients._channels.values():
                await channel.close()

    async def offer(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Every request at its time; returns when each has ended.

        Raises:
            TimeoutError: some had not, long after the last was sent.
        """
        made = [(arrival, self._request(arrival.prompt_tokens)) for arrival in arrivals]
        began_s = time.perf_counter()
        tasks: list[asyncio.Task[Outcome]] = []
        async with asyncio.TaskGroup() as group:
            for arrival, request in made:
                await asyncio.sleep(began_s + arrival.at_s - time.perf_counter())
                tasks.append(group.create_task(self._ask(arrival, request, began_s)))
            _, unended = await asyncio.wait(tasks, timeout=PATIENCE_S) if tasks else (set(), set())
            for task in unended:
                task.cancel()
        if unended:
            raise TimeoutError(
                f"{len(unended)} of {len(tasks)} requests had not ended after {PATIENCE_S:g} s"
            )
        return [task.result() for task in tasks]

    async def saturate(self, concurrency: int, seconds: float, seed: int) -> list[Outcome]:
        """`concurrency` requests at a time, each followed by the next, for so long."""
        began_s = time.perf_counter()
        turns = itertools.cycle(self._stubs)

        async def one_after_the_other(rng: random.Random) -> list[Outcome]:
            outcomes: list[Outcome] = []
            while (now_s := time.perf_counter() - began_s) < seconds:
                arrival = Arrival(now_s, next(turns), prompt_length(rng))
                outcomes.append(await self._ask(arrival, self._request(arrival.prompt_tokens), began_s))
            return outcomes

        rngs = [random.Random(seed * concurrency + number) for number in range(concurrency)]
        async with asyncio.timeout(seconds + PATIENCE_S):
            found = await asyncio.gather(*map(one_after_the_other, rngs))
        return list(itertools.chain(*found))

    def _request(self, num_tokens: int) -> pb.GenerateRequest:
        ids = pb.TokenIds(ids=self._draw_prompt(num_tokens, next(self._seeds)))
        sampling = pb.SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        return pb.GenerateRequest(token_ids=ids, sampling=sampling)

    async def _ask(self, arrival: Arrival, request: pb.GenerateRequest, began_s: float) -> Outcome:
        sent_s = time.perf_counter()
        ttft_s, num_tokens, accepted, cause = None, 0, False, ""
        metadata = self._metadata[arrival.tenant]
        try:
            async for message in self._stubs[arrival.tenant].Generate(request, metadata=metadata):
                accepted = True
                if message.HasField("delta"):
                    ttft_s = time.perf_counter() - sent_s if ttft_s is None else ttft_s
                    num_tokens += len(message.delta.token_ids)
        except grpc.aio.AioRpcError as error:
            cause = cause_of(error)
        return Outcome(
            tenant=arrival.tenant,
            prompt_tokens=arrival.prompt_tokens,
            due_s=arrival.at_s,
            sent_s=sent_s - began_s,
            ended_s=time.perf_counter() - began_s,
            ttft_s=ttft_s,
            answer_tokens=num_tokens,
            accepted=accepted,
            cause=cause,
        )


def cause_of(error: grpc.aio.AioRpcError) -> str:
    """As the router names it; the status where it named none."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_DETAIL_KEY and isinstance(value, bytes):
            return pb.ErrorDetail.FromString(value).cause or error.code().name
    return str(error.code().name)
