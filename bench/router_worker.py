"""A worker without an engine: speaks Worker.Session with real messages, and takes no time for anything.

It grants every lease at once and has every prompt prefilled at once; then each request gets its next token at
each tick of the step clock, all tokens of a step in one message. Reports and news of cached blocks come as a
worker's do.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from bench.router_settings import BLOCK_TOKENS, MAX_CONTEXT
from bench.router_steps import StepClock
from decode.direct import BulkPace
from headrace.v1 import inference_pb2, worker_pb2, worker_pb2_grpc
from kvtransfer.direct_ticket import DirectTicket
from kvtransfer.keys import keys_for, root_key, tenant_secret
from router.core.tenants import DEFAULT_TENANT
from rpc.call import ServerCall
from rpc.server import Server, ServerSettings
from worker.block_journal import BlockJournal, BlockStream
from worker.direct import DirectRefused
from worker.servers import KEEPALIVE_S, MAX_CONTROL_BYTES

REPORT_S = 0.2
NUM_BLOCKS = 1 << 16
MAX_SEQUENCES = 1024
MAX_CACHED_BLOCKS = 4096
STEP_S = 0.02  # what reports say, whatever the pace of the tokens
PREFILL_S_PER_TOKEN = 0.002
"""Likewise; so slow that a prompt is handed over rather than computed beside answers."""
TOKEN_ID, TOKEN_TEXT = 200, " water"
KEY_IDENTITY = "bench"

IDENTITY = worker_pb2.Identity(weights_digest="bench", arithmetic="none", layout="none", handoff_major=1)

AttemptName = tuple[str, str, int]


class MockCache:
    """The blocks that a worker says it has: those of the last prompts, in keys that the router can make too."""

    def __init__(self, cluster_secret: bytes, max_blocks: int = MAX_CACHED_BLOCKS) -> None:
        self.journal = BlockJournal()
        self._max_blocks = max_blocks
        self._root = root_key(KEY_IDENTITY, "", tenant_secret(cluster_secret, DEFAULT_TENANT))
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def take(self, token_ids: list[int]) -> int:
        """Caches a prompt; returns how many tokens of it were there. At least one is left to compute."""
        num_found = 0
        for place, key in enumerate(keys_for(self._root, token_ids, BLOCK_TOKENS)):
            if key in self._keys:
                num_found += num_found == place
                self._keys.move_to_end(key)
                continue
            self._keys[key] = None
            self.journal.named(key, 0)
        while len(self._keys) > self._max_blocks:
            self.journal.forgotten(self._keys.popitem(last=False)[0], 0)
        return min(num_found * BLOCK_TOKENS, (len(token_ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS)


@dataclass(slots=True)
class _Running:
    key: worker_pb2.RequestKey
    max_tokens: int
    num_blocks: int
    num_tokens: int = 0
    num_told: int = 0
    ticket_id: bytes = b""
    reader: ServerCall | None = None
    pace: BulkPace = field(default_factory=BulkPace)

    def next_output(self, now: float) -> worker_pb2.ChoiceOutput | None:
        """The next token; None for the router where a client reads it here, and the router does not yet."""
        self.num_tokens += 1
        if self.reader is not None:
            self._send(self.reader, self.num_tokens - 1)
            if self.num_tokens < self.max_tokens and not self.pace.is_due(now):
                return None
        output = worker_pb2.ChoiceOutput(key=self.key, delta=self._delta(self.num_told))
        self.num_told = self.num_tokens
        if self.num_tokens >= self.max_tokens:
            output.finished.CopyFrom(self._finish())
        return output

    def catch_up(self, next_index: int) -> None:
        """Sends the reader what it lacks."""
        if self.reader is not None and next_index < self.num_tokens:
            self._send(self.reader, next_index)

    def _send(self, reader: ServerCall, first_index: int) -> None:
        delta = self._delta(first_index)
        delta.text_offset = delta.first_index * len(TOKEN_TEXT)
        reader.send(inference_pb2.GenerateResponse(delta=delta))
        if self.num_tokens >= self.max_tokens:
            reader.send(inference_pb2.GenerateResponse(choice_finished=self._finish()))
            reader.end()

    def _delta(self, first_index: int) -> inference_pb2.Delta:
        num_new = self.num_tokens - first_index
        return inference_pb2.Delta(
            first_index=first_index, token_ids=(TOKEN_ID,) * num_new, text=TOKEN_TEXT * num_new
        )

    def _finish(self) -> inference_pb2.ChoiceFinished:
        return inference_pb2.ChoiceFinished(
            reason=inference_pb2.FINISH_REASON_LENGTH, num_tokens=self.num_tokens
        )


class MockWorker(worker_pb2_grpc.WorkerServicer):
    """One worker. `partners`: the workers of this process by kv address, to hand prompts over to."""

    def __init__(
        self,
        hello: worker_pb2.WorkerHello,
        cache: MockCache,
        clock: StepClock,
        partners: Mapping[str, MockWorker],
    ) -> None:
        self.hello = hello
        self.num_prefilled_here = 0
        self.num_streamed_directly = 0
        self._cache = cache
        self._clock = clock
        self._partners = partners
        self._control: deque[worker_pb2.WorkerMessage] = deque()
        self._reserved: dict[AttemptName, _Running] = {}
        self._running: dict[AttemptName, _Running] = {}
        self._due: dict[AttemptName, _Running] = {}
        self._blocks: BlockStream | None = None
        self._blocks_due = False
        self._news = asyncio.Event()
        clock.listen(self._step)

    async def Session(  # type: ignore[override] # writes to the context instead of yielding
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> None:
        """One router's stream."""
        await anext(request_iterator)  # its hello
        await context.write(worker_pb2.WorkerMessage(hello=self.hello))
        self._blocks, self._blocks_due = self._cache.journal.open(), True
        tasks = [asyncio.create_task(self._read(request_iterator)), asyncio.create_task(self._report())]
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while (message := self._next()) is not None:
                    await context.write(message)
        finally:
            self._cache.journal.close(self._blocks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- what it is told ---------------------------------------------------------------------------------

    async def _read(self, messages: AsyncIterator[worker_pb2.RouterMessage]) -> None:
        async for message in messages:
            match message.WhichOneof("message"):
                case "reserve":
                    self._reserve(message.reserve)
                case "start_prefill":
                    self._prefill(message.start_prefill)
                case "cancel":
                    self._forget(_name(message.cancel.key))
                case "snapshot" if self._blocks is not None:
                    self._blocks.restart()
                    self._blocks_due = True
            self._news.set()

    def _reserve(self, reserve: worker_pb2.Reserve) -> None:
        task, key = reserve.task, reserve.key
        num_blocks = len(task.prompt_token_ids) // BLOCK_TOKENS + 2
        self._reserved[_name(key)] = _Running(key, task.sampling.max_tokens, num_blocks)
        cached_tokens = self._cache.take(list(task.prompt_token_ids))
        self._say(
            reserved=worker_pb2.Reserved(
                key=key,
                lease_id=secrets.token_bytes(16),
                decode_epoch=self.hello.epoch,
                kv_address=self.hello.kv_address,
                cached_tokens=cached_tokens,
                ttl_s=30.0,
                kv_dtypes=("bfloat16", "bfloat16"),
            )
        )
        if reserve.local_prefill:
            self.num_prefilled_here += 1
            self._say(
                prefill_finished=worker_pb2.PrefillFinished(
                    key=key,
                    cached_tokens=cached_tokens,
                    computed_tokens=len(task.prompt_token_ids) - cached_tokens,
                )
            )
            self.adopt(key)

    def _prefill(self, start: worker_pb2.StartPrefill) -> None:
        token_ids = list(start.task.prompt_token_ids)
        cached_tokens = self._cache.take(token_ids)
        self.num_prefilled_here += 1
        self._partners[start.lease.kv_address].adopt(start.key)
        self._say(
            prefill_finished=worker_pb2.PrefillFinished(
                key=start.key,
                prefill_s=0.001,
                transfer_s=0.001,
                handoff_s=0.001,
                cached_tokens=cached_tokens,
                computed_tokens=len(token_ids) - cached_tokens,
                transferred_tokens=len(token_ids),
                kv_bytes=len(token_ids) << 15,
                wire_bytes=len(token_ids) << 15,
                codec="raw",
                codec_reason="no link was measured",
            )
        )

    def adopt(self, key: worker_pb2.RequestKey) -> None:
        """The prompt's KV has landed here: the first token is there at once, and the others follow step by step."""
        name = _name(key)
        running = self._reserved.pop(name, None)
        if running is not None:
            self._running[name] = self._due[name] = running
            self._news.set()

    def open_direct(self, ticket: DirectTicket, next_index: Sequence[int], call: ServerCall) -> None:
        """A client reads its tokens here, from the first that it lacks."""
        name = (ticket.tenant, ticket.request_id, ticket.attempt)
        running = self._reserved.get(name) or self._running.get(name)
        if running is None:
            raise DirectRefused(grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST", "the attempt is not here")
        running.reader, running.ticket_id = call, bytes.fromhex(ticket.ticket_id)
        call.on_over = lambda: self._left(running)
        self.num_streamed_directly += 1
        self._tell(running, worker_pb2.DIRECT_PHASE_OPEN)
        running.catch_up((list(next_index) or [0])[0])

    def _left(self, running: _Running) -> None:
        running.reader = None
        is_whole = running.num_tokens >= running.max_tokens
        phase = worker_pb2.DIRECT_PHASE_DELIVERED if is_whole else worker_pb2.DIRECT_PHASE_BROKEN
        self._tell(running, phase)

    def _tell(self, running: _Running, phase: worker_pb2.DirectPhase) -> None:
        self._say(direct=worker_pb2.DirectState(key=running.key, ticket_id=running.ticket_id, phase=phase))

    def _forget(self, name: AttemptName) -> None:
        for requests in (self._reserved, self._running, self._due):
            requests.pop(name, None)

    # --- what it says ------------------------------------------------------------------------------------

    def _say(self, **message: Any) -> None:
        self._control.append(worker_pb2.WorkerMessage(**message))
        self._news.set()

    def _step(self) -> None:
        self._due.update(self._running)
        if self._due:
            self._news.set()

    def _next(self) -> worker_pb2.WorkerMessage | None:
        if self._control:
            return self._control.popleft()
        if self._blocks is not None and self._blocks_due:
            events = self._blocks.next_message()
            self._blocks_due = self._blocks.has_more
            return worker_pb2.WorkerMessage(blocks=events)
        if not self._due:
            return None
        due, self._due = self._due, {}
        now = asyncio.get_running_loop().time()
        produced = [running.next_output(now) for running in due.values()]
        outputs = [output for output in produced if output is not None]
        for name, running in due.items():
            if running.num_tokens >= running.max_tokens:
                self._running.pop(name, None)
        if not self._clock.step_s:
            self._due.update(self._running)
        if not outputs:
            return None
        return worker_pb2.WorkerMessage(step=worker_pb2.StepOutput(outputs=outputs, step_s=STEP_S))

    async def _report(self) -> None:
        while True:
            held = [*self._reserved.values(), *self._running.values()]
            self._say(
                report=worker_pb2.WorkerReport(
                    state=worker_pb2.WORKER_STATE_SERVING,
                    running_sequences=len(held),
                    free_blocks=max(0, NUM_BLOCKS - sum(running.num_blocks for running in held)),
                    leases=len(held),
                    step_s=STEP_S,
                    prefill_s_per_token=PREFILL_S_PER_TOKEN,
                )
            )
            self._blocks_due = True
            await asyncio.sleep(REPORT_S)


def hello_of(
    worker_id: str, role: worker_pb2.Role, tokenizer_digest: str, vocab_size: int
) -> worker_pb2.WorkerHello:
    """What a mock worker says of itself."""
    hello = worker_pb2.WorkerHello(
        worker_id=worker_id,
        epoch=secrets.randbits(63) + 1,
        role=role,
        state=worker_pb2.WORKER_STATE_SERVING,
        identity=IDENTITY,
        kv_address=f"{worker_id}:1",
        block_tokens=BLOCK_TOKENS,
        num_blocks=NUM_BLOCKS,
        max_sequences=MAX_SEQUENCES,
        max_context=MAX_CONTEXT,
        protocol_version=1,
        vocab_size=vocab_size,
        key_identity=KEY_IDENTITY,
        kv_bytes_per_token=1 << 15,
    )
    hello.identity.tokenizer_digest = tokenizer_digest
    return hello


async def serve(worker: MockWorker) -> tuple[Server, str]:
    """A worker's server, the one that workers with engines have, and its address."""
    server = Server(ServerSettings(max_message_bytes=MAX_CONTROL_BYTES, keepalive_s=KEEPALIVE_S))
    worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


def _name(key: worker_pb2.RequestKey) -> AttemptName:
    return key.tenant, key.request_id, key.attempt
