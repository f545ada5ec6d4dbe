"""The codec `auto`: one transfer's chooser. It takes what is predicted to land first and thinks again at every frame.

`codec_plan` predicts; here is what it needs to know and who remembers it: what codecs cost (the book of this
process), what the way to the receiver carries (the estimate of this pair of workers), how fast the prompt is
computed (seen from what becomes ready), and how long a choice is kept. Pure: the clock and the load are passed in.
See docs/auto.md.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

from kvtransfer.choice import CodecChoice
from kvtransfer.codec_plan import (
    Candidate,
    Plan,
    Situation,
    explain,
    make_plan,
    rate_text,
    slowdown,
)
from kvtransfer.layouts import DEFAULT_PIECE_BYTES
from kvtransfer.link_estimate import FrameTiming

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtransfer.codec_speed import SpeedBook
    from kvtransfer.codecs import Codec
    from kvtransfer.link_estimate import LinkEstimate, LinkView

PROBE_FRAMES = 3
"""At most so many frames go to an unknown link in the cheapest codec. A sender has credit for one before it hears from
the receiver; of the next two, one waits for the other and so shows the bandwidth apart from the round trip."""
ASSUMED_BYTES_PER_S = 500e6
"""Of a link that has not answered yet; a quarter of it with every frame that is sent before it does."""
MIN_GAIN = 0.08
"""A codec in use is left for one that is predicted to land sooner by this share."""
MIN_FRAMES, MAX_FRAMES = 2, 64
"""A choice holds for MIN_FRAMES; each return to the codec that was left last doubles that, up to MAX_FRAMES."""
LOST_S = 0.02
"""A stream that broke is taken up again after this at the soonest; what is shorter may just have been noticed late."""
MAX_IN_FLIGHT = 4096
"""Frames of one transfer whose handing over is remembered."""


class AutoCodec:
    """A `CodecChooser`. Shares `book` with all transfers of the process and `link` with those to the same receiver.

    `codecs`: those that both sides speak and the bound on fidelity allows, at least one; the first is taken where
    nothing is known of any. `dtype`: of the cache (`dtype_label`). `busy`: share of this side's cores that others
    use, 0 to 1. `total_bytes`: raw bytes that the transfer will have; None where all are there already. `preface`:
    words put before every reason.
    """

    def __init__(
        self,
        codecs: Sequence[Codec],
        *,
        dtype: str,
        book: SpeedBook,
        link: LinkEstimate,
        busy: Callable[[], float],
        clock: Callable[[], float],
        total_bytes: int | None = None,
        preface: str = "",
    ) -> None:
        self._codecs = {codec.name: codec for codec in codecs}
        self._first = codecs[0]
        self._dtype = dtype
        self._book = book
        self._link = link
        self._busy = busy
        self._clock = clock
        self._preface = preface
        self._production = Production(total_bytes or 0, clock)
        self._steady = Steadiness()
        self._frame_bytes = DEFAULT_PIECE_BYTES
        self._sent_bytes = 0
        self._num_sent = 0
        self._in_flight: deque[tuple[str, int, float]] = deque(maxlen=MAX_IN_FLIGHT)
        self._landed_at: float | None = None
        self._landing_s = 0.0

    def choose(self, bytes_left: int) -> CodecChoice:
        self._production.note(self._sent_bytes + bytes_left)
        if len(self._codecs) == 1:
            return self._choice(self._first.name, f"{self._first.name}: the only codec that may be taken")
        candidates = self._candidates()
        if not candidates:
            return self._choice(self._first.name, f"{self._first.name}: no codec has been measured yet")
        view = self._link.view()
        if view is None or not view.is_fresh or (not view.is_sure and self._num_sent < PROBE_FRAMES):
            return self._choose_unmeasured(candidates, bytes_left, view)
        situation = self._situation(bytes_left, view.bytes_per_s, view.round_trip_s)
        plan = make_plan(candidates, situation, self._steady.in_use)
        name = self._steady.settle(plan)
        if name == plan.pick.candidate.name:
            return self._choice(name, plan.reason)
        kept = explain(plan.forecasts[name], list(plan.forecasts.values()), situation)
        return self._choice(name, f"{kept}: too little to change for, or too soon")

    def note_encoded(self, codec: str, raw_bytes: int, payload_bytes: int, encode_s: float) -> None:
        self._sent_bytes += raw_bytes
        self._frame_bytes = max(1, (3 * self._frame_bytes + raw_bytes) // 4)
        self._num_sent += 1
        self._in_flight.append((codec, payload_bytes, self._clock()))
        slow = slowdown(self._busy())
        self._book.note_encoded(codec, self._dtype, raw_bytes, payload_bytes, encode_s, slow)

    def note_landed(
        self, codec: str, raw_bytes: int, payload_bytes: int, in_flight_s: float, landing_s: float
    ) -> None:
        now = self._clock()
        since_last_s = inf if self._landed_at is None else now - self._landed_at
        handed_at = self._handed_at(codec, payload_bytes, now - in_flight_s, now - since_last_s)
        self._link.note_landing(codec, self._dtype, raw_bytes, landing_s)
        speed = self._book.speeds(self._dtype).get(codec)
        encode_s = raw_bytes * speed.encode_s_per_byte * slowdown(self._busy()) if speed else 0.0
        self._link.note_landed(
            FrameTiming(payload_bytes, now - handed_at, landing_s, since_last_s, self._landing_s, encode_s)
        )
        self._landed_at, self._landing_s = now, landing_s

    def _handed_at(self, codec: str, payload_bytes: int, begun_at: float, last_at: float) -> float:
        """When the frame that was acknowledged now was handed over. `begun_at`: then, or at the acknowledgement before
        it (`last_at`), whichever is later."""
        if begun_at > last_at + LOST_S:  # nothing was in flight: what is older was lost with its stream
            while self._in_flight and self._in_flight[0][2] < begun_at - LOST_S:
                self._in_flight.popleft()
        while self._in_flight:
            name, num_bytes, handed_at = self._in_flight.popleft()
            if (name, num_bytes) == (codec, payload_bytes):
                return min(handed_at, begun_at)
        return begun_at

    def _choose_unmeasured(
        self, candidates: list[Candidate], bytes_left: int, known: LinkView | None
    ) -> CodecChoice:
        if self._num_sent < PROBE_FRAMES:
            name = min(candidates, key=lambda candidate: candidate.work_s).name
            why = "that nothing is known of"
            if known is not None and known.is_fresh:
                why = f"that carries {rate_text(known.bytes_per_s)} or more"
            elif known is not None:
                why = f"that was measured {known.age_s:.0f} s ago ({rate_text(known.bytes_per_s)})"
            return self._choice(
                name, f"{name}: frame {self._num_sent + 1} of {PROBE_FRAMES} to probe a link {why}"
            )
        assumed = ASSUMED_BYTES_PER_S if known is None else known.bytes_per_s
        assumed /= 4.0 ** (self._num_sent - PROBE_FRAMES)
        plan = make_plan(candidates, self._situation(bytes_left, max(1.0, assumed), 0.0))
        return self._choice(plan.pick.candidate.name, f"{plan.reason}: assumed, nothing has landed yet")

    def _situation(self, bytes_left: int, bytes_per_s: float, round_trip_s: float) -> Situation:
        bytes_to_come, computed_in_s = self._production.outlook()
        return Situation(
            bytes_left=max(bytes_left, self._frame_bytes),
            frame_bytes=self._frame_bytes,
            bytes_per_s=bytes_per_s,
            round_trip_s=round_trip_s,
            busy=self._busy(),
            bytes_to_come=bytes_to_come,
            computed_in_s=computed_in_s,
        )

    def _candidates(self) -> list[Candidate]:
        speeds = self._book.speeds(self._dtype)
        landing = self._link.landing_s_per_byte(self._dtype, speeds)
        return [
            Candidate(name, speed.encode_s_per_byte, landing[name], 1 / speed.ratio)
            for name, speed in speeds.items()
            if name in self._codecs
        ]

    def _choice(self, name: str, reason: str) -> CodecChoice:
        return CodecChoice(self._codecs[name], f"{self._preface}{reason}")


class Production:
    """How much of a transfer is still to be computed, and how soon it will be there, seen from what became ready."""

    def __init__(self, total_bytes: int, clock: Callable[[], float]) -> None:
        self._total_bytes = total_bytes
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._grown_at = 0.0
        self._known_bytes = 0

    def note(self, known_bytes: int) -> None:
        """So many raw bytes have become ready so far, sent or not."""
        if self._first is None:
            # What was cached here is ready at once: it says nothing of the speed of computing.
            self._first = (self._clock(), known_bytes)
            self._known_bytes = known_bytes
        elif known_bytes > self._known_bytes:
            self._grown_at = self._clock()
            self._known_bytes = known_bytes

    def outlook(self) -> tuple[int, float]:
        """Raw bytes to come, and the seconds until they are all there; (0, 0) where that cannot be said."""
        to_come = self._total_bytes - self._known_bytes
        if to_come <= 0 or self._first is None or self._grown_at <= self._first[0]:
            return 0, 0.0
        begun_at, first_bytes = self._first
        per_byte_s = (self._grown_at - begun_at) / (self._known_bytes - first_bytes)
        return to_come, max(0.0, to_come * per_byte_s - (self._clock() - self._grown_at))


class Steadiness:
    """Keeps a transfer from changing its codec with every frame."""

    def __init__(self) -> None:
        self.in_use = ""
        self._left = ""
        self._num_frames = 0
        self._hold_frames = MIN_FRAMES

    def settle(self, plan: Plan) -> str:
        """The codec to take for one frame, given what would be best."""
        pick, kept = plan.pick, plan.forecasts.get(self.in_use)
        self._num_frames += 1
        if kept is None:
            self._change(pick.candidate.name)
        elif pick is not kept and self._num_frames > self._hold_frames:
            sooner = pick.landed_s <= kept.landed_s * (1 - MIN_GAIN)
            if pick.is_hidden or sooner:
                self._change(pick.candidate.name)
        return self.in_use

    def _change(self, name: str) -> None:
        if name == self._left:
            self._hold_frames = min(MAX_FRAMES, 2 * self._hold_frames)
        self._left, self.in_use, self._num_frames = self.in_use, name, 0
