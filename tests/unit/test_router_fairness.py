"""Tenants that always have somebody waiting are served by their weights; idleness earns nothing."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.queue import ANSWER_TOKEN_PRICE, TokenQueue

pytestmark = pytest.mark.unit

LARGEST = 50
WEIGHTS = st.lists(st.floats(0.1, 100), min_size=2, max_size=6)


class Backlog:
    """Keeps five requests waiting for every tenant in it, and counts what is served."""

    def __init__(self, weights, seed=0):
        self.queue = TokenQueue(1 << 30)
        self.weights = weights
        self.random = random.Random(seed)
        self.served = dict.fromkeys(weights, 0.0)
        self.num_keys = 0
        for tenant in weights:
            for _ in range(5):
                self.offer(tenant)

    def offer(self, tenant, priority=0):
        self.num_keys += 1
        size = self.random.randint(1, LARGEST)
        weight = self.weights[tenant]
        assert self.queue.offer(self.num_keys, size, 1e9, 0.0, tenant, priority, weight) is None

    def take(self, answer_tokens=0):
        entry = self.queue.take(0.0)
        self.queue.served(entry.tenant, answer_tokens, entry.priority)
        self.served[entry.tenant] += entry.num_tokens + answer_tokens * ANSWER_TOKEN_PRICE
        return entry.tenant

    def run(self, num_requests, answer_tokens=lambda tenant: 0):
        for _ in range(num_requests):
            tenant = self.queue.head().tenant
            self.offer(self.take(answer_tokens(tenant)))

    def share(self, tenant):
        """Of what was served, to its weight: 1 is exactly its own."""
        total, weight = sum(self.served.values()), sum(self.weights.values())
        return self.served[tenant] / total * weight / self.weights[tenant]


@given(WEIGHTS, st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_no_tenant_is_more_than_a_request_ahead_of_another(weights, seed):
    backlog = Backlog({str(number): weight for number, weight in enumerate(weights)}, seed)
    for _ in range(10):
        backlog.run(30)
        # Sheng et al., lemma 4.3: the counts differ by no more than one request's worth.
        counts = [backlog.served[tenant] / weight for tenant, weight in backlog.weights.items()]
        assert max(counts) - min(counts) <= LARGEST / min(weights) + 1e-6


@given(WEIGHTS)
@settings(deadline=None, max_examples=15)
def test_answers_count_as_service(weights):
    backlog = Backlog({str(number): weight for number, weight in enumerate(weights)})
    dearest = LARGEST + ANSWER_TOKEN_PRICE * 20 * len(weights)
    for _ in range(10):
        backlog.run(30, answer_tokens=lambda tenant: 20 * int(tenant))
        counts = [backlog.served[tenant] / weight for tenant, weight in backlog.weights.items()]
        assert max(counts) - min(counts) <= dearest / min(weights) + 1e-6


def test_in_the_long_run_shares_are_weights():
    backlog = Backlog({"a": 1, "b": 2, "c": 4})
    backlog.run(2000)
    assert all(backlog.share(tenant) == pytest.approx(1, rel=0.02) for tenant in "abc")


def test_who_was_idle_gets_no_more_than_its_share_afterwards():
    backlog = Backlog({"a": 1, "b": 1})
    while any(entry.tenant == "b" for entry in backlog.queue._entries.values()):
        backlog.take()
    for _ in range(200):
        backlog.offer("a")
        backlog.take()
    backlog.served = {"a": 0.0, "b": 0.0}
    for _ in range(5):
        backlog.offer("b")
    for _ in range(5):
        backlog.offer("a")
    backlog.run(20)
    assert abs(backlog.served["a"] - backlog.served["b"]) <= 2 * LARGEST


def test_who_used_an_idle_cluster_is_not_punished_for_it():
    backlog = Backlog({"a": 1, "b": 1})
    while len(backlog.queue):
        backlog.take()
    for _ in range(200):  # nobody else is there
        backlog.offer("a")
        backlog.take()
    for tenant in "ab" * 5:
        backlog.offer(tenant)
    backlog.served = {"a": 0.0, "b": 0.0}
    backlog.run(20)
    assert abs(backlog.served["a"] - backlog.served["b"]) <= 2 * LARGEST


def test_a_higher_class_goes_first_and_is_shared_by_itself():
    backlog = Backlog({"a": 1, "b": 3})
    for _ in range(40):
        backlog.offer("a", priority=1)
        backlog.offer("b", priority=1)
    for _ in range(20):
        assert backlog.queue.head().priority == 1
        backlog.take()
        counts = {tenant: backlog.served[tenant] / backlog.weights[tenant] for tenant in "ab"}
        assert abs(counts["a"] - counts["b"]) <= LARGEST
    assert min(counts.values()) > 0
    while backlog.queue.head().priority == 1:
        backlog.take()
    assert len(backlog.queue) == 10


def test_a_request_that_came_back_is_next_again_and_is_not_charged_twice():
    backlog = Backlog({"a": 1, "b": 1, "c": 1})
    backlog.run(50)
    entry = backlog.queue.take(0.0)
    counts = {line.tenant: line.service for line in backlog.queue._classes[0].lines.values()}
    for _ in range(100):
        backlog.queue.put_back(entry)
        assert backlog.queue.head().key == entry.key
        entry = backlog.queue.take(0.0)
    assert counts == {line.tenant: line.service for line in backlog.queue._classes[0].lines.values()}


def test_one_that_comes_back_late_gives_its_tenant_no_credit():
    backlog = Backlog({"a": 1, "b": 1})
    late = backlog.queue.take(0.0)
    other = "b" if late.tenant == "a" else "a"
    backlog.offer(late.tenant)
    backlog.run(400)
    backlog.queue.put_back(late)
    assert backlog.take() == late.tenant
    before = dict(backlog.served)
    backlog.run(40)
    gained = {tenant: backlog.served[tenant] - before[tenant] for tenant in "ab"}
    assert abs(gained[late.tenant] - gained[other]) <= 3 * LARGEST
