"""The books of a fetch at both ends. Pure: grpc_fetch.py and grpc_serve.py talk, and call this under their locks.

The asker's book says what has come, whether it is too late, and what may be committed. A fetch ends with a cause in
bounded time, whatever the other side does: at the deadline; when the source has said nothing for `stall_s` while
nothing was being landed here; when a frame is refused for good; when more frames came damaged than is worth waiting
for; or with the closing word, which is believed only as far as the lease table and the coverage of the pieces bear
it out.

The answerer's book says what is in flight, whether there is room for more, and what must go again. It keeps no
payload: a frame that must go again is read from its source again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from kvtransfer.coverage import find_gap
from kvtransfer.fetch_messages import MAX_FETCH_FRAMES
from kvtransfer.layouts import CacheLayout, Paged
from kvtransfer.lease_types import Outcome, Ready, Refused, Waiting
from kvtransfer.ledger import SEND_AGAIN, FrameRefused

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.fetch_messages import Served
    from kvtransfer.frames import Ack, FrameRecord
    from kvtransfer.sources import FetchRequest

MAX_FETCH_S = 600.0
"""The longest that a fetch may take. An answerer refuses a call whose deadline is later, or that has none."""

MAX_DAMAGED = 64
"""Frames of one fetch that may come damaged. The answerer gives up sooner on a single one."""


class FetchCause(StrEnum):
    """Why nothing was fetched, beside the refusals of the lease table, of frames, and of the source."""

    PEER_UNAVAILABLE = "PEER_UNAVAILABLE"  # no connection, or it broke in the middle
    PEER_REFUSED = "PEER_REFUSED"  # the call failed with a status that says so
    BUSY = "BUSY"  # as many fetches as are let in run there, or land here
    SOURCE_STALLED = "SOURCE_STALLED"  # connected, but silent
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    PROTOCOL_ERROR = "PROTOCOL_ERROR"
    INCOMPLETE = "INCOMPLETE"  # what landed is not what the closing word says
    LEASE_LOST = "LEASE_LOST"  # cancelled, superseded or expired here meanwhile
    CANCELLED = "CANCELLED"
    COMMIT_FAILED = "COMMIT_FAILED"  # this worker could not take the blocks over
    INTERNAL = "INTERNAL"


class FetchFailed(Exception):
    """A fetch that is over without blocks. `cause` is UPPER_SNAKE: a FetchCause or a refusal's."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = str(cause)
        self.message = message


@dataclass(frozen=True, slots=True)
class Fetched:
    """The leading `num_blocks` keys of the request are whole in the lease; `fidelity`: worst rank of them."""

    lease_id: bytes
    num_blocks: int
    fidelity: int


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """What became of a fetch. `num_blocks`: leading keys of the request that are committed here, 0 where there is
    a `cause`; `fidelity`: their worst rank (0 exact, 1 near, 2 compact); `kv_bytes`: their canonical bytes in the
    dtypes that travelled. `wire_bytes`: of all messages received, headers and repeats too. `fetch_s`: from the first
    step to the commit.
    """

    num_blocks: int
    fidelity: int
    kv_bytes: int
    wire_bytes: int
    fetch_s: float
    cause: str = ""
    message: str = ""

    @property
    def is_committed(self) -> bool:
        return not self.cause


