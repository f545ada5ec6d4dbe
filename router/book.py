"""Every request the router knows: those that run, and those that ended a while ago.

The book gives requests their deadline, their listeners and their end, whichever way it comes; what a request
holds elsewhere (a place in the queue, charges, workers' leases) is given back through `on_ending`.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from router.config import RouterConfig
from router.core.failures import Code, Failure, Stage
from router.core.lifecycle import RequestState
from router.requests import Attachment, CallLater, Request, RequestKey
from router.summary import done_message

logger = logging.getLogger(__name__)

ENDED_REQUEST_BYTES = 1024  # what keeping an ended request costs beside its answer


@dataclass(slots=True)
class Counters:
    """How requests ended since the router started."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0


class RequestBook:
    """Requests by tenant and id. Lives on the router's event loop."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float], call_later: CallLater) -> None:
        self.counters = Counters()
        self.on_ending: Callable[[Request, RequestState], None] = lambda _request, _state: None
        self._config = config
        self._clock = clock
        self._call_later = call_later
        self._requests: dict[RequestKey, Request] = {}
        self._live: dict[RequestKey, Request] = {}
        self._attachments: set[Attachment] = set()
        self._ended: OrderedDict[Request, tuple[float, int]] = OrderedDict()
        self._ended_bytes = 0

    def get(self, key: RequestKey) -> Request | None:
        """The request of that name, running or ended lately."""
        return self._requests.get(key)

    def running(self, tenant: str, request_id: str) -> Request | None:
        """The request of that name that has not ended."""
        name: tuple[str, str] = (tenant, request_id)  # equal to the key, and made faster
        return self._live.get(name)  # type: ignore[call-overload,no-any-return]

    @property
    def live(self) -> list[Request]:
        """Those that have not ended."""
        return list(self._live.values())

    def begin(self, request: Request) -> None:
        """Enters a request, in place of an ended one of the same name, and starts its deadline."""
        older = self._requests.get(request.key)
        if older is not None:
            self._forget(older)
        self._requests[request.key] = self._live[request.key] = request
        remaining_s = max(0.0, request.deadline_s - self._clock())
        request.deadline_timer = self._call_later(remaining_s, lambda: self.deadline_passed(request))

    def attach(self, request: Request, next_index: int, wants_direct: bool = False) -> Attachment:
        """A new listener, from that token index of every choice on."""
        attachment = Attachment(request, next_index, self._clock, wants_direct)
        request.attachments.append(attachment)
        self._attachments.add(attachment)
        if request.orphan_timer is not None:
            request.orphan_timer.cancel()
            request.orphan_timer = None
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """A client has gone; the last one takes the request with it, at once or after the grace."""
        request = attachment.request
        if self._remove(attachment) and not request.attachments and not request.is_over:
            self._orphaned(request, "CLIENT_DISCONNECTED", "the client has gone")

    def tokens_came(self, request: Request) -> None:
        """Passes news on to the listeners, and drops those that are too far behind."""
        for attachment in tuple(request.attachments):
            attachment.wake()
            if not attachment.is_caught_up and attachment.lag_bytes > self._config.outbox_bytes:
                self._drop_slow(attachment, f"more than {self._config.outbox_bytes} bytes behind")

    def cancel(self, request: Request) -> bool:
        """Ends a request because its owner says so; False if it had ended."""
        if request.is_over:
            return False
        failure = Failure(
            code=Code.CANCELLED,
            stage=request.stage,
            cause="CLIENT_CANCELLED",
            message="the request was cancelled",
        )
        self.end(request, RequestState.CANCELLED, failure)
        return True

    def end(self, request: Request, state: RequestState, failure: Failure | None = None) -> None:
        """Ends a request, once; what comes later changes nothing."""
        if request.is_over:
            return
        request.stop_timers()
        was_accepted = request.accepted is not None
        request.lifecycle.move(state, self._clock())
        request.failure = failure
        self._live.pop(request.key, None)
        self.on_ending(request, state)
        self._count(request, state)
        if state is RequestState.FINISHED:
            request.done = done_message(request, self._clock())
        request.task = request.keys = None
        request.wake()
        if was_accepted:
            self._retain(request)
        else:
            # Refused at the door: the same id may come again with another body.
            self._forget(request)

    def deadline_passed(self, request: Request) -> None:
        """Ends a request that ran out of time."""
        failure = Failure(
            code=Code.DEADLINE_EXCEEDED,
            stage=request.stage,
            cause="DEADLINE_EXCEEDED",
            message=f"the deadline passed while the request was {request.lifecycle.state}",
            retryable=True,
        )
        self.end(request, RequestState.FAILED, failure)

    def end_all(self, failure: Failure) -> None:
        """The router is stopping."""
        for request in self.live:
            self.end(request, RequestState.FAILED, failure)

    def sweep(self) -> None:
        """Forgets what ended long ago and drops clients that take nothing."""
        now = self._clock()
        for request, (ended_s, _) in tuple(self._ended.items()):
            if now - ended_s <= self._config.retention_s:
                break
            self._forget(request)
        for attachment in tuple(self._attachments):
            if attachment.is_stalled(now, self._config.stalled_client_s):
                self._drop_slow(attachment, f"took nothing for {self._config.stalled_client_s} s")

    def _drop_slow(self, attachment: Attachment, how: str) -> None:
        request = attachment.request
        logger.info("request %s: dropped a slow client, %s", request.key.request_id, how)
        self._remove(attachment)
        attachment.drop(
            Failure(
                code=Code.RESOURCE_EXHAUSTED,
                stage=Stage.DECODE,
                cause="CLIENT_TOO_SLOW",
                message=f"the client was too slow: {how}",
                retryable=True,
            )
        )
        if not request.attachments and not request.is_over:
            self._orphaned(request, "CLIENT_TOO_SLOW", "its only client was too slow")

    def _remove(self, attachment: Attachment) -> bool:
        if attachment not in self._attachments:
            return False
        self._attachments.remove(attachment)
        attachment.request.attachments.remove(attachment)
        return True

    def _orphaned(self, request: Request, cause: str, why: str) -> None:
        failure = Failure(code=Code.CANCELLED, stage=request.stage, cause=cause, message=why, retryable=True)
        if request.resumable:
            request.orphan_timer = self._call_later(
                self._config.resume_grace_s, lambda: self.end(request, RequestState.CANCELLED, failure)
            )
        else:
            self.end(request, RequestState.CANCELLED, failure)

    def _count(self, request: Request, state: RequestState) -> None:
        match state:
            case RequestState.FINISHED:
                self.counters.finished += 1
            case RequestState.CANCELLED:
                self.counters.cancelled += 1
            case _:
                self.counters.failed += 1
        failure, request_id = request.failure, request.key.request_id
        if failure is None:
            logger.debug("request %s %s", request_id, state)
        else:
            logger.info("request %s %s in %s: %s", request_id, state, failure.stage, failure.cause)

    def _retain(self, request: Request) -> None:
        num_bytes = ENDED_REQUEST_BYTES + request.answer.num_bytes
        self._ended[request] = (self._clock(), num_bytes)
        self._ended_bytes += num_bytes
        while self._ended_bytes > self._config.retention_bytes:
            self._forget(next(iter(self._ended)))

    def _forget(self, request: Request) -> None:
        if self._requests.get(request.key) is request:
            del self._requests[request.key]
        _, num_bytes = self._ended.pop(request, (0.0, 0))
        self._ended_bytes -= num_bytes
