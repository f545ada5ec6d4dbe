"""Whether a request comes in: its tenant's limits, the service level, its deadline, and room in the queue.

What is refused is refused at arrival, before it costs anything: RESOURCE_EXHAUSTED with the time after which it is
worth trying again where others stand in the way, UNAVAILABLE where nobody is there to serve it, never the one for the
other. Lives on the router's event loop.
"""

from collections.abc import Callable

from router.core.failures import Code, Failure, Stage
from router.core.placement import Placement, Wait, WaitCause
from router.core.queue import ANSWER_TOKEN_PRICE, MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, TokenQueue
from router.core.shares import Shares
from router.core.shedding import Shedder
from router.core.tenants import Tenant, TenantLimits
from router.placer import Placer
from router.requests import Request, RequestKey
from router.verdicts import no_workers, too_large

CHARGED_TOKENS = 16
"""Of an answer that are charged to its tenant at once; the rest when it ends."""


class Gate:
    """Admits requests to `queue`, and keeps its tenants' accounts."""

    def __init__(
        self,
        queue: TokenQueue[RequestKey],
        limits: TenantLimits,
        shedder: Shedder,
        placer: Placer,
        clock: Callable[[], float],
    ) -> None:
        self._queue = queue
        self._limits = limits
        self._shedder = shedder
        self._placer = placer
        self._clock = clock
        self._shares: dict[int, Shares] = {}  # by priority

    def admit(self, request: Request) -> Failure | None:
        """Lets a request into the queue, or says why not."""
        assert request.demand is not None
        num_tokens, now = request.demand.num_prompt_tokens, self._clock()
        tenant = self._limits.tenant(request.key.tenant)
        request.priority = tenant.priority(request.priority)
        refusal = self._limits.admit(tenant.name, num_tokens, now)
        if refusal is not None:
            return _exhausted(refusal.cause, refusal.message, refusal.retry_after_s)
        request.is_counted = True
        admit = self._by_share if self._shedder.has_service_level else self._not_now
        failure = admit(request, tenant, now)
        if failure is not None:
            request.is_counted = False
            self._limits.withdrawn(tenant.name, num_tokens, now)
        return failure

    def _by_share(self, request: Request, tenant: Tenant, now: float) -> Failure | None:
        """As `_not_now`; but a service level keeps the line too short to share by, so who is ahead is held back."""
        assert request.demand is not None
        num_tokens = request.demand.num_prompt_tokens
        shares = self._shares.setdefault(request.priority, Shares())
        shares.asked(tenant.name, tenant.weight, num_tokens, now)
        failure = self._ahead(shares, tenant, now)
        if failure is not None:
            return failure
        failure = self._not_now(request, tenant, now)
        if failure is None:
            shares.admitted(tenant.name, num_tokens)
        elif failure.code is Code.RESOURCE_EXHAUSTED:
            shares.refused(num_tokens)
        return failure

    def _not_now(self, request: Request, tenant: Tenant, now: float) -> Failure | None:
        """Puts a request into the queue, or says why that cannot be."""
        decision = self._placer.place(request)
        request.choice = decision if isinstance(decision, Placement) else None
        return (
            self._no_place(decision) or self._late(request, tenant, now) or self._full(request, tenant, now)
        )

    def _ahead(self, shares: Shares, tenant: Tenant, now: float) -> Failure | None:
        debt_tokens = shares.debt_tokens(tenant.name, now)
        if not debt_tokens:
            return None
        rate = self._service_rate or debt_tokens
        return _exhausted(
            "AHEAD_OF_SHARE",
            f"tenant {tenant.name!r} was served more than its weight's share while others were turned away",
            min(max(debt_tokens / rate, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S),
        )

    def let_in(self, request: Request) -> None:
        """A request that another router had admitted goes on here: it neither waits nor is refused."""
        assert request.demand is not None
        tenant = self._limits.tenant(request.key.tenant)
        request.priority = tenant.priority(request.priority)
        request.entry = self._queue.entry_of_running(
            request.key,
            request.demand.num_prompt_tokens,
            request.deadline_s,
            tenant.name,
            request.priority,
            tenant.weight,
        )

    def tokens_came(self, request: Request, num_tokens: int) -> None:
        """An answer has grown; with its first token the prediction is held against what happened."""
        request.uncharged_tokens += num_tokens
        if request.uncharged_tokens >= CHARGED_TOKENS:
            self._charge_answer(request)
        if request.forecast is not None:
            self._shedder.observed(request.forecast, self._clock() - request.arrived_s)
            request.forecast = None

    def ended(self, request: Request) -> None:
        """A request is over, whether it was waiting or running."""
        self._charge_answer(request)
        self._queue.remove(request.key)
        if request.is_counted:
            request.is_counted = False
            self._limits.finished(request.key.tenant, self._clock(), sum(request.answer.num_tokens))

    def _charge_answer(self, request: Request) -> None:
        entry, num_tokens = request.entry, request.uncharged_tokens
        request.uncharged_tokens = 0
        if entry is None or not num_tokens:
            return
        self._queue.served(entry.tenant, num_tokens, entry.priority)
        shares = self._shares.get(entry.priority)
        if shares is not None:
            shares.answered(entry.tenant, num_tokens * ANSWER_TOKEN_PRICE)

    def _no_place(self, decision: Placement | Wait) -> Failure | None:
        if isinstance(decision, Wait) and decision.cause is WaitCause.NO_WORKERS:
            return no_workers(decision)
        if isinstance(decision, Wait) and decision.cause is WaitCause.TOO_LARGE:
            return too_large(decision)
        return None

    def _late(self, request: Request, tenant: Tenant, now: float) -> Failure | None:
        assert request.demand is not None
        forecast = self._shedder.forecast(
            request.demand.num_prompt_tokens,
            self._queue.ahead(tenant.name, request.priority, tenant.weight),
            self._service_rate,
            self._predicted_s(request),
            self._idle_s(request),
            priority=request.priority,
        )
        shed = self._shedder.judge(forecast, request.deadline_s - now)
        request.forecast = forecast
        if shed is None:
            return None
        return Failure(
            code=shed.code,
            stage=Stage.QUEUE,
            cause=shed.cause,
            message=shed.message,
            retryable=shed.retryable,
            retry_after_s=shed.retry_after_s,
        )

    @property
    def _service_rate(self) -> float | None:
        """Tokens a second: as seen, or as the workers say while nobody had to wait yet, so that a first burst is not
        let in whole."""
        return self._queue.service_rate or self._placer.prefill_tokens_per_s

    def _predicted_s(self, request: Request) -> float | None:
        """From placement to the first token: on the workers just chosen, else on those that would be."""
        if request.choice is not None:
            return request.choice.predicted_ttft_s
        return self._placer.predict_ttft_s(request)

    def _idle_s(self, request: Request) -> float | None:
        """The same with nothing ahead."""
        if request.choice is not None:
            return request.choice.idle_ttft_s
        return self._placer.predict_ttft_s(request, idle=True)

    def _full(self, request: Request, tenant: Tenant, now: float) -> Failure | None:
        assert request.demand is not None
        full = self._queue.offer(
            request.key,
            request.demand.num_prompt_tokens,
            request.deadline_s,
            now,
            tenant=tenant.name,
            priority=request.priority,
            weight=tenant.weight,
        )
        return None if full is None else _exhausted("QUEUE_FULL", full.reason, full.retry_after_s)


def _exhausted(cause: str, message: str, retry_after_s: float) -> Failure:
    return Failure(
        code=Code.RESOURCE_EXHAUSTED,
        stage=Stage.QUEUE,
        cause=cause,
        message=message,
        retryable=True,
        retry_after_s=retry_after_s,
    )
