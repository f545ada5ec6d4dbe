"""One client that reads an answer straight from here, and how often the router hears of it meanwhile.

A reader takes each token when it is there: it holds what its connection has no room for, up to a bound, and needs
nothing of what is kept for the router. Lives on the service loop; knows no tickets and no leases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from decode.answers import Answer, Part
from headrace.v1 import inference_pb2
from headrace.v1.worker_pb2 import DIRECT_PHASE_BROKEN, DIRECT_PHASE_DELIVERED, DirectPhase
from rpc.call import OK
from rpc.heads import Status
from worker.direct import broken

BULK_S = 0.5
"""Tokens that a client reads here reach the router about so often."""
MAX_WAITING_TOKENS = 4096
"""That a slow client's connection has no room for. Past it the stream is given up: the router's own bound counts."""
MAX_READERS = 4
"""Of one answer at a time: a client that comes again has its own."""


class Stream(Protocol):
    """A call as `rpc.call.ServerCall` has it."""

    on_writable: Callable[[], None]
    on_over: Callable[[], None]

    @property
    def is_writable(self) -> bool: ...

    def send(self, message: inference_pb2.GenerateResponse) -> None: ...

    def end(self, status: Status = OK) -> None: ...


class BulkPace:
    """Says when tokens may go to the router: at once, and then `interval_s` after the last time."""

    def __init__(self, interval_s: float = BULK_S) -> None:
        self._interval_s = interval_s
        self._due_s: float | None = None

    def is_due(self, now: float) -> bool:
        """Whether to send now, which counts as sent."""
        if self._due_s is not None and now < self._due_s:
            return False
        self._due_s = now + self._interval_s
        return True


class DirectReader:
    """One stream. `on_over` hears once how it ended."""

    def __init__(
        self,
        ticket_id: bytes,
        stream: Stream,
        answer: Answer,
        next_index: Sequence[int],
        on_over: Callable[[DirectReader, DirectPhase], None],
    ) -> None:
        """`next_index`: per choice; the tokens from there on must be kept."""
        self.ticket_id = ticket_id
        self._stream = stream
        self._answer = answer
        self._next_index = list(next_index)
        self._waiting: list[list[Part]] = [[] for _ in next_index]
        self._num_waiting = 0
        self._finishes_due = [True] * len(self._next_index)
        self._on_over = on_over
        self._is_over = False
        stream.on_writable = self._write
        stream.on_over = lambda: self._end(DIRECT_PHASE_BROKEN)

    def push(self) -> None:
        """Take what is new, and send as much as there is room for."""
        for index, choice in enumerate(self._answer.choices):
            part = choice.since(self._next_index[index])
            if part is not None and part.token_ids:
                self._waiting[index].append(part)
                self._num_waiting += len(part.token_ids)
                self._next_index[index] += len(part.token_ids)
        self._write()
        if self._num_waiting > MAX_WAITING_TOKENS:
            self.give_up("CLIENT_TOO_SLOW", f"more than {MAX_WAITING_TOKENS} tokens wait for the client")

    def give_up(self, cause: str, message: str) -> None:
        """End the stream; the client is sent the rest by the router."""
        if not self._is_over:
            self._end(DIRECT_PHASE_BROKEN)
            self._stream.end(broken(cause, message))

    def _write(self) -> None:
        for index, choice in enumerate(self._answer.choices):
            if self._is_over or not self._stream.is_writable:
                return
            parts = self._waiting[index]
            if parts:
                self._waiting[index] = []
                self._num_waiting -= sum(len(part.token_ids) for part in parts)
                self._stream.send(_delta(index, parts))
            is_whole = choice.finished is not None and self._next_index[index] == choice.num_tokens
            if is_whole and self._finishes_due[index]:
                self._finishes_due[index] = False
                self._stream.send(inference_pb2.GenerateResponse(choice_finished=choice.finished))
        if not any(self._finishes_due):
            self._end(DIRECT_PHASE_DELIVERED)
            self._stream.end()

    def _end(self, phase: DirectPhase) -> None:
        if not self._is_over:
            self._is_over = True
            self._on_over(self, phase)


def _delta(choice: int, parts: Sequence[Part]) -> inference_pb2.GenerateResponse:
    first = parts[0]
    delta = inference_pb2.Delta(
        choice=choice,
        first_index=first.first_index,
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        text="".join(part.text for part in parts),
        text_offset=first.text_offset,
    )
    for part in parts:
        delta.logprobs.extend(part.logprobs)
    return inference_pb2.GenerateResponse(delta=delta)
