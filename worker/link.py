"""What a worker has to say to one incarnation of a router, whether or not a stream to it is open.

Control messages wait in order in a bounded queue. Tokens do not wait here: an answer that has new ones is
marked, and is asked for them when a message is written, so that a slow stream gets fewer, larger messages
and nothing is kept twice. News of cached blocks go at the pace of reports, likewise made when they are written.
Lives on the service loop; knows no engine and no gRPC.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from headrace.v1 import worker_pb2
from worker.block_journal import BlockJournal, BlockStream

MAX_CONTROL_MESSAGES = 4096


class TokenSource(Protocol):
    """An answer that a link may ask for tokens it has not sent."""

    def take(self) -> list[worker_pb2.ChoiceOutput]:
        """New tokens since the last call; empty where there are none."""
        ...


class RouterLink:
    """One router incarnation's outbox.

    `generation` counts broken streams: a request that was heard of since the last break carries the
    current number, the others are cancelled when the grace is over.
    """

    def __init__(
        self,
        router_id: str,
        router_epoch: int,
        report: Callable[[], worker_pb2.WorkerReport],
        journal: BlockJournal,
    ) -> None:
        """`report` gives the worker's numbers of now; `journal` knows its cached blocks."""
        self.router_id = router_id
        self.router_epoch = router_epoch
        self.generation = 0
        self.closed = False
        self._control: deque[worker_pb2.WorkerMessage] = deque()
        self._report = report
        self._report_due = False
        self._journal = journal
        self._blocks: BlockStream | None = None
        self._blocks_due = False
        self._was_blocks = False
        self._marked: dict[TokenSource, None] = {}
        self._step_s = 0.0
        self._stream: object | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def connected(self) -> bool:
        """Whether a stream is open."""
        return self._stream is not None and not self.closed

    # --- filling -------------------------------------------------------------------------------

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        """Queue a control message; written before any token that is marked later."""
        self._control.append(message)
        if len(self._control) >= MAX_CONTROL_MESSAGES:
            self._room.clear()
        self._news.set()

    def report_soon(self) -> None:
        """Send a report, made when it is written: it counts every lease whose grant was written before. What became
        of cached blocks goes with it."""
        self._report_due = self._blocks_due = True
        self._news.set()

    def snapshot_blocks(self) -> None:
        """Tell of all cached blocks anew: the router lost track of them."""
        if self._blocks is not None:
            self._blocks.restart()
            self._blocks_due = True
            self._news.set()

    def mark(self, source: TokenSource, step_s: float = 0.0) -> None:
        """Note that a source has tokens to send."""
        self._marked[source] = None
        self._step_s = step_s
        self._news.set()

    def unmark(self, source: TokenSource) -> None:
        """Forget a source: its request failed or was cancelled."""
        self._marked.pop(source, None)

    async def room(self) -> None:
        """Wait until control messages may be queued; the stream's reader waits here before it reads on."""
        await self._room.wait()

    # --- draining ------------------------------------------------------------------------------

    def attach(self) -> object:
        """Make a new stream the one that messages are written to; an older one ends."""
        self._stream = object()
        self._end_blocks()
        self._blocks, self._blocks_due = self._journal.open(), True
        self._news.set()
        return self._stream

    def detach(self, stream: object) -> bool:
        """The stream is gone; False where a newer one had replaced it."""
        if self._stream is not stream:
            return False
        self._stream = None
        self._end_blocks()
        self.generation += 1
        self._room.set()
        self._news.set()
        return True

    def close(self) -> None:
        """End the stream once what waits is written: this router incarnation, or the worker, is gone."""
        self.closed = True
        self._end_blocks()
        self._room.set()
        self._news.set()

    async def messages(self, stream: object) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """What to write to `stream`, until it is replaced or the link is closed."""
        while self._stream is stream:
            message = self._next()
            if message is not None:
                yield message
                continue
            if self.closed:
                return
            self._news.clear()
            await self._news.wait()

    def _next(self) -> worker_pb2.WorkerMessage | None:
        if self._control:
            message = self._control.popleft()
            if len(self._control) < MAX_CONTROL_MESSAGES // 2:
                self._room.set()
            return message
        if self._report_due:  # before the tokens: they never end, and reports are few
            self._report_due = False
            return worker_pb2.WorkerMessage(report=self._report())
        # In turn: a snapshot of many pages must not hold up the tokens, nor they the blocks.
        if self._was_blocks:
            return self._next_step() or self._next_blocks()
        return self._next_blocks() or self._next_step()

    def _next_blocks(self) -> worker_pb2.WorkerMessage | None:
        if self._blocks is None or not self._blocks_due:
            return None
        events = self._blocks.next_message()
        self._blocks_due, self._was_blocks = self._blocks.has_more, True
        return worker_pb2.WorkerMessage(blocks=events)

    def _next_step(self) -> worker_pb2.WorkerMessage | None:
        outputs = [output for source in self._marked for output in source.take()]
        self._marked.clear()
        if not outputs:
            return None
        self._was_blocks = False
        return worker_pb2.WorkerMessage(step=worker_pb2.StepOutput(outputs=outputs, step_s=self._step_s))

    def _end_blocks(self) -> None:
        if self._blocks is not None:
            self._journal.close(self._blocks)
            self._blocks = None
