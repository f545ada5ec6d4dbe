"""A router in this process with a tokenizer of bytes, and a client that keeps what it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from headrace.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc, worker_pb2
from router.config import ModelFacts, RouterConfig
from router.server import RouterServer
from rpc.details import ERROR_DETAIL_KEY
from tests.integration.scripted_worker import SECRET, TOKENIZER_DIGEST, ScriptedWorker

WAIT_S = 10.0
STOP = inference_pb2.FINISH_REASON_STOP


class ByteTokenizer:
    """A token is a byte. Refuses text with a NUL, breaks on one with a BEL."""

    eos_token_ids = frozenset({0})
    vocab_size = 300
    digest = TOKENIZER_DIGEST

    def encode(self, text: str) -> list[int]:
        if "\0" in text:
            raise ValueError("NUL is not in the vocabulary")
        if "\a" in text:
            raise RuntimeError(f"a defect that quotes {text}")
        return list(text.encode())

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))


@dataclass
class Answer:
    """All that one call was told."""

    accepted: inference_pb2.Accepted | None = None
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    first_index: dict[int, int] = field(default_factory=dict)
    finished: dict[int, inference_pb2.ChoiceFinished] = field(default_factory=dict)
    done: inference_pb2.Done | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    error: inference_pb2.ErrorDetail | None = None
    num_messages: int = 0
    handles: list[bytes] = field(default_factory=list)

    def take(self, message: inference_pb2.GenerateResponse) -> None:
        assert self.done is None, "something came after Done"
        self.num_messages += 1
        match message.WhichOneof("event"):
            case "accepted":
                assert self.num_messages == 1, "Accepted was not first"
                self.accepted = message.accepted
            case "resume_handle":
                self.handles.append(message.resume_handle)
            case "delta":
                self._take_delta(message.delta)
            case "choice_finished":
                self.finished[message.choice_finished.choice] = message.choice_finished
            case "done":
                self.done = message.done

    def _take_delta(self, delta: inference_pb2.Delta) -> None:
        start = self.first_index.setdefault(delta.choice, delta.first_index)
        tokens = self.token_ids.setdefault(delta.choice, [])
        assert delta.first_index == start + len(tokens), "a token was lost or repeated"
        tokens.extend(delta.token_ids)
        self.text[delta.choice] = self.text.get(delta.choice, "") + delta.text


class Stream:
    """One Generate or Chat call, read in the background."""

    def __init__(self, call: Any, paused: bool = False) -> None:
        self.answer = Answer()
        self._call = call
        self._changed = asyncio.Condition()
        self._resumed = asyncio.Event()
        if not paused:
            self._resumed.set()
        self._task = asyncio.create_task(self._read())

    async def until(self, what: str) -> Answer:
        """Reads until `accepted` came, or text ends with `what`."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: self._has(what) or self._task.done())
        assert self._has(what), f"the call ended before {what!r}: {self.answer}"
        return self.answer

    async def end(self) -> Answer:
        """Everything, to the end of the call."""
        async with asyncio.timeout(WAIT_S):
            await asyncio.shield(self._task)
        return self.answer

    async def leave(self) -> None:
        """The client goes away."""
        self._call.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def resume(self) -> None:
        """Begins to read."""
        self._resumed.set()

    def _has(self, what: str) -> bool:
        if what == "accepted":
            return self.answer.accepted is not None
        return self.answer.text.get(0, "").endswith(what)

    async def _read(self) -> None:
        await self._resumed.wait()
        try:
            async for message in self._call:
                self.answer.take(message)
                async with self._changed:
                    self._changed.notify_all()
        except grpc.aio.AioRpcError as error:
            self.answer.code = error.code()
            self.answer.error = error_detail(error)
        finally:
            async with self._changed:
                self._changed.notify_all()


