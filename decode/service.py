"""The decode service of a worker: reservations, adoption of handed-over sequences, token streams.

A request here is a lease and an answer. Reserve grants the lease, and blocks with it; only a prompt that is
computed here may wait for cached blocks from elsewhere in between. A commit from the prefill worker, or a prefill
of the worker's own, brings the first token; steps bring the others; the lease ends with the last token, the
answer when the router has acknowledged it. Everything runs on the service loop except `adopt`, which runs on the
thread that commits, under the engine's lock.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

import grpc

from decode.answers import Answer
from decode.direct import MAX_READERS, DirectReader
from decode.request import Request, check_handoff, direct_state, prefilled_here, reserved
from engine.events import SequenceFailed, StepResult, TokenDrawn
from engine.request import Drawn
from headrace.v1 import kvtransfer_pb2, worker_pb2
from headrace.v1.worker_pb2 import DIRECT_PHASE_OPEN, DirectPhase
from kvtransfer.choosers import strictest
from kvtransfer.direct_ticket import DirectTicket
from kvtransfer.lease_types import Refusal, RequestId
from kvtransfer.transports.seam import HandoffRefused
from rpc.call import ServerCall
from worker.direct import DirectRefused
from worker.leasing import DEADLINE_EXCEEDED, LOST_CAUSES, NO_CAPACITY, NotReserved
from worker.link import RouterLink
from worker.ownership import is_anothers, tell_taken_over
from worker.prefix_sources import Wanted
from worker.prefixes import Brought
from worker.service import WorkerContext
from worker.wire import (
    MalformedTask,
    check_task,
    drafting_from_wire,
    failure,
    first_tokens_from_wire,
    sampling_params,
    so_far_of,
    taken_over,
)

logger = logging.getLogger(__name__)

KEPT_FOR_READERS = 64  # tokens of a choice: a client may be a second on its way here with its ticket
MAX_FINISHED_ANSWERS = 1024
MAX_FINISHED_TOKENS = 1 << 18  # some 40 MB at most: routers acknowledge within a moment


class DecodeService:
    """Implements `worker.service.RoleService`."""

    receives_kv = True

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._leases = context.leases
        self._leases.on_lost = self._on_lease_lost
        self._leases.on_commit = self.adopt
        self._keeps_behind = 0
        if context.direct is not None:
            context.direct.on_redeemed = self._open_direct
            self._keeps_behind = KEPT_FOR_READERS
        self._requests: dict[RequestId, Request] = {}
        self._by_lease: dict[bytes, Request] = {}
        self._finished: OrderedDict[RequestId, Request] = OrderedDict()

    @property
    def num_requests(self) -> int:
        """Requests that hold a lease."""
        return len(self._requests)

    # --- the router's messages -----------------------------------------------------------------

    def handle(self, link: RouterLink, message: worker_pb2.RouterMessage) -> bool:
        """Act on Reserve, CancelAttempt, AcknowledgeTokens, ResumeStream and TakeOver."""
        match message.WhichOneof("message"):
            case "reserve":
                self._reserve(link, message.reserve)
            case "cancel":
                self._cancel(link, message.cancel)
            case "acknowledge":
                self._acknowledge(link, message.acknowledge)
            case "resume":
                return self._resume(link, message.resume)
            case "take_over":
                return self._take_over(link, message.take_over.key)
            case _:
                return False
        return True

    def _reserve(self, link: RouterLink, message: worker_pb2.Reserve) -> None:
        if self._is_anothers(link, message.key):
            text = "another router has this attempt, or a later one, here"
            link.send(failure(message.key, "reserve", Refusal.STALE_ATTEMPT, text))
            return
        known = self._find(message.key)
        if known is not None:
            known.hear(link)
            for sent in known.control:
                link.send(sent)
            return
        refusal = self._refusal(message)
        if refusal is not None:
            link.send(refusal)
            return
        self._tell_taken_over(_request_id(message.key), link)
        self._forget(_request_id(message.key), older_than=message.key.attempt)
        request = self._open(link, message)
        if request is None:
            return
        if request.local_prefill and self._context.prefixes.anybody():
            request.fetch = self._context.prefixes.bring(
                self._wanted(request), lambda brought: self._brought(request, brought)
            )
        if request.fetch is None:
            self._take_room(request)

    def _open(self, link: RouterLink, message: worker_pb2.Reserve) -> Request | None:
        """A request with a lease, and no blocks yet."""
        bound = strictest((self._context.config.fidelity, message.task.fidelity)).rank
        # May raise, so before there is a lease.
        so_far = so_far_of(message.task)
        answer = Answer(message.key, self._context.tokenizer, message.task, self._keeps_behind)
        lease_id = self._leases.grant(
            _request_id(message.key),
            message.key.attempt,
            message.remaining_s,
            local=message.local_prefill,
            fidelity=bound,
        )
        if isinstance(lease_id, NotReserved):
            link.send(failure(message.key, "reserve", lease_id.cause, lease_id.message))
            return None
        request = Request(
            key=message.key,
            link=link,
            lease_id=lease_id,
            bound=bound,
            head=so_far.head(message.task.prompt_token_ids),
            so_far=so_far,
            sampling=sampling_params(message.task),
            answer=answer,
            local_prefill=message.local_prefill,
            deadline=self._context.clock() + message.remaining_s,
        )
        self._requests[_request_id(message.key)] = request
        self._by_lease[lease_id] = request
        return request

    def _wanted(self, request: Request) -> Wanted:
        root_key = self._context.root_key(request.key.tenant)
        return Wanted(
            tenant=request.key.tenant,
            keys=self._engine.prefix_keys(root_key, request.head),
            bound=request.bound,
            deadline=request.deadline,
        )

    def _brought(self, request: Request, brought: Brought) -> None:
        if self._by_lease.get(request.lease_id) is request:
            request.fetch, request.brought = None, brought
            self._take_room(request)

    def _take_room(self, request: Request) -> None:
        """Blocks for a request that has a lease, and the word that it is reserved."""
        num_choices, root_key = request.sampling.n, self._context.root_key(request.key.tenant)
        cached_tokens = self._leases.reserve(
            request.lease_id, request.head, num_choices, root_key, request.bound, request.local_prefill
        )
        if cached_tokens is None:
            text = f"no room for a prompt of {len(request.head)} tokens and {num_choices} choices now"
            self._fail(request, NO_CAPACITY, text, retryable=True)
            return
        request.cached_tokens, request.began = cached_tokens, self._context.clock()
        request.send(reserved(request, self._context))
        if request.local_prefill:
            self._engine.submit(
                request.lease_id, request.head, request.sampling, prefill_only=False, so_far=request.so_far
            )
            self._context.wake_engine()
        self._context.changed()

    def _refusal(self, message: worker_pb2.Reserve) -> worker_pb2.WorkerMessage | None:
        if not self._context.accepts_new():
            text = "the worker takes no new requests"
            return failure(message.key, "reserve", "NOT_SERVING", text, retryable=True)
        if not message.remaining_s > 0:
            text = "the deadline had passed when the reservation arrived"
            return failure(message.key, "reserve", DEADLINE_EXCEEDED, text)
        try:
            check_task(message.task, self._engine)
        except MalformedTask as error:
            return failure(message.key, "reserve", "INVALID_TASK", str(error))
        return None

    def _cancel(self, link: RouterLink, message: worker_pb2.CancelAttempt) -> None:
        if self._is_anothers(link, message.key):
            return
        request_id = _request_id(message.key)
        self._tell_taken_over(request_id, link)
        self._forget(request_id, older_than=message.key.attempt + 1)
        self._leases.cancel(request_id, message.key.attempt, message.cause or "CANCELLED")
        self._context.changed()

    def _acknowledge(self, link: RouterLink, message: worker_pb2.AcknowledgeTokens) -> None:
        for seen in message.seen:
            request = self._find(seen.key)
            if request is None or request.link is not link or seen.choice >= len(request.answer.choices):
                continue
            request.hear(link)
            request.answer.choices[seen.choice].acknowledge(seen.next_index)
            if request.answer.settled:
                self._finished.pop(_request_id(seen.key), None)

    def _resume(self, link: RouterLink, message: worker_pb2.ResumeStream) -> bool:
        if self._is_anothers(link, message.key):
            link.send(taken_over(message.key, "decode"))
            return True
        request = self._find(message.key)
        if request is None:
            return False
        request.hear(link)
        next_index = message.next_index or [0] * len(request.answer.choices)
        if not request.answer.rewind(next_index):
            text = f"tokens from index {list(next_index)} cannot be sent again"
            self._fail(request, "REPLAY_GONE", text, retryable=True)
            return True
        for sent in request.control:
            link.send(sent)
        link.mark(request.answer)
        return True

    def _take_over(self, link: RouterLink, key: worker_pb2.RequestKey) -> bool:
        """Write the answer of an older attempt, or of another router's, on as this one, for this router; False where
        there is none that is whole."""
        request_id = _request_id(key)
        request = self._find(key)
        if request is None or request.link is not link:
            request = self._held(request_id)
            if request is None or not self._goes_on_as(request, key.attempt):
                return False
            self._tell_taken_over(request_id, link)
            request.link.unmark(request.answer)
            request.hang_up("TAKEN_OVER", "another router goes on with this request")
            request.become(key)
        request.hear(link)
        request.answer.rewind([0] * len(request.answer.choices))
        link.send(reserved(request, self._context))
        link.mark(request.answer)
        return True

    def _goes_on_as(self, request: Request, attempt: int) -> bool:
        if not request.decoding or not request.answer.is_whole or request.key.attempt > attempt:
            return False
        if request.answer.finished or request.key.attempt == attempt:
            return True
        return self._leases.take_over(request.lease_id, attempt)

    def _tell_taken_over(self, request_id: RequestId, link: RouterLink) -> None:
        request = self._requests.get(request_id)
        if request is not None:
            tell_taken_over(request, link, request.stage)

    def _is_anothers(self, link: RouterLink, key: worker_pb2.RequestKey) -> bool:
        return is_anothers(self._held(_request_id(key)), link, key)

    def _held(self, request_id: RequestId) -> Request | None:
        """Whatever attempt of a request is here, running or finished."""
        return self._requests.get(request_id) or self._finished.get(request_id)

    def disown(self, link: RouterLink, cause: str, before_generation: int) -> None:
        """Cancel the requests of `link` that were not heard of since that generation began."""
        for request in [*self._requests.values(), *self._finished.values()]:
            if request.link is link and request.generation < before_generation:
                self._forget(_request_id(request.key), older_than=request.key.attempt + 1)
                self._leases.release(request.lease_id, cause)

    # --- the first token -----------------------------------------------------------------------

    def adopt(self, lease_id: bytes, handoff: kvtransfer_pb2.Handoff, fidelity: int) -> None:
        """Make a committed sequence visible to the engine; the caller holds the engine's lock.

        Raises HandoffRefused, with nothing changed, where the record is not the lease's request's.
        """
        request = self._by_lease.get(lease_id)
        if request is None:
            raise HandoffRefused("UNKNOWN_REQUEST", "the request has ended here")
        check_handoff(request, handoff, self._context)
        first, drafting = first_tokens_from_wire(handoff.first_tokens), drafting_from_wire(handoff)
        self._engine.adopt(
            lease_id, request.head, request.sampling, first, fidelity, drafting, request.so_far
        )
        # Posted before the lock is let go, so that it comes before any step's tokens.
        self._context.loop.call_soon_threadsafe(self._adopted, lease_id, first)
        self._context.wake_engine()

    def _adopted(self, lease_id: bytes, first: Sequence[Drawn]) -> None:
        request = self._by_lease.get(lease_id)
        if request is None:
            return
        request.decoding = True
        for choice, drawn in enumerate(first):
            if request.so_far.draws(choice):
                self._feed(request, choice, request.so_far.num_shared, drawn)
        self._deliver((request,), 0.0)

    # --- steps ---------------------------------------------------------------------------------

    def on_step(self, result: StepResult) -> None:
        """Turn a step's tokens into answers."""
        touched: dict[Request, None] = {}
        for event in result.events:
            request = self._by_lease.get(event.lease_id)
            if request is None:
                continue
            if isinstance(event, TokenDrawn):
                if not request.decoding:
                    request.decoding = True
                    request.send(prefilled_here(request, self._context.clock()))
                self._feed(request, event.choice, event.index, event.drawn)
                touched[request] = None
            elif isinstance(event, SequenceFailed):
                touched.pop(request, None)
                self._fail(request, event.cause, event.message, retryable=False)
        self._deliver(touched, result.step_s)

    def _feed(self, request: Request, choice: int, index: int, drawn: Drawn) -> None:
        answer = request.answer.choices[choice]
        if index == answer.num_tokens and answer.feed(drawn):
            self._engine.finish_choice(request.lease_id, choice)

    def _deliver(self, requests: Iterable[Request], step_s: float) -> None:
        now = self._context.clock()
        for request in requests:
            request.deliver(step_s, now)
            if request.answer.finished:
                self._finish(request)

    def _finish(self, request: Request) -> None:
        self._drop(request)
        self._leases.release(request.lease_id, "FINISHED")
        self._finished[_request_id(request.key)] = request
        self._trim_finished()
        self._context.changed()

    def _trim_finished(self) -> None:
        kept = sum(request.answer.num_kept for request in self._finished.values())
        while len(self._finished) > MAX_FINISHED_ANSWERS or kept > MAX_FINISHED_TOKENS:
            _, oldest = self._finished.popitem(last=False)
            kept -= oldest.answer.num_kept

    # --- clients that read here ----------------------------------------------------------------

    def _open_direct(self, ticket: DirectTicket, next_index: Sequence[int], call: ServerCall) -> None:
        """Send a client this attempt's tokens from now on. Raises DirectRefused."""
        request = self._find(
            worker_pb2.RequestKey(tenant=ticket.tenant, request_id=ticket.request_id, attempt=ticket.attempt)
        )
        if request is None:
            text = "this attempt is not, or no longer, on this worker"
            raise DirectRefused(grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST", text)
        choices = request.answer.choices
        indices = list(next_index) or [0] * len(choices)
        if len(indices) != len(choices) or len(request.readers) >= MAX_READERS:
            text = f"{len(indices)} choices are asked for, of {len(choices)}; {len(request.readers)} clients read"
            raise DirectRefused(grpc.StatusCode.FAILED_PRECONDITION, "BAD_DIRECT_REQUEST", text)
        # A client may have more than this attempt: it passes over what it knows.
        indices = [min(index, choice.num_tokens) for choice, index in zip(choices, indices, strict=True)]
        if any(choice.since(index) is None for choice, index in zip(choices, indices, strict=True)):
            text = f"tokens from index {indices} are not kept here"
            raise DirectRefused(grpc.StatusCode.FAILED_PRECONDITION, "TOKENS_GONE", text)

        def over(ended: DirectReader, phase: DirectPhase) -> None:
            request.readers.remove(ended)
            request.link.send(direct_state(request.key, ended.ticket_id, phase))
            request.link.mark(request.answer)

        reader = DirectReader(bytes.fromhex(ticket.ticket_id), call, request.answer, indices, over)
        request.readers.append(reader)
        request.link.send(direct_state(request.key, reader.ticket_id, DIRECT_PHASE_OPEN))
        reader.push()

    # --- failures ------------------------------------------------------------------------------

    def on_engine_failed(self, lease_ids: Collection[bytes] | None, message: str) -> None:
        """End the requests whose sequences the engine lost; None: all of them."""
        for request in list(self._requests.values()):
            if lease_ids is None or request.lease_id in lease_ids:
                self._fail(request, "ENGINE_FAILED", message, retryable=True)

    def _on_lease_lost(self, lease_id: bytes, cause: str) -> None:
        self._context.loop.call_soon_threadsafe(self._lease_lost, lease_id, cause)

    def _lease_lost(self, lease_id: bytes, cause: str) -> None:
        request = self._by_lease.get(lease_id)
        if request is None:
            return
        name, _, message = cause.partition(": ")
        name = LOST_CAUSES.get(name, name)
        retryable = name != DEADLINE_EXCEEDED
        self._fail(request, name, message or "the lease ended before the answer", retryable=retryable)

    def _fail(self, request: Request, cause: str, message: str, *, retryable: bool) -> None:
        self._forget(_request_id(request.key), older_than=request.key.attempt + 1)
        self._leases.release(request.lease_id, cause)
        request.link.send(failure(request.key, request.stage, cause, message, retryable=retryable))
        logger.info("request %s failed in %s: %s", request.key.request_id, request.stage, cause)
        self._context.changed()

    async def close(self) -> None:
        """End every request: the worker stops."""
        for request in list(self._requests.values()):
            self._fail(request, "WORKER_STOPPED", "the worker was stopped", retryable=True)
        await self._context.prefixes.close()

    # --- the books -----------------------------------------------------------------------------

    def _find(self, key: worker_pb2.RequestKey) -> Request | None:
        request = self._held(_request_id(key))
        return request if request is not None and request.key.attempt == key.attempt else None

    def _forget(self, request_id: RequestId, older_than: int) -> None:
        """Drop attempts below `older_than`; their leases end without a word to the router."""
        for request in (self._requests.get(request_id), self._finished.get(request_id)):
            if request is not None and request.key.attempt < older_than:
                self._drop(request)
                self._finished.pop(request_id, None)
                request.hang_up("ATTEMPT_OVER", "this attempt has ended; the router goes on")
                request.link.unmark(request.answer)

    def _drop(self, request: Request) -> None:
        self._by_lease.pop(request.lease_id, None)
        if request.fetch is not None:
            request.fetch.cancel()
        if self._requests.get(_request_id(request.key)) is request:
            del self._requests[_request_id(request.key)]


def _request_id(key: worker_pb2.RequestKey) -> RequestId:
    return RequestId(key.tenant, key.request_id)
