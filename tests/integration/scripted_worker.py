"""A worker without an engine: speaks Worker.Session, and does what a test tells it to."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from headrace.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, worker_pb2, worker_pb2_grpc
from kvtransfer.cluster_token import cluster_token
from router.auth import CLUSTER_TOKEN_KEY

SECRET = b"a cluster secret for the tests"
TOKENIZER_DIGEST = "bytes"
EXPECT_S = 10.0
IDENTITY = worker_pb2.Identity(
    weights_digest="weights",
    tokenizer_digest=TOKENIZER_DIGEST,
    arithmetic="float32",
    layout="gqa",
    handoff_major=1,
)


class ScriptedWorker(worker_pb2_grpc.WorkerServicer):
    """Keeps what it is sent until a test asks for it with `expect`, and sends what a test says."""

    def __init__(
        self,
        worker_id: str,
        role: worker_pb2.Role,
        *,
        epoch: int = 1,
        identity: worker_pb2.Identity = IDENTITY,
        **facts: Any,
    ) -> None:
        sizes = {"block_tokens": 16, "num_blocks": 64, "max_sequences": 8, "max_context": 512}
        self.hello = worker_pb2.WorkerHello(
            worker_id=worker_id,
            epoch=epoch,
            role=role,
            state=worker_pb2.WORKER_STATE_SERVING,
            identity=identity,
            kv_address=f"{worker_id}:1",
            protocol_version=1,
            vocab_size=300,
            **(sizes | facts),
        )
        self.router_hellos: list[worker_pb2.RouterHello] = []
        self.refuses_sessions = False
        self._inbox: list[worker_pb2.RouterMessage] = []
        self._arrived = asyncio.Condition()
        self._outgoing: asyncio.Queue[worker_pb2.WorkerMessage | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(
            options=(("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 1000))
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def stop(self) -> None:
        """As after SIGKILL: every stream breaks and nobody listens any more."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def register(self, router: str, secret: bytes = SECRET) -> cluster_pb2.RegisterResponse:
        """Announces itself once."""
        async with grpc.aio.insecure_channel(router) as channel:
            return await cluster_pb2_grpc.ClusterStub(channel).Register(
                cluster_pb2.RegisterRequest(
                    worker_id=self.hello.worker_id, epoch=self.hello.epoch, address=self.address
                ),
                metadata=((CLUSTER_TOKEN_KEY, cluster_token(secret)),),
            )

    async def join(self, router: str) -> None:
        """Announces itself until the router has a session open."""
        async with asyncio.timeout(EXPECT_S):
            while not (await self.register(router)).connected:
                await asyncio.sleep(0.02)

    def break_stream(self) -> None:
        """Ends the session's stream with an error."""
        self._outgoing.put_nowait(None)

    async def expect(self, kind: str) -> Any:
        """The next message of a kind that was not taken yet."""
        async with asyncio.timeout(EXPECT_S), self._arrived:
            while True:
                for index, message in enumerate(self._inbox):
                    if message.WhichOneof("message") == kind:
                        return getattr(self._inbox.pop(index), kind)
                await self._arrived.wait()

    def pending(self) -> list[str]:
        """Kinds of the messages that were not taken."""
        return [str(message.WhichOneof("message")) for message in self._inbox]

    # --- what it says ------------------------------------------------------------------------------------

    def send(self, **message: Any) -> None:
        self._outgoing.put_nowait(worker_pb2.WorkerMessage(**message))

    def grant(self, reserve: worker_pb2.Reserve, cached_tokens: int = 0) -> None:
        self.send(
            reserved=worker_pb2.Reserved(
                key=reserve.key,
                lease_id=b"l" * 16,
                decode_epoch=self.hello.epoch,
                kv_address=self.hello.kv_address,
                cached_tokens=cached_tokens,
                ttl_s=10.0,
            )
        )

    def finish_prefill(self, key: worker_pb2.RequestKey, **figures: Any) -> None:
        self.send(prefill_finished=worker_pb2.PrefillFinished(key=key, **figures))

    def fail(
        self,
        key: worker_pb2.RequestKey,
        stage: str,
        cause: str,
        message: str = "as the test says",
        retryable: bool = False,
    ) -> None:
        detail = inference_pb2.ErrorDetail(stage=stage, cause=cause, message=message, retryable=retryable)
        self.send(failed=worker_pb2.AttemptFailed(key=key, error=detail))

    def say(
        self,
        key: worker_pb2.RequestKey,
        first_index: int,
        text: str,
        *,
        finish: inference_pb2.FinishReason | None = None,
        choice: int = 0,
    ) -> None:
        """One step: a token for each character, and the end of the choice if asked."""
        token_ids = [ord(character) for character in text]
        output = worker_pb2.ChoiceOutput(
            key=key,
            delta=inference_pb2.Delta(choice=choice, first_index=first_index, token_ids=token_ids, text=text),
        )
        if finish is not None:
            output.finished.CopyFrom(
                inference_pb2.ChoiceFinished(
                    choice=choice, reason=finish, num_tokens=first_index + len(token_ids)
                )
            )
        self.send(step=worker_pb2.StepOutput(outputs=[output]))

    def tell_load(self, **figures: Any) -> None:
        report = {"state": worker_pb2.WORKER_STATE_SERVING, "free_blocks": self.hello.num_blocks}
        self.send(report=worker_pb2.WorkerReport(**(report | figures)))

    # --- Worker ------------------------------------------------------------------------------------------

    async def Session(self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any) -> None:
        if (CLUSTER_TOKEN_KEY, cluster_token(SECRET)) not in tuple(context.invocation_metadata()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        if self.refuses_sessions:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.router_hellos.append((await anext(request_iterator)).hello)
        self._outgoing = outgoing = asyncio.Queue()
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            await context.write(worker_pb2.WorkerMessage(hello=self.hello))
            while (message := await outgoing.get()) is not None:
                await context.write(message)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")

    async def _read(self, messages: AsyncIterator[worker_pb2.RouterMessage]) -> None:
        async for message in messages:
            async with self._arrived:
                self._inbox.append(message)
                self._arrived.notify_all()
        self._outgoing.put_nowait(None)
