"""The router's waiting line: bounded in tokens, shared by tenants.

Whose turn it is: a higher priority class is first; within a class the tenant with the least service for its
weight (see `fair_class`); within a tenant the earliest deadline, then the earliest arrival. The head holds back
all that comes after it in that order: what cannot be placed yet is not overtaken by what would take the room
it waits for, so that no large request starves.

The bound is in tokens because that is what a wait costs: a thousand short prompts are soon through, thirty
long ones are not. While others are active (they wait, or were here within `ACTIVE_FOR_S`), a tenant may have
its weight's part of the bound waiting; alone it may have all of it. Nothing that was let in is put out, so one
that comes when the others hold all may find no room within the bound: for tenants with nothing waiting a
reserve of a quarter lies on top. So there never wait more tokens than the bound, its quarter and one request,
beside what was taken and came back.
A tenant with nothing waiting is not held to its part, and an empty queue takes anything: a request larger than
a part, or than the bound, could never come in otherwise.

Knows no clock: `now` and deadlines are monotonic seconds, passed in. Operations take time logarithmic in the
number of requests and tenants.
"""

import bisect
import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from router.core.fair_class import MIN_STALE, Entry, FairClass
from router.core.rates import ServiceRate

__all__ = ["Ahead", "Entry", "Full", "TokenQueue"]

K = TypeVar("K", bound=Hashable)

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0
DEFAULT_RETRY_AFTER_S = 1.0

ANSWER_TOKEN_PRICE = 2.0
"""What an answer's token counts as service, in tokens of prompt: the price that Sheng et al. use."""
ACTIVE_FOR_S = 30.0
"""A tenant that neither waited nor was served for so long is forgotten, with the count of its service."""
MAX_IDLE_TENANTS = 4096
RESERVE_PART = 0.25


