"""The sending end over gRPC: pushes one sequence's cache into one lease while it is computed.

    engine thread          runner thread                    builder thread              request thread (gRPC's)
    -------------          -------------                    --------------              -----------------------
    advance(n) ──────────▶ opens the stream when there is   takes the next frame        takes what is built and
      (a number, no wait)  a frame, reads the opening and   within the window, reads    waits until gRPC has it
                           acknowledgements, reconnects     the cache, encodes into     on the way
                                                            a message or landing slot

Whoever of runner and builder waits for work also renews the lease when nothing was sent for a third of its TTL.
Every wait ends at the request's deadline; frames in flight that nobody acknowledges for a whole TTL end it earlier.

Memory, whatever the sequence's length: what is queued is ranges, not bytes. Messages that are built and not yet
acknowledged are at most `window_bytes`, or what the receiver's credit allows where that is less, or one frame; gRPC
may hold all of them, and one a second time while it is handed over. The builder has the frame in its hand before and
after the codec. So: window + 3 frames.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal, TypeVar

import grpc

from kvtransfer.contact import Contact
from kvtransfer.frame_builder import PieceEncoder
from kvtransfer.frames import DamagedFrame, decode_ack, decode_opening
from kvtransfer.lease_types import LeaseState
from kvtransfer.ledger import FrameRefused
from kvtransfer.read_ahead import ReadAhead
from kvtransfer.transports.grpc_channel import BULK_SERVICE, LAST_WORD
from kvtransfer.transports.grpc_control import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    TRANSIENT_CODES,
    LeaseControl,
    as_transfer_error,
)
from kvtransfer.transports.push_books import PushBooks, PushOptions
from kvtransfer.transports.push_frames import FrameTask, make_frame
from kvtransfer.transports.seam import CommitOutcome, TransferCause, TransferError, lease_state
from kvtransfer.transports.slot_writing import open_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from headrace.v1.kvtransfer_pb2 import CommitResponse, Handoff
    from kvtransfer.built_frames import BuiltFrame
    from kvtransfer.cache_store import CacheStore
    from kvtransfer.choice import CodecChooser
    from kvtransfer.frames import LeaseRef
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.transports.seam import PushStats
    from kvtransfer.transports.slot_writing import OpenWriter, StreamSlots

_T = TypeVar("_T")
_JOIN_S = 2.0
_BUILT_AHEAD = 2
_FLUSHES_PER_TTL = 3


class PushSession:
    """One `Pusher` over gRPC. Starts its runner thread at once, with the CPU affinity of its maker.

    `lease`, `ttl_s`: as the receiver granted them. `owner`: the lease id under which `cache` holds the
    sequence here, in the dtypes of `layout`. `wire`: the same layout in the dtypes to travel in; the cache's own
    unless given. `start_token`: the first position that the receiver does not hold; a multiple of the
    key block. `remaining_s`: of the request's deadline. `metadata`: sent with every call. `open_writer(offer)`:
    takes up the receiver's offer of landing slots; raises CarrierFailed.
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
        chooser: CodecChooser,
        owner: bytes,
        wire: CacheLayout | None = None,
        start_token: int = 0,
        metadata: Sequence[tuple[str, str]] = (),
        open_writer: OpenWriter | None = None,
        options: PushOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease = lease
        self._ttl_s = ttl_s
        self._encoder = PieceEncoder(cache, owner, layout, wire or layout)
        self._open_writer = open_writer
        self._metadata = tuple(metadata)
        self._options = options or PushOptions()
        self._clock = clock
        self._deadline = clock() + remaining_s
        self._push: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            f"/{BULK_SERVICE}/Push"
        )
        self._stopped = threading.Event()
        self._control = LeaseControl(channel, lease, metadata, clock, self._stopped)

        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)  # for the runner and the builder
        self._quiet = threading.Condition(self._lock)  # for commit and abort: settled, or nothing reads
        self._books = PushBooks(
            wire or layout,
            start_token,
            chooser,
            self._options,
            clock,
            waits_for_offers=open_writer is not None,
        )
        self._error: TransferError | None = None
        self._is_committed = False
        self._num_reading = 0
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
        with self._lock:
            if self._books.advance(num_tokens, num_layers):
                self._work.notify_all()

    def declare_fidelity(self, rank: int) -> None:
        with self._lock:
            self._books.declare_fidelity(rank)

    def commit(self, handoff: Handoff, remaining_s: float) -> CommitOutcome:
        """Raises TransferError, and ValueError when `advance` went beyond the handoff's tokens."""
        deadline = self._clock() + remaining_s
        with self._lock:
            self._books.seal(handoff.num_tokens)
            self._work.notify_all()
        try:
            while True:
                self._await_settled(deadline)
                response = self._control.commit(self._books.ledger.manifest(), handoff, deadline, self._ttl_s)
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
        with self._lock:
            self._quiet.wait_for(lambda: self._num_reading == 0, _JOIN_S)
        state = self._control.abort(cause, self._options.abort_s)
        if state is None:  # told, the receiver would have answered a commit that is under way
            self._control.cancel_commit()
        self._runner.join(_JOIN_S)
        return state

    def stats(self) -> PushStats:
        with self._lock:
            return self._books.stats()

    def _await_settled(self, deadline: float) -> None:
        with self._lock:
            while self._error is None and not self._books.ledger.is_settled:
                now = self._clock()
                if now >= deadline:
                    text = "frames were not acknowledged in time"
                    raise TransferError(TransferCause.DEADLINE_EXCEEDED, text)
                # The builder does not see a stall while gRPC holds it back: the peer reads nothing.
                self._quiet.wait(min(deadline, self._stalls_at()) - now)
            if self._error is not None:
                raise self._error

    def _send_missing(self, numbers: Sequence[int]) -> None:
        with self._lock:
            try:
                self._books.ledger.send_missing(numbers)
            except FrameRefused as error:
                raise TransferError(error.cause, error.message) from error
            self._work.notify_all()

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
            while self._await(lambda: self._books.ledger.has_work or None):
                self._run_stream()
        except TransferError as error:
            self._stop(error)
        except Exception as error:  # noqa: BLE001 - a thread that dies silently would leave commit waiting
            self._stop(TransferError(TransferCause.INTERNAL, f"{type(error).__name__}: {error}"))

    def _run_stream(self) -> None:
        """One stream, from its first frame until all is acknowledged or it breaks."""
        stream = self._books.stream
        built = ReadAhead(self._frames(stream), _BUILT_AHEAD, "kv-build")
        timeout_s = max(0.0, self._deadline - self._clock())
        call = self._push(self._requests(stream, built), timeout=timeout_s, metadata=self._metadata)
        with self._lock:
            self._call = call
        if self._stopped.is_set():
            call.cancel()
        broken: grpc.RpcError | None = None
        try:
            for ordinal, message in enumerate(call):
                if ordinal:
                    self._take_ack(message)
                else:
                    self._take_opening(stream, message)
        except grpc.RpcError as error:
            broken = error
        except DamagedFrame as error:
            raise TransferError(TransferCause.PROTOCOL_ERROR, str(error)) from error
        finally:
            call.cancel()
            built.close()
            with self._lock:
                num_lost = self._books.leave_stream()
                self._work.notify_all()
        if (broken is not None or num_lost) and not self._stopped.is_set():
            self._back_off(broken)

    def _take_opening(self, stream: int, message: bytes) -> None:
        opening = decode_opening(message)
        slots: StreamSlots | None = None
        if self._open_writer is not None and opening.offers:
            slots = open_first(self._open_writer, opening.offers)
        with self._lock:
            self._books.open(stream, opening.credit, slots)
            self._work.notify_all()

    def _take_ack(self, message: bytes) -> None:
        ack = decode_ack(message)
        with self._lock:
            self._contact.touch()
            self._broken_since = None
            self._backoff_s = FIRST_BACKOFF_S
            try:
                self._books.acknowledge(ack)
            except FrameRefused as error:
                raise TransferError(error.cause, error.message) from error
            self._work.notify_all()
            if self._books.ledger.is_settled:
                self._quiet.notify_all()

    def _back_off(self, broken: grpc.RpcError | None) -> None:
        """Waits before the next stream, or raises when another would be of no use."""
        if broken is not None and broken.code() not in TRANSIENT_CODES:
            raise as_transfer_error(broken)
        patience_s = self._options.reconnect_s
        if broken is not None and broken.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # It is there, but has no room for one more stream: worth a longer wait, in which nothing else renews.
            patience_s = max(patience_s, self._ttl_s)
            self._renew()
        now = self._clock()
        if self._broken_since is None:
            self._broken_since = now
        if now - self._broken_since >= patience_s:
            text = "the stream ends early" if broken is None else as_transfer_error(broken).message
            raise TransferError(TransferCause.PEER_UNAVAILABLE, text)
        self._stopped.wait(self._backoff_s)
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    # ---- the builder thread, and gRPC's request thread behind it

    def _frames(self, stream: int) -> Iterator[BuiltFrame]:
        try:
            while True:
                task = self._await(lambda: self._take_frame(stream))
                if not isinstance(task, FrameTask):
                    return
                yield self._build(stream, task)
        except TransferError as error:
            self._stop(error)

    def _requests(self, stream: int, built: ReadAhead[BuiltFrame]) -> Iterator[bytes]:
        for frame in built:
            with self._lock:
                self._books.ledger.note_handed(frame.number)
            message = frame.message
            del frame  # gRPC copies the message; this would hold it until the next one is built
            yield message
            del message
        with self._lock:
            is_in_order = stream == self._books.stream and self._books.ends_in_order
        if is_in_order:
            yield LAST_WORD

    def _take_frame(self, stream: int) -> FrameTask | Literal[False] | None:
        """False: no frame will follow on this stream."""
        if stream != self._books.stream or self._books.is_over:
            return False
        task = self._books.take()
        if task is not None:
            self._num_reading += 1
            self._contact.touch()
        return task

    def _build(self, stream: int, task: FrameTask) -> BuiltFrame:
        began_at = self._clock()
        try:
            flush_by = began_at + self._ttl_s / _FLUSHES_PER_TTL
            frame, failed = make_frame(self._encoder, self._lease, task, flush_by)
        except Exception as error:
            # Stores and codecs may fail in any way; gRPC would only log it and cancel the stream.
            text = f"{type(error).__name__}: {error}"
            raise TransferError(TransferCause.CACHE_READ_FAILED, text) from error
        finally:
            with self._lock:
                self._num_reading -= 1
                if task.place is not None:
                    task.place.slots.filled(task.number)
                if self._stopped.is_set():  # an abort may wait; a commit need not wake for every frame
                    self._quiet.notify_all()
        with self._lock:
            if task.place is not None and failed is not None:
                task.place.slots.fail(task.number, failed)
            self._books.note_built(stream, task, frame, self._clock() - began_at)
        return frame

    # ---- shared by both threads

    def _await(self, poll: Callable[[], _T | None]) -> _T | None:
        """What `poll` gives, called under the lock, once it gives something; None when all is over."""
        while True:
            with self._lock:
                if self._stopped.is_set():
                    return None
                self._books.refill()
                result = poll()
                if result is not None:
                    return result
                wait_s = self._next_event_at() - self._clock()
                if wait_s > 0:
                    self._work.wait(wait_s)
                    continue
            self._renew()

    def _next_event_at(self) -> float:
        """When the waiting thread must act by itself. Raises TransferError when it is too late already."""
        now = self._clock()
        if now >= self._deadline:
            text = "the request's deadline passed during the transfer"
            raise TransferError(TransferCause.DEADLINE_EXCEEDED, text)
        if not self._books.ledger.num_in_flight:
            return min(self._deadline, self._contact.renew_at)
        return min(self._deadline, self._stalls_at())

    def _stalls_at(self) -> float:
        """When frames in flight count as lost. Raises TransferError when they do already."""
        if self._contact.is_lost:
            text = f"no frame was acknowledged for {self._ttl_s:g} s"
            raise TransferError(TransferCause.RECEIVER_STALLED, text)
        return self._contact.lost_at

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
        with self._lock:
            self._contact.touch()

    def _stop(self, error: TransferError) -> None:
        with self._lock:
            if not self._stopped.is_set():
                self._error = error
            self._stopped.set()
            call = self._call
            self._work.notify_all()
            self._quiet.notify_all()
        if call is not None:
            call.cancel()
