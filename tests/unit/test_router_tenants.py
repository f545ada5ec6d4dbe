"""What tenants may use: the bucket and the count against a plain reckoning, and exact times to come back."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.tenants import MAX_IDLE_TENANTS, OPEN_TENANT, RefusalCause, Tenant, TenantLimits

pytestmark = pytest.mark.unit

RATE, BURST, AT_A_TIME = 8.0, 64, 3
LIMITED = Tenant(name="a", max_concurrent=AT_A_TIME, tokens_per_s=RATE, burst_tokens=BURST)


class LimitsMachine(RuleBasedStateMachine):
    """Times and rates are binary fractions, so that the model's level is exact."""

    def __init__(self):
        super().__init__()
        self.limits = TenantLimits({"a": LIMITED})
        self.level = float(BURST)
        self.running: list[int] = []
        self.now = 0.0

    @rule(num_tokens=st.integers(1, 2 * BURST))
    def admit(self, num_tokens):
        refusal = self.limits.admit("a", num_tokens, self.now)
        if len(self.running) >= AT_A_TIME:
            assert refusal.cause is RefusalCause.TENANT_CONCURRENCY
            assert 0 < refusal.retry_after_s < math.inf
        elif self.level < min(num_tokens, BURST):
            assert refusal.cause is RefusalCause.TENANT_RATE
            assert refusal.retry_after_s == (min(num_tokens, BURST) - self.level) / RATE
        else:
            assert refusal is None
            self.level -= num_tokens
            self.running.append(num_tokens)

    @precondition(lambda self: self.running)
    @rule(answer=st.integers(0, 100))
    def finish(self, answer):
        self.running.pop()
        self.limits.finished("a", self.now, answer)
        self.level -= answer

    @precondition(lambda self: self.running)
    @rule()
    def withdraw(self):
        num_tokens = self.running.pop()
        self.limits.withdrawn("a", num_tokens, self.now)
        self.level = min(self.level + num_tokens, BURST)

    @rule(eighths=st.integers(0, 100))
    def pass_time(self, eighths):
        self.now += eighths / 8
        self.level = min(self.level + eighths / 8 * RATE, BURST)

    @invariant()
    def counts_what_runs(self):
        assert self.limits.num_running("a") == len(self.running)


TestLimits = LimitsMachine.TestCase
TestLimits.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


@given(st.floats(0.01, 1e6), st.lists(st.integers(1, 10_000), min_size=1, max_size=20), st.floats(0, 1e6))
@settings(deadline=None, max_examples=100)
def test_who_comes_back_when_told_is_let_in_and_not_much_sooner(rate, sizes, now):
    limits = TenantLimits({"a": Tenant(name="a", tokens_per_s=rate)})
    for size in sizes:
        refusal = limits.admit("a", size, now)
        if refusal is not None:
            assert limits.admit("a", size, now + refusal.retry_after_s * 0.99) is not None
            now += refusal.retry_after_s
            assert limits.admit("a", size, now) is None


def test_a_full_bucket_admits_a_prompt_larger_than_itself():
    limits = TenantLimits({"a": LIMITED})
    assert limits.admit("a", 10 * BURST, 0.0) is None
    assert limits.admit("a", 1, 0.0).retry_after_s == (9 * BURST + 1) / RATE


def test_the_time_to_come_back_follows_how_often_requests_end():
    limits = TenantLimits({"a": Tenant(name="a", max_concurrent=2)})
    for second in range(0, 200, 4):
        while limits.admit("a", 1, second) is None:
            pass
        limits.finished("a", second)
    limits.admit("a", 1, 196)
    assert limits.admit("a", 1, 197).retry_after_s == pytest.approx(3, rel=0.05)


def test_tenants_do_not_share_limits():
    limits = TenantLimits({}, default=Tenant(name="any", max_concurrent=1))
    assert limits.admit("x", 1, 0.0) is None
    assert limits.admit("y", 1, 0.0) is None
    assert limits.admit("x", 1, 0.0).cause is RefusalCause.TENANT_CONCURRENCY
    assert limits.tenant("x").name == "x"


def test_idle_tenants_are_forgotten_and_running_ones_are_not():
    limits = TenantLimits({}, default=Tenant(name="any", max_concurrent=1))
    limits.admit("busy", 1, 0.0)
    for number in range(MAX_IDLE_TENANTS + 500):
        limits.admit(f"t{number}", 1, 0.0)
        limits.finished(f"t{number}", 0.0)
    assert len(limits._usage) == MAX_IDLE_TENANTS + 1
    assert limits.num_running("busy") == 1


def test_priorities_are_what_the_tenant_may_have():
    tenant = Tenant(name="a", max_priority=3)
    assert [tenant.priority(asked) for asked in (0, 2, 3, 7, 1 << 31)] == [0, 2, 3, 3, 3]
    # Alone, everybody may order their own requests; beside configured tenants nobody unknown goes first.
    assert TenantLimits({}).tenant("x").max_priority == OPEN_TENANT.max_priority > 0
    assert TenantLimits({"a": tenant}).tenant("x").max_priority == 0


def test_what_was_not_admitted_cannot_end():
    limits = TenantLimits({})
    with pytest.raises(ValueError, match="no request that could end"):
        limits.finished("a", 0.0)
    limits.admit("a", 1, 0.0)
    limits.withdrawn("a", 1, 0.0)
    with pytest.raises(ValueError, match="no request that could end"):
        limits.withdrawn("a", 1, 0.0)
    with pytest.raises(ValueError, match="at least one token"):
        limits.admit("a", 0, 0.0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
        ({"weight": 0}, "weight of tenant 'a'"),
        ({"weight": math.nan}, "weight"),
        ({"weight": 1e9}, "weight"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"tokens_per_s": -1}, "tokens_per_s"),
        ({"tokens_per_s": math.inf}, "tokens_per_s"),
        ({"burst_tokens": 5}, "burst_tokens"),
        ({"max_priority": 10}, "max_priority"),
        ({"max_priority": -1}, "max_priority"),
    ],
)
def test_a_tenant_that_cannot_be_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        Tenant(**({"name": "a"} | wrong))
