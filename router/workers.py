"""The connection to one incarnation of a worker: dial, hello, messages both ways, redial within a grace.

    REGISTERED → CONNECTED ⇄ OUT_OF_TOUCH → LOST

The reader hands each message on at once and never waits for a client. What is to be sent waits in a bounded
queue; a worker that does not read until it is full is treated like one whose stream broke. What was under way
when a stream broke is not kept, except cancels: when the same incarnation is back, the dispatcher says anew
what each request needs, since every message is idempotent.

Liveness is the stream's: HTTP/2 pings find a worker that is frozen or cut off.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc

from headrace.v1 import worker_pb2, worker_pb2_grpc
from router.auth import CLUSTER_TOKEN_KEY
from router.core.fleet import WorkerRef
from rpc.channel import Channel, StreamCall

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
HELLO_TIMEOUT_S = 5.0
REDIAL_S = 0.1
MAX_REFUSED = 3  # connections in a row
CLOSE_S = 0.5  # how long a worker has to read the last words and to end its side
ACKNOWLEDGE_S = 0.05
MAX_QUEUED_MESSAGES = 8192
MAX_QUEUED_BYTES = 256 << 20
MAX_MESSAGE_BYTES = 64 << 20

KEEPALIVE_S = 5.0

Session: TypeAlias = "StreamCall[worker_pb2.RouterMessage, worker_pb2.WorkerMessage]"


class LinkBroken(Exception):
    """The stream ended or could not be opened; says why. `refused`: nobody listens there."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class WrongWorker(Exception):
    """Whoever answers at the address is not the worker that registered; redialling will not help."""


class LinkObserver(Protocol):
    """Who is told what happens on a link. Nothing here may wait."""

    def joined(self, link: "WorkerLink", hello: worker_pb2.WorkerHello) -> None:
        """The first stream is open. Raises WrongWorker where the hello cannot be accepted."""

    def out_of_touch(self, link: "WorkerLink") -> None: ...

    def back(self, link: "WorkerLink") -> None:
        """The same incarnation is connected again."""

    def lost(self, link: "WorkerLink", reason: str) -> None:
        """The last word of a link."""

    def message(self, link: "WorkerLink", message: worker_pb2.WorkerMessage) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """What all links of a router share."""

    router_id: str
    router_epoch: int
    token: str
    grace_s: float


