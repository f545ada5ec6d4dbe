"""A stretch of network in user space: connections are passed on, and can be cut, stilled, slowed and corrupted.

One relay listens for one process. What is flipped are bytes of KV frames alone, on HTTP/2 connections found by their
magic (kvtransfer/frames.py): flipping others would be for TLS and TCP's own checksums to notice.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from kvtransfer.frames import MAGIC, SLOT_MAGIC

CHUNK_BYTES = 64 << 10
DIAL_TIMEOUT_S = 2.0
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEAD_BYTES = 9
_DATA = 0
_MESSAGE_HEAD = struct.Struct(">BI")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a relay does to what passes. `refuses`: no connection lives; `silent`: nothing passes, nothing closes.
    `flip_share`: of the frames (or, where the bytes are not HTTP/2, of the chunks) that get one bit changed."""

    refuses: bool = False
    silent: bool = False
    bytes_per_s: float = 0.0
    delay_s: float = 0.0
    flip_share: float = 0.0


FAIR = Weather()


class Http2Frames:
    """Cuts one direction of an HTTP/2 connection into whole frames; feed it from the connection's first byte."""

    def __init__(self, *, from_client: bool) -> None:
        self._buffer = bytearray()
        self._preface_left = len(HTTP2_PREFACE) if from_client else 0

    def feed(self, data: bytes) -> Iterator[bytearray]:
        """What is whole now: the preface, or frames with their heads."""
        self._buffer += data
        if self._preface_left:
            if len(self._buffer) < self._preface_left:
                return
            yield self._take(self._preface_left)
            self._preface_left = 0
        while len(self._buffer) >= _FRAME_HEAD_BYTES:
            num_bytes = _FRAME_HEAD_BYTES + int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < num_bytes:
                return
            yield self._take(num_bytes)

    def _take(self, num_bytes: int) -> bytearray:
        taken = self._buffer[:num_bytes]
        del self._buffer[:num_bytes]
        return taken


def flip_kv(frame: bytearray, rng: random.Random) -> bool:
    """Change one bit of the first KV frame that begins in an HTTP/2 DATA frame; False where none does."""
    if len(frame) <= _FRAME_HEAD_BYTES or frame[3] != _DATA:
        return False
    places = [place for magic in (MAGIC, SLOT_MAGIC) if (place := frame.find(magic, _FRAME_HEAD_BYTES)) >= 0]
    start = min(places, default=-1)
    head = start - _MESSAGE_HEAD.size
    if head < _FRAME_HEAD_BYTES:
        return False
    _, num_bytes = _MESSAGE_HEAD.unpack_from(frame, head)
    end = min(start + num_bytes, len(frame))
    frame[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return True


class Relay:
    """Passes connections at `address` on to `target`. Belongs to one event loop."""

    def __init__(self, host: str, rng: random.Random, *, speaks_http2: bool = True) -> None:
        self.address = ""
        self.target: tuple[str, int] | None = None
        self.num_flipped = 0
        self._host = host
        self._rng = rng
        self._speaks_http2 = speaks_http2
        self._weather = FAIR
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, port: int = 0) -> None:
        """Listen. Raises OSError where the port is taken."""
        self._server = await asyncio.start_server(self._accept, self._host, port)
        self.address = f"{self._host}:{self._server.sockets[0].getsockname()[1]}"

    def set_weather(self, weather: Weather) -> None:
        """From now on, for connections that are open too."""
        self._weather = weather
        self._changed.set()
        self._changed = asyncio.Event()
        if weather.refuses:
            self.reset()

    def reset(self) -> None:
        """End every open connection with a reset."""
        for writer in tuple(self._writers):
            _reset(writer)

    async def close(self) -> None:
        """Listen no longer and end every connection."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            with suppress(OSError, TimeoutError):
                await self._connect(reader, writer)
        finally:
            self._tasks.discard(task)
            self._forget(writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while self._weather.silent:
            await self._changed.wait()
        if self._weather.refuses or self.target is None:
            _reset(writer)
            return
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            far_reader, far_writer = await asyncio.open_connection(*self.target)
        self._writers.add(far_writer)
        ways = [
            asyncio.create_task(self._pass(reader, far_writer, from_client=True)),
            asyncio.create_task(self._pass(far_reader, writer, from_client=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._forget(far_writer)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        frames = Http2Frames(from_client=from_client) if self._speaks_http2 else None
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                while self._weather.silent:
                    await self._changed.wait()
                weather = self._weather
                if weather.delay_s or weather.bytes_per_s:
                    await asyncio.sleep(weather.delay_s + len(data) / (weather.bytes_per_s or float("inf")))
                if writer.is_closing():
                    return
                for part in frames.feed(data) if frames is not None else (bytearray(data),):
                    if weather.flip_share and self._rng.random() < weather.flip_share:
                        self.num_flipped += self._flip(part)
                    writer.write(part)
                await writer.drain()

    def _flip(self, part: bytearray) -> bool:
        if self._speaks_http2:
            return flip_kv(part, self._rng)
        part[self._rng.randrange(len(part))] ^= 1 << self._rng.randrange(8)
        return True

    def _forget(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
