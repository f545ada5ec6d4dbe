"""What the way to one other worker carries: bandwidth and round trip, from the acknowledgements of frames. Pure.

A frame is handed over, waits until the wire has carried those before it, travels, is decoded and written over
there, and is acknowledged. With `handed` and `acknowledged` of this side's clock, and `landing` as the receiver tells
it, the wire held the frame for

    (acknowledged - landing) - max(handed + round trip, acknowledged - landing of the frame before it)

where the landing itself did not queue. So a frame that had to wait for another shows the bandwidth without the
round trip, and one that travelled alone shows both together. Frames are judged together, never one by one:
acknowledgements come in bursts, but the times between them add up to the time that the wire was busy.

Where landing sets the pace, or the encoder does, which shows in that nothing waits, acknowledgements show that and not
the wire: they are a lower bound, and what was known before stays. After a while the estimate then creeps up, so that a
codec that was chosen for a slow link is given up on a link that has become fast in the meantime.

Several transfers of one pair of workers feed one estimate, which is what each of them gets.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from kvtransfer.codec_speed import MeasuredCosts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvtransfer.codec_speed import CodecSpeed

WINDOW_FRAMES = 8
WINDOW_S = 2.0
MIN_FRAMES = 2
"""Frames older than WINDOW_S are forgotten, but for so many: a slow link has nothing newer."""
FRESH_S = 60.0
"""An estimate older than this is no more than a hint."""
SMALL_BYTES = 64 << 10
"""A lone frame up to this size shows the round trip, and nothing else."""
MAX_ROUND_TRIP_S = 0.2
"""A lone frame that took longer shows the bandwidth well enough."""
LANDING_LIMITED = 0.8
"""Where landing fills this share of the time between two acknowledgements, it and not the wire set the pace."""
ENCODE_LIMITED, WAITING = 0.5, 2.0
"""Encoding sets it where it fills this share of the time and no more than so many frames are on their way at once."""
CREEP = 1.5
"""By how much the estimate grows with a frame, once it has not been put to the proof for so many:"""
FIRST_PATIENCE, MAX_PATIENCE = 8, 1024
MAX_GUESS = 16.0
"""No estimate goes further beyond what was seen from acknowledgement to acknowledgement."""
MAX_BYTES_PER_S = 1e12
ROUNDS = 6


@dataclass(frozen=True, slots=True)
class LinkView:
    """`bytes_per_s`: payload bytes that one transfer gets through. `round_trip_s`: 0 where it is not known. `age_s`:
    since the last acknowledgement. `is_sure`: the bandwidth is known apart from the round trip."""

    bytes_per_s: float
    round_trip_s: float
    age_s: float
    is_sure: bool

    @property
    def is_fresh(self) -> bool:
        return self.age_s <= FRESH_S


@dataclass(frozen=True, slots=True)
class FrameTiming:
    """One acknowledgement. `sojourn_s`: since the frame was handed over. `since_last_s`: since the acknowledgement of
    the frame before it in the same stream, infinite where there is none; `last_landing_s`: of that frame. `encode_s`:
    about what encoding it took."""

    payload_bytes: int
    sojourn_s: float
    landing_s: float
    since_last_s: float = inf
    last_landing_s: float = 0.0
    encode_s: float = 0.0

    @property
    def is_alone(self) -> bool:
        """Handed over when nothing else was in flight."""
        return self.sojourn_s <= self.since_last_s

    @property
    def trip_s(self) -> float:
        """Waiting, wire and round trip, without the landing."""
        return max(0.0, self.sojourn_s - self.landing_s)

    @property
    def apart_s(self) -> float:
        """Between this arrival and the one before it, if neither waited for its landing."""
        return self.since_last_s - self.landing_s + self.last_landing_s

    @property
    def is_by_landing(self) -> bool:
        """The landing took about all the time since the last acknowledgement: the wire may have been idle."""
        return self.landing_s > LANDING_LIMITED * self.since_last_s

    def followed_by(self, other: FrameTiming) -> FrameTiming:
        """Two frames as if they were one."""
        return FrameTiming(
            self.payload_bytes + other.payload_bytes,
            max(self.sojourn_s, other.sojourn_s),
            self.landing_s + other.landing_s,
            self.since_last_s + other.since_last_s,
            self.last_landing_s + self.landing_s,
            self.encode_s + other.encode_s,
        )


class LinkEstimate:
    """One pair of workers: this one as the sender, and one incarnation of another. Any thread may call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._frames: deque[tuple[float, FrameTiming]] = deque(maxlen=WINDOW_FRAMES)
        self._bytes_per_s: float | None = None
        self._is_sure = False
        self._landed_at = 0.0
        self._round_trip_s = 0.0
        self._shortest: FrameTiming | None = None
        self._shortest_at = 0.0
        self._num_unproven = 0
        self._patience = FIRST_PATIENCE
        self._landing: dict[str, MeasuredCosts] = {}

    def note_landed(self, frame: FrameTiming) -> None:
        """Takes an acknowledgement into account."""
        if frame.payload_bytes < 1:
            return
        with self._lock:
            now = self._landed_at = self._clock()
            self._note_trip(frame, now)
            if frame.is_alone and frame.payload_bytes <= SMALL_BYTES and self._bytes_per_s is not None:
                self._learn_round_trip([frame], self._bytes_per_s)
                return
            self._frames.append((now, frame))
            while len(self._frames) > MIN_FRAMES and self._frames[0][0] < now - WINDOW_S:
                self._frames.popleft()
            self._take([noted for _, noted in self._frames])

    def note_landing(self, codec: str, dtype: str, raw_bytes: int, landing_s: float) -> None:
        """The receiver verified, decoded and wrote a frame in `landing_s`."""
        with self._lock:
            costs = self._landing.setdefault(dtype, MeasuredCosts(self._clock))
            costs.note(codec, landing_s, max(1, raw_bytes))

    def landing_s_per_byte(self, dtype: str, speeds: Mapping[str, CodecSpeed]) -> dict[str, float]:
        """Seconds per raw byte over there for each codec of `speeds`, whose decoding here is the guess."""
        guesses = {codec: speed.decode_s_per_byte for codec, speed in speeds.items()}
        with self._lock:
            costs = self._landing.get(dtype)
            if costs is None:
                return guesses
            overhead = costs.overhead(guesses)
            return {codec: costs.estimate(codec, guess + overhead) for codec, guess in guesses.items()}

    def view(self) -> LinkView | None:
        """None before the first acknowledgement."""
        with self._lock:
            if self._bytes_per_s is None:
                return None
            age_s = self._clock() - self._landed_at
            return LinkView(self._bytes_per_s, self._round_trip_s, age_s, self._is_sure)

    def _note_trip(self, frame: FrameTiming, now: float) -> None:
        # Only a lone frame replaces one that has grown old: another may have waited for any time.
        is_old = frame.is_alone and now - self._shortest_at > FRESH_S
        if self._shortest is None or is_old or frame.trip_s < self._shortest.trip_s:
            self._shortest, self._shortest_at = frame, now
            wire_s = frame.payload_bytes / (self._bytes_per_s or MAX_BYTES_PER_S)
            self._round_trip_s = min(self._round_trip_s, max(0.0, frame.trip_s - wire_s))

    def _take(self, frames: Sequence[FrameTiming]) -> None:
        row = _without_bursts([frame for frame in frames if not frame.is_alone])
        alone = [frame for frame in frames if frame.is_alone]
        if not row:
            self._is_sure = self._is_sure or frames[-1].sojourn_s > MAX_ROUND_TRIP_S
            self._bytes_per_s = self._from_lone(alone)
            return
        self._is_sure = True
        by_wire = [frame for frame in row if not frame.is_by_landing]
        busy_s = sum(frame.since_last_s for frame in row)
        is_by_landing = 2 * sum(frame.since_last_s for frame in by_wire) < busy_s
        if self._bytes_per_s is not None and (is_by_landing or self._is_by_encoding(row, busy_s)):
            self._learn_round_trip(frames, _rate(row, busy_s))
            self._keep(self._bytes_per_s, max(_rate(row, busy_s), self._from_lone(alone)))
            return
        by_wire = by_wire or row
        seen = self._from_wire(frames, by_wire, alone)
        if self._num_unproven > self._patience and seen * CREEP < (self._bytes_per_s or 0.0):
            self._patience = min(MAX_PATIENCE, 2 * self._patience)  # it had crept too far
        self._num_unproven = 0
        self._bytes_per_s = seen

    def _is_by_encoding(self, row: Sequence[FrameTiming], busy_s: float) -> bool:
        on_their_way_s = sum(frame.trip_s - self._round_trip_s for frame in row)
        encode_s = sum(frame.encode_s for frame in row)
        return encode_s >= ENCODE_LIMITED * busy_s and on_their_way_s <= WAITING * busy_s

    def _from_lone(self, alone: Sequence[FrameTiming]) -> float:
        return min(self._rate_of(alone), MAX_GUESS * _rate(alone, sum(frame.trip_s for frame in alone)))

    def _from_wire(
        self, frames: Sequence[FrameTiming], row: Sequence[FrameTiming], alone: Sequence[FrameTiming]
    ) -> float:
        """`row`: those of `frames` that the wire kept waiting; `alone`: those that waited for none."""
        at_most = MAX_GUESS * _rate(row, sum(frame.apart_s for frame in row))
        everything = [*row, *alone]
        seen = min(at_most, self._rate_of(row))
        for _ in range(ROUNDS):  # bandwidth and round trip each make the other better known
            self._learn_round_trip(frames, seen)
            seen = min(at_most, self._rate_of(everything if self._round_trip_s else row))
        return seen

    def _keep(self, known: float, at_least: float) -> None:
        """Landing or encoding set the pace of what is in the window."""
        self._num_unproven += 1
        if self._num_unproven > self._patience:
            known = max(known, min(known * CREEP, at_least * MAX_GUESS))
        self._bytes_per_s = min(MAX_BYTES_PER_S, max(at_least, known))

    def _rate_of(self, frames: Sequence[FrameTiming]) -> float:
        return _rate(frames, sum(min(f.trip_s - self._round_trip_s, f.apart_s) for f in frames))

    def _learn_round_trip(self, frames: Sequence[FrameTiming], bytes_per_s: float) -> None:
        """The shortest trip has the round trip in it, and its bytes' time on the wire as it was then. With too low a
        bandwidth that is too long, so that what is left for the round trip is never too long."""
        shortest = self._shortest
        if shortest is not None and shortest in frames:
            left_s = shortest.trip_s - shortest.payload_bytes / bytes_per_s
            self._round_trip_s = max(self._round_trip_s, left_s)


def _without_bursts(row: Sequence[FrameTiming]) -> list[FrameTiming]:
    """A frame that was acknowledged sooner after the last one than it can have been landed was acknowledged late, or
    the one before it was: only together do they tell the truth."""
    merged: list[FrameTiming] = []
    for frame in row:
        if merged and frame.since_last_s < LANDING_LIMITED * frame.landing_s:
            merged[-1] = merged[-1].followed_by(frame)
        else:
            merged.append(frame)
    return merged


def _rate(frames: Sequence[FrameTiming], seconds: float) -> float:
    num_bytes = sum(frame.payload_bytes for frame in frames)
    return min(MAX_BYTES_PER_S, num_bytes / max(seconds, 1e-12))
