"""The decode service of a worker: reservations, adoption of handed-over sequences, token streams.

A request here is a lease and an answer. Reserve grants the lease; a commit from the prefill worker, or a
prefill of the worker's own, brings the first token; steps bring the others; the lease ends with the last
token, the answer when the router has acknowledged it. Everything runs on the service loop except `adopt`,
which runs on the thread that commits, under the engine's lock.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from decode.answers import Answer
from engine.events import SequenceFailed, StepResult, TokenDrawn
from engine.request import Drawn, SamplingParams
from headrace.v1 import kvtransfer_pb2, worker_pb2
from kvtransfer.lease_types import RequestId
from kvtransfer.transports.seam import HandoffRefused
from worker.facts import identity_digest
from worker.leasing import DEADLINE_EXCEEDED, LOST_CAUSES, NotReserved, Reservation
from worker.link import RouterLink
from worker.service import WorkerContext
from worker.wire import MalformedTask, check_task, failure, first_tokens_from_wire, sampling_params

logger = logging.getLogger(__name__)

MAX_FINISHED_ANSWERS = 1024
MAX_FINISHED_TOKENS = 1 << 18  # some 40 MB at most: routers acknowledge within a moment


@dataclass(slots=True, eq=False)
class _Request:
    key: worker_pb2.RequestKey
    link: RouterLink
    generation: int
    reservation: Reservation
    prompt: Sequence[int]
    sampling: SamplingParams
    answer: Answer
    local_prefill: bool
    began: float
    decoding: bool = False
    control: list[worker_pb2.WorkerMessage] = field(default_factory=list)
    """Sent already; sent again when the router asks again."""

    @property
    def lease_id(self) -> bytes:
        return self.reservation.lease_id

    @property
    def stage(self) -> str:
        if self.decoding:
            return "decode"
        return "prefill" if self.local_prefill else "transfer"

    def hear(self, link: RouterLink) -> None:
        self.link = link
        self.generation = link.generation

    def send(self, message: worker_pb2.WorkerMessage) -> None:
        self.control.append(message)
        self.link.send(message)


class DecodeService:
    """Implements `worker.service.RoleService`."""

    receives_kv = True

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engine = context.engine
        self._leases = context.leases
        self._leases.on_lost = self._on_lease_lost
        self._leases.on_commit = self.adopt
        self._requests: dict[RequestId, _Request] = {}
        self._by_lease: dict[bytes, _Request] = {}
        self._finished: OrderedDict[RequestId, _Request] = OrderedDict()

    @property
    def num_requests(self) -> int:
        """Requests that hold a lease."""
        return len(self._requests)

    # --- the router's messages -----------------------------------------------------------------

    def handle(self, link: RouterLink, message: worker_pb2.RouterMessage) -> bool:
        """Act on Reserve, CancelAttempt, AcknowledgeTokens and ResumeStream."""
        match message.WhichOneof("message"):
            case "reserve":
                self._reserve(link, message.reserve)
            case "cancel":
                self._cancel(message.cancel)
            case "acknowledge":
                self._acknowledge(link, message.acknowledge)
            case "resume":
                return self._resume(link, message.resume)
            case _:
                return False
        return True

    def _reserve(self, link: RouterLink, message: worker_pb2.Reserve) -> None:
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
        self._forget(_request_id(message.key), older_than=message.key.attempt)
        opened = self._leases.open(
            _request_id(message.key),
            message.key.attempt,
            message.remaining_s,
            message.task.prompt_token_ids,
            message.task.sampling.n or 1,
            self._context.root_key(message.key.tenant),
            local=message.local_prefill,
        )
        if isinstance(opened, NotReserved):
            link.send(
                failure(message.key, "reserve", opened.cause, opened.message, retryable=opened.retryable)
            )
            return
        self._begin(link, message, opened)

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

    def _begin(self, link: RouterLink, message: worker_pb2.Reserve, reservation: Reservation) -> None:
        request = _Request(
            key=message.key,
            link=link,
            generation=link.generation,
            reservation=reservation,
            prompt=list(message.task.prompt_token_ids),
            sampling=sampling_params(message.task),
            answer=Answer(message.key, self._context.tokenizer, message.task),
            local_prefill=message.local_prefill,
            began=self._context.clock(),
        )
        self._requests[_request_id(message.key)] = request
        self._by_lease[reservation.lease_id] = request
        request.send(
            worker_pb2.WorkerMessage(
                reserved=worker_pb2.Reserved(
                    key=message.key,
                    lease_id=reservation.lease_id,
                    decode_epoch=self._context.epoch,
                    kv_address=self._context.kv_address,
                    cached_tokens=reservation.cached_tokens,
                    ttl_s=reservation.ttl_s,
                )
            )
        )
        if request.local_prefill:
            self._engine.submit(request.lease_id, request.prompt, request.sampling, prefill_only=False)
            self._context.wake_engine()
        self._context.changed()

    def _cancel(self, message: worker_pb2.CancelAttempt) -> None:
        request_id = _request_id(message.key)
        self._forget(request_id, older_than=message.key.attempt + 1)
        self._leases.cancel(request_id, message.key.attempt, message.cause or "CANCELLED")
        self._context.changed()

    def _acknowledge(self, link: RouterLink, message: worker_pb2.AcknowledgeTokens) -> None:
        for seen in message.seen:
            request = self._find(seen.key)
            if request is None or seen.choice >= len(request.answer.choices):
                continue
            request.hear(link)
            request.answer.choices[seen.choice].acknowledge(seen.next_index)
            if request.answer.settled:
                self._finished.pop(_request_id(seen.key), None)

    def _resume(self, link: RouterLink, message: worker_pb2.ResumeStream) -> bool:
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

    def disown(self, link: RouterLink, cause: str, before_generation: int) -> None:
        """Cancel the requests of `link` that were not heard of since that generation began."""
        for request in [*self._requests.values(), *self._finished.values()]:
            if request.link is link and request.generation < before_generation:
                self._forget(_request_id(request.key), older_than=request.key.attempt + 1)
                self._leases.release(request.lease_id, cause)

    # --- the first token -----------------------------------------------------------------------

    def adopt(self, lease_id: bytes, handoff: kvtransfer_pb2.Handoff) -> None:
        """Make a committed sequence visible to the engine; the caller holds the engine's lock.

        Raises HandoffRefused, with nothing changed, where the record is not the lease's request's.
        """
        request = self._by_lease.get(lease_id)
        if request is None:
            raise HandoffRefused("UNKNOWN_REQUEST", "the request has ended here")
        first = first_tokens_from_wire(handoff.first_tokens)
        self._check_handoff(request, handoff, len(first))
        self._engine.adopt(lease_id, request.prompt, request.sampling, first)
        # Posted before the lock is let go, so that it comes before any step's tokens.
        self._context.loop.call_soon_threadsafe(self._adopted, lease_id, first)
        self._context.wake_engine()

    def _check_handoff(self, request: _Request, handoff: kvtransfer_pb2.Handoff, num_first: int) -> None:
        if handoff.identity != identity_digest(self._context.identity):
            text = "weights, tokenizer, arithmetic or layout of the two workers differ"
            raise HandoffRefused("IDENTITY_MISMATCH", text)
        facts = (
            ("request", handoff.key, request.key),
            ("number of prompt tokens", handoff.num_tokens, len(request.prompt)),
            ("number of first tokens", num_first, request.sampling.n),
            ("penalty boundary", handoff.penalty_boundary, len(request.prompt)),
        )
        for name, given, expected in facts:
            if given != expected:
                raise HandoffRefused("HANDOFF_MISMATCH", f"the handoff's {name} is not the lease's")

    def _adopted(self, lease_id: bytes, first: Sequence[Drawn]) -> None:
        request = self._by_lease.get(lease_id)
        if request is None:
            return
        request.decoding = True
        for choice, drawn in enumerate(first):
            self._feed(request, choice, 0, drawn)
        self._deliver((request,), 0.0)

    def _prefilled_here(self, request: _Request) -> None:
        request.decoding = True
        cached = request.reservation.cached_tokens
        request.send(
            worker_pb2.WorkerMessage(
                prefill_finished=worker_pb2.PrefillFinished(
                    key=request.key,
                    prefill_s=self._context.clock() - request.began,
                    cached_tokens=cached,
                    computed_tokens=len(request.prompt) - cached,
                )
            )
        )

    # --- steps ---------------------------------------------------------------------------------

    def on_step(self, result: StepResult) -> None:
        """Turn a step's tokens into answers."""
        touched: dict[_Request, None] = {}
        for event in result.events:
            request = self._by_lease.get(event.lease_id)
            if request is None:
                continue
            if isinstance(event, TokenDrawn):
                if not request.decoding:
                    self._prefilled_here(request)
                self._feed(request, event.choice, event.index, event.drawn)
                touched[request] = None
            elif isinstance(event, SequenceFailed):
                touched.pop(request, None)
                self._fail(request, event.cause, event.message, retryable=False)
        self._deliver(touched, result.step_s)

    def _feed(self, request: _Request, choice: int, index: int, drawn: Drawn) -> None:
        answer = request.answer.choices[choice]
        if index == answer.num_tokens and answer.feed(drawn):
            self._engine.finish_choice(request.lease_id, choice)

    def _deliver(self, requests: Iterable[_Request], step_s: float) -> None:
        for request in requests:
            request.link.mark(request.answer, step_s)
            if request.answer.finished:
                self._finish(request)

    def _finish(self, request: _Request) -> None:
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

    def _fail(self, request: _Request, cause: str, message: str, *, retryable: bool) -> None:
        self._forget(_request_id(request.key), older_than=request.key.attempt + 1)
        self._leases.release(request.lease_id, cause)
        request.link.send(failure(request.key, request.stage, cause, message, retryable=retryable))
        logger.info("request %s failed in %s: %s", request.key.request_id, request.stage, cause)
        self._context.changed()

    async def close(self) -> None:
        """End every request: the worker stops."""
        for request in list(self._requests.values()):
            self._fail(request, "WORKER_STOPPED", "the worker was stopped", retryable=True)

    # --- the books -----------------------------------------------------------------------------

    def _find(self, key: worker_pb2.RequestKey) -> _Request | None:
        request_id = _request_id(key)
        request = self._requests.get(request_id) or self._finished.get(request_id)
        return request if request is not None and request.key.attempt == key.attempt else None

    def _forget(self, request_id: RequestId, older_than: int) -> None:
        """Drop attempts below `older_than`; their leases end without a word to the router."""
        for request in (self._requests.get(request_id), self._finished.get(request_id)):
            if request is not None and request.key.attempt < older_than:
                self._drop(request)
                self._finished.pop(request_id, None)
                request.link.unmark(request.answer)

    def _drop(self, request: _Request) -> None:
        self._by_lease.pop(request.lease_id, None)
        if self._requests.get(_request_id(request.key)) is request:
            del self._requests[_request_id(request.key)]


def _request_id(key: worker_pb2.RequestKey) -> RequestId:
    return RequestId(key.tenant, key.request_id)
