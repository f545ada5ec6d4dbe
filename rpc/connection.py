"""One HTTP/2 connection that carries gRPC calls: bytes in, events out, no socket and no clock (RFC 9113).

Both roles. What is to be sent gathers in `take`; the observer is told when there is something. Everything that a
peer can make this side hold is bounded: header blocks, messages, streams, and by flow control what was not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from rpc import frames
from rpc.frames import ConnectionFault, ErrorCode
from rpc.head_reader import MAX_HEADER_BYTES, HeadReader
from rpc.heads import BadHead, Header
from rpc.messages import BadMessage
from rpc.outbox import Outbox
from rpc.stream import Stream

STREAM_WINDOW_BYTES: Final = 1 << 20
CONNECTION_WINDOW_BYTES: Final = 16 << 20
MAX_RESETS: Final = 10_000
"""By the peer, until `num_resets` is put back: calls that are begun and given up cost their servicer something each
(CVE-2023-44487)."""

HeadT = TypeVar("HeadT")
HeadT_contra = TypeVar("HeadT_contra", contravariant=True)


class Observer(Protocol[HeadT_contra]):
    """Who is told what comes. Called from within `receive`; may send at once."""

    def output(self) -> None:
        """There is something to take, where there was nothing."""

    def head(self, stream: Stream, head: HeadT_contra | BadHead) -> None:
        """Headers came: a server's new call, a client's response headers or trailers."""

    def messages(self, stream: Stream, messages: list[bytes]) -> None: ...

    def bad_message(self, stream: Stream, error: BadMessage) -> None:
        """What came is no message; nothing more is read of the stream."""

    def remote_done(self, stream: Stream) -> None:
        """The peer sends no more on this stream."""

    def reset(self, stream: Stream, code: int) -> None:
        """The peer ended the stream at once; it is gone."""

    def writable(self, stream: Stream) -> None:
        """What waited on the stream has been sent."""

    def going_away(self, last_stream_id: int, reason: str) -> None:
        """The peer begins nothing new, and has not looked at streams above that one."""

    def pong(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this side takes."""

    max_message_bytes: int
    max_streams: int = 1 << 20


