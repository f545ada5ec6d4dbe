"""The block pool keeps every block in one place, whatever happens to it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.pool import BlockPool

pytestmark = pytest.mark.unit


def keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_opening_pins_the_cached_prefix_and_takes_the_rest() -> None:
    pool = BlockPool(4, 16)
    pool.open(b"a", [], 2)
    pool.seal(b"a", b"k0")
    assert pool.open(b"b", keys("k0", "k1"), 3) == 1
    assert pool.blocks(b"b")[0] == pool.blocks(b"a")[0]
    assert pool.stats().pins == 2


def test_opening_beyond_what_is_left_changes_nothing() -> None:
    pool = BlockPool(4, 16)
    pool.open(b"a", [], 2)
    before = pool.stats()
    assert pool.open(b"b", [], 3) is None
    assert pool.open(b"b", [], 2, spare=1) is None
    assert pool.stats() == before


def test_an_unpinned_prefix_is_not_counted_as_room_for_its_own_rest() -> None:
    pool = BlockPool(2, 16)
    pool.open(b"a", [], 2)
    pool.seal(b"a", b"k0")
    pool.seal(b"a", b"k1")
    pool.close(b"a")
    assert pool.open(b"b", keys("k0"), 3) is None
    assert pool.open(b"b", keys("k0"), 2) == 1
    pool.check()


def test_closing_keeps_keyed_blocks_cached_and_evicts_the_deepest_first() -> None:
    pool = BlockPool(3, 16)
    pool.open(b"a", [], 3)
    for name in ("k0", "k1", "k2"):
        pool.seal(b"a", name.encode())
    assert pool.close(b"a") == []
    assert pool.lookup(keys("k0", "k1", "k2")) == 3
    pool.open(b"b", [], 1)
    assert pool.lookup(keys("k0", "k1", "k2")) == 2


def test_closing_and_forgetting_drops_what_nobody_else_pins() -> None:
    pool = BlockPool(3, 16)
    pool.open(b"a", [], 2)
    pool.seal(b"a", b"k0")
    pool.seal(b"a", b"k1")
    pool.open(b"b", keys("k0"), 1)
    assert len(pool.close(b"a", forget=True)) == 1
    assert pool.lookup(keys("k0", "k1")) == 1
    pool.check()


def test_a_second_block_with_the_same_key_stays_private() -> None:
    pool = BlockPool(2, 16)
    for owner in (b"a", b"b"):
        pool.open(owner, [], 1)
        pool.seal(owner, b"k0")
    assert pool.stats().cached == 1
    assert pool.stats().private == 1
    assert len(pool.close(b"b")) == 1


def test_a_fork_shares_cached_blocks_and_owns_its_tail() -> None:
    pool = BlockPool(8, 16)
    pool.open(b"a", [], 3)
    pool.seal(b"a", b"k0")
    pool.seal(b"a", b"k1")
    assert pool.fork(b"a", b"b", num_tokens=40) == (2, 3)
    assert pool.blocks(b"b")[:2] == pool.blocks(b"a")[:2]
    assert pool.blocks(b"b")[2] != pool.blocks(b"a")[2]


class PoolMachine(RuleBasedStateMachine):
    """Random owners open, grow, seal, fork and close; the pool's own check must hold throughout."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.owners: set[bytes] = set()
        self.serial = 0

    def _fresh(self) -> bytes:
        self.serial += 1
        return b"owner-%d" % self.serial

    @rule(num_keys=st.integers(0, 3), extra=st.integers(0, 3), spare=st.integers(0, 2))
    def open(self, num_keys: int, extra: int, spare: int) -> None:
        owner = self._fresh()
        names = [b"key-%d" % index for index in range(num_keys)]
        available = self.pool.num_available
        hit = self.pool.open(owner, names, num_keys + extra, spare)
        if hit is None:
            assert self.pool.num_available == available
        else:
            assert len(self.pool.blocks(owner)) == num_keys + extra
            assert self.pool.num_available >= spare
            self.owners.add(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), extra=st.integers(0, 4))
    def grow(self, data: st.DataObject, extra: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        before = len(self.pool.blocks(owner))
        grown = self.pool.grow(owner, before + extra)
        assert len(self.pool.blocks(owner)) == (before + extra if grown else before)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        index = len(self.pool.keys(owner))
        if index < len(self.pool.blocks(owner)):
            self.pool.seal(owner, b"key-%d" % index)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.owners)))
        num_tokens = data.draw(st.integers(0, len(self.pool.blocks(source)) * 4))
        owner = self._fresh()
        if self.pool.fork(source, owner, num_tokens) is not None:
            self.owners.add(owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), forget=st.booleans())
    def close(self, data: st.DataObject, forget: bool) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        self.owners.remove(owner)
        self.pool.close(owner, forget)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for owner in self.owners:
                self.pool.close(owner)
            stats = self.pool.stats()
            assert (stats.private, stats.pins, stats.owners) == (0, 0, 0)
            assert stats.available == stats.total


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
