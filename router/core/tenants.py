"""Who may ask for how much: each tenant's weight, priorities, concurrency and rate of tokens.

The rate is a token bucket: it fills at `tokens_per_s` up to `burst_tokens`; a prompt takes its tokens when it is
admitted, an answer when it has ended, which may leave the bucket in debt. A full bucket admits a prompt of
any size, which could never be admitted otherwise. Pure: `now` is monotonic seconds, passed in.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache, partial

DEFAULT_TENANT = "default"
MAX_PRIORITY = 9
MAX_WEIGHT = 1000.0
DEFAULT_BURST_S = 10.0
MAX_IDLE_TENANTS = 4096

FIRST_INTERVAL_S = 1.0
MIN_RETRY_AFTER_S = 0.1
MAX_CONCURRENCY_RETRY_S = 60.0
INTERVAL_LEARNING_RATE = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """What a tenant may do.

    Attributes:
        weight: its share of the cluster, to that of others.
        max_concurrent: requests at a time, waiting ones too; None: any number.
        tokens_per_s: prompts and answers together; None: any rate.
        burst_tokens: how far it may exceed the rate for a moment. None: what the rate allows in 10 s.
        max_priority: the highest class that it may ask for.

    Raises:
        ValueError: a value out of its range; the message names the tenant and the field.
    """

    name: str
    weight: float = 1.0
    max_concurrent: int | None = None
    tokens_per_s: float | None = None
    burst_tokens: int | None = None
    max_priority: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^\s\x00-\x1f\x7f]{1,128}", self.name):
            raise ValueError(f"{self.name!r} is no tenant's name: up to 128 characters without spaces")
        if not 0 < self.weight <= MAX_WEIGHT:
            raise self._wrong("weight", f"above 0 and at most {MAX_WEIGHT:g}")
        for field in ("max_concurrent", "tokens_per_s", "burst_tokens"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise self._wrong(field, "above 0, or left out")
        if self.burst_tokens is not None and self.tokens_per_s is None:
            raise self._wrong("burst_tokens", "given together with tokens_per_s")
        if not 0 <= self.max_priority <= MAX_PRIORITY:
            raise self._wrong("max_priority", f"from 0 to {MAX_PRIORITY}")

    def priority(self, asked: int) -> int:
        """The class that a request gets which asks for `asked`: at most what the tenant may ask for."""
        return min(max(asked, 0), self.max_priority)

    @property
    def bucket_tokens(self) -> float:
        """What its bucket holds when full; without a rate it has none."""
        if self.tokens_per_s is None:
            return math.inf
        return self.burst_tokens if self.burst_tokens is not None else self.tokens_per_s * DEFAULT_BURST_S

    def _wrong(self, field: str, expected: str) -> ValueError:
        return ValueError(f"{field} of tenant {self.name!r} is {getattr(self, field)}; it must be {expected}")


OPEN_TENANT = Tenant(name=DEFAULT_TENANT, max_priority=MAX_PRIORITY)
"""Everybody, where no tenants are configured: alone, it may order its own requests as it likes."""


class RefusalCause(StrEnum):
    """Which limit of the tenant stands in the way."""

    TENANT_CONCURRENCY = "TENANT_CONCURRENCY"
    TENANT_RATE = "TENANT_RATE"


@dataclass(frozen=True, slots=True)
class TenantRefusal:
    """The tenant has used up what it may: RESOURCE_EXHAUSTED.

    `retry_after_s` is exact for the rate, if nothing else is asked for meanwhile; for the concurrency it is
    when one of the tenant's requests is likely to end.
    """

    cause: RefusalCause
    message: str
    retry_after_s: float


@dataclass(slots=True)
class _Usage:
    """`level`: tokens in the bucket at `filled_s`."""

    level: float
    filled_s: float
    num_running: int = 0
    last_end_s: float | None = None
    end_interval_s: float = FIRST_INTERVAL_S


class TenantLimits:
    """Counts what tenants use. A tenant that is not configured has the limits of `default`, by itself; left out,
    those are no limits, and priorities only where no tenant at all is configured."""

    def __init__(self, tenants: Mapping[str, Tenant], default: Tenant | None = None) -> None:
        self._tenants = dict(tenants)
        self._default = default or (Tenant(name=DEFAULT_TENANT) if tenants else OPEN_TENANT)
        self._usage: dict[str, _Usage] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._like_default = lru_cache(MAX_IDLE_TENANTS)(partial(replace, self._default))

    def tenant(self, name: str) -> Tenant:
        """What the tenant of that name may do."""
        return self._tenants.get(name) or self._like_default(name=name)

    def num_running(self, name: str) -> int:
        """Requests of the tenant that were admitted and have not finished."""
        usage = self._usage.get(name)
        return usage.num_running if usage is not None else 0

    def admit(self, name: str, num_tokens: int, now: float) -> TenantRefusal | None:
        """Lets a request in with `num_tokens` of prompt, or says why not. What is let in must be `finished`
        once, or `withdrawn`.

        Raises:
            ValueError: `num_tokens` is not positive.
        """
        if num_tokens < 1:
            raise ValueError(f"a request weighs at least one token, not {num_tokens}")
        tenant = self.tenant(name)
        usage = self._filled(tenant, now)
        refusal = _too_many(tenant, usage, now) or _too_fast(tenant, usage, num_tokens)
        if refusal is None:
            usage.num_running += 1
            usage.level -= num_tokens
        self._settle(name, usage)
        return refusal

    def finished(self, name: str, now: float, num_answer_tokens: int = 0) -> None:
        """An admitted request has ended, with so many tokens of answer.

        Raises:
            ValueError: none of the tenant's is running.
        """
        usage = self._end(name, now)
        usage.level -= num_answer_tokens
        if usage.last_end_s is not None:
            interval_s = max(0.0, now - usage.last_end_s)
            usage.end_interval_s += INTERVAL_LEARNING_RATE * (interval_s - usage.end_interval_s)
        usage.last_end_s = now
        self._settle(name, usage)

    def withdrawn(self, name: str, num_tokens: int, now: float) -> None:
        """An admitted request was refused elsewhere before anything was done for it: it is as if it had not
        been. Raises as `finished`."""
        usage = self._end(name, now)
        usage.level = min(usage.level + num_tokens, self.tenant(name).bucket_tokens)
        self._settle(name, usage)

    def _filled(self, tenant: Tenant, now: float) -> _Usage:
        usage = self._usage.get(tenant.name)
        if usage is None:
            usage = self._usage[tenant.name] = _Usage(tenant.bucket_tokens, now)
        if tenant.tokens_per_s is not None:
            gained = max(0.0, now - usage.filled_s) * tenant.tokens_per_s
            usage.level = min(usage.level + gained, tenant.bucket_tokens)
        usage.filled_s = max(usage.filled_s, now)
        return usage

    def _end(self, name: str, now: float) -> _Usage:
        if not self.num_running(name):
            raise ValueError(f"tenant {name!r} has no request that could end")
        usage = self._filled(self.tenant(name), now)
        usage.num_running -= 1
        return usage

    def _settle(self, name: str, usage: _Usage) -> None:
        """Bounds how many idle tenants are remembered; the one idle for longest is forgotten first."""
        self._idle.pop(name, None)
        if usage.num_running:
            return
        self._idle[name] = None
        if len(self._idle) > MAX_IDLE_TENANTS:
            forgotten, _ = self._idle.popitem(last=False)
            del self._usage[forgotten]


def _too_many(tenant: Tenant, usage: _Usage, now: float) -> TenantRefusal | None:
    limit = tenant.max_concurrent
    if limit is None or usage.num_running < limit:
        return None
    since_s = now - usage.last_end_s if usage.last_end_s is not None else 0.0
    return TenantRefusal(
        RefusalCause.TENANT_CONCURRENCY,
        f"tenant {tenant.name} has {usage.num_running} requests, of {limit} that it may have at a time",
        min(max(usage.end_interval_s - since_s, MIN_RETRY_AFTER_S), MAX_CONCURRENCY_RETRY_S),
    )


def _too_fast(tenant: Tenant, usage: _Usage, num_tokens: int) -> TenantRefusal | None:
    if tenant.tokens_per_s is None:
        return None
    needed = min(num_tokens, tenant.bucket_tokens)
    missing = needed - usage.level
    if missing <= 1e-6 * needed:  # what rounding leaves when the bucket filled just so far
        return None
    return TenantRefusal(
        RefusalCause.TENANT_RATE,
        f"tenant {tenant.name} may use {tenant.tokens_per_s:g} tokens per second; "
        f"{num_tokens} more are too many now",
        missing / tenant.tokens_per_s,
    )
