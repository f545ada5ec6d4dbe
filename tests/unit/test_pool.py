"""The block pool keeps every block in one place, whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable

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


def lossy(pool: BlockPool, owner: bytes, rank: int, *names: str) -> None:
    """`owner` opened, filled by what landed at `rank`, and sealed under `names`."""
    pool.open(owner, [], len(names))
    pool.worsen(owner, rank)
    for name in names:
        pool.seal(owner, name.encode())


def test_a_lookup_sees_only_ranks_within_its_bound() -> None:
    pool = BlockPool(4, 16)
    lossy(pool, b"a", 1, "k0", "k1")
    assert [pool.lookup(keys("k0", "k1"), bound) for bound in (0, 1, 2)] == [0, 2, 2]
    assert pool.open(b"b", keys("k0", "k1"), 2) == 0


def test_a_key_may_be_cached_at_two_ranks_and_the_better_is_taken() -> None:
    pool = BlockPool(8, 16)
    lossy(pool, b"a", 2, "k0")
    lossy(pool, b"b", 0, "k0")
    assert pool.stats().cached == 2
    pool.open(b"c", keys("k0"), 1, bound=2)
    assert pool.blocks(b"c") == pool.blocks(b"b")
    assert pool.rank(b"c") == 0
    for owner in (b"b", b"c"):
        pool.close(owner, forget=True)
    pool.open(b"d", keys("k0"), 1, bound=2)
    assert pool.blocks(b"d") == pool.blocks(b"a")
    assert pool.rank(b"d") == 2


def test_a_worse_copy_of_a_cached_key_stays_private() -> None:
    pool = BlockPool(4, 16)
    lossy(pool, b"a", 0, "k0")
    lossy(pool, b"b", 1, "k0")
    assert (pool.stats().cached, pool.stats().private) == (1, 1)


def test_what_is_computed_on_a_lossy_prefix_is_lossy() -> None:
    pool = BlockPool(8, 16)
    lossy(pool, b"a", 1, "k0")
    assert pool.open(b"b", keys("k0"), 2, bound=1) == 1
    pool.seal(b"b", b"k1")
    assert pool.lookup(keys("k1"), bound=0) == 0
    assert pool.lookup(keys("k1"), bound=1) == 1


def test_a_worse_block_in_the_middle_of_a_prefix_marks_all_that_follows() -> None:
    pool = BlockPool(8, 16)
    lossy(pool, b"a", 0, "k0", "k1", "k2")
    lossy(pool, b"b", 2, "m1")
    pool.open(b"c", keys("k0", "m1", "k2"), 4, bound=2)
    pool.seal(b"c", b"k3")
    assert pool.lookup(keys("k3"), bound=1) == 0


def test_a_fork_shares_the_very_blocks_and_inherits_the_rank() -> None:
    pool = BlockPool(8, 16)
    lossy(pool, b"a", 1, "k0")
    lossy(pool, b"exact", 0, "k0")
    assert pool.fork(b"a", b"b", num_tokens=20) == (1, 2)
    assert pool.blocks(b"b")[0] == pool.blocks(b"a")[0]
    pool.seal(b"b", b"k1")
    assert pool.lookup(keys("k1"), bound=0) == 0


def fill(pool: BlockPool, tenant: str, count: int, start: int = 0) -> list[bytes]:
    """`count` cached idle blocks of a tenant; their keys."""
    owner = f"{tenant}-{start}".encode()
    names = [f"{tenant}:{index}".encode() for index in range(start, start + count)]
    assert pool.open(owner, [], count, tenant=tenant) is not None
    for name in names:
        pool.seal(owner, name)
    pool.close(owner)
    return names


def test_a_tenant_cannot_evict_its_way_into_anothers_prefix() -> None:
    pool = BlockPool(10, 16, tenant_share=0.5)
    quiet = fill(pool, "quiet", 5)
    for start in range(0, 60, 3):
        fill(pool, "loud", 3, start)
    assert pool.lookup(quiet) == 5
    assert pool.open(b"too much", [], 6, tenant="loud") is None
    assert pool.open(b"its share", [], 5, tenant="loud") == 0
    assert pool.lookup(quiet) == 5
    assert not pool.grow(b"its share", 6)
    pool.check()


def test_without_shares_the_least_recently_used_goes_whoever_holds_it() -> None:
    pool = BlockPool(10, 16)
    quiet = fill(pool, "quiet", 5)
    for start in range(0, 60, 3):
        fill(pool, "loud", 3, start)
    assert pool.lookup(quiet) == 0


def test_what_a_tenant_holds_above_its_share_goes_first() -> None:
    pool = BlockPool(10, 16, tenant_share=0.5)
    small = fill(pool, "small", 2)
    large = fill(pool, "large", 8)
    pool.open(b"new", [], 3, tenant="new")
    assert pool.lookup(small) == 2
    assert pool.lookup(large) == 5
    assert pool.open(b"more", [], 2, tenant="new") == 0
    assert pool.lookup(small) == 0
    assert pool.open(b"beyond", [], 1, tenant="new") is None


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_part_of_the_pool(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        BlockPool(4, 16, tenant_share=share)


TENANTS = ("red", "green", "blue")


class PoolMachine(RuleBasedStateMachine):
    """Random owners of several tenants and fidelities open, grow, land, seal, fork and close.

    Beside the pool's own check, a model holds what each owner's contents are truly worth: no look-up gives
    worse than its bound, no rank is better than the truth; and no tenant loses cached blocks to another beyond
    what the shares say.
    """

    @initialize(num_blocks=st.integers(1, 12), share=st.sampled_from([0.25, 0.5, 1.0]))
    def start(self, num_blocks: int, share: float) -> None:
        self.pool = BlockPool(num_blocks, 4, share)
        self.quota = max(1, int(share * num_blocks)) if share < 1 else num_blocks
        self.owners: dict[bytes, str] = {}
        self.worth: dict[bytes, int] = {}  # owner → the worst of what it stands on
        self.sealed: dict[bytes, int] = {}  # how many of its blocks it has named
        self.truth: dict[int, int] = {}  # cached block → the worth of its contents
        self.tenant_of: dict[int, str] = {}
        self.serial = 0

    def _fresh(self) -> bytes:
        self.serial += 1
        return b"owner-%d" % self.serial

    def _name(self, tenant: str, index: int) -> bytes:
        return f"{tenant}-{index}".encode()

    def _cached(self) -> set[int]:
        """The cached blocks, found from outside: by their names, at every rank."""
        return set(self.pool._name_of)

    def _held(self, tenant: str) -> int:
        private = {
            block
            for owner, whose in self.owners.items()
            if whose == tenant
            for block in self.pool.blocks(owner)
        }
        return len(private | {block for block in self._cached() if self.tenant_of[block] == tenant})

    def _watch_losses(self, tenant: str, change: Callable[[], object]) -> None:
        before, held = self._cached(), {name: self._held(name) for name in TENANTS}
        change()
        lost = before - self._cached()
        within = 0
        for other in TENANTS:
            if other != tenant:
                count = sum(1 for block in lost if self.tenant_of[block] == other)
                within += max(0, count - max(0, held[other] - self.quota))
        assert within <= max(0, self.quota - held[tenant])

    def _took(self, owner: bytes, tenant: str, num_shared: int) -> None:
        self.owners[owner] = tenant
        self.sealed[owner] = num_shared
        self._gave(owner)

    def _gave(self, owner: bytes) -> None:
        for block in self.pool.blocks(owner)[self.sealed[owner] :]:
            self.tenant_of[block] = self.owners[owner]

    @rule(
        tenant=st.sampled_from(TENANTS),
        num_keys=st.integers(0, 3),
        extra=st.integers(0, 3),
        spare=st.integers(0, 2),
        bound=st.integers(0, 2),
    )
    def open(self, tenant: str, num_keys: int, extra: int, spare: int, bound: int) -> None:
        owner, names = self._fresh(), [self._name(tenant, index) for index in range(num_keys)]
        before = self.pool.stats()
        expected = self.pool.lookup(names, bound)
        num_blocks = num_keys + extra

        def change() -> None:
            hit = self.pool.open(owner, names, num_blocks, spare, bound, tenant)
            if hit is None:
                assert self.pool.stats() == before
                return
            assert hit == expected
            assert len(self.pool.blocks(owner)) == num_blocks
            assert self.pool.num_available >= spare
            taken = [self.truth[block] for block in self.pool.blocks(owner)[:hit]]
            assert max(taken, default=0) == self.pool.rank(owner) <= bound
            self.worth[owner] = max(taken, default=0)
            self._took(owner, tenant, hit)

        self._watch_losses(tenant, change)

    @rule(
        tenant=st.sampled_from(TENANTS),
        num_blocks=st.integers(1, 6),
        rank=st.integers(0, 2),
        bound=st.integers(0, 2),
        ends=st.booleans(),
    )
    def serve(self, tenant: str, num_blocks: int, rank: int, bound: int, ends: bool) -> None:
        """A request from its beginning to its end, or nearly."""
        self.open(tenant, num_blocks - 1, 1, 0, bound)
        owner = b"owner-%d" % self.serial
        if owner in self.owners:
            if rank <= bound:
                self._land(owner, rank)
            for _ in range(num_blocks):
                self._seal(owner)
            if ends:
                self._close(owner, forget=False)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), extra=st.integers(0, 4))
    def grow(self, data: st.DataObject, extra: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owners)))
        before = len(self.pool.blocks(owner))
        room = self.pool.room(self.owners[owner])

        def change() -> None:
            grown = self.pool.grow(owner, before + extra)
            assert grown == (extra <= room)
            assert len(self.pool.blocks(owner)) == (before + extra if grown else before)
            self._gave(owner)

        self._watch_losses(self.owners[owner], change)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), rank=st.integers(0, 2))
    def land(self, data: st.DataObject, rank: int) -> None:
        self._land(data.draw(st.sampled_from(sorted(self.owners))), rank)

    def _land(self, owner: bytes, rank: int) -> None:
        self.pool.worsen(owner, rank)
        self.worth[owner] = max(self.worth[owner], rank)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        self._seal(data.draw(st.sampled_from(sorted(self.owners))))

    def _seal(self, owner: bytes) -> None:
        index = len(self.pool.keys(owner))
        if index < len(self.pool.blocks(owner)):
            name = self._name(self.owners[owner], index)
            known = self.pool.lookup([name], self.worth[owner])
            cached = self._cached()
            self.pool.seal(owner, name)
            assert self.pool.lookup([name], self.worth[owner]) == 1
            if not known:
                (block,) = self._cached() - cached
                self.truth[block] = self.worth[owner]

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.owners)))
        num_tokens = data.draw(st.integers(0, len(self.pool.blocks(source)) * 4))
        owner = self._fresh()

        def change() -> None:
            shared = self.pool.fork(source, owner, num_tokens)
            if shared is not None:
                assert self.pool.blocks(owner)[: shared[0]] == self.pool.blocks(source)[: shared[0]]
                self.worth[owner] = self.worth[source]
                self._took(owner, self.owners[source], shared[0])

        self._watch_losses(self.owners[source], change)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), forget=st.booleans())
    def close(self, data: st.DataObject, forget: bool) -> None:
        self._close(data.draw(st.sampled_from(sorted(self.owners))), forget)

    def _close(self, owner: bytes, forget: bool) -> None:
        del self.owners[owner]
        self.pool.close(owner, forget)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            for owner in self.owners:
                assert self.pool.rank(owner) >= self.worth[owner]

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for owner in self.owners:
                self.pool.close(owner)
            stats = self.pool.stats()
            assert (stats.private, stats.pins, stats.owners) == (0, 0, 0)
            assert stats.available == stats.total


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
