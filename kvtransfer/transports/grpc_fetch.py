"""The asking end of a fetch over gRPC: cached blocks of another worker, or of a tier, into a lease of this worker.

    the caller's thread               reader thread                        gRPC's own thread
    -------------------               -------------                        -----------------
    run(): starts the reader,         opens the stream, lands each frame   takes acknowledgements from
    waits for its result until the    as a push would be landed, queues    the queue and sends them
    deadline or a stall, commits      its acknowledgement

What is held of a fetch in memory is bounded by the credit that this end tells (landing_stream.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from kvtransfer.fetch_messages import (
    BadFetchMessage,
    NotServed,
    Served,
    decode_closing,
    encode_request,
    is_closing,
)
from kvtransfer.fetching import FetchBook, FetchCause, Fetched, FetchFailed
from kvtransfer.frames import encode_ack, encode_opening
from kvtransfer.landing_stream import LandingStream
from kvtransfer.transports.grpc_channel import BULK_SERVICE
from kvtransfer.transports.grpc_control import FIRST_BACKOFF_S, MAX_BACKOFF_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtransfer.credit import CreditBook
    from kvtransfer.desk import LeaseDesk
    from kvtransfer.fetching import FetchOutcome
    from kvtransfer.landing import FrameLander, FrameSink
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.leases import LeaseTable
    from kvtransfer.sources import FetchRequest

_log = logging.getLogger(__name__)

CONNECT_S = 0.5
"""How long an answerer that cannot be reached is tried again. Computing is always possible instead."""

_JOIN_S = 2.0
_MAX_UNSENT = 4096
_CAUSES = {
    grpc.StatusCode.UNAVAILABLE: FetchCause.PEER_UNAVAILABLE,
    grpc.StatusCode.CANCELLED: FetchCause.PEER_UNAVAILABLE,  # by the other side: it stops
    grpc.StatusCode.RESOURCE_EXHAUSTED: FetchCause.BUSY,
    grpc.StatusCode.DEADLINE_EXCEEDED: FetchCause.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True, slots=True)
class FetchTarget:
    """Where this worker lands what it fetches: the same parts that take pushes. `sink`: the lander's."""

    desk: LeaseDesk
    lander: FrameLander
    sink: FrameSink
    credits: CreditBook
    layout: CacheLayout


