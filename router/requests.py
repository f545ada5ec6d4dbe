"""One request and those who listen to it.

A `Request` is what the router keeps of a request from the call until it is forgotten; an `Attachment` is one
client reading its answer. Both live on the router's event loop, and are changed there only.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from headrace.v1 import inference_pb2 as pb
from headrace.v1 import worker_pb2
from router.core.answer import Answer, Reader
from router.core.failures import Failure, Rejection, Stage
from router.core.fleet import Demand, WorkerRef
from router.core.lifecycle import Lifecycle
from router.core.placement import Placement
from router.core.queue import Entry
from router.core.retries import Setbacks
from router.core.shedding import Forecast
from router.direct import DirectSource
from router.prompt_keys import PromptKeys

MAX_MESSAGE_BYTES = 64 << 10
MAX_DECISIONS = 16  # of the last attempts


class RequestKey(NamedTuple):
    """A request's name: ids are the tenant's own."""

    tenant: str
    request_id: str


class Timer(Protocol):
    """What `call_later` gives back."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


@dataclass(slots=True)
class Decision:
    """One attempt's placement, and the cause that ended it, where it has ended. `decided_s` is monotonic."""

    attempt: int
    decided_s: float
    placement: Placement
    ended: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One request. `deadline_s` is monotonic; `body` digests all that determines the answer; `attempt` is the
    number of the present placement, or of the last one before the first; `prefill` is the present attempt's,
    `prefills` those of all. `failed_on`: where attempts ended without an answer; `landed_on`: the decode worker to
    which an attempt had been pushing. `direct_source`: where a client may read the last attempt that was granted a
    lease, past this router. `is_counted`: against its tenant's limits; `uncharged_tokens`: of the answer, to it.
    `num_handles`: how often the handle was made anew; `is_taken_over`: it was asked of a worker that writes it for
    another router."""

    key: RequestKey
    body: bytes
    seed: int
    attempt: int
    deadline_s: float
    resumable: bool
    resume_handle: bytes
    num_handles: int = 1
    is_taken_over: bool = False
    lifecycle: Lifecycle
    answer: Answer
    demand: Demand | None = None
    task: worker_pb2.GenerationTask | None = None
    accepted: pb.Accepted | None = None
    entry: Entry[RequestKey] | None = None
    placement: Placement | None = None
    lease: worker_pb2.Reserved | None = None
    direct_source: DirectSource | None = None
    prefill: worker_pb2.PrefillFinished | None = None
    prefills: list[worker_pb2.PrefillFinished] = field(default_factory=list)
    setbacks: Setbacks = field(default_factory=Setbacks)
    num_moves: int = 0
    failed_on: set[WorkerRef] = field(default_factory=set)
    landed_on: WorkerRef | None = None
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=MAX_DECISIONS))
    keys: PromptKeys | None = None
    choice: Placement | None = None
    priority: int = 0
    arrived_s: float = 0.0
    forecast: Forecast | None = None
    is_counted: bool = False
    uncharged_tokens: int = 0
    replay_asked: bool = False
    replay_due: bool = False
    num_stale: int = 0
    failure: Failure | None = None
    done: pb.Done | None = None
    attachments: "list[Attachment]" = field(default_factory=list)
    deadline_timer: Timer | None = None
    orphan_timer: Timer | None = None
    report_timer: Timer | None = None

    @property
    def is_over(self) -> bool:
        return self.lifecycle.is_over

    @property
    def stage(self) -> Stage:
        """What a failure now is called."""
        return Stage.ADMISSION if self.accepted is None else self.lifecycle.stage

    @property
    def has_tokens(self) -> bool:
        return any(self.answer.num_tokens)

    @property
    def may_restart(self) -> bool:
        """Whether the same call again begins it anew, instead of telling how it ended."""
        return self.failure is not None and self.failure.retryable

    @property
    def wire_key(self) -> worker_pb2.RequestKey:
        """The present attempt, as workers know it."""
        return worker_pb2.RequestKey(
            tenant=self.key.tenant, request_id=self.key.request_id, attempt=self.attempt
        )

    def runs_on(self, ref: WorkerRef) -> bool:
        """Whether the present attempt involves that incarnation of a worker."""
        placement = self.placement
        return placement is not None and (ref == placement.decode or ref == placement.prefill)

    def wake(self) -> None:
        """Tells every listener that there is news."""
        for attachment in tuple(self.attachments):
            attachment.wake()

    def stop_timers(self) -> None:
        for timer in (self.deadline_timer, self.orphan_timer, self.report_timer):
            if timer is not None:
                timer.cancel()
        self.deadline_timer = self.orphan_timer = self.report_timer = None


class Attachment:
    """One client's place in an answer.

    It holds a position, not messages: what a client has not taken yet is in the request's answer, which every
    attachment shares, and goes out in as few messages as fit. What was there when the client attached is a
    replay; only what comes later counts as the client's lag.
    """

    def __init__(
        self,
        request: Request,
        next_index: int,
        clock: Callable[[], float],
        wants_direct: bool = False,
    ) -> None:
        """`wants_direct`: the client can stream from workers."""
        self.request = request
        self.wants_direct = wants_direct
        self._ticket_id = ""
        self._ticket_attempt = 0
        self._is_direct = False
        self._reader = Reader(request.answer, next_index)
        self._replay_bytes = self._reader.lag_bytes
        self.on_news: Callable[[], None] = _nobody_listens
        self._clock = clock
        self._taken_s = clock()
        self.is_caught_up = False
        self._handles_sent = 0
        self.has_ended = False
        self._dropped: Failure | None = None

    @property
    def lag_bytes(self) -> int:
        """How far the client is behind what came since it attached."""
        if self.is_caught_up or self.is_direct:
            return 0
        return min(self._reader.lag_bytes, self._reader.total_bytes - self._replay_bytes)

    def is_stalled(self, now: float, limit_s: float) -> bool:
        """Whether the client has taken nothing for that long, although there was something to take."""
        return self._reader.has_more and not self.is_direct and now - self._taken_s > limit_s

    @property
    def is_direct(self) -> bool:
        """Whether the client reads the present attempt from its worker: it is sent no tokens here."""
        return self._is_direct and self._ticket_attempt == self.request.attempt

    def direct_changed(self, ticket_id: str, phase: worker_pb2.DirectPhase) -> None:
        """A worker tells what became of a ticket; that of another attachment, or an older one, changes nothing."""
        if not self._ticket_id or ticket_id != self._ticket_id:
            return
        if phase == worker_pb2.DIRECT_PHASE_BROKEN:
            self.relay_again()
        else:
            self._is_direct = True

    def relay_again(self) -> None:
        """The client reads nowhere else, or that is not known: it is sent all that it was not sent here."""
        if self._is_direct:
            self._is_direct = False
            # What came meanwhile was not held up by the client.
            self._replay_bytes = self._reader.total_bytes
            self.wake()

    def wake(self) -> None:
        """Tells the client's side that there is something to take."""
        if self.is_caught_up:
            self.is_caught_up = False
            self._taken_s = self._clock()
        self.on_news()

    def drop(self, failure: Failure) -> None:
        """Ends this attachment alone; the client hears of it when it takes what is on its way to it."""
        self._dropped = failure
        self._reader = Reader(Answer(0), 0)
        self.wake()

    def take(self) -> list[bytes]:
        """The next messages for the client, serialized GenerateResponses, about as many as fit into one; empty where
        there are none now. More may be there unless it `is_caught_up`.

        Raises:
            Rejection: the request failed, or this client was dropped.
        """
        request = self.request
        if self._dropped is not None:
            raise Rejection(self._dropped, request.key.request_id, request.attempt)
        self._taken_s = self._clock()
        messages = self._greeting() if self._handles_sent < request.num_handles else []
        if not self.is_direct:
            messages += self._reader.read(MAX_MESSAGE_BYTES)
            if self._reader.has_more:
                return messages
            if self.wants_direct:
                messages += self._new_ticket()
        if request.failure is not None:
            if messages:
                return messages
            raise Rejection(request.failure, request.key.request_id, request.attempt)
        if request.done is not None and not self.has_ended:
            self.has_ended = True
            messages.append(pb.GenerateResponse(done=request.done).SerializeToString())
        self.is_caught_up = True
        return messages

    def _new_ticket(self) -> list[bytes]:
        """Behind the tokens that are here, so that the client can go on from there elsewhere."""
        source = self.request.direct_source
        if source is None or self.request.is_over or source.attempt != self.request.attempt:
            return []
        if source.attempt == self._ticket_attempt:
            return []
        self._ticket_attempt, self._is_direct = source.attempt, False
        self._ticket_id, message = source.ticket()
        return [message.SerializeToString()]

    def _greeting(self) -> list[bytes]:
        """What comes before tokens: the first message, and the newest handle."""
        request = self.request
        if request.accepted is None:
            return []
        messages = []
        if not self._handles_sent:
            messages.append(pb.GenerateResponse(accepted=request.accepted))
        if request.num_handles > 1 and not request.is_over:
            messages.append(pb.GenerateResponse(resume_handle=request.resume_handle))
        self._handles_sent = request.num_handles
        return [message.SerializeToString() for message in messages]


def _nobody_listens() -> None:
    return None
