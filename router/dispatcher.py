"""Sends requests to workers and acts on what workers say.

    submit → queue → place → Reserve → (Reserved) → StartPrefill → (PrefillFinished, tokens) → end
               ↑                └ local prefill: Reserve alone, then tokens     │
               └──────── the attempt failed or lost its worker ────────────────┘

Every handler runs to its end on the router's event loop without waiting for anything, so a reader of a
worker's stream never waits for a client, and no two events of one request interleave. What a worker says of an
older attempt than the present one (`attempts`) changes nothing.
"""

import logging
from collections.abc import Callable, Iterable

from headrace.v1 import worker_pb2
from router import messages
from router.attempts import Attempts, Links, demand_of
from router.book import RequestBook
from router.core.answer import Arrival
from router.core.fleet import WorkerRef
from router.core.lifecycle import RequestState
from router.core.placement import Placement, WaitCause
from router.core.queue import Entry, TokenQueue
from router.direct import DirectSources
from router.gate import Gate
from router.placer import Placer
from router.requests import CallLater, Request, RequestKey
from router.resume import ResumeHandles
from router.verdicts import (
    Verdict,
    failure_of,
    no_workers,
    taken_over,
    too_large,
    verdict_on,
    worker_lost,
)

logger = logging.getLogger(__name__)

REFUSAL_BACKOFF_S = 0.25
REPORT_GRACE_S = 0.5  # how long a finished answer waits for its prefill worker's figures
ABSENCE_S = 60.0  # how long accepted requests wait for a worker to come back where none is left
MAX_STALE = 16  # placements in a row that workers may call outdated