class WorkerLink:
    """One worker incarnation's link. Lives on the router's event loop."""

    def __init__(
        self,
        ref: WorkerRef,
        address: str,
        settings: LinkSettings,
        observer: LinkObserver,
        clock: Callable[[], float],
    ) -> None:
        self.ref = ref
        self.address = address
        self.hello: worker_pb2.WorkerHello | None = None
        self.report: worker_pb2.WorkerReport | None = None
        self.connected = False
        self.is_lost = False
        self._is_closing = False
        self.connected_at_s = 0.0
        self.last_error = ""
        self._settings = settings
        self._observer = observer
        self._clock = clock
        self._outgoing: deque[worker_pb2.RouterMessage] = deque()
        self._outgoing_bytes = 0
        self._seen: dict[tuple[str, str, int, int], tuple[worker_pb2.RequestKey, int]] = {}
        self._seen_due = False
        self._call: Session | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link {self.ref.worker_id}")

    async def close(self) -> None:
        """Says what is left to say, cancels above all, and ends the link without a word to the observer."""
        if self._task is None:
            return
        self._is_closing = True
        self._flush()
        if self.connected:
            await asyncio.wait((self._task,), timeout=CLOSE_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.connected = False

    def send(self, message: worker_pb2.RouterMessage) -> None:
        """Queues a message; while the worker is out of touch, only cancels are kept."""
        if not self.connected and not message.HasField("cancel"):
            return
        if self._call is not None and not self._outgoing and self._call.is_writable:
            self._call.send(message)
            return
        self._outgoing.append(message)
        self._outgoing_bytes += message.ByteSize()
        if len(self._outgoing) > MAX_QUEUED_MESSAGES or self._outgoing_bytes > MAX_QUEUED_BYTES:
            self.last_error = "the worker does not read what it is sent"
            self._keep_cancels()
            if self._call is not None:
                self._call.cancel()

    def acknowledge(self, key: worker_pb2.RequestKey, choice: int, next_index: int) -> None:
        """Notes which tokens the worker need not keep; told in a batch."""
        if not self.connected:
            return
        if not self._seen:
            asyncio.get_running_loop().call_later(ACKNOWLEDGE_S, self._acknowledgements_due)
        self._seen[key.tenant, key.request_id, key.attempt, choice] = (key, next_index)

    def _acknowledgements_due(self) -> None:
        self._seen_due = bool(self._seen)
        self._flush()

    async def _run(self) -> None:
        deadline_s = self._clock() + max(self._settings.grace_s, HELLO_TIMEOUT_S)
        num_refused = 0
        while True:
            try:
                await self._session(min(HELLO_TIMEOUT_S, max(REDIAL_S, deadline_s - self._clock())))
            except WrongWorker as error:
                self._lose(str(error))
                return
            except LinkBroken as error:
                self.last_error = self.last_error or str(error)
                num_refused = num_refused + 1 if error.refused else 0
            if self._is_closing:
                return
            if self.connected:
                self.connected = False
                deadline_s = self._clock() + self._settings.grace_s
                self._keep_cancels()
                logger.warning("worker %s is out of touch: %s", self.ref.worker_id, self.last_error)
                self._observer.out_of_touch(self)
            # A port that nobody listens on any more was its process's: this incarnation does not come back.
            if self._clock() >= deadline_s or (self.hello is not None and num_refused >= MAX_REFUSED):
                self._lose(self.last_error)
                return
            await asyncio.sleep(REDIAL_S)

    def _lose(self, reason: str) -> None:
        self.last_error = reason
        self.connected = False
        self.is_lost = True
        logger.warning("worker %s is lost: %s", self.ref.worker_id, reason)
        self._observer.lost(self, reason)

    async def _session(self, hello_timeout_s: float) -> None:
        """One stream, from dialling to its end, which is always a LinkBroken or WrongWorker."""
        async with Channel(
            self.address, max_message_bytes=MAX_MESSAGE_BYTES, keepalive_s=KEEPALIVE_S
        ) as channel:
            stub: Any = worker_pb2_grpc.WorkerStub(channel)
            call: Session = stub.Session(metadata=((CLUSTER_TOKEN_KEY, self._settings.token),))
            try:
                hello = await self._exchange_hellos(call, hello_timeout_s)
                self._call, call.on_writable = call, self._flush
                self._accept(hello)
                self._flush()
                await call.hand_on(self._take)
                raise LinkBroken(f"the worker ended the stream: {await call.details()}")
            except grpc.aio.AioRpcError as error:
                raise LinkBroken(_describe(error), refused=_is_refused(error)) from None
            finally:
                self._call = None
                call.cancel()

    async def _exchange_hellos(self, call: Session, timeout_s: float) -> worker_pb2.WorkerHello:
        hello = worker_pb2.RouterHello(
            router_id=self._settings.router_id, router_epoch=self._settings.router_epoch
        )
        try:
            async with asyncio.timeout(timeout_s):
                await call.write(worker_pb2.RouterMessage(hello=hello))
                first = await call.read()
        except TimeoutError:
            raise LinkBroken(f"no WorkerHello within {timeout_s:.1f} s") from None
        if not isinstance(first, worker_pb2.WorkerMessage):
            raise LinkBroken(f"the worker ended the stream: {await call.details()}")
        if not first.HasField("hello"):
            raise WrongWorker("its first message was no WorkerHello")
        return first.hello

    def _accept(self, hello: worker_pb2.WorkerHello) -> None:
        if (hello.worker_id, hello.epoch) != (self.ref.worker_id, self.ref.epoch):
            raise WrongWorker(
                f"{self.address} is now worker {hello.worker_id!r}, incarnation {hello.epoch:x}"
            )
        if hello.protocol_version != PROTOCOL_VERSION:
            raise WrongWorker(
                f"it speaks protocol version {hello.protocol_version}, this router {PROTOCOL_VERSION}"
            )
        is_new = self.hello is None
        self.hello = hello
        self.connected = True
        self.connected_at_s = self._clock()
        self.last_error = ""
        if is_new:
            logger.info("worker %s joined from %s", self.ref.worker_id, self.address)
            self._observer.joined(self, hello)
        else:
            logger.info("worker %s is back", self.ref.worker_id)
            self._observer.back(self)

    def _take(self, message: worker_pb2.WorkerMessage) -> None:
        try:
            self._observer.message(self, message)
        except Exception:
            # One message that cannot be handled must not cost the requests of the whole link.
            logger.exception("a %s message could not be handled", message.WhichOneof("message"))

    def _flush(self) -> None:
        """Sends what waits, as far as there is room; the last words end this side."""
        call = self._call
        if call is None or not self.connected:
            return
        while self._outgoing and call.is_writable:
            message = self._outgoing.popleft()
            self._outgoing_bytes -= message.ByteSize()
            call.send(message)
        if self._seen_due and call.is_writable:
            call.send(self._acknowledgement())
        if self._is_closing and not self._outgoing:
            call.done_writing()

    def _acknowledgement(self) -> worker_pb2.RouterMessage:
        seen = [
            worker_pb2.TokensSeen(key=key, choice=name[-1], next_index=next_index)
            for name, (key, next_index) in self._seen.items()
        ]
        self._seen.clear()
        self._seen_due = False
        return worker_pb2.RouterMessage(acknowledge=worker_pb2.AcknowledgeTokens(seen=seen))

    def _keep_cancels(self) -> None:
        self._outgoing = deque(message for message in self._outgoing if message.HasField("cancel"))
        self._outgoing_bytes = sum(message.ByteSize() for message in self._outgoing)
        self._seen.clear()
        self._seen_due = False


def _is_refused(error: grpc.aio.AioRpcError) -> bool:
    return "Connection refused" in (error.details() or "")


def _describe(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
