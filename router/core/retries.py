"""How often an attempt that failed may be made again.

A request that takes its worker down with it must not take down one after the other: each may lose few workers. Other
failures of an attempt are cheaper, and may be more. Over all requests a token bucket lets a worker's death pass and
stops a storm: it holds `BURST` recoveries and earns `EARNED_PER_REQUEST` with every new request (the retry budget of
Finagle and of Google's SRE book, ch. 21). Knows no clock: what it earns comes with work, not with time.
"""

from dataclasses import dataclass

MAX_WORKERS_LOST = 3
MAX_FAILED_ATTEMPTS = 10
EARNED_PER_REQUEST = 0.2
BURST = 512.0


@dataclass(slots=True)
class Setbacks:
    """Of one request: attempts that ended with their worker, and attempts that failed in other ways."""

    workers_lost: int = 0
    failed_attempts: int = 0


class RetryBudget:
    """Recoveries that the cluster's requests may have; `num_granted` and `num_refused` since the start."""

    def __init__(self, burst: float = BURST) -> None:
        self.num_granted = 0
        self.num_refused = 0
        self._burst = burst
        self._left = burst

    def earn(self) -> None:
        """A request was accepted."""
        self._left = min(self._burst, self._left + EARNED_PER_REQUEST)

    def refusal(self, setbacks: Setbacks, worker_lost: bool) -> str | None:
        """Notes one more setback; None where the request may go on, else why it may not."""
        if worker_lost:
            setbacks.workers_lost += 1
        else:
            setbacks.failed_attempts += 1
        reason = self._reason(setbacks)
        if reason is None:
            self._left -= 1
            self.num_granted += 1
        else:
            self.num_refused += 1
        return reason

    def _reason(self, setbacks: Setbacks) -> str | None:
        if setbacks.workers_lost > MAX_WORKERS_LOST:
            return f"it has lost {setbacks.workers_lost} workers, and may lose {MAX_WORKERS_LOST}"
        if setbacks.failed_attempts > MAX_FAILED_ATTEMPTS:
            return f"{setbacks.failed_attempts} attempts failed, and {MAX_FAILED_ATTEMPTS} may"
        if self._left < 1:
            return "the cluster has no recoveries left for now"
        return None
