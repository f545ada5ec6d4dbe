"""One attempt after the other: where a request is sent, how an attempt ends, and how the next one goes on.

Each placement of a request is an attempt with a number of its own. The next one goes on behind the tokens that are
here: it has them computed like a longer prompt, so that none is lost or comes twice. Lives on the router's event loop.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from headrace.v1 import worker_pb2
from router import messages
from router.book import RequestBook
from router.core.failures import Failure
from router.core.fleet import Demand, WorkerRef
from router.core.lifecycle import RequestState
from router.core.placement import Placement
from router.core.queue import TokenQueue
from router.core.retries import RetryBudget
from router.placer import Placer
from router.requests import Request, RequestKey
from router.verdicts import given_up

logger = logging.getLogger(__name__)


class Links(Protocol):
    """The way to the workers. Sending never waits; to a worker that is gone it does nothing."""

    def send(self, ref: WorkerRef, message: worker_pb2.RouterMessage) -> None: ...

    def acknowledge(self, ref: WorkerRef, key: worker_pb2.RequestKey, choice: int, next_index: int) -> None:
        """Says, soon and together with others, which tokens need not be kept."""


class Attempts:
    """Begins attempts and ends them; `retries` is what may be made again."""

    def __init__(
        self,
        book: RequestBook,
        queue: TokenQueue[RequestKey],
        placer: Placer,
        links: Links,
        clock: Callable[[], float],
    ) -> None:
        self.retries = RetryBudget()
        self._book = book
        self._queue = queue
        self._placer = placer
        self._links = links
        self._clock = clock

    def begin(self, request: Request, placement: Placement) -> None:
        """The next attempt, on these workers."""
        request.attempt += 1
        self._placer.dispatched(request, placement)
        request.placement = placement
        request.lease = request.prefill = None
        request.replay_asked = request.replay_due = False
        request.lifecycle.move(RequestState.PLACED, self._clock())
        logger.debug("request %s attempt %d: %s", request.key.request_id, request.attempt, placement.reason)
        self.reserve(request, placement.decode)

    def reserve(self, request: Request, ref: WorkerRef) -> None:
        """Asks the decode worker for a lease, or for the answer that it writes already."""
        if request.is_taken_over:
            self._links.send(ref, messages.take_over(request))
        else:
            self._links.send(ref, messages.reserve(request, self._remaining_s(request)))

    def requeue(self, request: Request, cause: str) -> None:
        """Back to its old place in the queue; what the attempt held is returned."""
        if request.entry is None:
            raise LookupError(f"{request.key.request_id} was never queued")
        self._placer.ended(request, cause)
        if request.lifecycle.state is not RequestState.PLACED:
            request.lifecycle.move(RequestState.RESUMING, self._clock())
        request.lifecycle.move(RequestState.QUEUED, self._clock())
        request.placement = None
        request.is_taken_over = False
        if request.task is not None and request.has_tokens:
            messages.go_on(request.task, request.answer)
            request.demand = demand_of(request.task)
            self._placer.tokens_changed(request)
        self._queue.put_back(request.entry)

    def recover(self, request: Request, ref: WorkerRef, failure: Failure) -> None:
        """Makes another attempt, elsewhere if it can be, where there is budget for one."""
        refusal = self.retries.refusal(request.setbacks, worker_lost=failure.cause == "WORKER_LOST")
        if refusal is not None:
            self._book.end(request, RequestState.FAILED, given_up(failure, refusal))
            return
        request.failed_on.add(ref)
        self.move(request, ref, failure)

    def move(self, request: Request, ref: WorkerRef, failure: Failure) -> None:
        """Ends the attempt on every worker that it was on; the next one goes on behind the tokens that came."""
        logger.info(
            "request %s attempt %d failed in %s: %s; goes on behind %s tokens",
            request.key.request_id, request.attempt, failure.stage, failure.cause, request.answer.num_tokens,
        )  # fmt: skip
        request.num_moves += 1
        decode = request.placement.decode if request.placement is not None else None
        request.landed_on = None if ref == decode else decode
        self.cancel(request, failure.cause)
        self.requeue(request, failure.cause)

    def cancel(self, request: Request, cause: str) -> None:
        """Tells the present attempt's workers that it is over; a prefill worker that is done need not hear of it."""
        if request.placement is None:
            return
        for ref in request.placement.workers:
            if ref != request.placement.prefill or request.prefill is None:
                self._links.send(ref, messages.cancel(request, cause))

    def start_prefill(self, request: Request, ref: WorkerRef) -> None:
        """Has the prompt computed, for the lease that was granted."""
        sources = self._placer.sources(request)
        self._links.send(ref, messages.start_prefill(request, self._remaining_s(request), sources))

    def _remaining_s(self, request: Request) -> float:
        return max(0.0, request.deadline_s - self._clock())


def demand_of(task: worker_pb2.GenerationTask) -> Demand:
    """What a task needs, its answer so far included."""
    num_prompt_tokens = len(task.prompt_token_ids)
    so_far = max((len(known.token_ids) for known in task.so_far), default=0)
    return Demand(
        num_prompt_tokens=num_prompt_tokens + so_far,
        max_total_tokens=num_prompt_tokens + task.sampling.max_tokens,
        num_choices=task.sampling.n,
    )
