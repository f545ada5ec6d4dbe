"""How a worker leaves: what it takes, what it waits for, and when its process may end. Pure.

    SERVING ◀── undo ──┬──────────────┐
       │               │              │
       └── ask ──▶ NO_NEW ── idle ──▶ KV_ONLY ── asked to go, and not needed any more ──▶ GONE

NO_NEW finishes what the worker has and takes nothing new. What still runs may be handed back, at once (KV_ONLY was
asked for) or after a time: its requests end with cause DRAINED, and the router has another worker go on with them.
KV_ONLY computes nothing, serves its cached blocks and writes them to the store: for ever where that is what was asked
for, else until nobody has fetched and nothing was written for a moment, at the most for some seconds. GONE is final.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from headrace.v1 import worker_pb2
from headrace.v1.worker_pb2 import (
    WORKER_STATE_GONE,
    WORKER_STATE_KV_ONLY,
    WORKER_STATE_NO_NEW,
    WORKER_STATE_SERVING,
)

QUIET_S = 1.0
"""A worker that is to go stays for so long after its last block moved: requests that it handed back are placed
meanwhile, and fetch what it had computed."""
MAX_KV_ONLY_S = 8.0
"""And for so long at the most. With the grace after SIGTERM it is within the 30 s that Kubernetes gives."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a worker has at a moment. `is_moving`: blocks are served to others, or wait to be written to the store."""

    num_requests: int
    is_moving: bool


class Lifecycle:
    """One worker's state and where it is going. Starts as NO_NEW, until the worker can be dialled.

    `look` is asked some times a second, and after every order; it alone moves on to KV_ONLY and GONE.
    """

    def __init__(
        self, clock: Callable[[], float], quiet_s: float = QUIET_S, max_kv_only_s: float = MAX_KV_ONLY_S
    ) -> None:
        """`clock`: monotonic seconds."""
        self.state: worker_pb2.WorkerState = WORKER_STATE_NO_NEW
        self.is_over = False
        """Whether the worker may be stopped, and its process end."""
        self._clock = clock
        self._quiet_s = quiet_s
        self._max_kv_only_s = max_kv_only_s
        self._is_draining = False
        self._is_terminated = False
        self._is_retired = False
        self._hand_back_at = math.inf
        self._going_since = math.inf  # KV_ONLY, and asked to go
        self._moved_at = -math.inf

    @property
    def is_retired(self) -> bool:
        """Whether somebody asked for GONE: whoever supervises the process shall not start it again."""
        return self._is_retired

    # --- orders ----------------------------------------------------------------------------------

    def serve(self) -> None:
        """The worker can be dialled."""
        self.state = WORKER_STATE_SERVING

    def ask(self, wanted: worker_pb2.WorkerState) -> None:
        """A router passes on where the worker shall go; the last word counts, and repeats change nothing.

        SERVING undoes what was asked for, as long as the worker is not GONE and its process is not to end. NO_NEW:
        finish, then stay as KV_ONLY. KV_ONLY: hand back what runs, then stay so. GONE: finish, then end.
        """
        match wanted:
            case worker_pb2.WORKER_STATE_SERVING:
                self._undo()
            case worker_pb2.WORKER_STATE_NO_NEW:
                self._is_retired = False
                self._drain(math.inf)
            case worker_pb2.WORKER_STATE_KV_ONLY:
                self._is_retired = False
                self._drain(self._clock())
            case worker_pb2.WORKER_STATE_GONE:
                self._is_retired = True
                self._drain(self._hand_back_at)
            case _:
                raise ValueError(
                    f"a worker cannot be asked to be in state {wanted}; name one of WorkerState's"
                )

    def terminate(self, hand_back_after_s: float) -> None:
        """The process is to end, whatever routers ask for: finish, hand back what runs after that many seconds, go."""
        self._is_terminated = True
        self._drain(min(self._hand_back_at, self._clock() + hand_back_after_s))

    def close(self) -> None:
        """Nothing is computed here any more: the engine failed, which the worker says until somebody ends it, or it is
        being stopped."""
        self.state = WORKER_STATE_GONE

    # --- moving on -------------------------------------------------------------------------------

    def look(self, held: Held) -> bool:
        """Move on as far as can be; whether what the worker still has is to be handed back now."""
        now = self._clock()
        if held.is_moving:
            self._moved_at = now
        if not self._is_draining:
            return False
        if self.state == WORKER_STATE_NO_NEW and held.num_requests == 0:
            self.state = WORKER_STATE_KV_ONLY
        if self.state == WORKER_STATE_KV_ONLY and self._is_to_go:
            self._going_since = min(self._going_since, now)
            if self._may_go(now):
                self.state = WORKER_STATE_GONE
        if self.state == WORKER_STATE_GONE and self._is_to_go:
            self.is_over = True
        return self.state == WORKER_STATE_NO_NEW and now >= self._hand_back_at

    @property
    def _is_to_go(self) -> bool:
        return self._is_retired or self._is_terminated

    def _may_go(self, now: float) -> bool:
        quiet_since = max(self._moved_at, self._going_since)
        return now - quiet_since >= self._quiet_s or now - self._going_since >= self._max_kv_only_s

    def _drain(self, hand_back_at: float) -> None:
        self._is_draining = True
        if self.state == WORKER_STATE_SERVING:
            self.state = WORKER_STATE_NO_NEW
        if not self._is_to_go:
            self._going_since = math.inf
        # What a process has until it is ended is not for routers to prolong.
        self._hand_back_at = min(self._hand_back_at, hand_back_at) if self._is_terminated else hand_back_at

    def _undo(self) -> None:
        if self._is_terminated or self.state == WORKER_STATE_GONE:
            return
        self._is_draining = self._is_retired = False
        self._hand_back_at = self._going_since = math.inf
        self.state = WORKER_STATE_SERVING
