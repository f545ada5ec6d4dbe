"""The sending end over gRPC: pushes one sequence's cache into one lease while it is computed.

    engine thread          runner thread                    request thread (gRPC's own)
    -------------          -------------                    ---------------------------
    advance(n) ──────────▶ opens the stream when there is   takes the next frame within the window,
      (a number, no wait)  a frame, reads acknowledgements, reads the cache, encodes, yields
                           reconnects for a while

Whoever of the two waits for work also renews the lease when nothing was sent for a third of its TTL.
Every wait ends at the request's deadline; frames in flight that nobody acknowledges for a whole TTL
end it earlier. What is queued is ranges, not bytes, so memory is bounded by the frame in hand and what
gRPC holds of the window.
"""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc

from kvtransfer.contact import Contact
from kvtransfer.frames import DamagedFrame, FrameHeader, decode_ack, encode_frame
from kvtransfer.layouts import DEFAULT_PIECE_BYTES, window_pieces_for
from kvtransfer.lease_types import LeaseState
from kvtransfer.ledger import FrameLedger, FrameRefused
from kvtransfer.progress import PushProgress
from kvtransfer.transports.grpc_channel import BULK_SERVICE
from kvtransfer.transports.grpc_control import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    TRANSIENT_CODES,
    LeaseControl,
    as_transfer_error,
)
from kvtransfer.transports.seam import (
    CommitOutcome,
    PushStats,
    TransferCause,
    TransferError,
    lease_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from headrace.v1.kvtransfer_pb2 import CommitResponse, Handoff
    from kvtransfer.cache_store import CacheStore
    from kvtransfer.codecs import Codec
    from kvtransfer.frames import LeaseRef
    from kvtransfer.layouts import CacheLayout

_T = TypeVar("_T")
_STREAM_OVER = -1
_JOIN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    frame_bytes: int = DEFAULT_PIECE_BYTES  # larger gained nothing where it was measured, smaller costs CPU
    window_bytes: int = 16 << 20  # raw bytes sent and not yet acknowledged
    max_resends: int = 8  # of one frame
    reconnect_s: float = 1.0  # how long a broken stream is tried again
    abort_s: float = 1.0  # how long telling the receiver of an abort may take


class PushSession:
    """One `Pusher` over gRPC. Starts its runner thread at once, with the CPU affinity of its maker.

    `lease`, `ttl_s`: as the receiver granted them. `owner`: the lease id under which `cache` holds the
    sequence here. `start_token`: the first position that the receiver does not hold; a multiple of the
    key block. `remaining_s`: of the request's deadline. `metadata`: sent with every call.
    """

    def __init__(
        self,
        *,
        channel: grpc.Channel,
        lease: LeaseRef,
        ttl_s: float,
        remaining_s: float,
        cache: CacheStore,
        layout: CacheLayout,
        codec: Codec,
        owner: bytes,
        start_token: int = 0,
        metadata: Sequence[tuple[str, str]] = (),
        options: PushOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease = lease
        self._ttl_s = ttl_s
        self._cache = cache
        self._layout = layout
        self._codec = codec
        self._owner = owner
        self._start_token = start_token
        self._metadata = tuple(metadata)
        self._options = options or PushOptions()
        self._clock = clock
        self._deadline = clock() + remaining_s
        self._push: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            f"/{BULK_SERVICE}/Push"
        )
        self._stopped = threading.Event()
        self._control = LeaseControl(channel, lease, metadata, clock, self._stopped)

        self._cond = threading.Condition()
        self._ledger = FrameLedger(layout, self._options.window_bytes, self._options.max_resends, clock)
        self._progress = PushProgress(layout, start_token, self._options.frame_bytes)
        self._sealed = False  # commit was called: nothing more will be ready
        self._error: TransferError | None = None
        self._is_committed = False
        self._num_reading = 0
        self._stream = 0
        self._call: grpc.Call | None = None
        self._contact = Contact(ttl_s, clock)
        self._broken_since: float | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._runner = threading.Thread(target=self._run, name="kv-push", daemon=True)
        self._runner.start()

    # ---- the prefill service's side

    @property
    def error(self) -> TransferError | None:
        return self._error

    def advance(self, num_tokens: int, num_layers: int | None = None) -> None:
        with self._cond:
            if not self._sealed and self._progress.advance(num_tokens, num_layers):
                self._cond.notify_all()

    def commit(self, handoff: Handoff, remaining_s: float) -> CommitOutcome:
        """Raises TransferError, and ValueError when `advance` went beyond the handoff's tokens."""
        deadline = self._clock() + remaining_s
        self._seal(handoff.num_tokens)
        try:
            while True:
                self._await_settled(deadline)
                response = self._control.commit(self._ledger.manifest(), handoff, deadline, self._ttl_s)
                state = lease_state(response.state)
                if state is None or not state.is_open:
                    break
                self._send_missing(response.missing_frames)
        except TransferError as error:
            self._stop(error)
            raise
        return self._conclude(state, response)

    def abort(self, cause: str) -> LeaseState | None:
        if self._is_committed:
            return LeaseState.COMMITTED
        self._stop(TransferError(TransferCause.CANCELLED, cause))
        with self._cond:
            self._cond.wait_for(lambda: self._num_reading == 0, _JOIN_S)
        state = self._control.abort(cause, self._options.abort_s)
        if state is None:  # told, the receiver would have answered a commit that is under way
            self._control.cancel_commit()
        self._runner.join(_JOIN_S)
        return state

    def stats(self) -> PushStats:
        with self._cond:
            totals = self._ledger.totals()
            num_tokens = self._progress.num_cut - self._start_token
        return PushStats(num_tokens=num_tokens, **asdict(totals))

    def _seal(self, num_tokens: int) -> None:
        with self._cond:
            if num_tokens < self._progress.num_ready:
                num_ready = self._progress.num_ready
                raise ValueError(f"{num_ready} positions were advanced, the handoff has {num_tokens}")
            if not self._sealed:
                self._progress.advance(num_tokens)
                self._refill()
                self._ledger.add(window_pieces_for(self._layout, num_tokens, self._options.frame_bytes))
                self._sealed = True
            self._cond.notify_all()

    def _await_settled(self, deadline: float) -> None:
        with self._cond:
            while not self._ledger.is_settled:
                self._raise_if_over()
                now = self._clock()
                if now >= deadline:
                    text = "frames were not acknowledged in time"
                    raise TransferError(TransferCause.DEADLINE_EXCEEDED, text)
                # The request thread does not see a stall while gRPC holds it back: the peer reads nothing.
                self._cond.wait(min(deadline, self._stalls_at()) - now)
            self._raise_if_over()

    def _send_missing(self, numbers: Sequence[int]) -> None:
        with self._cond:
            try:
                self._ledger.send_missing(numbers)
            except FrameRefused as error:
                raise TransferError(error.cause, error.message) from error
            self._cond.notify_all()

    def _conclude(self, state: LeaseState | None, response: CommitResponse) -> CommitOutcome:
        cause, _, message = response.reason.partition(": ")
        outcome = CommitOutcome(state, cause, message)
        self._is_committed = outcome.is_committed
        self._stop(TransferError(cause or TransferCause.LEASE_LOST, message))
        if outcome.is_committed:  # also where an abort came too late
            self._error = None
        self._runner.join(_JOIN_S)
        return outcome

    # ---- the runner thread

    def _run(self) -> None:
        try:
            while self._await(lambda: self._ledger.has_work or None):
                self._run_stream()
        except TransferError as error:
            self._stop(error)
        except Exception as error:  # noqa: BLE001 - a thread that dies silently would leave commit waiting
            self._stop(TransferError(TransferCause.INTERNAL, f"{type(error).__name__}: {error}"))

    def _run_stream(self) -> None:
        """One stream, from its first frame until all is acknowledged or it breaks."""
        with self._cond:
            stream = self._stream
        timeout_s = max(0.0, self._deadline - self._clock())
        call = self._push(self._messages(stream), timeout=timeout_s, metadata=self._metadata)
        with self._cond:
            self._call = call
        if self._stopped.is_set():
            call.cancel()
        broken: grpc.RpcError | None = None
        try:
            for message in call:
                self._take_ack(message)
        except grpc.RpcError as error:
            broken = error
        finally:
            call.cancel()
            with self._cond:
                self._stream += 1
                lost = self._ledger.num_in_flight
                self._ledger.lose_in_flight()
                self._cond.notify_all()
        if (broken is not None or lost) and not self._stopped.is_set():
            self._back_off(broken)

    def _take_ack(self, message: bytes) -> None:
        try:
            ack = decode_ack(message)
            with self._cond:
                self._contact.touch()
                self._broken_since = None
                self._backoff_s = FIRST_BACKOFF_S
                self._ledger.acknowledge(ack)
                self._cond.notify_all()
        except DamagedFrame as error:
            raise TransferError(TransferCause.PROTOCOL_ERROR, str(error)) from error
        except FrameRefused as error:
            raise TransferError(error.cause, error.message) from error

    def _back_off(self, broken: grpc.RpcError | None) -> None:
        """Waits before the next stream, or raises when another would be of no use."""
        if broken is not None and broken.code() not in TRANSIENT_CODES:
            raise as_transfer_error(broken)
        now = self._clock()
        if self._broken_since is None:
            self._broken_since = now
        if now - self._broken_since >= self._options.reconnect_s:
            text = "the stream ends early" if broken is None else as_transfer_error(broken).message
            raise TransferError(TransferCause.PEER_UNAVAILABLE, text)
        self._stopped.wait(self._backoff_s)
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    # ---- the request thread

    def _messages(self, stream: int) -> Iterator[bytes]:
        try:
            while True:
                number = self._await(lambda: self._take_frame(stream))
                if number is None or number == _STREAM_OVER:
                    return
                yield self._build(number)
        except TransferError as error:
            self._stop(error)

    def _take_frame(self, stream: int) -> int | None:
        if stream != self._stream:
            return _STREAM_OVER
        number = self._ledger.take()
        if number is not None:
            self._num_reading += 1
            self._contact.touch()
        elif self._sealed and self._ledger.is_settled:
            return _STREAM_OVER
        return number

    def _build(self, number: int) -> bytes:
        piece = self._ledger.piece(number)
        plane = self._layout.plane(piece.plane)
        codec = self._codec
        header = FrameHeader(
            self._lease,
            number,
            piece,
            codec.name,
            codec.version,
            self._ledger.raw_bytes(number),
            plane.dtypes,
        )
        try:
            payload = codec.encode(self._cache.gather(self._owner, piece, plane), plane, piece)
            message, checksum = encode_frame(header, payload)
        except Exception as error:
            # Stores and codecs may fail in any way; gRPC would only log it and cancel the stream.
            text = f"{type(error).__name__}: {error}"
            raise TransferError(TransferCause.CACHE_READ_FAILED, text) from error
        finally:
            with self._cond:
                self._num_reading -= 1
                self._cond.notify_all()
        with self._cond:
            self._ledger.note_sent(number, checksum, len(message))
        return message

    # ---- shared by both threads

    def _await(self, poll: Callable[[], _T | None]) -> _T | None:
        """What `poll` gives, called under the lock, once it gives something; None when all is over."""
        while True:
            with self._cond:
                if self._stopped.is_set():
                    return None
                self._refill()
                result = poll()
                if result is not None:
                    return result
                wait_s = self._next_event_at() - self._clock()
                if wait_s > 0:
                    self._cond.wait(wait_s)
                    continue
            self._renew()

    def _next_event_at(self) -> float:
        """When the waiting thread must act by itself. Raises TransferError when it is too late already."""
        now = self._clock()
        if now >= self._deadline:
            text = "the request's deadline passed during the transfer"
            raise TransferError(TransferCause.DEADLINE_EXCEEDED, text)
        if not self._ledger.num_in_flight:
            return min(self._deadline, self._contact.renew_at)
        return min(self._deadline, self._stalls_at())

    def _stalls_at(self) -> float:
        """When frames in flight count as lost. Raises TransferError when they do already."""
        if self._contact.is_lost:
            text = f"no frame was acknowledged for {self._ttl_s:g} s"
            raise TransferError(TransferCause.RECEIVER_STALLED, text)
        return self._contact.lost_at

    def _refill(self) -> None:
        self._ledger.add(self._progress.take())

    def _renew(self) -> None:
        try:
            state = self._control.renew(self._contact.renewal_timeout_s)
        except grpc.RpcError as error:
            if self._contact.is_lost:
                text = f"the lease could not be renewed: {as_transfer_error(error)}"
                raise TransferError(TransferCause.PEER_UNAVAILABLE, text) from error
            self._contact.retry_renewal()
            return
        if state is None or not state.is_open:
            raise TransferError(TransferCause.LEASE_LOST, f"the receiver says that the lease is {state}")
        with self._cond:
            self._contact.touch()

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self, error: TransferError) -> None:
        with self._cond:
            if not self._stopped.is_set():
                self._error = error
            self._stopped.set()
            call = self._call
            self._cond.notify_all()
        if call is not None:
            call.cancel()