class FetchSession:
    """One fetch into one lease, which is over when `run` returns, whatever came of it.

    `request.lease`: granted by this worker's own table for `peer_epoch` = the answerer's, its prefix held up to
    `request.start_token`, memory reserved for all keys asked for. `on_fetched(lease_id, num_blocks, fidelity)`:
    caches the leading blocks of the lease under their keys, with that fidelity rank. Called once, under the
    desk's lock, when all of them are whole; the lease is committed and released in the same hold of the lock.
    It may raise: then nothing is committed. `remaining_s`: of the request's deadline; `stall_s`: how long the
    source may say nothing. `metadata`: sent with the call.

    Raises ValueError for a request that cannot be sent.
    """

    def __init__(
        self,
        *,
        channel: grpc.Channel,
        request: FetchRequest,
        target: FetchTarget,
        on_fetched: Callable[[bytes, int, int], None],
        remaining_s: float,
        stall_s: float,
        metadata: Sequence[tuple[str, str]] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            f"/{BULK_SERVICE}/Fetch"
        )
        self._request = request
        self._request_message = encode_request(request)
        self._target = target
        self._on_fetched = on_fetched
        self._metadata = tuple(metadata)
        self._clock = clock
        self._cond = threading.Condition()
        self._book = FetchBook(request, target.layout, remaining_s=remaining_s, stall_s=stall_s, clock=clock)
        self._connect_until = clock() + CONNECT_S
        self._result: Served | FetchFailed | None = None  # the first one stays
        self._call: grpc.Call | None = None

    def run(self) -> FetchOutcome:
        """Blocks until the fetch is over: at most until its deadline or a stall, and as long as one frame takes
        to land. Never raises for what the other side did. Once."""
        reader = threading.Thread(target=self._read, name="kv-fetch", daemon=True)
        reader.start()
        cause: str = FetchCause.INTERNAL
        try:
            self._await_result()
            self._end_call()
            reader.join(_JOIN_S)
            outcome = self._commit()
            cause = outcome.cause or "FETCHED"
            return outcome
        finally:
            # Memory goes back as soon as no frame is being written into it.
            with self._target.desk.change() as table:
                table.release(self._request.lease.lease_id, cause)

    def cancel(self, message: str = "cancelled by this worker") -> None:
        """Ends the fetch from any thread; without effect on one that is committed."""
        self._finish(FetchFailed(FetchCause.CANCELLED, message))

    # ---- the caller's thread

    def _await_result(self) -> None:
        with self._cond:
            while self._result is None:
                try:
                    self._book.check_time()
                except FetchFailed as error:
                    self._result = error
                    return
                self._cond.wait(self._book.wake_at - self._clock())

    def _commit(self) -> FetchOutcome:
        result = self._result
        try:
            if not isinstance(result, Served):
                raise result or FetchFailed(FetchCause.INTERNAL, "the fetch ended without a result")
            self._target.sink.fence()
            with self._target.desk.change() as table:
                fetched = self._adopt(table, result)
        except FetchFailed as error:
            return self._book.outcome(error)
        except Exception as error:  # noqa: BLE001 - a fault in this worker's own parts must not end its request
            _log.exception("taking over fetched blocks failed")
            failed = FetchFailed(FetchCause.COMMIT_FAILED, f"{type(error).__name__}: {error}")
            return self._book.outcome(failed)
        return self._book.outcome(fetched, sum(record.raw_bytes for record in result.manifest.values()))

    def _adopt(self, table: LeaseTable, served: Served) -> Fetched:
        """Under the lock, so that no cancel comes between the verdict and the commit."""
        fetched = self._book.judge(served, table.check_commit(self._request.lease, served.manifest))
        self._on_fetched(fetched.lease_id, fetched.num_blocks, fetched.fidelity)
        table.commit(fetched.lease_id)
        table.release(fetched.lease_id, "FETCHED")
        return fetched

    # ---- the reader thread

    def _read(self) -> None:
        name = self._target.credits.open()
        if name is None:
            text = f"{self._target.credits.max_streams} streams land here already"
            self._finish(FetchFailed(FetchCause.BUSY, text))
            return
        stream = LandingStream(self._target.lander, self._target.credits, name)
        is_clean = False
        try:
            self._finish(self._receive(stream))
            is_clean = True
        except FetchFailed as error:
            self._finish(error)
        except Exception as error:  # noqa: BLE001 - a thread that dies silently would leave `run` waiting
            _log.exception("a fetch failed")
            self._finish(FetchFailed(FetchCause.INTERNAL, f"{type(error).__name__}: {error}"))
        finally:
            stream.close(clean=is_clean)

    def _receive(self, stream: LandingStream) -> Served:
        """One stream from its request to its closing word; another while none could be opened at all."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            outgoing = _Outgoing((self._request_message, encode_opening(stream.opening())))
            timeout_s = max(0.0, self._book.deadline - self._clock())
            call = self._fetch(outgoing, timeout=timeout_s, metadata=self._metadata)
            try:
                self._attach(call)
                return self._take_all(call, stream, outgoing)
            except grpc.RpcError as error:
                failed = _as_failure(error)
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not self._may_try_again(backoff_s):
                    raise failed from error
            finally:
                outgoing.close()
                call.cancel()
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _take_all(self, call: Iterator[bytes], stream: LandingStream, outgoing: _Outgoing) -> Served:
        for message in call:
            with self._cond:
                self._book.begin_message(len(message))
            try:
                if is_closing(message):
                    return _as_served(message)
                ack = stream.take(message)
                outgoing.put(encode_ack(ack))
                with self._cond:
                    self._book.take(ack)
            finally:
                del message  # or it is held until the next one comes
                with self._cond:
                    self._book.end_message()
                    self._cond.notify_all()
        raise FetchFailed(FetchCause.PROTOCOL_ERROR, "the stream ended before its closing word")

    def _may_try_again(self, backoff_s: float) -> bool:
        """Waits before another stream is opened, if that is of use."""
        with self._cond:
            if self._book.has_heard or self._clock() + backoff_s >= self._connect_until:
                return False
            return not self._cond.wait_for(lambda: self._result is not None, backoff_s)

    # ---- shared

    def _attach(self, call: grpc.Call) -> None:
        with self._cond:
            self._call = call
            is_over = self._result is not None
        if is_over:
            call.cancel()

    def _finish(self, result: Served | FetchFailed) -> None:
        with self._cond:
            if self._result is None:
                self._result = result
            self._cond.notify_all()

    def _end_call(self) -> None:
        with self._cond:
            call = self._call
        if call is not None:
            call.cancel()


class _Outgoing:
    """What goes up the stream: an iterator that gRPC's thread reads, and the reader thread fills and closes."""

    def __init__(self, first: Sequence[bytes]) -> None:
        self._cond = threading.Condition()
        self._queue = deque(first)
        self._is_closed = False

    def put(self, message: bytes) -> None:
        """Raises FetchFailed where the other side sends without reading what it is told."""
        with self._cond:
            if len(self._queue) >= _MAX_UNSENT:
                text = f"{_MAX_UNSENT} acknowledgements wait to be read"
                raise FetchFailed(FetchCause.PROTOCOL_ERROR, text)
            self._queue.append(message)
            self._cond.notify_all()

    def close(self) -> None:
        with self._cond:
            self._is_closed = True
            self._cond.notify_all()

    def __iter__(self) -> _Outgoing:
        return self

    def __next__(self) -> bytes:
        with self._cond:
            # Ends with the stream at the latest, which closes it.
            self._cond.wait_for(lambda: self._is_closed or self._queue)
            if self._is_closed:
                raise StopIteration
            return self._queue.popleft()


def _as_served(message: bytes) -> Served:
    try:
        closing = decode_closing(message)
    except BadFetchMessage as error:
        raise FetchFailed(FetchCause.PROTOCOL_ERROR, f"the closing word: {error}") from error
    if isinstance(closing, NotServed):
        raise FetchFailed(closing.cause, closing.message)
    return closing


def _as_failure(error: grpc.RpcError) -> FetchFailed:
    code = error.code()
    return FetchFailed(_CAUSES.get(code, FetchCause.PEER_REFUSED), f"{code.name}: {error.details()}")
