"""Whether and when a failed call is sent again. Pure: knows no gRPC, the clock is passed in.

Every rpc of the contract may be repeated: reads have no effects, Cancel is idempotent, and an answer is
sent again under the same request id with the same body, to which the router answers by attaching to what
runs already. So what decides is whether a repeat can help: the error says so (`retryable`), attempts are
left, and the wait ends before the deadline.
"""

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from headrace._errors import Cancelled, DeadlineExceeded, HeadraceError, bad_argument

_logger = logging.getLogger("headrace")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often, and after what wait, a call is sent again when that is safe and may help.

    The wait before the k-th repeat is drawn from the upper half of
    `min(max_delay_s, base_delay_s * factor ** (k - 1))`, and comes on top of what the cluster asks for.

    Attributes:
        max_attempts: calls in all; 1 never repeats. Tokens that arrive start the count anew.
        base_delay_s: longest wait before the first repeat, in seconds.
        max_delay_s: longest wait before any repeat, in seconds. A cluster that asks for a longer one
            gets no repeat: the error is raised, with its `retry_after_s`, for the caller to decide.
        factor: growth of the wait from one repeat to the next.

    Raises:
        ValueError: a number out of its range.
    """

    max_attempts: int = 5
    base_delay_s: float = 0.2
    max_delay_s: float = 5.0
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if not 0 <= self.base_delay_s <= self.max_delay_s < math.inf:
            raise ValueError(
                "delays must satisfy 0 <= base_delay_s <= max_delay_s, "
                f"got base_delay_s={self.base_delay_s} and max_delay_s={self.max_delay_s}"
            )
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def backoff_s(self, num_failures: int, drawn: float) -> float:
        """The wait after `num_failures` failures in a row; `drawn` is uniform in [0, 1)."""
        longest_s = self.base_delay_s
        for _ in range(num_failures - 1):
            longest_s = min(self.max_delay_s, longest_s * self.factor)
        return longest_s * (0.5 + 0.5 * drawn)


class Attempts:
    """The attempts and the time left of one call.

    Raises:
        InvalidRequest: `timeout_s` is not a positive, finite number of seconds.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise bad_argument(f"timeout_s must be a positive number of seconds, got {timeout_s}")
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._num_failures = 0

    def remaining_s(self) -> float | None:
        """Seconds to the deadline, never negative; None if there is none."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._clock())

    def progressed(self) -> None:
        """Something new arrived: failures before it no longer count."""
        self._num_failures = 0

    def delay_s(self, error: HeadraceError) -> float | None:
        """Records a failure; seconds to wait before the next attempt, or None to give up."""
        self._num_failures += 1
        if not error.retryable or isinstance(error, Cancelled | DeadlineExceeded):
            return None
        if self._num_failures >= self._policy.max_attempts or error.retry_after_s > self._policy.max_delay_s:
            return None
        delay_s = error.retry_after_s + self._policy.backoff_s(self._num_failures, self._draw())
        remaining_s = self.remaining_s()
        if remaining_s is not None and delay_s >= remaining_s:
            return None
        _logger.info("%s; sending it again in %.2f s", error, delay_s)
        return delay_s