@dataclass(frozen=True, slots=True)
class Full:
    """There is no room. `retry_after_s` is when there will be, as the line has moved lately.

    `tenant` empty: the figures are the whole queue's. Else it is the tenant's part that is full.
    """

    queued_tokens: int
    max_tokens: int
    retry_after_s: float
    tenant: str = ""

    @property
    def reason(self) -> str:
        """One sentence for people."""
        whose = f" for tenant {self.tenant}" if self.tenant else ""
        return f"{self.queued_tokens} of {self.max_tokens} prompt tokens that may wait{whose} are waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What a request that comes now would wait for.

    Attributes:
        class_tokens: waiting in its class.
        above_tokens: waiting in higher classes.
        turn_tokens: that its class takes until its turn, by weight alone: if everybody who was active lately
            always had somebody waiting.
        others_rate: tokens per second that other tenants lately brought into its class.
        above_rate: tokens per second that came lately into higher classes.
    """

    class_tokens: int
    above_tokens: int
    turn_tokens: float
    others_rate: float
    above_rate: float


@dataclass(slots=True)
class _Tenant:
    """What the queue knows of one tenant. `priorities`: the classes in which it has a line."""

    weight: float
    last_active_s: float
    queued_tokens: int = 0
    num_entries: int = 0
    priorities: set[int] = field(default_factory=set)


class TokenQueue(Generic[K]):
    """A bounded line of requests, each weighing its prompt's tokens."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"a queue needs room for at least one token, not {max_tokens}")
        self.max_tokens = max_tokens
        self.queued_tokens = 0
        self._entries: dict[K, Entry[K]] = {}
        self._deadlines: list[tuple[float, int, K]] = []
        self._classes: dict[int, FairClass[K]] = {}
        self._open: list[int] = []  # classes in which somebody waits, the highest last
        self._tenants: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()  # nothing waiting, the longest idle first
        self._weight: float | None = 0.0
        self._rate = ServiceRate()
        self._next_order = 0
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    @property
    def service_rate(self) -> float | None:
        """Prompt tokens per second that left the queue while requests waited; None while that is unknown."""
        return self._rate.per_s(self._now)

    @property
    def num_active_tenants(self) -> int:
        """Tenants that wait or were here within `ACTIVE_FOR_S`."""
        return len(self._tenants)

    def offer(
        self,
        key: K,
        num_tokens: int,
        deadline: float,
        now: float,
        tenant: str = "default",
        priority: int = 0,
        weight: float = 1.0,
    ) -> Full | None:
        """Lets a request in, or says why not.

        Raises:
            ValueError: the key is in the line already, or `num_tokens` or `weight` is not positive.
        """
        if key in self._entries:
            raise ValueError(f"{key!r} is queued already")
        if num_tokens < 1:
            raise ValueError(f"a request weighs at least one token, not {num_tokens}")
        if not weight > 0:
            raise ValueError(f"the weight of tenant {tenant!r} must be above 0, not {weight}")
        self._pass_time(now)
        member = self._seen(tenant, weight)
        full = self._refusal(tenant, member, num_tokens)
        if full is not None:
            return full
        entry = Entry(key, num_tokens, deadline, self._next_order, tenant, priority, weight)
        self._next_order += 1
        self._insert(entry)
        group = self._classes[priority]
        group.arrivals.add(num_tokens, self._now)
        group.lines[tenant].arrivals.add(num_tokens, self._now)
        return None

    def head(self) -> Entry[K] | None:
        """The request that is next, left in the line."""
        return self._classes[self._open[-1]].head() if self._open else None

    def take(self, now: float) -> Entry[K]:
        """Takes the head out and charges its prompt to its tenant.

        Raises:
            LookupError: the line is empty.
        """
        self._pass_time(now)
        entry = self.head()
        if entry is None:
            raise LookupError("the queue is empty")
        group = self._classes[entry.priority]
        start = group.begin(group.lines[entry.tenant], entry)
        self._rate.took(entry.order, entry.num_tokens, self._now)
        self._drop(entry)
        return replace(entry, start=start)

    def put_back(self, entry: Entry[K]) -> None:
        """Returns a taken entry to its old place; the bound was passed when it first came, and it is not
        charged again.

        Raises:
            ValueError: the key is in the line already.
        """
        if entry.key in self._entries:
            raise ValueError(f"{entry.key!r} is queued already")
        self._rate.returned(entry.order, entry.num_tokens)
        self._seen(entry.tenant, entry.weight)
        self._insert(entry)

    def entry_of_running(
        self, key: K, num_tokens: int, deadline: float, tenant: str, priority: int, weight: float
    ) -> Entry[K]:
        """For a request that runs already without having waited here: should it have to, `put_back` takes it."""
        entry = Entry(key, num_tokens, deadline, self._next_order, tenant, priority, weight)
        self._next_order += 1
        return entry

    def remove(self, key: K) -> bool:
        """Takes a request out wherever it stands; False if it is not in the line."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._drop(entry)
        return True

    def expired(self, now: float) -> list[Entry[K]]:
        """Takes out all whose deadline has come, the earliest first."""
        self._pass_time(now)
        found: list[Entry[K]] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, key = heapq.heappop(self._deadlines)
            entry = self._entries.get(key)
            if entry is not None and entry.order == order:
                self._drop(entry)
                found.append(entry)
        return found

    def served(self, tenant: str, num_tokens: int, priority: int = 0) -> None:
        """Charges tokens of answers as they come, `ANSWER_TOKEN_PRICE` each. Nothing is kept of a tenant that
        was forgotten since its request was taken."""
        group = self._classes.get(priority)
        line = group.lines.get(tenant) if group is not None else None
        if group is None or line is None:
            return
        group.answered(line, num_tokens * ANSWER_TOKEN_PRICE)
        self._seen(tenant, line.weight)

    def ahead(self, tenant: str = "default", priority: int = 0, weight: float = 1.0) -> Ahead:
        """What a request that comes now would wait for. All that waits of its tenant in its class counts as
        ahead of it, though it may have the earlier deadline."""
        group = self._classes.get(priority) or FairClass()
        line = group.lines.get(tenant)
        own_rate = line.arrivals.per_s(self._now) if line is not None else 0.0
        above = [self._classes[other] for other in self._classes if other > priority]
        return Ahead(
            class_tokens=group.queued_tokens,
            above_tokens=sum(each.queued_tokens for each in above),
            turn_tokens=group.turn_tokens(tenant, weight),
            others_rate=max(0.0, group.arrivals.per_s(self._now) - own_rate),
            above_rate=sum(each.arrivals.per_s(self._now) for each in above),
        )

    # --- the bound ---------------------------------------------------------------------------------------

    def _refusal(self, tenant: str, member: _Tenant, num_tokens: int) -> Full | None:
        total, held = self.queued_tokens, member.queued_tokens
        if not self._entries:
            return None
        if not held and total < self.max_tokens * (1 + RESERVE_PART):
            return None
        share = member.weight / self._active_weight
        part = self.max_tokens * share
        if held and held + num_tokens > part * (1 + 1e-9) and share < 1:
            excess = min(held + num_tokens - part, held)
            return Full(held, int(part), self._time_to_drain_s(excess, share), tenant)
        if total + num_tokens > self.max_tokens:
            excess = min(total + num_tokens - self.max_tokens, total)
            return Full(total, self.max_tokens, self._time_to_drain_s(excess, 1.0))
        return None

    def _time_to_drain_s(self, num_tokens: float, share: float) -> float:
        rate = self.service_rate
        if rate is None:
            return DEFAULT_RETRY_AFTER_S
        return min(max(num_tokens / (rate * share), MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    # --- requests ----------------------------------------------------------------------------------------

    def _insert(self, entry: Entry[K]) -> None:
        group = self._classes.setdefault(entry.priority, FairClass())
        if not group.queued_tokens:
            bisect.insort(self._open, entry.priority)
        group.put(group.line(entry.tenant, entry.weight), entry)
        self._entries[entry.key] = entry
        self.queued_tokens += entry.num_tokens
        heapq.heappush(self._deadlines, (entry.deadline, entry.order, entry.key))
        member = self._tenants[entry.tenant]
        member.queued_tokens += entry.num_tokens
        member.num_entries += 1
        member.priorities.add(entry.priority)
        self._idle.pop(entry.tenant, None)

    def _drop(self, entry: Entry[K]) -> None:
        group = self._classes[entry.priority]
        group.remove(group.lines[entry.tenant], entry)
        if not group.queued_tokens:
            self._open.remove(entry.priority)
        del self._entries[entry.key]
        if not self._entries:
            self._rate.emptied()
        self.queued_tokens -= entry.num_tokens
        if len(self._deadlines) > 2 * len(self._entries) + MIN_STALE:
            self._deadlines = [(e.deadline, e.order, e.key) for e in self._entries.values()]
            heapq.heapify(self._deadlines)
        member = self._tenants[entry.tenant]
        member.queued_tokens -= entry.num_tokens
        member.num_entries -= 1
        self._seen(entry.tenant, member.weight)

    # --- tenants -----------------------------------------------------------------------------------------

    @property
    def _active_weight(self) -> float:
        if self._weight is None:  # summed anew, since differences of floats would drift
            self._weight = sum(member.weight for member in self._tenants.values())
        return self._weight

    def _seen(self, tenant: str, weight: float) -> _Tenant:
        """The tenant's record: it is active now, and has that weight."""
        member = self._tenants.get(tenant)
        if member is None:
            member = self._tenants[tenant] = _Tenant(weight, self._now)
            self._weight = None
        elif member.weight != weight:
            member.weight = weight
            self._weight = None
        member.last_active_s = self._now
        if not member.num_entries:
            self._idle[tenant] = member
            self._idle.move_to_end(tenant)
        return member

    def _pass_time(self, now: float) -> None:
        """Forgets tenants that were idle for long."""
        self._now = max(self._now, now)
        while self._idle:
            tenant, member = next(iter(self._idle.items()))
            if len(self._idle) <= MAX_IDLE_TENANTS and self._now - member.last_active_s < ACTIVE_FOR_S:
                return
            del self._idle[tenant], self._tenants[tenant]
            self._weight = None
            for priority in member.priorities:
                self._forget_line(priority, tenant)

    def _forget_line(self, priority: int, tenant: str) -> None:
        group = self._classes[priority]
        group.forget(tenant)
        if not group.lines:
            del self._classes[priority]
