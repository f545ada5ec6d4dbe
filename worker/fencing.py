"""When a worker must give up what it holds, because the cluster has given it up. Pure.

A router that hears nothing of a worker for a while calls it lost and places its requests anew. A worker that
was cut off, or frozen and woken, must not go on as if nothing had happened: it drops its leases and rejoins
under a new epoch, so that whatever was meant for the incarnation before is refused (design §3.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable


def running_s() -> float:
    """Monotonic seconds that go on while the machine is suspended, where the system has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class FenceWatch:
    """Asked some times a second; says when the worker must fence itself, once for each time out of touch.

    `dead_after_s`: longer than this without a router, or without having been asked, and the cluster has given
    the worker up. `has_routers`: whether the worker announces itself to any; one that does not can only freeze.
    A worker that no router has dialled yet holds nothing that could be fenced.
    """

    def __init__(self, dead_after_s: float, clock: Callable[[], float], *, has_routers: bool) -> None:
        self._dead_after_s = dead_after_s
        self._clock = clock
        self._has_routers = has_routers
        self._asked_at = clock()
        self._in_touch_at: float | None = None

    def ask(self, *, in_touch: bool) -> str | None:
        """Why to fence now, in words, or None. `in_touch`: a router's session is open, or was since
        the last time."""
        now = self._clock()
        frozen_s = now - self._asked_at
        self._asked_at = now
        if frozen_s > self._dead_after_s:
            # What seems open may have been closed by the other side long ago.
            self._in_touch_at = None
            return f"the process stood still for {frozen_s:.1f} s"
        if in_touch:
            self._in_touch_at = now
        elif self._has_routers and self._in_touch_at is not None:
            away_s = now - self._in_touch_at
            if away_s > self._dead_after_s:
                self._in_touch_at = None
                return f"no router had a session open for {away_s:.1f} s"
        return None
