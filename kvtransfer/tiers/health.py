"""Whether a tier that can fail is used: pure, over the outcomes of what was tried and a clock.

A failed write stops writing, a slow operation stops both, for `retry_s`; then one operation is let through, and
what becomes of it decides. An operation that has not come back within the limit counts as slow while it still hangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class TierState(StrEnum):
    SERVING = "SERVING"
    READ_ONLY = "READ_ONLY"  # what is there is served; nothing is added
    DEGRADED = "DEGRADED"  # too slow to be of use: neither read nor written
    OFF = "OFF"  # not configured, or could not be opened


@dataclass(frozen=True, slots=True)
class TierStatus:
    """`reason` is empty while SERVING. `since_s`: for how long, in seconds."""

    state: TierState
    reason: str
    since_s: float


@dataclass(slots=True)
class _Trouble:
    """`trial`: the operation that was let through to find out."""

    reason: str
    since: float
    retry_at: float
    trial: int | None = None


class TierHealth:
    """`clock`: monotonic seconds. `slow_s`: what an operation may take. Not thread-safe."""

    def __init__(self, clock: Callable[[], float], slow_s: float, retry_s: float) -> None:
        self._clock = clock
        self._slow_s = slow_s
        self._retry_s = retry_s
        self._since = clock()
        self._unwritable: _Trouble | None = None
        self._slow: _Trouble | None = None
        self._running: dict[int, float] = {}
        self._next = 0

    def may_read(self) -> bool:
        return self._lets(self._look_at_running())

    def may_write(self) -> bool:
        return self._lets(self._look_at_running()) and self._lets(self._unwritable)

    def begin(self, *, write: bool) -> int:
        """An operation starts; `end` must follow. Gives its number."""
        self._next += 1
        self._running[self._next] = self._clock()
        for trouble in (self._slow, self._unwritable if write else None):
            if trouble is not None and trouble.trial is None:
                trouble.trial = self._next
        return self._next

    def end(self, operation: int, *, write: bool, failure: str | None = None) -> None:
        """How it ended. A failed read says nothing of the tier: the record is dropped (the caller's)."""
        took_s = self._clock() - self._running.pop(operation)
        if took_s > self._slow_s:
            what = "write" if write else "read"
            self._slow = self._worse(
                self._slow, f"a {what} took {took_s:.1f} s, the limit is {self._slow_s:g} s"
            )
        elif self._slow is not None and self._slow.trial == operation:
            self._slow, self._since = None, self._clock()
        if not write:
            return
        if failure is not None:
            self._unwritable = self._worse(self._unwritable, failure)
        elif self._unwritable is not None:
            self._unwritable, self._since = None, self._clock()

    def status(self) -> TierStatus:
        now = self._clock()
        slow = self._look_at_running()
        if slow is not None:
            return TierStatus(TierState.DEGRADED, slow.reason, now - slow.since)
        if self._unwritable is not None:
            return TierStatus(TierState.READ_ONLY, self._unwritable.reason, now - self._unwritable.since)
        return TierStatus(TierState.SERVING, "", now - self._since)

    def _look_at_running(self) -> _Trouble | None:
        """What slowness is known, with what hangs at this moment."""
        oldest = min(self._running.values(), default=None)
        if oldest is not None and self._clock() - oldest > self._slow_s:
            hangs_s = self._clock() - oldest
            self._slow = self._worse(self._slow, f"an operation has been running for {hangs_s:.1f} s")
        return self._slow

    def _worse(self, known: _Trouble | None, reason: str) -> _Trouble:
        now = self._clock()
        return _Trouble(reason, known.since if known else now, now + self._retry_s)

    def _lets(self, trouble: _Trouble | None) -> bool:
        """Whether an operation may start in spite of it: one, after a while."""
        return trouble is None or (trouble.trial is None and self._clock() >= trouble.retry_at)
