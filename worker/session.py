"""The Worker.Session servicer: routers dial in, messages are handed to the roles, answers go back.

A router incarnation is one RouterLink, whatever the number of streams it opens one after the other. A new
incarnation of a router ends the requests of the one before; a broken stream ends those that are not
resumed within the grace. Knows what a message is addressed to, not what it does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import grpc

from headrace.v1 import worker_pb2, worker_pb2_grpc
from rpc.call import ServerCall
from worker.block_journal import BlockJournal
from worker.link import RouterLink
from worker.service import RoleService
from worker.wire import failure

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0


class SessionServicer(worker_pb2_grpc.WorkerServicer):
    """Serves every router; lives on the service loop."""

    def __init__(
        self,
        hello: Callable[[], worker_pb2.WorkerHello],
        report: Callable[[], worker_pb2.WorkerReport],
        resume_grace_s: float,
        services: Sequence[RoleService],
        journal: BlockJournal,
        set_state: Callable[[worker_pb2.WorkerState], None],
    ) -> None:
        """`set_state`: a router passes on where the worker shall go (worker/lifecycle.py)."""
        self._hello = hello
        self._report = report
        self._resume_grace_s = resume_grace_s
        self._services = services
        self._journal = journal
        self._set_state = set_state
        self._is_closed = False
        self._links: dict[str, RouterLink] = {}
        self._had_contact = False

    def connected(self, router_id: str, router_epoch: int) -> bool:
        """Whether that incarnation of a router has a stream open."""
        link = self._links.get(router_id)
        return link is not None and link.router_epoch == router_epoch and link.connected

    def take_contact(self) -> bool:
        """Whether any router has a stream open, or had one since this was last asked."""
        had_contact, self._had_contact = self._had_contact, False
        return had_contact or any(link.connected for link in self._links.values())

    def links(self) -> Iterable[RouterLink]:
        """Every router incarnation that is connected or within its grace."""
        return tuple(self._links.values())

    def broadcast_report(self) -> None:
        """Give every connected router the numbers of now."""
        for link in self._links.values():
            if link.connected:
                link.report_soon()

    def drop_all(self, cause: str) -> None:
        """End the requests of every router, and the streams once what waits is written."""
        for link in tuple(self._links.values()):
            self._drop(link, cause)

    def close(self) -> None:
        """End every stream once what waits is written, and take no more."""
        self._is_closed = True
        for link in self._links.values():
            link.close()
        self._links.clear()

    # --- one stream ----------------------------------------------------------------------------

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.RouterMessage],
        context: ServerCall,
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """Exchange hellos, then pass messages both ways until either side ends the stream."""
        if self._is_closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker has left")
        hello = await self._router_hello(request_iterator, context)
        link = self._open(hello)
        stream = link.attach()
        self._had_contact = True
        logger.info("router %s connected", link.router_id)
        reader = asyncio.create_task(self._read(link, stream, request_iterator))
        try:
            yield worker_pb2.WorkerMessage(hello=self._hello())
            link.report_soon()
            async for message in link.messages(stream):
                yield message
        finally:
            reader.cancel()
            self._detached(link, stream)

    async def _router_hello(
        self,
        messages: AsyncIterator[worker_pb2.RouterMessage],
        context: ServerCall,
    ) -> worker_pb2.RouterHello:
        try:
            first = await asyncio.wait_for(anext(messages), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no RouterHello came")
        if not first.HasField("hello") or not first.hello.router_id:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a RouterHello with a router_id"
            )
        return first.hello

    def _open(self, hello: worker_pb2.RouterHello) -> RouterLink:
        link = self._links.get(hello.router_id)
        if link is not None and link.router_epoch != hello.router_epoch:
            self._drop(link, "ROUTER_RESTARTED")
            link = None
        if link is None:
            link = self._links[hello.router_id] = RouterLink(
                hello.router_id, hello.router_epoch, self._report, self._journal
            )
        return link

    async def _read(
        self, link: RouterLink, stream: object, messages: AsyncIterator[worker_pb2.RouterMessage]
    ) -> None:
        try:
            async for message in messages:
                if link.closed:
                    return  # meant for an incarnation that is gone
                self._dispatch(link, message)
                await link.room()
        except (grpc.aio.AbortError, asyncio.CancelledError):
            logger.debug("the stream of router %s broke", link.router_id)
        finally:
            self._detached(link, stream)

    def _detached(self, link: RouterLink, stream: object) -> None:
        if link.closed or not link.detach(stream):
            return
        logger.info("router %s disconnected", link.router_id)
        loop = asyncio.get_running_loop()
        loop.call_later(self._resume_grace_s, self._grace_over, link, link.generation)

    def _grace_over(self, link: RouterLink, generation: int) -> None:
        if link.closed:
            return
        for service in self._services:
            service.disown(link, "ROUTER_LOST", generation)
        if not link.connected and link.generation == generation:
            self._drop(link, "ROUTER_LOST")

    def _drop(self, link: RouterLink, cause: str) -> None:
        for service in self._services:
            service.disown(link, cause, link.generation + 1)
        link.close()
        if self._links.get(link.router_id) is link:
            del self._links[link.router_id]

    # --- one message ---------------------------------------------------------------------------

    def _dispatch(self, link: RouterLink, message: worker_pb2.RouterMessage) -> None:
        if message.HasField("snapshot"):
            link.snapshot_blocks()
            return
        try:
            if message.HasField("set_state"):
                self._set_state(message.set_state.state)
                return
            known = [service.handle(link, message) for service in self._services]
        except Exception:
            # One request's message must not end the stream of all the others.
            logger.exception("a %s message could not be handled", message.WhichOneof("message"))
            self._refuse(link, message, "INTERNAL", "the worker failed to handle the message")
            return
        if not any(known):
            self._refuse(link, message, "UNKNOWN_REQUEST", "this worker does not hold the request")

    @staticmethod
    def _refuse(link: RouterLink, message: worker_pb2.RouterMessage, cause: str, text: str) -> None:
        match message.WhichOneof("message"):
            case "reserve":
                key, stage = message.reserve.key, "reserve"
            case "start_prefill":
                key, stage = message.start_prefill.key, "prefill"
            case "resume":
                key, stage = message.resume.key, "decode"
            case "take_over":
                key, stage = message.take_over.key, "decode"
            case _:
                return
        if cause == "UNKNOWN_REQUEST" and stage != "decode":
            cause, text = "WRONG_ROLE", f"this worker does not offer {stage}"
        link.send(failure(key, stage, cause, text, retryable=True))
