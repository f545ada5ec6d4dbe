"""What a tier of bounded size keeps: limits held exactly, pins, and no way to evict into another tenant's share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.tiers.index import NoRoom, TierIndex
from tests.tier_blocks import ALICE, BOB, CAROL

pytestmark = pytest.mark.unit


def admit(index: TierIndex[str], name: str, tenant: bytes, num_bytes: int) -> tuple[str, ...] | NoRoom:
    plan = index.plan(tenant, num_bytes)
    if plan.refused is not None:
        return plan.refused
    for victim in plan.evict:
        index.remove(victim)
    index.insert(name, tenant, num_bytes)
    return plan.evict


def test_the_least_recently_used_goes_first() -> None:
    index: TierIndex[str] = TierIndex(30)
    for name in "abc":
        admit(index, name, ALICE, 10)
    index.touch("a")
    assert admit(index, "d", ALICE, 15) == ("b", "c")
    assert index.used_bytes == 25


def test_a_pinned_item_stays_and_what_cannot_fit_beside_it_is_refused() -> None:
    index: TierIndex[str] = TierIndex(30)
    admit(index, "a", ALICE, 20)
    index.pin("a")
    assert admit(index, "b", ALICE, 20) is NoRoom.PINNED
    assert admit(index, "c", ALICE, 31) is NoRoom.TOO_LARGE
    index.unpin("a")
    assert admit(index, "b", ALICE, 20) == ("a",)


def test_a_tenant_above_its_quota_evicts_its_own() -> None:
    index: TierIndex[str] = TierIndex(100, quota_bytes=40)
    admit(index, "b", BOB, 30)
    admit(index, "a1", ALICE, 20)
    admit(index, "a2", ALICE, 20)
    assert admit(index, "a3", ALICE, 20) == ("a1",)
    assert index.tenants == {ALICE: 40, BOB: 30}


def test_a_tenant_within_its_share_takes_room_back_from_one_that_borrowed_it() -> None:
    index: TierIndex[str] = TierIndex(100)
    for number in range(10):
        admit(index, f"a{number}", ALICE, 10)
    assert admit(index, "b0", BOB, 10) == ("a0",)
    for number in range(1, 5):
        admit(index, f"b{number}", BOB, 10)
    assert index.tenants == {ALICE: 50, BOB: 50}


def test_a_tenant_at_its_share_loses_nothing_to_one_that_writes_without_end() -> None:
    index: TierIndex[str] = TierIndex(100)
    for number in range(5):
        admit(index, f"b{number}", BOB, 10)
    for number in range(100):
        admit(index, f"a{number}", ALICE, 10)
    assert index.tenants == {ALICE: 50, BOB: 50}
    assert all(f"b{number}" in index for number in range(5))


def test_a_third_tenant_gets_in_although_no_share_is_exceeded_by_a_whole_item() -> None:
    index: TierIndex[str] = TierIndex(100)
    admit(index, "a", ALICE, 50)
    admit(index, "b", BOB, 50)
    assert admit(index, "c", CAROL, 30) == ("a",)


def test_what_others_hold_within_their_shares_is_told_from_what_is_pinned() -> None:
    index: TierIndex[str] = TierIndex(100)
    admit(index, "b", BOB, 50)
    assert admit(index, "a", ALICE, 60) is NoRoom.SHARES


def test_adopted_items_beyond_the_limit_are_named() -> None:
    index: TierIndex[str] = TierIndex(25, quota_bytes=20)
    for name, tenant in (("a", ALICE), ("b", ALICE), ("c", BOB), ("d", ALICE)):
        index.adopt(name, tenant, 10)
    assert index.excess() == ("a", "b")


class IndexMachine(RuleBasedStateMachine):
    """Random admissions, uses and pins of four tenants, beside a plain list of what is held."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.index: TierIndex[int] = TierIndex(1000, quota_bytes=600)
        self.held: dict[int, tuple[bytes, int]] = {}
        self.pins: dict[int, int] = {}
        self.next = 0

    @rule(
        target=names, tenant=st.sampled_from([ALICE, BOB, CAROL, b"dave".ljust(16)]), size=st.integers(1, 700)
    )
    def bring(self, tenant: bytes, size: int) -> int:
        share = self.index.share_bytes(tenant)
        before = self.index.tenants
        plan = self.index.plan(tenant, size)
        assert self.index.tenants == before  # a plan changes nothing
        self.next += 1
        if plan.refused is not None:
            assert not plan.evict
            free_of_pins = not self.pins and before.get(tenant, 0) + size <= share
            assert not free_of_pins, "a tenant within its share was refused though nothing is pinned"
            return self.next
        assert not set(plan.evict) & set(self.pins)
        for victim in plan.evict:
            owner, victim_bytes = self.held.pop(victim)
            within = before.get(tenant, 0) + size <= share
            if owner != tenant:
                assert before[owner] > share, "a tenant within its share lost an item to another"
                assert within or before[owner] - victim_bytes >= share
            before[owner] -= victim_bytes
            self.index.remove(victim)
        self.index.insert(self.next, tenant, size)
        self.held[self.next] = (tenant, size)
        return self.next

    @rule(name=names)
    def use(self, name: int) -> None:
        if name in self.held:
            self.index.touch(name)

    @rule(name=names)
    def pin(self, name: int) -> None:
        if name in self.held:
            self.index.pin(name)
            self.pins[name] = self.pins.get(name, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.pins[name] -= 1
        assert self.index.unpin(name) == self.pins[name]
        if not self.pins[name]:
            del self.pins[name]

    @rule(name=names)
    def drop(self, name: int) -> None:
        if name in self.held and name not in self.pins:
            self.index.remove(name)
            del self.held[name]

    @invariant()
    def limits_hold_and_the_books_agree(self) -> None:
        sums: dict[bytes, int] = {}
        for tenant, size in self.held.values():
            sums[tenant] = sums.get(tenant, 0) + size
        assert self.index.tenants == sums
        assert self.index.used_bytes == sum(sums.values()) <= 1000
        assert max(sums.values(), default=0) <= 600
        assert all(name in self.index for name in self.pins)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