class FetchBook:
    """The books of one fetch, from its first step on. `layout`: the asker's own."""

    def __init__(
        self,
        request: FetchRequest,
        layout: CacheLayout,
        *,
        remaining_s: float,
        stall_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._request = request
        self._planes = paged_part(layout)
        self._stall_s = stall_s
        self._clock = clock
        self._began_at = self._heard_at = clock()
        self._is_landing = False
        self._num_frames = 0
        self._num_damaged = 0
        self._wire_bytes = 0
        self.deadline = self._began_at + min(remaining_s, MAX_FETCH_S)

    @property
    def has_heard(self) -> bool:
        """Whether the other side has said anything at all."""
        return self._wire_bytes > 0

    @property
    def wake_at(self) -> float:
        """When `check_time` may have another answer than now, if nothing happens before."""
        return self.deadline if self._is_landing else min(self.deadline, self._heard_at + self._stall_s)

    def check_time(self) -> None:
        """Raises FetchFailed when it is too late, or the source has been silent for too long."""
        now = self._clock()
        if now >= self.deadline:
            raise FetchFailed(FetchCause.DEADLINE_EXCEEDED, "the fetch did not end in time")
        if now >= self.wake_at:
            text = f"the source has said nothing for {self._stall_s:g} s, after {self._num_frames} frames"
            raise FetchFailed(FetchCause.SOURCE_STALLED, text)

    def begin_message(self, num_bytes: int) -> None:
        """A message came; the time that it takes here is not the source's."""
        self._wire_bytes += num_bytes
        self._is_landing = True

    def end_message(self) -> None:
        """It is done with, however that ended."""
        self._is_landing = False
        self._heard_at = self._clock()

    def take(self, ack: Ack) -> None:
        """What the frame of the last message came to. Raises FetchFailed when no other can mend it."""
        self._num_frames += 1
        if self._num_frames > MAX_FETCH_FRAMES:
            raise FetchFailed(FetchCause.PROTOCOL_ERROR, f"more than {MAX_FETCH_FRAMES} frames came")
        if ack.ok:
            return
        self._num_damaged += 1
        if ack.cause not in SEND_AGAIN:
            raise FetchFailed(ack.cause, f"frame {ack.number}: {ack.message}")
        if self._num_damaged > MAX_DAMAGED:
            raise FetchFailed(ack.cause, f"{self._num_damaged} frames were refused, the last: {ack.message}")

    def judge(self, served: Served, verdict: Ready | Waiting | Outcome | Refused) -> Fetched:
        """What may be committed. `verdict`: of the lease table on the manifest, under the same hold of the lock.
        Raises FetchFailed."""
        match verdict:
            case Refused(refusal, message):
                raise FetchFailed(refusal, message)
            case Outcome(state, cause):
                raise FetchFailed(
                    FetchCause.LEASE_LOST, f"the lease is {state}" + (f" ({cause})" if cause else "")
                )
            case Waiting(missing=missing):
                raise FetchFailed(
                    FetchCause.INCOMPLETE, f"{len(missing)} frames of the manifest did not land"
                )
        problem = self._find_gap(served, verdict)
        if problem is not None:
            raise FetchFailed(FetchCause.INCOMPLETE, problem)
        return Fetched(verdict.lease_id, served.num_blocks, verdict.fidelity)

    def outcome(self, result: Fetched | FetchFailed, kv_bytes: int = 0) -> FetchOutcome:
        """`kv_bytes`: of what was committed."""
        fetch_s = self._clock() - self._began_at
        if isinstance(result, FetchFailed):
            return FetchOutcome(0, 0, 0, self._wire_bytes, fetch_s, result.cause, result.message)
        return FetchOutcome(result.num_blocks, result.fidelity, kv_bytes, self._wire_bytes, fetch_s)

    def _find_gap(self, served: Served, ready: Ready) -> str | None:
        request = self._request
        if served.num_blocks > len(request.keys):
            return f"{served.num_blocks} blocks are said to be served, {len(request.keys)} were asked for"
        if ready.start_token != request.start_token:
            return f"the lease begins at token {ready.start_token}, the request at {request.start_token}"
        names = {plane.name for plane in self._planes.planes}
        for piece in ready.pieces:
            if piece.plane not in names:
                return f"plane {piece.plane!r} has no blocks, but a piece of it landed"
        stop_token = request.start_token + served.num_blocks * request.block_tokens
        return find_gap(self._planes, ready.pieces, request.start_token, stop_token)


@dataclass(frozen=True, slots=True)
class LandedPiece:
    """A piece that the asker has; see OpenBlocks.note_landed."""

    number: int
    in_flight_s: float
    landing_s: float


@dataclass(slots=True)
class _Sent:
    record: FrameRecord
    num_bytes: int
    sent_at: float
    num_resends: int = 0


class ServingBook:
    """Frames of one fetch, at the answerer. `window_bytes`: its own bound on the bytes of messages that are in
    flight, `credit` the asker's, which every acknowledgement tells anew; one frame may always go. `max_resends`
    bounds how often one frame goes again.
    """

    def __init__(self, window_bytes: int, credit: int, max_resends: int, clock: Callable[[], float]) -> None:
        self._window_bytes = window_bytes
        self._credit = credit
        self._max_resends = max_resends
        self._clock = clock
        self._sent: list[_Sent] = []
        self._in_flight: deque[int] = deque()
        self._in_flight_bytes = 0
        self._to_resend: deque[int] = deque()
        self._heard_at = clock()

    def next_resend(self) -> int | None:
        """The frame that must go again, ahead of any other, once there is room; it then counts as sent."""
        if not self._to_resend:
            return None
        number = self._to_resend[0]
        if self._has_room(self._sent[number].num_bytes):
            self._to_resend.popleft()
            self._fly(number)
            return number
        return None

    def may_go_on(self, num_bytes: int | None) -> bool:
        """Whether a new message of so many bytes may go now; for None, whether everything has landed."""
        if self._to_resend:
            return False
        return not self._in_flight if num_bytes is None else self._has_room(num_bytes)

    @property
    def silent_since(self) -> float:
        """Since when an acknowledgement has been due."""
        oldest = self._sent[self._in_flight[0]].sent_at if self._in_flight else self._clock()
        return max(self._heard_at, oldest)

    @property
    def in_flight_bytes(self) -> int:
        return self._in_flight_bytes

    def note_sent(self, record: FrameRecord, num_bytes: int) -> None:
        """A new frame goes, with the next number."""
        self._sent.append(_Sent(record, num_bytes, self._clock()))
        self._fly(len(self._sent) - 1)

    def acknowledge(self, ack: Ack) -> LandedPiece | None:
        """Takes the word on the oldest frame in flight; None where it goes again. Raises FrameRefused where it
        can never land."""
        if not self._in_flight or ack.number not in (None, self._in_flight[0]):
            expected = self._in_flight[0] if self._in_flight else "none"
            raise FrameRefused("PROTOCOL_ERROR", f"acknowledged frame {ack.number}, expected {expected}")
        now, number = self._clock(), self._in_flight.popleft()
        sent = self._sent[number]
        in_flight_s = now - max(sent.sent_at, self._heard_at)
        self._in_flight_bytes -= sent.num_bytes
        self._credit = ack.credit
        self._heard_at = now
        if ack.ok:
            return LandedPiece(number, in_flight_s, ack.landing_s)
        if ack.cause not in SEND_AGAIN or sent.num_resends == self._max_resends:
            raise FrameRefused(ack.cause, f"frame {number}, sent {sent.num_resends + 1} times: {ack.message}")
        sent.num_resends += 1
        self._to_resend.append(number)
        return None

    def manifest(self) -> dict[int, FrameRecord]:
        return {number: sent.record for number, sent in enumerate(self._sent)}

    def _has_room(self, num_bytes: int) -> bool:
        window_bytes = min(self._window_bytes, self._credit)
        return not self._in_flight or self._in_flight_bytes + num_bytes <= window_bytes

    def _fly(self, number: int) -> None:
        sent = self._sent[number]
        sent.sent_at = self._clock()
        self._in_flight.append(number)
        self._in_flight_bytes += sent.num_bytes


def paged_part(layout: CacheLayout) -> CacheLayout:
    """The planes that have blocks: what a fetch moves. Windows belong to a position, not to a block."""
    return replace(layout, planes=tuple(plane for plane in layout.planes if isinstance(plane.kind, Paged)))
