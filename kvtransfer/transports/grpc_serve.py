"""The answering end of a fetch over gRPC: sends the blocks of a source into leases of whoever asks for them.

    handler thread (gRPC's)                        listener thread
    -----------------------                        ---------------
    reads the next piece, waits for room, yields   reads acknowledgements: room, frames
    its frame; at the end the closing word         to send again, how fast the link is

What is held for one fetch, whatever its length: one piece as its source read it, one frame made of it, and the frame
that gRPC is sending; while a frame is sent again, its piece and frame too. What else is in flight lies in the
sockets. The source's blocks stay pinned until the stream is over, however it ends: served, refused, cancelled or
abandoned by the asker, past the call's deadline, or because nothing was acknowledged for `stall_s`.

Knows no torch: a tier answers with payloads as it stored them.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import grpc

from kvtransfer.built_frames import build_frame
from kvtransfer.fetch_messages import (
    MAX_FETCH_FRAMES,
    BadFetchMessage,
    NotServed,
    Served,
    decode_request,
    encode_closing,
)
from kvtransfer.fetching import MAX_FETCH_S, FetchCause, ServingBook
from kvtransfer.frames import DamagedFrame, decode_ack, decode_opening
from kvtransfer.lease_types import Refusal
from kvtransfer.ledger import FrameRefused
from kvtransfer.sources import SourceRefused
from kvtransfer.transports.grpc_channel import BULK_SERVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtransfer.sources import BlockSource, FetchRequest, OpenBlocks

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# A deadline travels as time remaining and is read a little later; this much may be lost or won.
_DEADLINE_SLACK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    max_fetches: int = 8  # at once; one more is refused with RESOURCE_EXHAUSTED
    window_bytes: int = 16 << 20  # of messages in flight for one fetch; the asker's credit may be less
    max_resends: int = 8  # of one frame
    stall_s: float = 10.0  # how long an asker may acknowledge nothing while frames are in flight


class FetchServer:
    """Method Fetch of the bulk service. `epoch()`: this worker's or store's incarnation, as askers must name it."""

    def __init__(
        self,
        source: BlockSource,
        epoch: Callable[[], int],
        options: ServeOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._epoch = epoch
        self._options = options or ServeOptions()
        self._clock = clock
        self._cond = threading.Condition()
        self._open: dict[_Serving, grpc.ServicerContext] = {}
        self._num_open = 0
        self._is_closed = False

    def handler(self) -> grpc.GenericRpcHandler:
        """For `server.add_generic_rpc_handlers`, beside Push's: raw bytes in and out, no protobuf."""
        return grpc.method_handlers_generic_handler(
            BULK_SERVICE, {"Fetch": grpc.stream_stream_rpc_method_handler(self._fetch)}
        )

    @property
    def num_open(self) -> int:
        """Fetches that are being answered."""
        with self._cond:
            return self._num_open

    def close(self, timeout_s: float) -> bool:
        """Ends every fetch and lets none in any more. Whether all blocks are given back within `timeout_s`."""
        with self._cond:
            self._is_closed = True
            running = list(self._open.items())
        for serving, context in running:
            serving.end()
            context.cancel()
        with self._cond:
            return self._cond.wait_for(lambda: not self._num_open, timeout_s)

    # ---- one call

    def _fetch(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if context.time_remaining() > MAX_FETCH_S + _DEADLINE_SLACK_S:
            text = f"a fetch needs a deadline of at most {MAX_FETCH_S:g} s"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        try:
            request = decode_request(next(messages))
            credit = decode_opening(next(messages)).credit
        except (grpc.RpcError, StopIteration):  # the asker is gone already
            return
        except (BadFetchMessage, DamagedFrame) as error:
            yield _refusal("BAD_REQUEST", str(error))
            return
        self._enter(context)
        try:
            yield from self._answer(request, credit, messages, context)
        finally:
            with self._cond:
                self._num_open -= 1
                self._cond.notify_all()

    def _enter(self, context: grpc.ServicerContext) -> None:
        with self._cond:
            has_room = not self._is_closed and self._num_open < self._options.max_fetches
            self._num_open += has_room
        if self._is_closed:
            context.abort(grpc.StatusCode.UNAVAILABLE, "this worker serves no more fetches: it stops")
        if not has_room:
            text = f"{self._options.max_fetches} fetches are being answered already"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)

    def _answer(
        self, request: FetchRequest, credit: int, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        if request.lease.sender_epoch != self._epoch():
            yield _refusal(Refusal.STALE_EPOCH, "this worker has started anew since the fetch was planned")
            return
        try:
            blocks = self._source.open(request)
        except SourceRefused as error:
            yield _refusal(error.cause, error.message)
            return
        except Exception as error:  # noqa: BLE001 - sources may fail in any way: one fetch pays for it
            _log.exception("opening blocks for a fetch failed")
            yield _refusal("READ_FAILED", f"{type(error).__name__}: {error}")
            return
        serving = _Serving(request, credit, blocks, self._options, self._clock)
        with self._cond:
            self._open[serving] = context
            is_closed = self._is_closed
        if is_closed or not context.add_callback(serving.end):
            serving.end()
        listener = threading.Thread(target=serving.listen, args=(messages,), name="kv-serve", daemon=True)
        listener.start()
        try:
            yield from serving.messages()
        finally:
            serving.end()
            with self._cond:
                del self._open[serving]


class _Over(Exception):
    """The stream has ended: nothing more is read or sent."""


class _Serving:
    """One fetch that is being answered."""

    def __init__(
        self,
        request: FetchRequest,
        credit: int,
        blocks: OpenBlocks,
        options: ServeOptions,
        clock: Callable[[], float],
    ) -> None:
        self._lease = request.lease
        self._blocks = blocks
        self._stall_s = options.stall_s
        self._clock = clock
        self._cond = threading.Condition()
        self._book = ServingBook(options.window_bytes, credit, options.max_resends, clock)
        self._failed: FrameRefused | None = None
        self._num_using = 0  # threads that are in a call of the source
        self._is_over = False
        self._is_given_back = False

    def end(self) -> None:
        """The stream is over; any thread may say so. The blocks are closed as soon as nobody reads them."""
        with self._cond:
            self._is_over = True
            self._cond.notify_all()
        self._give_back_if_unused()

    # ---- the handler thread

    def messages(self) -> Iterator[bytes]:
        """All frames, then the closing word; or fewer, then why."""
        try:
            yield from self._frames()
            served = Served(self._blocks.num_blocks, self._book.manifest())
            yield encode_closing(served)
        except _Over:
            return
        except SourceRefused as error:
            yield _refusal(error.cause, error.message)
        except FrameRefused as error:
            yield _refusal(error.cause, error.message)

    def _frames(self) -> Iterator[bytes]:
        pieces, number = self._blocks.pieces(), 0
        while (piece := self._read(partial(next, pieces, None))) is not None:
            if number == MAX_FETCH_FRAMES:
                raise FrameRefused("TOO_MANY_FRAMES", f"the blocks make more than {MAX_FETCH_FRAMES} frames")
            frame = build_frame(self._lease, number, piece)
            del piece
            yield from self._resend_until_room(frame.wire_bytes)
            with self._cond:
                self._book.note_sent(frame.record, frame.wire_bytes)
            yield frame.message
            del frame  # or it is held while the next one is made
            number += 1
        yield from self._resend_until_room(None)

    def _resend_until_room(self, num_bytes: int | None) -> Iterator[bytes]:
        """Waits until a message of so many bytes may go, or all has landed where it is None; sends again, in the
        meantime, what must go again."""
        while (number := self._await(num_bytes)) is not None:
            again = self._read(partial(self._blocks.piece, number))
            yield build_frame(self._lease, number, again).message

    def _await(self, num_bytes: int | None) -> int | None:
        """The frame to send again, or None when there is none and nothing to wait for. Raises _Over and
        FrameRefused."""
        with self._cond:
            while True:
                if self._is_over:
                    raise _Over
                if self._failed is not None:
                    raise self._failed
                number = self._book.next_resend()
                if number is not None or self._book.may_go_on(num_bytes):
                    return number
                wait_s = self._book.silent_since + self._stall_s - self._clock()
                if wait_s <= 0:
                    text = f"nothing was acknowledged for {self._stall_s:g} s"
                    raise FrameRefused("ASKER_STALLED", text)
                self._cond.wait(wait_s)

    def _read(self, read: Callable[[], _T]) -> _T:
        """What the source gives, which is not closed meanwhile. Raises _Over and SourceRefused."""
        with self._cond:
            if self._is_over:
                raise _Over
            self._num_using += 1
        try:
            return read()
        except SourceRefused:
            raise
        except Exception as error:  # sources and codecs may fail in any way: one fetch pays for it
            _log.exception("reading blocks for a fetch failed")
            raise SourceRefused("READ_FAILED", f"{type(error).__name__}: {error}") from error
        finally:
            with self._cond:
                self._num_using -= 1
            self._give_back_if_unused()

    # ---- the listener thread

    def listen(self, messages: Iterator[bytes]) -> None:
        """Takes acknowledgements until the stream ends. One that half-closes it will not acknowledge the rest."""
        try:
            for message in messages:
                self._take_ack(message)
        except grpc.RpcError:
            self.end()
        except _Over:
            return
        except DamagedFrame as error:
            self._fail(FrameRefused(FetchCause.PROTOCOL_ERROR, str(error)))
        except (FrameRefused, SourceRefused) as error:
            self._fail(FrameRefused(error.cause, error.message))
        else:
            self._fail(FrameRefused(FetchCause.PROTOCOL_ERROR, "the asker sends no more acknowledgements"))

    def _take_ack(self, message: bytes) -> None:
        ack = decode_ack(message)
        with self._cond:
            landed = self._book.acknowledge(ack)
            self._cond.notify_all()
        if landed is not None:
            self._read(lambda: self._blocks.note_landed(landed.number, landed.in_flight_s, landed.landing_s))

    def _fail(self, error: FrameRefused) -> None:
        with self._cond:
            self._failed = self._failed or error
            self._cond.notify_all()

    # ---- both

    def _give_back_if_unused(self) -> None:
        with self._cond:
            if not self._is_over or self._num_using or self._is_given_back:
                return
            self._is_given_back = True
        try:
            self._blocks.close()
        except Exception:  # noqa: BLE001 - nobody is left to tell
            _log.exception("closing the blocks of a fetch failed")


def _refusal(cause: str, message: str) -> bytes:
    return encode_closing(NotServed(cause, message))