class Dispatcher:
    """The queue, the placement and the conversation with workers."""

    def __init__(
        self,
        book: RequestBook,
        queue: TokenQueue[RequestKey],
        gate: Gate,
        placer: Placer,
        attempts: Attempts,
        links: Links,
        handles: ResumeHandles,
        clock: Callable[[], float],
        call_later: CallLater,
        direct: DirectSources | None = None,
    ) -> None:
        """`direct`: which workers serve clients directly; None: the router relays everything."""
        self.queue = queue
        self._absent_since_s: float | None = None
        self._book = book
        self._gate = gate
        self._placer = placer
        self._attempts = attempts
        self._links = links
        self._handles = handles
        self._clock = clock
        self._call_later = call_later
        self._pumping = False
        self._direct = direct
        book.on_ending = self._on_ending

    # --- requests ----------------------------------------------------------------------------------------

    def submit(
        self, request: Request, task: worker_pb2.GenerationTask, written_on: WorkerRef | None = None
    ) -> None:
        """Accepts a request that was admitted, or ends it where there is no room or nobody to serve it. `written_on`:
        the worker that may be writing its answer for another router."""
        request.task = task
        request.demand = demand_of(task)
        self._placer.tokens_changed(request)
        if written_on is not None and self._placer.is_here(written_on):
            self._take_over(request, written_on)
            return
        failure = self._gate.admit(request)
        if failure is not None:
            self._book.end(request, RequestState.FAILED, failure)
            return
        self._attempts.retries.earn()
        request.accepted = messages.accepted(request)
        request.wake()
        head = self.queue.head()
        if head is None or head.key != request.key:
            request.choice = None  # others are placed before it
        self.pump()
        request.choice = None

    def _take_over(self, request: Request, ref: WorkerRef) -> None:
        """Asks a worker for the answer that it writes for another router. Where it has none, the request is placed."""
        self._gate.let_in(request)
        request.accepted = messages.accepted(request)
        request.is_taken_over = True
        self._attempts.begin(request, Placement(ref, None, f"{ref.worker_id} writes it for another router"))
        request.wake()

    def pump(self) -> None:
        """Places what can be placed, in order."""
        if self._pumping:
            return  # an end within the loop below freed something; the loop sees it
        self._pumping = True
        try:
            while (entry := self.queue.head()) is not None:
                if not self._place_head(entry):
                    return
        finally:
            self._pumping = False

    def _place_head(self, entry: Entry[RequestKey]) -> bool:
        request = self._book.get(entry.key)
        if request is None or request.demand is None:
            raise LookupError(f"{entry.key.request_id} is queued but not in the book")
        now = self._clock()
        if entry.deadline <= now:
            self._book.deadline_passed(request)  # its timer is late
            return True
        decision = request.choice or self._placer.place(request)
        if isinstance(decision, Placement):
            self._absent_since_s = None
            request.entry = self.queue.take(now)
            self._attempts.begin(request, decision)
            return True
        if decision.cause is WaitCause.TOO_LARGE:
            self._book.end(request, RequestState.FAILED, too_large(decision))
            return True
        if decision.cause is WaitCause.NO_WORKERS and self._absent_for_s(now) > ABSENCE_S:
            self._book.end(request, RequestState.FAILED, no_workers(decision))
            return True
        if decision.cause is not WaitCause.NO_WORKERS:
            self._absent_since_s = None
        return False

    def _absent_for_s(self, now: float) -> float:
        """How long accepted requests have found nobody at all."""
        if self._absent_since_s is None:
            self._absent_since_s = now
        return now - self._absent_since_s

    def _on_ending(self, request: Request, state: RequestState) -> None:
        cause = request.failure.cause if request.failure else state.value
        self._gate.ended(request)
        if state is not RequestState.FINISHED:
            self._attempts.cancel(request, cause)
        self._placer.ended(request, cause)
        if request.accepted is not None:  # else it never had what others wait for
            self.pump()

    # --- workers -----------------------------------------------------------------------------------------

    def on_reserved(self, ref: WorkerRef, message: worker_pb2.Reserved) -> None:
        """A decode worker granted a lease: prefill may begin."""
        request = self._current(ref, message.key)
        if request is None:
            # Granted to an attempt that is over here: the cancel may have been lost with a connection.
            self._links.send(ref, messages.cancel_key(message.key, "SUPERSEDED"))
            return
        if request.lifecycle.state is not RequestState.PLACED or request.placement is None:
            return
        self._placer.granted(request, message.cached_tokens)
        request.lease, request.is_taken_over = message, False
        if request.resumable:
            request.resume_handle = self._handles.make(request, request.attempt, ref)
            request.num_handles += 1
        if self._direct is not None:
            request.direct_source = self._direct.of(ref, *request.key, request.attempt)
        if request.resumable or any(each.wants_direct for each in request.attachments):
            request.wake()
        request.lifecycle.move(RequestState.RESERVED, self._clock())
        request.lifecycle.move(RequestState.PREFILLING, self._clock())
        if request.replay_due:
            self._ask_for_replay(ref, request)
        if request.placement.prefill is not None:
            self._attempts.start_prefill(request, request.placement.prefill)

    def on_prefill_finished(self, ref: WorkerRef, message: worker_pb2.PrefillFinished) -> None:
        """The prompt's KV belongs to the decode worker, and the prefill worker has room again."""
        request = self._current(ref, message.key)
        if request is None or request.placement is None or request.lease is None:
            return
        if request.prefill is not None or ref != (request.placement.prefill or request.placement.decode):
            return
        request.prefill = message
        request.prefills.append(message)
        self._placer.found_cached(request, message.cached_tokens)
        request.lifecycle.committed(self._clock())
        self._decoding(request)
        self._finish_if_complete(request)
        self.pump()

    def on_step(self, ref: WorkerRef, step: worker_pb2.StepOutput) -> None:
        """New tokens of any number of requests."""
        now = self._clock()
        touched: dict[Request, None] = {}
        for output in step.outputs:
            request = self._current(ref, output.key)
            if request is not None and self._take(ref, request, output, now):
                touched[request] = None
        for request in touched:
            self._book.tokens_came(request)
            if request.answer.is_complete:
                self._finish_if_complete(request)

    def on_direct(self, ref: WorkerRef, message: worker_pb2.DirectState) -> None:
        """A client began, or ended, to read its tokens from the worker itself."""
        request = self._current(ref, message.key)
        if request is not None:
            for attachment in tuple(request.attachments):
                attachment.direct_changed(message.ticket_id.hex(), message.phase)

    def on_failed(self, ref: WorkerRef, message: worker_pb2.AttemptFailed) -> None:
        """An attempt ended on a worker without an answer."""
        request = self._current(ref, message.key)
        if request is None or request.placement is None:
            return
        error = message.error
        if self._has_handed_over(request, ref):
            return
        if request.answer.is_complete:
            self._finish_if_complete(request, wait_for_figures=False)
            return
        if request.is_taken_over:
            self._attempts.requeue(request, error.cause)
            self.pump()
            return
        verdict = verdict_on(error, request.lifecycle.state)
        if verdict is Verdict.OUTDATED and request.num_stale >= MAX_STALE:
            verdict = Verdict.FAIL
        match verdict:
            case Verdict.NO_ROOM:
                self._placer.refused(request, self._clock() + REFUSAL_BACKOFF_S)
                self._attempts.requeue(request, error.cause)
            case Verdict.OUTDATED:
                # The worker remembers a later attempt from before this router knew the request.
                self._attempts.cancel(request, "SUPERSEDED")
                request.attempt += 1 << request.num_stale
                request.num_stale += 1
                self._attempts.requeue(request, error.cause)
            case Verdict.TAKEN_OVER:
                self._book.end(request, RequestState.CANCELLED, taken_over())
            case Verdict.MOVE:
                self._attempts.move(request, ref, failure_of(error, request.stage))
            case Verdict.RECOVER:
                self._attempts.recover(request, ref, failure_of(error, request.stage))
            case Verdict.FAIL:
                self._book.end(request, RequestState.FAILED, failure_of(error, request.stage))
        self.pump()

    def on_joined(self) -> None:
        """A worker joined: the queue may move."""
        self.pump()

    def on_back(self, ref: WorkerRef) -> None:
        """A worker is in touch again: each of its requests goes on where it stood, or begins again there.

        One message per request, since a worker cancels what it does not hear of: the Reserve or StartPrefill
        that was not answered, else where its tokens should go on.
        """
        for request in self._on(ref):
            if request.placement is None:
                continue
            for attachment in tuple(request.attachments):
                attachment.relay_again()  # the word that a direct stream broke may be lost with the link
            if ref == request.placement.prefill:
                if request.lease is not None and request.prefill is None:
                    self._attempts.start_prefill(request, ref)
            elif request.lease is None:
                # Its tokens may have gone the way that the grant went.
                request.replay_due = True
                self._attempts.reserve(request, ref)
            elif request.answer.is_complete:
                for choice, num_tokens in enumerate(request.answer.num_tokens):
                    self._links.acknowledge(ref, request.wire_key, choice, num_tokens)
            else:
                self._ask_for_replay(ref, request)
        self.pump()

    def on_lost(self, ref: WorkerRef, reason: str) -> None:
        """A worker is gone: the requests that needed it are placed anew, the others go on."""
        for request in self._on(ref):
            if request.placement is None or request.is_over:
                continue
            if request.answer.is_complete:
                self._finish_if_complete(request, wait_for_figures=False)
            elif not self._has_handed_over(request, ref):
                self._attempts.recover(request, ref, worker_lost(ref.worker_id, request.stage, reason))
        self.pump()

    # --- one request -------------------------------------------------------------------------------------

    def _current(self, ref: WorkerRef, key: worker_pb2.RequestKey) -> Request | None:
        """The running request whose present attempt this worker speaks of."""
        request = self._book.running(key.tenant, key.request_id)
        if request is None or request.attempt != key.attempt:
            return None
        return request if request.runs_on(ref) else None

    @staticmethod
    def _has_handed_over(request: Request, ref: WorkerRef) -> bool:
        """Whether the worker was this request's prefill worker, and the decode worker has it already."""
        is_prefill = request.placement is not None and ref == request.placement.prefill
        return is_prefill and request.lifecycle.state is RequestState.DECODING

    def _on(self, ref: WorkerRef) -> Iterable[Request]:
        return [request for request in self._book.live if request.runs_on(ref)]

    def _decoding(self, request: Request) -> None:
        if request.lifecycle.state is RequestState.PREFILLING:
            request.lifecycle.move(RequestState.DECODING, self._clock())
        self._placer.prefilled(request)

    def _take(self, ref: WorkerRef, request: Request, output: worker_pb2.ChoiceOutput, now: float) -> bool:
        """Books one choice's news; False where there was none for the listeners."""
        delta = output.delta
        if request.lease is None or delta.choice >= len(request.answer.choices):
            return False
        choice = request.answer.choices[delta.choice]
        num_known = len(choice.tokens)
        arrival = choice.add(delta)
        if arrival is Arrival.MISALIGNED:
            # Tokens were lost, or a replay crossed with news: ask once for what follows what is here.
            if not request.replay_asked:
                self._ask_for_replay(ref, request)
            return False
        finished = output.HasField("finished") and choice.finish(output.finished)
        if arrival is Arrival.NEW or finished:
            request.replay_asked = False
            if request.lifecycle.state is not RequestState.DECODING:
                self._decoding(request)
            request.lifecycle.tokens_arrived(delta.first_index, now)
            self._gate.tokens_came(request, len(choice.tokens) - num_known)
        self._links.acknowledge(ref, output.key, delta.choice, len(choice.tokens))
        return arrival is Arrival.NEW or finished

    def _ask_for_replay(self, ref: WorkerRef, request: Request) -> None:
        request.replay_asked, request.replay_due = True, False
        self._links.send(ref, messages.resume(request))

    def _finish_if_complete(self, request: Request, wait_for_figures: bool = True) -> None:
        if request.is_over or not request.answer.is_complete or request.placement is None:
            return
        prefill = request.placement.prefill
        # Two streams bring the tokens and the prefill worker's figures; the tokens may overtake them.
        may_come = prefill is not None and self._placer.is_here(prefill)
        if may_come and request.prefill is None and wait_for_figures:
            if request.report_timer is None:
                request.report_timer = self._call_later(
                    REPORT_GRACE_S, lambda: self._finish_if_complete(request, wait_for_figures=False)
                )
            return
        self._book.end(request, RequestState.FINISHED)
