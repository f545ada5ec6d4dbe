"""The router's queue against a plain list that is searched anew for whoever is next."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.queue import (
    ANSWER_TOKEN_PRICE,
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    RESERVE_PART,
    Entry,
    Full,
    TokenQueue,
)

pytestmark = pytest.mark.unit

MAX_TOKENS = 100
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 4.0}
LARGEST = 150


@dataclass
class Waiting:
    """`start`: the count at which it was taken, None while it has not been."""

    key: int
    num_tokens: int
    deadline: float
    tenant: str
    priority: int
    start: float | None = None

    @property
    def line(self):
        return self.priority, self.tenant


class NaiveQueue:
    """The rules of `fair_class` and of the bound, word by word; every answer is a search through all."""

    def __init__(self):
        self.waiting: list[Waiting] = []
        self.service: dict[tuple[int, str], float] = {}
        self.virtual: dict[int, float] = {}
        self.left_last: dict[int, tuple[int, str]] = {}
        self.seen: set[str] = set()

    def tokens(self, tenant=None):
        return sum(each.num_tokens for each in self.waiting if tenant in (None, each.tenant))

    def has_room(self, tenant, num_tokens):
        self.seen.add(tenant)
        if not self.waiting:
            return True
        if not self.tokens(tenant):
            return self.tokens() < MAX_TOKENS * (1 + RESERVE_PART)
        part = MAX_TOKENS * WEIGHTS[tenant] / sum(WEIGHTS[each] for each in self.seen)
        return self.tokens(tenant) + num_tokens <= part + 1e-6 and self.tokens() + num_tokens <= MAX_TOKENS

    def put(self, each):
        if not any(other.line == each.line for other in self.waiting):
            self.service[each.line] = max(self.service.get(each.line, 0.0), self.floor(each.priority))
        self.waiting.append(each)

    def floor(self, priority):
        turns = [self.turn(line) for line in {e.line for e in self.waiting if e.priority == priority}]
        idle = self.service[self.left_last[priority]] if priority in self.left_last else 0.0
        return max(self.virtual.get(priority, 0.0), min(turns)[0] if turns else idle)

    def first_of(self, line):
        return min((e for e in self.waiting if e.line == line), key=lambda e: (e.deadline, e.key))

    def turn(self, line):
        first = self.first_of(line)
        return (self.service[line] if first.start is None else first.start), first.key

    def head(self):
        if not self.waiting:
            return None
        highest = max(each.priority for each in self.waiting)
        lines = {each.line for each in self.waiting if each.priority == highest}
        return self.first_of(min(lines, key=self.turn))

    def drop(self, each):
        self.waiting.remove(each)
        if not any(other.line == each.line for other in self.waiting):
            self.left_last[each.priority] = each.line

    def take(self):
        each = self.head()
        count = self.turn(each.line)[0]
        self.virtual[each.priority] = max(self.virtual.get(each.priority, 0.0), count)
        if each.start is None:
            self.service[each.line] += each.num_tokens / WEIGHTS[each.tenant]
        each.start = count
        self.drop(each)
        return each


class QueueMachine(RuleBasedStateMachine):
    """`self.out` is what was taken and may come back, as the queue gave it and as the model has it."""

    def __init__(self):
        super().__init__()
        self.queue = TokenQueue(MAX_TOKENS)
        self.model = NaiveQueue()
        self.out: list[tuple[Entry, Waiting]] = []
        self.now = 0.0
        self.num_keys = 0

    @rule(
        num_tokens=st.integers(1, LARGEST) | st.integers(1, 20),
        tenant=st.sampled_from(sorted(WEIGHTS)),
        priority=st.integers(0, 2),
        patience_s=st.sampled_from([1.0, 5.0, 100.0]),
    )
    def offer(self, num_tokens, tenant, priority, patience_s):
        key = self.num_keys
        each = Waiting(key, num_tokens, self.now + patience_s, tenant, priority)
        held, total = self.model.tokens(tenant), self.model.tokens()
        has_room = self.model.has_room(tenant, num_tokens)
        answer = self.queue.offer(key, num_tokens, each.deadline, self.now, tenant, priority, WEIGHTS[tenant])
        if has_room:
            assert answer is None
            self.model.put(each)
            self.num_keys += 1
        else:
            assert isinstance(answer, Full)
            assert answer.queued_tokens == (held if answer.tenant else total)
            assert answer.tenant in ("", tenant)
            assert MIN_RETRY_AFTER_S <= answer.retry_after_s <= MAX_RETRY_AFTER_S
            assert key not in self.queue

    @precondition(lambda self: self.model.waiting)
    @rule()
    def take(self):
        taken, expected = self.queue.take(self.now), self.model.take()
        assert (taken.key, taken.num_tokens, taken.deadline, taken.start) == (
            expected.key,
            expected.num_tokens,
            expected.deadline,
            expected.start,
        )
        self.out.append((taken, expected))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_back(self, data):
        taken, each = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.queue.put_back(taken)
        self.model.put(each)

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data())
    def remove(self, data):
        each = data.draw(st.sampled_from(self.model.waiting))
        self.model.drop(each)
        assert self.queue.remove(each.key)
        assert not self.queue.remove(each.key)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), num_tokens=st.integers(1, 50))
    def answer(self, data, num_tokens):
        taken, each = data.draw(st.sampled_from(self.out))
        self.queue.served(taken.tenant, num_tokens, taken.priority)
        self.model.service[each.line] += num_tokens * ANSWER_TOKEN_PRICE / WEIGHTS[each.tenant]

    @rule()
    def expire(self):
        late = sorted(
            (e for e in self.model.waiting if e.deadline <= self.now), key=lambda e: (e.deadline, e.key)
        )
        for each in late:
            self.model.drop(each)
        assert [entry.key for entry in self.queue.expired(self.now)] == [each.key for each in late]

    @rule(seconds=st.floats(0, 0.5))
    def pass_time(self, seconds):
        self.now += seconds

    @invariant()
    def holds_what_it_should(self):
        assert len(self.queue) == len(self.model.waiting)
        assert self.queue.queued_tokens == self.model.tokens()
        assert all(each.key in self.queue for each in self.model.waiting)
        head, expected = self.queue.head(), self.model.head()
        assert (head.key if head else None) == (expected.key if expected else None)

    @invariant()
    def keeps_its_bound(self):
        returned = sum(each.num_tokens for each in self.model.waiting if each.start is not None)
        assert self.queue.queued_tokens - returned <= MAX_TOKENS * (1 + RESERVE_PART) + LARGEST


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(deadline=None, max_examples=80, stateful_step_count=40)


def test_an_empty_line_takes_a_request_larger_than_the_bound():
    queue = TokenQueue(10)
    assert queue.offer("large", 50, deadline=1, now=0) is None
    assert isinstance(queue.offer("small", 1, deadline=1, now=0), Full)


def test_a_tenant_alone_may_use_all_and_one_that_comes_still_finds_room():
    queue = TokenQueue(100)
    for number in range(10):
        assert queue.offer(number, 10, deadline=99, now=0, tenant="a") is None
    assert queue.offer("more", 1, deadline=99, now=0, tenant="a") == Full(100, 100, 1.0)
    assert queue.offer("b", 30, deadline=99, now=0, tenant="b") is None
    assert queue.offer("b2", 1, deadline=99, now=0, tenant="b") == Full(130, 100, 1.0)
    assert queue.offer("a2", 1, deadline=99, now=0, tenant="a") == Full(100, 50, 1.0, tenant="a")
    assert queue.offer("c", 1, deadline=99, now=0, tenant="c").queued_tokens == 130
    # As the line moves, room is for those who hold less than their part.
    while queue.queued_tokens > 60:
        queue.take(now=1)
    held = sum(10 for number in range(10) if number in queue)
    assert held > 40
    assert queue.offer("a3", 10, deadline=99, now=1, tenant="a").tenant == "a"
    assert queue.offer("b3", 10, deadline=99, now=1, tenant="b") is None


def test_who_was_idle_for_long_takes_no_part():
    queue = TokenQueue(100)
    queue.offer("b", 1, deadline=99, now=0, tenant="b")
    queue.take(now=0)
    queue.offer("a", 40, deadline=99, now=10, tenant="a")
    assert queue.offer("a2", 20, deadline=99, now=10, tenant="a") == Full(40, 50, 1.0, tenant="a")
    assert queue.offer("a2", 20, deadline=99, now=31, tenant="a") is None


def test_a_message_says_whose_part_is_full():
    assert Full(9, 10, 1.0).reason == "9 of 10 prompt tokens that may wait are waiting"
    assert "for tenant a are waiting" in Full(9, 10, 1.0, tenant="a").reason


def test_the_time_to_come_back_follows_the_rate_at_which_the_line_moves():
    queue = TokenQueue(100)
    for second in range(11):
        queue.offer(second, 20, deadline=99, now=second)
        if second:
            queue.take(now=second)
    queue.offer("waiting", 80, deadline=99, now=10)
    full = queue.offer("late", 40, deadline=99, now=10)
    assert full == Full(queued_tokens=100, max_tokens=100, retry_after_s=pytest.approx(2.0))
    queue.offer("b", 1, deadline=99, now=10, tenant="b", weight=3.0)
    part = queue.offer("late", 5, deadline=99, now=10)  # 80 too many, and a quarter of the rate
    assert part == Full(100, 25, pytest.approx(16.0), tenant="default")


def test_what_came_back_was_not_served():
    queue = TokenQueue(1000)
    for number in range(20):
        queue.offer(number, 10, deadline=99, now=0)
    for second in range(1, 11):
        entry = queue.take(now=second)
        queue.put_back(entry)
    assert queue.service_rate is None
    for second in range(11, 21):
        queue.take(now=second)
    assert queue.service_rate < 10


def test_time_in_which_nobody_waited_says_nothing_of_the_rate():
    queue = TokenQueue(1000)
    for second in range(0, 1000, 100):  # two come at once, and one of them waits for the other
        for _ in range(2):
            queue.offer((second, _), 50, deadline=9999, now=second)
        queue.take(now=second)
        queue.take(now=second + 5)
    assert queue.service_rate == pytest.approx(10.0)


def test_the_earliest_deadline_of_a_tenant_is_first():
    queue = TokenQueue(1000)
    for key, deadline in (("patient", 50), ("urgent", 5), ("later", 5), ("middle", 20)):
        queue.offer(key, 10, deadline, now=0)
    assert [queue.take(1).key for _ in range(4)] == ["urgent", "later", "middle", "patient"]


def test_many_requests_and_tenants_are_no_matter():
    queue = TokenQueue(1 << 40)
    for number in range(10_000):
        assert queue.offer(number, 10, deadline=number, now=0, tenant=f"t{number % 1000}") is None
    first = [queue.take(1).tenant for _ in range(1000)]
    assert len(set(first)) == 1000
    assert [entry.key for entry in queue.expired(now=5000)] == list(range(1000, 5001))
    while queue.head() is not None:
        queue.take(5000)
    assert (len(queue), queue.queued_tokens, queue.num_active_tenants) == (0, 0, 1000)
    queue.offer("last", 1, deadline=9999, now=5100)
    assert queue.num_active_tenants == 1


def test_misuse_is_refused():
    queue = TokenQueue(10)
    queue.offer("a", 1, deadline=1, now=0)
    with pytest.raises(ValueError, match="queued already"):
        queue.offer("a", 1, deadline=1, now=0)
    with pytest.raises(ValueError, match="at least one token"):
        queue.offer("b", 0, deadline=1, now=0)
    with pytest.raises(ValueError, match="weight of tenant 'x'"):
        queue.offer("b", 1, deadline=1, now=0, tenant="x", weight=0)
    entry = queue.take(0)
    queue.put_back(entry)
    with pytest.raises(ValueError, match="queued already"):
        queue.put_back(entry)
    queue.take(0)
    with pytest.raises(LookupError):
        queue.take(0)
    with pytest.raises(ValueError, match="at least one token"):
        TokenQueue(0)
