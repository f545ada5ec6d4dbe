"""The router's queue against a plain list."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.queue import MAX_RETRY_AFTER_S, MIN_RETRY_AFTER_S, Entry, Full, TokenQueue

pytestmark = pytest.mark.unit

MAX_TOKENS = 100


class QueueMachine(RuleBasedStateMachine):
    """`self.line` is what the queue should hold, in order; `self.out` what was taken and may come back."""

    def __init__(self):
        super().__init__()
        self.queue = TokenQueue(MAX_TOKENS)
        self.line: list[Entry] = []
        self.out: list[Entry] = []
        self.now = 0.0
        self.num_keys = 0

    @rule(num_tokens=st.integers(1, 150))
    def offer(self, num_tokens):
        key = self.num_keys
        self.num_keys += 1
        held = sum(entry.num_tokens for entry in self.line)
        answer = self.queue.offer(key, num_tokens, deadline=self.now + 1, now=self.now)
        if self.line and held + num_tokens > MAX_TOKENS:
            assert isinstance(answer, Full)
            assert answer.queued_tokens == held
            assert MIN_RETRY_AFTER_S <= answer.retry_after_s <= MAX_RETRY_AFTER_S
            assert key not in self.queue
        else:
            assert answer is None
            self.line.append(Entry(key, num_tokens, self.now + 1, order=len(self.line) + len(self.out)))

    @precondition(lambda self: self.line)
    @rule()
    def take(self):
        expected = self.line.pop(0)
        taken = self.queue.take(self.now)
        assert (taken.key, taken.num_tokens, taken.deadline) == (
            expected.key,
            expected.num_tokens,
            expected.deadline,
        )
        self.out.append(taken)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def put_back(self, data):
        entry = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.queue.put_back(entry)
        older = sum(1 for waiting in self.line if waiting.key < entry.key)
        self.line.insert(older, entry)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def remove(self, data):
        entry = self.line.pop(data.draw(st.integers(0, len(self.line) - 1)))
        assert self.queue.remove(entry.key)
        assert not self.queue.remove(entry.key)

    @rule(seconds=st.floats(0, 10))
    def pass_time(self, seconds):
        self.now += seconds

    @invariant()
    def holds_what_it_should(self):
        assert len(self.queue) == len(self.line)
        assert self.queue.queued_tokens == sum(entry.num_tokens for entry in self.line)
        head = self.queue.head()
        assert (head.key if head else None) == (self.line[0].key if self.line else None)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_an_empty_line_takes_a_request_larger_than_the_bound():
    queue = TokenQueue(10)
    assert queue.offer("large", 50, deadline=1, now=0) is None
    assert isinstance(queue.offer("small", 1, deadline=1, now=0), Full)


def test_the_time_to_come_back_follows_the_rate_at_which_the_line_moves():
    queue = TokenQueue(100)
    for second in range(11):
        queue.offer(second, 20, deadline=99, now=second)
        queue.take(now=second)
    queue.offer("waiting", 100, deadline=99, now=10)
    full = queue.offer("late", 44, deadline=99, now=10)
    assert full == Full(queued_tokens=100, max_tokens=100, retry_after_s=pytest.approx(2.0))


def test_misuse_is_refused():
    queue = TokenQueue(10)
    queue.offer("a", 1, deadline=1, now=0)
    with pytest.raises(ValueError, match="queued already"):
        queue.offer("a", 1, deadline=1, now=0)
    with pytest.raises(ValueError, match="at least one token"):
        queue.offer("b", 0, deadline=1, now=0)
    entry = queue.take(0)
    queue.put_back(entry)
    with pytest.raises(ValueError, match="queued already"):
        queue.put_back(entry)
    queue.take(0)
    with pytest.raises(LookupError):
        queue.take(0)
    with pytest.raises(ValueError, match="at least one token"):
        TokenQueue(0)
