"""How fast tokens come and go, of late. Pure: `now` is monotonic seconds, passed in."""

import math

ARRIVAL_WINDOW_S = 3.0
MIN_ARRIVAL_AGE_S = 0.5
SERVICE_WINDOW_S = 5.0
STALE_S = 5.0
"""Without anybody waiting: how fast the cluster is when somebody does may have changed since, and if it serves all that
is asked, what was seen before is no bound."""
MIN_SERVICE_SAMPLES = 4
MIN_BUSY_S = 0.25
"""Two that came at once, and for whom there was room, leave at once: a few such say that the cluster is as quick as one
likes."""


class ArrivalRate:
    """Tokens per second that came lately: each counts for less the longer ago it came.

    What came is spread over the time since the first of it while that is short, so that the rate is not
    taken for a small one just because it began a moment ago.
    """

    __slots__ = ("_first_s", "_last_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._first_s = self._last_s = -math.inf

    def add(self, num_tokens: int, now: float) -> None:
        """Tokens that came at `now`."""
        self._tokens = self._tokens * self._left(now) + num_tokens
        self._last_s = now
        if self._first_s == -math.inf:
            self._first_s = now

    def per_s(self, now: float) -> float:
        """Tokens per second."""
        if not self._tokens:
            return 0.0
        age_s = max(now - self._first_s, MIN_ARRIVAL_AGE_S)
        window_s = ARRIVAL_WINDOW_S * -math.expm1(-age_s / ARRIVAL_WINDOW_S)
        return self._tokens * self._left(now) / window_s

    def _left(self, now: float) -> float:
        return math.exp(-max(0.0, now - self._last_s) / ARRIVAL_WINDOW_S)


class ServiceRate:
    """Tokens per second that the cluster takes from a line in which somebody waits.

    Whoever waits is taken when an earlier request makes room. So between two takes, where somebody waited all
    the time, the cluster was busy throughout; only such times count, each with the tokens taken at its
    beginning. Other times say more of what was asked for than of what can be served. Weighed so that the last
    `SERVICE_WINDOW_S` of them count most.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0
        self._num_samples = 0
        self._last_order = -1
        self._last_tokens = 0
        self._last_s = 0.0
        self._sampled_s = 0.0
        self._somebody_waits = False

    def took(self, order: int, num_tokens: int, now: float) -> None:
        """A request left the line; `order` names it."""
        if self._somebody_waits:
            busy_s = max(0.0, now - self._last_s)
            faded = busy_s / SERVICE_WINDOW_S
            weight = -math.expm1(-faded) / faded if faded > 0 else 1.0
            left = math.exp(-faded)
            self._tokens = self._tokens * left + self._last_tokens * weight
            self._busy_s = self._busy_s * left + busy_s * weight
            self._num_samples += 1
            self._sampled_s = now
        self._last_order, self._last_tokens, self._last_s = order, num_tokens, now
        self._somebody_waits = True

    def emptied(self) -> None:
        """Nobody waits any more."""
        self._somebody_waits = False

    def returned(self, order: int, num_tokens: int) -> None:
        """A request that was taken came back: it was not served."""
        if order == self._last_order:
            self._last_tokens = 0
        else:
            self._tokens = max(0.0, self._tokens - num_tokens)

    def per_s(self, now: float) -> float | None:
        """Tokens per second; None while too little was seen of late."""
        if not self._somebody_waits and now - self._sampled_s > STALE_S:
            return None
        if self._num_samples < MIN_SERVICE_SAMPLES or self._busy_s < MIN_BUSY_S or not self._tokens:
            return None
        return self._tokens / self._busy_s