class Connection(Generic[HeadT]):
    """`parse` reads header lists; what it gives for a block that changes nothing in the table is kept."""

    def __init__(
        self,
        is_client: bool,
        observer: Observer[HeadT],
        parse: Callable[[Iterable[Header]], HeadT],
        limits: Limits,
    ) -> None:
        self.streams: dict[int, Stream] = {}
        self.is_going_away = False
        self.num_replies = 0  # to frames that no window holds back
        self.num_resets = 0
        self._is_client = is_client
        self._observer = observer
        self._limits = limits
        self._outbox = Outbox(observer.output, self._forget_if_done, observer.writable)
        self._buffer = b""
        self._awaits_preface = not is_client
        self._awaits_settings = True
        self._heads = HeadReader(parse)
        self._block: bytearray | None = None  # of the headers that are not whole, with their stream and flags
        self._block_of = (0, 0)
        self._last_stream_id = 0
        self._next_stream_id = 1
        self._receive_window = CONNECTION_WINDOW_BYTES
        self._uncredited = 0
        self._take_frame = {
            frames.DATA: self._on_data,
            frames.HEADERS: self._on_headers,
            frames.RST_STREAM: self._on_rst_stream,
            frames.SETTINGS: self._on_settings,
            frames.PUSH_PROMISE: self._on_push_promise,
            frames.PING: self._on_ping,
            frames.GOAWAY: self._on_goaway,
            frames.WINDOW_UPDATE: self._on_window_update,
            frames.CONTINUATION: self._on_continuation,
        }
        self.send_message = self._outbox.message
        """A message on a stream, now or as soon as the peer has room for it."""

    # --- what is sent ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Says what both sides say first."""
        values = {
            frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
            frames.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
        }
        if self._is_client:
            self._outbox.add(frames.PREFACE)
            values[frames.ENABLE_PUSH] = 0
        else:
            values[frames.MAX_CONCURRENT_STREAMS] = self._limits.max_streams
        self._outbox.add(frames.settings(values))
        self._outbox.add(frames.window_update(0, CONNECTION_WINDOW_BYTES - frames.DEFAULT_WINDOW_BYTES))

    def take(self) -> bytes:
        """All that is to be written to the socket."""
        return self._outbox.take()

    @property
    def gathered_bytes(self) -> int:
        """What was not taken."""
        return self._outbox.num_bytes

    def begin(self, block: bytes) -> Stream:
        """A client's new stream, with its headers."""
        stream = self._new_stream(self._next_stream_id)
        self._next_stream_id += 2
        self._outbox.add(frames.headers(stream.id, block, False))
        return stream

    def send_headers(self, stream: Stream, block: bytes, ends: bool = False) -> None:
        """A response's headers or trailers, behind what waits on the stream."""
        self._outbox.headers(stream, block, ends)

    def half_close(self, stream: Stream) -> None:
        """A client has sent all."""
        self._outbox.end(stream)

    def cancel(self, stream: Stream, code: ErrorCode) -> None:
        """Ends a stream at once, and forgets it."""
        if self._forget(stream):
            self._outbox.add(frames.rst_stream(stream.id, code))

    def pause(self, stream: Stream) -> None:
        """Lets the peer send no more on the stream than it may already."""
        stream.is_paused = True

    def resume(self, stream: Stream) -> None:
        """Lets it go on."""
        stream.is_paused = False
        self._credit(stream)

    def ping(self) -> None:
        """Asks whether the peer is there."""
        self._outbox.add(frames.frame(frames.PING, 0, 0, b"headrace"))

    def go_away(self, code: ErrorCode = ErrorCode.NO_ERROR, reason: str = "") -> None:
        """Takes no new streams, and says so."""
        self.is_going_away = True
        self._outbox.add(frames.goaway(self._last_stream_id, code, reason))

    # --- what comes --------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Takes what came from the socket, in any pieces.

        Raises:
            ConnectionFault: the connection is to be closed, once a GOAWAY with the reason has been sent.
        """
        data = self._buffer + data if self._buffer else data
        at, end = 0, len(data)
        if self._awaits_preface:
            given = data[: len(frames.PREFACE)]
            if not frames.PREFACE.startswith(given):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "this is not HTTP/2")
            if len(given) < len(frames.PREFACE):
                self._buffer = data
                return
            self._awaits_preface, at = False, len(frames.PREFACE)
        while end - at >= frames.HEAD_BYTES:
            length = int.from_bytes(data[at : at + 3], "big")
            if length > frames.MAX_FRAME_BYTES:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame has {length} bytes")
            begin = at + frames.HEAD_BYTES
            if end - begin < length:
                break
            stream_id = int.from_bytes(data[at + 5 : begin], "big") & 0x7FFFFFFF
            kind, flags = data[at + 3], data[at + 4]
            at = begin + length
            self._check_order(kind)
            take = self._take_frame.get(kind)
            if take is not None:
                take(flags, stream_id, data[begin:at])
        self._buffer = data[at:]

    def _check_order(self, kind: int) -> None:
        if self._awaits_settings:
            if kind != frames.SETTINGS:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._awaits_settings = False
        if (self._block is not None) != (kind == frames.CONTINUATION):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION frames out of order")

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        self._receive_window -= size
        self._uncredited += size
        if self._receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "more data than the connection's window")
        if self._uncredited >= CONNECTION_WINDOW_BYTES // 2:
            self._outbox.add(frames.window_update(0, self._uncredited))
            self._receive_window += self._uncredited
            self._uncredited = 0
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id)
            return
        if stream.is_remote_done:
            self._reset(stream, ErrorCode.STREAM_CLOSED)
            return
        if stream.is_local_done and not self._is_client:
            # The answer did not depend on what the client had yet to say (RFC 9113, section 8.1).
            if self._forget(stream) and not flags & frames.END_STREAM:
                self._outbox.add(frames.rst_stream(stream_id, ErrorCode.NO_ERROR))
            return
        stream.receive_window -= size
        stream.uncredited += size
        if stream.receive_window < 0:
            self._reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
            return
        self._read(stream, _without_padding(flags, payload))
        if flags & frames.END_STREAM and stream.id in self.streams:
            self._end_remote(stream)
        elif not stream.is_paused and stream.uncredited >= STREAM_WINDOW_BYTES // 2:
            self._credit(stream)

    def _read(self, stream: Stream, payload: bytes) -> None:
        if not payload:
            return
        try:
            messages = stream.reader.feed(payload)
        except BadMessage as error:
            stream.is_remote_done = True
            self._observer.bad_message(stream, error)
            return
        if messages:
            self._observer.messages(stream, messages)

    def _credit(self, stream: Stream) -> None:
        if stream.uncredited and stream.id in self.streams and not stream.is_remote_done:
            self._outbox.add(frames.window_update(stream.id, stream.uncredited))
            stream.receive_window += stream.uncredited
            stream.uncredited = 0

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & frames.PADDED:
            payload = _without_padding(flags, payload)
        if flags & frames.HAS_PRIORITY:
            payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._take_block(stream_id, flags, payload)
        else:
            self._block, self._block_of = bytearray(payload), (stream_id, flags)

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        assert self._block is not None
        first_id, first_flags = self._block_of
        self._block += payload
        if stream_id != first_id or len(self._block) > MAX_HEADER_BYTES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header block is too large or interrupted")
        if flags & frames.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._take_block(stream_id, first_flags, block)

    def _take_block(self, stream_id: int, flags: int, block: bytes) -> None:
        head = self._heads.read(block)  # of whatever stream
        stream = self.streams.get(stream_id)
        ends = bool(flags & frames.END_STREAM)
        if stream is not None:
            if stream.is_remote_done or not (self._is_client or ends):
                self._reset(stream, ErrorCode.STREAM_CLOSED)
                return
            if self._is_client:
                self._observer.head(stream, head)
        elif self._is_client or stream_id <= self._last_stream_id:
            self._check_known(stream_id)
            return
        else:
            stream = self._accept(stream_id)
            if stream is None:
                return
            self._observer.head(stream, head)
        if ends and stream.id in self.streams:
            self._end_remote(stream)

    def _accept(self, stream_id: int) -> Stream | None:
        if stream_id % 2 == 0:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a client's streams have odd numbers")
        if self.is_going_away:
            self._outbox.add(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return None
        self._last_stream_id = stream_id
        if len(self.streams) >= self._limits.max_streams:
            self._outbox.add(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            return None
        return self._new_stream(stream_id)

    def _end_remote(self, stream: Stream) -> None:
        if not stream.reader.is_between_messages:
            self._reset(stream, ErrorCode.PROTOCOL_ERROR)
            return
        stream.is_remote_done = True
        self._observer.remote_done(stream)
        self._forget_if_done(stream)

    def _on_rst_stream(self, _flags: int, stream_id: int, payload: bytes) -> None:
        self.num_resets += 1
        if self.num_resets > MAX_RESETS:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many calls were given up")
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id)
        elif self._forget(stream):
            self._observer.reset(stream, int.from_bytes(payload, "big"))

    def _on_settings(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if flags & frames.ACK:
            return
        try:
            values = frames.parse_settings(payload)
        except ValueError as error:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, str(error)) from None
        for name, value in values:
            if name == frames.INITIAL_WINDOW_SIZE:
                self._outbox.resize(value, self.streams.values())
        # Before anything that was waiting for it: the peer counts by the new sizes from here on.
        self.num_replies += 1
        self._outbox.add(frames.frame(frames.SETTINGS, frames.ACK, 0))
        self._outbox.send_blocked()

    def _on_push_promise(self, _flags: int, _stream_id: int, _payload: bytes) -> None:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "nothing may be pushed")

    def _on_ping(self, flags: int, _stream_id: int, payload: bytes) -> None:
        if len(payload) != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a PING has 8 bytes")
        if flags & frames.ACK:
            self._observer.pong()
        else:
            self.num_replies += 1
            self._outbox.add(frames.frame(frames.PING, frames.ACK, 0, payload))

    def _on_goaway(self, _flags: int, _stream_id: int, payload: bytes) -> None:
        last_stream_id = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
        self._observer.going_away(last_stream_id, payload[8:].decode(errors="replace"))

    def _on_window_update(self, _flags: int, stream_id: int, payload: bytes) -> None:
        grown = int.from_bytes(payload, "big") & 0x7FFFFFFF
        if len(payload) != 4 or not grown:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "a WINDOW_UPDATE of nothing")
        if stream_id == 0:
            self._outbox.grow(grown)
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id)
            return
        if not self._outbox.grow_stream(stream, grown):
            self._reset(stream, ErrorCode.FLOW_CONTROL_ERROR)

    # --- streams -----------------------------------------------------------------------------------------

    def _new_stream(self, stream_id: int) -> Stream:
        stream = Stream(
            stream_id, self._outbox.stream_window, STREAM_WINDOW_BYTES, self._limits.max_message_bytes
        )
        self.streams[stream_id] = stream
        return stream

    def _check_known(self, stream_id: int) -> None:
        """Frames of streams that have ended are late, and those of streams that never began are wrong."""
        begun = stream_id < self._next_stream_id if self._is_client else stream_id <= self._last_stream_id
        if stream_id % 2 == 0 or not (begun or self.is_going_away):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} was never begun")

    def _reset(self, stream: Stream, code: ErrorCode) -> None:
        """The peer broke the protocol on one stream."""
        if self._forget(stream):
            self._outbox.add(frames.rst_stream(stream.id, code))
            self._observer.reset(stream, code)

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.is_local_done and stream.is_remote_done:
            self._forget(stream)

    def _forget(self, stream: Stream) -> bool:
        self._outbox.forget(stream)
        return self.streams.pop(stream.id, None) is not None


def _without_padding(flags: int, payload: bytes) -> bytes:
    if not flags & frames.PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "more padding than there is frame")
    return payload[1 : len(payload) - payload[0]]
