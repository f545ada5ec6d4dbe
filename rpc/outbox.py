"""What a connection sends: frames gathered until they are taken, messages within the peer's windows (RFC 9113, 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rpc import frames
from rpc.frames import ConnectionFault, ErrorCode
from rpc.stream import Stream


class Outbox:
    """`gathered`: there is something to take, where there was nothing. `done`: all of a stream has been sent, its end
    too. `writable`: what waited on a stream has been sent."""

    def __init__(
        self,
        gathered: Callable[[], None],
        done: Callable[[Stream], None],
        writable: Callable[[Stream], None],
    ) -> None:
        self.num_bytes = 0  # that were not taken
        self.stream_window = frames.DEFAULT_WINDOW_BYTES  # of a stream that begins now
        self._window = frames.DEFAULT_WINDOW_BYTES
        self._frames: list[bytes] = []
        self._blocked: dict[int, Stream] = {}
        self._gathered = gathered
        self._done = done
        self._writable = writable

    def take(self) -> bytes:
        """All that is to be written to the socket."""
        data = self._frames[0] if len(self._frames) == 1 else b"".join(self._frames)
        self._frames.clear()
        self.num_bytes = 0
        return data

    def add(self, frame: bytes) -> None:
        """A frame that no window holds back."""
        self._frames.append(frame)
        self.num_bytes += len(frame)
        if len(self._frames) == 1:
            self._gathered()

    def headers(self, stream: Stream, block: bytes, ends: bool) -> None:
        """Headers or trailers, behind what waits on the stream."""
        if stream.is_local_done:
            return
        if stream.pending:
            stream.wait_with(block, ends, True)
        else:
            self._add_headers(stream, block, ends)

    def message(self, stream: Stream, message: bytes) -> None:
        """A message, now or as soon as the peer has room for it."""
        if stream.is_local_done:
            return
        size = len(message) + 5
        # Once for every token: comparing one after the other is faster than `min`.
        fits = size <= stream.send_window and size <= self._window and size <= frames.MAX_FRAME_BYTES
        if fits and not stream.pending:
            stream.send_window -= size
            self._window -= size
            self.add(frames.message_frame(stream.id, message))
            return
        stream.wait_with(b"\0" + len(message).to_bytes(4, "big") + message, False, False)
        self._send_waiting(stream)

    def end(self, stream: Stream) -> None:
        """Nothing follows on the stream."""
        if stream.pending:
            stream.wait_with(b"", True, False)
        elif not stream.is_local_done:
            self._add_data(stream, b"", True)

    def forget(self, stream: Stream) -> None:
        """What waits on the stream is not sent, nor anything later."""
        self._blocked.pop(stream.id, None)
        stream.pending.clear()
        stream.is_local_done = True

    # --- windows -----------------------------------------------------------------------------------------

    def grow(self, num_bytes: int) -> None:
        """The peer takes more on the whole connection."""
        self._window += num_bytes
        if self._window > frames.MAX_WINDOW_BYTES:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is too large")
        self.send_blocked()

    def grow_stream(self, stream: Stream, num_bytes: int) -> bool:
        """It takes more on one stream; False where that is more than can be."""
        stream.send_window += num_bytes
        if stream.send_window > frames.MAX_WINDOW_BYTES:
            return False
        if stream.pending:
            self._go_on((stream,))
        return True

    def resize(self, num_bytes: int, streams: Iterable[Stream]) -> None:
        """Streams begin with another window, and those that there are grow or shrink by as much."""
        if num_bytes > frames.MAX_WINDOW_BYTES:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the initial window is too large")
        grown, self.stream_window = num_bytes - self.stream_window, num_bytes
        for stream in streams:
            stream.send_window += grown

    def send_blocked(self) -> None:
        """Sends what windows held back and now do not."""
        self._go_on(tuple(self._blocked.values()))

    def _go_on(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            self._send_waiting(stream)
            if not stream.pending and not stream.is_local_done:
                self._writable(stream)

    def _send_waiting(self, stream: Stream) -> None:
        while stream.pending:
            data, ends, is_headers = stream.pending[0]
            room = min(stream.send_window, self._window, frames.MAX_FRAME_BYTES)
            if data and room <= 0 and not is_headers:
                self._blocked[stream.id] = stream
                return
            stream.pending.popleft()
            if is_headers:
                self._add_headers(stream, data, ends)
            elif len(data) > room:
                stream.pending.appendleft((data[room:], ends, False))
                self._add_data(stream, data[:room], False)
            else:
                self._add_data(stream, data, ends)
        self._blocked.pop(stream.id, None)

    def _add_data(self, stream: Stream, data: bytes, ends: bool) -> None:
        stream.send_window -= len(data)
        self._window -= len(data)
        self.add(frames.frame(frames.DATA, frames.END_STREAM if ends else 0, stream.id, data))
        self._ended(stream, ends)

    def _add_headers(self, stream: Stream, block: bytes, ends: bool) -> None:
        self.add(frames.headers(stream.id, block, ends))
        self._ended(stream, ends)

    def _ended(self, stream: Stream, ends: bool) -> None:
        if ends:
            stream.is_local_done = True
            self._done(stream)
