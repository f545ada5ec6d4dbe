"""A request's life as the router sees it: one table of states, and when each was entered.

    QUEUED → PLACED → RESERVED → PREFILLING → DECODING → FINISHED
      ↑________|                               ⇅
                                           PREEMPTED
    every state that is not an end → CANCELLED | FAILED; every state past QUEUED → RESUMING → QUEUED

Knows no clock (`now` is monotonic seconds, passed in), no workers and no messages.
"""

from dataclasses import dataclass
from enum import StrEnum

from router.core.failures import Stage


class RequestState(StrEnum):
    """The states of the contract's RequestState, by the same names."""

    QUEUED = "QUEUED"
    PLACED = "PLACED"
    RESERVED = "RESERVED"
    PREFILLING = "PREFILLING"
    DECODING = "DECODING"
    PREEMPTED = "PREEMPTED"
    RESUMING = "RESUMING"
    FINISHED = "FINISHED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


_ENDS = frozenset({RequestState.CANCELLED, RequestState.FAILED})

TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.QUEUED: _ENDS | {RequestState.PLACED},
    RequestState.PLACED: _ENDS | {RequestState.RESERVED, RequestState.QUEUED, RequestState.RESUMING},
    RequestState.RESERVED: _ENDS | {RequestState.PREFILLING, RequestState.RESUMING},
    RequestState.PREFILLING: _ENDS | {RequestState.DECODING, RequestState.RESUMING},
    RequestState.DECODING: _ENDS | {RequestState.FINISHED, RequestState.PREEMPTED, RequestState.RESUMING},
    RequestState.PREEMPTED: _ENDS | {RequestState.DECODING, RequestState.RESUMING},
    RequestState.RESUMING: _ENDS | {RequestState.QUEUED},
    RequestState.FINISHED: frozenset(),
    RequestState.CANCELLED: frozenset(),
    RequestState.FAILED: frozenset(),
}

# Asked with every token: a look-up by state would hash it, which an enum does in Python.
_OVER = (RequestState.FINISHED, RequestState.CANCELLED, RequestState.FAILED)

_STAGES = {
    RequestState.QUEUED: Stage.QUEUE,
    RequestState.PLACED: Stage.RESERVE,
    RequestState.RESERVED: Stage.PREFILL,
    RequestState.PREFILLING: Stage.PREFILL,
    RequestState.RESUMING: Stage.QUEUE,
}


class IllegalTransition(Exception):
    """The table does not lead from this state to the one asked for: a defect, not a request's failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds that a request spent, as far as it came; 0 where it did not.

    `first_step_s` is from the commit's acknowledgement to the decode worker's first own token, both as they
    reached the router.
    """

    queue_s: float
    reserve_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float
    total_s: float
    first_step_s: float


class Lifecycle:
    """The state of one request. Time in QUEUED, PLACED and on to the first token adds up over placements."""

    __slots__ = (
        "_accepted_s",
        "_committed_s",
        "_entered_s",
        "_first_s",
        "_last_s",
        "_own_s",
        "_spent_s",
        "state",
    )

    def __init__(self, now: float) -> None:
        self.state = RequestState.QUEUED
        self._accepted_s = now
        self._entered_s = now
        self._spent_s: dict[RequestState, float] = {}
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._own_s: float | None = None
        self._committed_s: float | None = None

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    @property
    def stage(self) -> Stage:
        """What a failure in this state is called."""
        return _STAGES.get(self.state, Stage.DECODE)

    def move(self, state: RequestState, now: float) -> None:
        """Enters a state.

        Raises:
            IllegalTransition: the table does not lead there; nothing is changed.
        """
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"a request that is {self.state} cannot become {state}")
        self._spent_s[self.state] = self._spent_s.get(self.state, 0.0) + now - self._entered_s
        self.state = state
        self._entered_s = now

    def committed(self, now: float) -> None:
        """The handoff was acknowledged: what comes next is the decode worker's own."""
        self._committed_s = now

    def tokens_arrived(self, first_index: int, now: float) -> None:
        """New tokens of some choice reached the router."""
        if self._first_s is None:
            self._first_s = now
        if first_index > 0 and self._own_s is None:
            self._own_s = now
        self._last_s = now

    def times(self, now: float) -> StageTimes:
        """Where the time went until `now`, or until the request ended."""
        end_s = self._entered_s if self.is_over else now
        return StageTimes(
            queue_s=self._in(RequestState.QUEUED, now),
            reserve_s=self._in(RequestState.PLACED, now),
            prefill_s=self._in(RequestState.RESERVED, now) + self._in(RequestState.PREFILLING, now),
            decode_s=_between(self._first_s, self._last_s),
            ttft_s=_between(self._accepted_s, self._first_s),
            total_s=end_s - self._accepted_s,
            first_step_s=_between(self._committed_s, self._own_s),
        )

    def _in(self, state: RequestState, now: float) -> float:
        current_s = now - self._entered_s if self.state is state else 0.0
        return self._spent_s.get(state, 0.0) + current_s


def _between(start_s: float | None, end_s: float | None) -> float:
    # Two streams bring the commit and the token: the later event may be seen first, and took no time then.
    return max(0.0, end_s - start_s) if start_s is not None and end_s is not None else 0.0
