"""Refuses at arrival what would be answered too late: the time to first token is predicted, and judged.

The prediction is the wait in line and what placement expects of the workers. The wait follows from the tokens
ahead (`queue.Ahead`) and from the rate at which waiting tokens were served lately. It is the shorter of two:

- the tenant's line drains at no less than its weight's share of what higher classes leave;
- all that waits drains at the rate that others leave by bringing new work: a tenant alone has all of it.

The part of a prediction that comes from load is corrected by what was seen, averaged with exponential weights,
and mean deviations are added as in Jacobson, "Congestion avoidance and control" (SIGCOMM '88): three, which 99 of
100 normally distributed errors are below. That is for the service level, a promise about the slow requests too; a
deadline is the caller's own risk and judged by what is likely.

Where there is no load nothing is refused for the service level: to come back later would not help. What could not keep
it on an idle cluster either may wait as long as it allows, behind others. Pure; times in seconds, no clock.
"""

from dataclasses import dataclass

from router.core.failures import Code
from router.core.queue import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Ahead

MIN_LEFT_PART = 0.05
"""Of the service rate, what is assumed to be left however much others bring."""
LEARNING_RATE = 1 / 32
NUM_DEVIATIONS = 3.0
SLO_PART = 0.9
"""Predictions are held against this part of the service level: to refuse a little sooner costs nothing while
the line does not run empty, and leaves room for what no prediction sees."""
FIRST_DEVIATION_S = 0.1  # before anything was seen
MIN_CORRECTION, MAX_CORRECTION = 0.5, 4.0
MIN_LEARNED_S = 0.02  # of load, seen or predicted: what is less says nothing
STEADINESS = 0.01
"""Pulls the slope to 1 where predictions differ too little to tell it: their variance in s², as if it were known."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """When a request's first token would come: `idle_s` on an idle cluster, `load_s` more as things are."""

    idle_s: float
    load_s: float
    priority: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token, as predicted and not corrected."""
        return self.idle_s + self.load_s


@dataclass(frozen=True, slots=True)
class Shed:
    """The request is refused. `retry_after_s` is 0 where it would not help to come again."""

    code: Code
    cause: str
    message: str
    retry_after_s: float

    @property
    def retryable(self) -> bool:
        """Whether the same request may be taken later."""
        return self.code is Code.RESOURCE_EXHAUSTED


def wait_s(ahead: Ahead, service_rate: float) -> float:
    """How long what is ahead takes, at `service_rate` tokens per second."""
    least_rate = MIN_LEFT_PART * service_rate
    left_by_above = max(service_rate - ahead.above_rate, least_rate)
    left_by_all = max(left_by_above - ahead.others_rate, least_rate)
    by_share_s = (ahead.above_tokens + ahead.turn_tokens) / left_by_above
    by_rates_s = (ahead.above_tokens + ahead.class_tokens) / left_by_all
    return min(by_share_s, by_rates_s)


class Correction:
    """What predicted load turned out to take, of late: a line through what was seen for what was predicted.

    Between little load and much the error is of both kinds: something that comes to every wait, such as what a
    worker still has to finish, and something in proportion to it, such as a rate that was taken too high.
    """

    def __init__(self) -> None:
        self._predicted_s = self._seen_s = 0.0  # means
        self._variance = self._covariance = 0.0
        self._deviation_s = FIRST_DEVIATION_S

    def likely_s(self, load_s: float) -> float:
        """What a predicted load takes."""
        slope = (self._covariance + STEADINESS) / (self._variance + STEADINESS)
        likely_s = self._seen_s + _between(MIN_CORRECTION, slope, MAX_CORRECTION) * (
            load_s - self._predicted_s
        )
        return _between(MIN_CORRECTION * load_s, likely_s, MAX_CORRECTION * load_s)

    def slow_s(self, load_s: float) -> float:
        """What it takes for the slow requests."""
        return min(self.likely_s(load_s) + NUM_DEVIATIONS * self._deviation_s, MAX_CORRECTION * load_s)

    def learn(self, load_s: float, seen_s: float) -> None:
        """Load that was predicted, and what it took."""
        if max(seen_s, load_s) < MIN_LEARNED_S:
            return
        error_s = abs(seen_s - self.likely_s(load_s))
        self._deviation_s += LEARNING_RATE * (error_s - self._deviation_s)
        from_mean_s, seen_from_mean_s = load_s - self._predicted_s, seen_s - self._seen_s
        self._predicted_s += LEARNING_RATE * from_mean_s
        self._seen_s += LEARNING_RATE * seen_from_mean_s
        kept = 1 - LEARNING_RATE
        self._variance = kept * (self._variance + LEARNING_RATE * from_mean_s**2)
        self._covariance = kept * (self._covariance + LEARNING_RATE * from_mean_s * seen_from_mean_s)


class Shedder:
    """Predicts, judges and learns. `slo_ttft_s` None: only deadlines are judged."""

    def __init__(self, slo_ttft_s: float | None = None) -> None:
        if slo_ttft_s is not None and not slo_ttft_s > 0:
            raise ValueError(f"the service level must be above 0 s, not {slo_ttft_s}")
        self._slo_s = slo_ttft_s
        # What higher classes bring later is all in the lower ones' error, so each learns for itself.
        self._corrections: dict[int, Correction] = {}

    @property
    def has_service_level(self) -> bool:
        """Whether more is judged than deadlines."""
        return self._slo_s is not None

    def forecast(
        self,
        num_tokens: int,
        ahead: Ahead,
        service_rate: float | None,
        placed_s: float | None = None,
        idle_s: float | None = None,
        priority: int = 0,
    ) -> Forecast | None:
        """Predicts for a request that comes now; None where too little is known.

        Args:
            num_tokens: of its prompt.
            ahead: what waits, from `TokenQueue.ahead`.
            service_rate: tokens per second, from `TokenQueue.service_rate`; None: not known.
            placed_s: from placement to first token, as workers stand; None: not known.
            idle_s: the same with idle workers; None: not known.
            priority: its class.
        """
        is_waiting = ahead.class_tokens + ahead.above_tokens > 0
        if service_rate is None and (is_waiting or placed_s is None):
            return None
        at_rate_s = num_tokens / service_rate if service_rate is not None else None
        if placed_s is None:
            placed_s = at_rate_s if idle_s is None else idle_s
        if idle_s is None:
            idle_s = placed_s if at_rate_s is None else at_rate_s
        if placed_s is None or idle_s is None:
            return None
        idle_s = min(idle_s, placed_s)
        waiting_s = wait_s(ahead, service_rate) if service_rate is not None else 0.0
        return Forecast(idle_s, waiting_s + placed_s - idle_s, priority)

    def judge(self, forecast: Forecast | None, remaining_s: float) -> Shed | None:
        """Refuses what would miss the service level or its deadline, `remaining_s` from now."""
        if forecast is None:
            return None
        if forecast.idle_s >= remaining_s:
            return Shed(
                Code.DEADLINE_EXCEEDED,
                "DEADLINE_TOO_SHORT",
                f"the first token takes {forecast.idle_s:.2f} s on an idle cluster, and the deadline is in "
                f"{remaining_s:.2f} s",
                0.0,
            )
        correction = self._corrections.get(forecast.priority) or Correction()
        likely_s = forecast.idle_s + correction.likely_s(forecast.load_s)
        if likely_s > remaining_s:
            return _late(likely_s, remaining_s, f"the deadline is in {remaining_s:.2f} s")
        slow_s = forecast.idle_s + correction.slow_s(forecast.load_s)
        if self._slo_s is None or not forecast.load_s:
            return None
        limit_s = max(SLO_PART * self._slo_s, forecast.idle_s)
        if forecast.idle_s > self._slo_s:
            limit_s += SLO_PART * self._slo_s
        if slow_s > limit_s:
            return _late(slow_s, limit_s, f"the service level is {self._slo_s:.2f} s")
        return None

    def observed(self, forecast: Forecast | None, ttft_s: float) -> None:
        """Learns from a first token that came `ttft_s` after its request, for which `forecast` was made."""
        if forecast is None:
            return
        correction = self._corrections.setdefault(forecast.priority, Correction())
        correction.learn(forecast.load_s, max(0.0, ttft_s - forecast.idle_s))


def _late(predicted_s: float, limit_s: float, what: str) -> Shed:
    excess_s = predicted_s - limit_s
    return Shed(
        Code.RESOURCE_EXHAUSTED,
        "PREDICTED_LATE",
        f"the first token is predicted after {predicted_s:.2f} s, and {what}",
        min(max(excess_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
    )


def _between(lowest: float, value: float, highest: float) -> float:
    return min(max(value, lowest), highest)
