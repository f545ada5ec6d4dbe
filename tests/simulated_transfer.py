"""A transfer as a deterministic pipeline: encoder, wire and lander with rates that may change, and a chooser.

Knows nothing of how the chooser decides; what the chooser is told is what a sender measures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from kvtransfer.choice import CodecChooser
from kvtransfer.codec_speed import CodecSpeed, SpeedBook
from kvtransfer.codecs.base import Fidelity

MIB = 1 << 20


class SimCodec(NamedTuple):
    """A codec of which only the name and the class matter, with the truth about its speed (bytes per second)."""

    name: str
    fidelity: Fidelity
    encode: float
    decode: float
    ratio: float
    version: int = 1


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


RAW = SimCodec("raw", Fidelity.EXACT, 4e9, 4e9, 1.0)
SPLIT = SimCodec("split", Fidelity.EXACT, 350e6, 500e6, 1.46)
INT8 = SimCodec("int8", Fidelity.NEAR, 1.2e9, 1.5e9, 2.1)
PACKED = SimCodec("packed", Fidelity.COMPACT, 250e6, 400e6, 4.2)
EVERY = (RAW, SPLIT, INT8, PACKED)


def allowed(bound: Fidelity) -> tuple[SimCodec, ...]:
    return tuple(codec for codec in EVERY if bound.allows(codec.fidelity))


def book_of(codecs: Sequence[SimCodec], clock: Clock, error: float = 1.0) -> SpeedBook:
    """A book whose guesses are wrong by the factor `error`."""
    book = SpeedBook(clock)
    for codec in codecs:
        speed = CodecSpeed(error / codec.encode, error / codec.decode, codec.ratio)
        book.guess(codec.name, "bfloat16", speed)
    return book


class Fixed:
    """The chooser that knew beforehand."""

    def __init__(self, codec: SimCodec) -> None:
        self._codec = codec

    def pick(self, bytes_left: int) -> SimCodec:
        return self._codec


@dataclass
class Simulation:
    """`rate(t)`: payload bytes per second that the wire carries, t seconds after the start. `ready(t)`: raw bytes
    that have been computed by then."""

    clock: Clock
    total_bytes: int
    rate: Callable[[float], float]
    round_trip_s: float = 200e-6
    late_s: Callable[[], float] = lambda: 0.0  # how much later an acknowledgement is noticed
    window_bytes: int = 16 * MIB
    frame_bytes: int = MIB
    ready: Callable[[float], int] | None = None
    codecs: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    _in_flight: deque[tuple[float, float, SimCodec, int, float]] = field(default_factory=deque)
    _flying_bytes: int = 0
    _acked_at: float = 0.0
    _credit_at: float = inf  # when the receiver's first word arrives: until then one frame may be in flight

    def run(self, chooser: CodecChooser | Fixed) -> float:
        """Seconds until the last byte has landed."""
        self._start = self._acked_at = self.clock.now
        self._chooser = chooser
        wire_free = lander_free = acked = self.clock.now
        sent = 0
        while sent < self.total_bytes:
            raw = min(self.frame_bytes, self.total_bytes - sent)
            self._await_ready(sent + raw)
            self._await_room(raw)
            codec = self._choose(sent)
            begun = self.clock.now
            self._deliver_until(begun + raw / codec.encode)
            payload = int(raw / codec.ratio)
            if not isinstance(chooser, Fixed):
                chooser.note_encoded(codec.name, raw, payload, raw / codec.encode)
            handed = self.clock.now
            self._credit_at = min(self._credit_at, handed + self.round_trip_s)
            wire_free = self._through_wire(max(handed, wire_free), payload)
            arrived = wire_free + self.round_trip_s / 2
            lander_free = max(arrived, lander_free) + raw / codec.decode
            acked = max(acked, lander_free + self.round_trip_s / 2 + self.late_s())
            self._in_flight.append((acked, handed, codec, raw, raw / codec.decode))
            self._flying_bytes += payload
            sent += raw
        self._deliver_until(acked)
        return lander_free - self._start

    @property
    def num_changes(self) -> int:
        return sum(a != b for a, b in zip(self.codecs, self.codecs[1:], strict=False))

    def _choose(self, sent: int) -> SimCodec:
        known = self.total_bytes if self.ready is None else self.ready(self.clock.now - self._start)
        if isinstance(self._chooser, Fixed):
            codec = self._chooser.pick(known - sent)
        else:
            choice = self._chooser.choose(min(known, self.total_bytes) - sent)
            assert choice.reason
            codec = choice.codec
            self.reasons.append(choice.reason)
        self.codecs.append(codec.name)
        return codec

    def _await_ready(self, num_bytes: int) -> None:
        while self.ready is not None and self.ready(self.clock.now - self._start) < num_bytes:
            self._deliver_until(self.clock.now + 1e-3)

    def _await_room(self, raw: int) -> None:
        if self._in_flight and self.clock.now < self._credit_at:
            self._deliver_until(self._credit_at)
        while self._in_flight and self._flying_bytes + raw > self.window_bytes:
            self._deliver_until(max(self.clock.now, self._in_flight[0][0]))

    def _deliver_until(self, until: float) -> None:
        while self._in_flight and self._in_flight[0][0] <= until:
            acked, handed, codec, raw, landing_s = self._in_flight.popleft()
            self.clock.now = max(self.clock.now, acked)
            payload = int(raw / codec.ratio)
            self._flying_bytes -= payload
            in_flight_s = acked - max(handed, self._acked_at)
            self._acked_at = acked
            if not isinstance(self._chooser, Fixed):
                self._chooser.note_landed(codec.name, raw, payload, in_flight_s, landing_s)
        self.clock.now = max(self.clock.now, until)

    def _through_wire(self, begin: float, payload: float) -> float:
        """When the payload is through, in steps short against any change of rate."""
        now, left = begin - self._start, float(payload)
        while True:
            rate = self.rate(now)
            step = max(2e-3, payload / rate / 8)
            if left / rate <= step:
                return now + left / rate + self._start
            left -= rate * step
            now += step