def error_detail(error: grpc.aio.AioRpcError) -> inference_pb2.ErrorDetail | None:
    """The ErrorDetail that a failed call carried."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_DETAIL_KEY:
            return inference_pb2.ErrorDetail.FromString(value)
    return None


class Harness:
    """A running router, its stubs, and the workers that joined it."""

    def __init__(self, server: RouterServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterStub(channel)
        self.channel = channel
        self.workers: list[ScriptedWorker] = []
        self._streams: list[Stream] = []

    async def worker(self, worker_id: str, role: worker_pb2.Role, **facts: Any) -> ScriptedWorker:
        """A new worker that has joined."""
        worker = ScriptedWorker(worker_id, role, **facts)
        await worker.start()
        self.workers.append(worker)
        await worker.join(self.server.address)
        return worker

    async def pair(self, **decode_facts: Any) -> tuple[ScriptedWorker, ScriptedWorker]:
        """A prefill and a decode worker."""
        prefill = await self.worker("p", worker_pb2.ROLE_PREFILL)
        return prefill, await self.worker("d", worker_pb2.ROLE_DECODE, **decode_facts)

    def generate(
        self,
        text: str = "hello",
        *,
        paused: bool = False,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] = (),
        **fields: Any,
    ) -> Stream:
        request = inference_pb2.GenerateRequest(**({"text": text} | fields))
        return self._stream(self.inference.Generate(request, timeout=timeout, metadata=metadata), paused)

    def chat(self, *messages: tuple[str, str], **fields: Any) -> Stream:
        chat = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
        return self._stream(self.inference.Chat(inference_pb2.ChatRequest(messages=chat, **fields)), False)

    def _stream(self, call: Any, paused: bool) -> Stream:
        stream = Stream(call, paused)
        self._streams.append(stream)
        return stream

    async def get(self, request_id: str) -> inference_pb2.GetResponse:
        return await self.inference.Get(inference_pb2.GetRequest(request_id=request_id))

    async def until_state(self, request_id: str, state: inference_pb2.RequestState) -> None:
        """Waits until a request is known to be in a state."""
        async with asyncio.timeout(WAIT_S):
            while (await self.get(request_id)).state != state:
                await asyncio.sleep(0.01)

    async def tell_load(self, worker: ScriptedWorker, free_blocks: int) -> None:
        """Has a worker report its room, and waits until the router has heard it."""
        worker.tell_load(free_blocks=free_blocks)
        async with asyncio.timeout(WAIT_S):
            while (await self.status(worker.hello.worker_id)).report.free_blocks != free_blocks:
                await asyncio.sleep(0.01)

    async def status(self, worker_id: str) -> cluster_pb2.WorkerStatus:
        """A worker as the router's Status tells of it."""
        response = await self.cluster.Status(cluster_pb2.StatusRequest())
        return next(row for row in response.workers if row.hello.worker_id == worker_id)

    async def cancel(self, request_id: str) -> bool:
        response = await self.inference.Cancel(inference_pb2.CancelRequest(request_id=request_id))
        return bool(response.was_running)

    async def close(self) -> None:
        for stream in self._streams:
            await stream.leave()
        await self.server.stop()
        for worker in self.workers:
            await worker.stop()


@asynccontextmanager
async def running_router(**settings: Any) -> AsyncIterator[Harness]:
    """A router on a free port, stopped at the end; `settings` are RouterConfig's."""
    defaults = {
        "router_id": "r",
        "canary_timeout_s": 0.0,
        "model_name": "tiny",
        "model_dir": Path("unused"),
        "listen": "127.0.0.1:0",
        "profile_name": "test",
        "max_context": 256,
        "cluster_secret": SECRET,
        "link_grace_s": 1.0,
        "resume_grace_s": 0.3,
    }
    config = RouterConfig(**(defaults | settings))
    model = ModelFacts(name="tiny", architecture="Tiny", digest="weights", max_context=config.max_context)
    server = RouterServer(config, tokenizer=ByteTokenizer(), model=model)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        harness = Harness(server, channel)
        try:
            yield harness
        finally:
            await harness.close()
