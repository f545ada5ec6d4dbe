"""Window slots and records: who has them, and where a prefix may be taken up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.pool import BlockPool
from engine.record_policy import RecordPolicy
from engine.windows import WindowPool, WindowUse

pytestmark = pytest.mark.unit

BLOCK = 4


def key(index: int) -> bytes:
    return index.to_bytes(2, "little")


def make_pool(num_slots: int = 2, num_records: int = 3, num_blocks: int = 16) -> BlockPool:
    return BlockPool(num_blocks, BLOCK, windows=WindowPool(num_slots, num_records))


def compute(pool: BlockPool, owner: bytes, num_blocks: int, boundaries: list[int], chain: int = 0) -> None:
    """Fill blocks and records as a step does."""
    fillings = [pool.fill_record(owner, boundary) for boundary in boundaries]
    assert None not in fillings
    for index in range(len(pool.keys(owner)), num_blocks):
        pool.seal(owner, key(chain + index))
    pool.settle_records(owner, num_blocks * BLOCK, lambda _: False)


def test_a_prefix_is_taken_up_only_at_a_record() -> None:
    pool = make_pool()
    pool.open(b"a", [], 5)
    compute(pool, b"a", 4, [2 * BLOCK])
    pool.close(b"a")
    keys = [key(index) for index in range(4)]
    assert pool.lookup(keys) == 4
    assert pool.open(b"b", keys, 5) == 2
    assert pool.taken_up(b"b").record is not None
    assert pool.junction(b"b") == 4 * BLOCK
    assert pool.open(b"reader", keys, 4, use=WindowUse.NONE) == 4


def test_without_a_record_nothing_is_taken_up() -> None:
    pool = make_pool()
    pool.open(b"a", [], 3)
    compute(pool, b"a", 2, [])
    assert pool.open(b"b", [key(0), key(1)], 3) == 0
    assert pool.taken_up(b"b").record is None
    assert pool.junction(b"b") == 2 * BLOCK


def test_a_record_beyond_what_was_computed_is_not_kept() -> None:
    """Of guesses that were not kept."""
    pool = make_pool()
    pool.open(b"a", [], 3)
    pool.fill_record(b"a", 2 * BLOCK)
    pool.seal(b"a", key(0))
    pool.settle_records(b"a", 2 * BLOCK - 1, lambda _: False)
    assert pool.windows is not None
    assert pool.windows.num_kept == 0
    pool.check()


def test_a_later_record_of_an_answer_takes_the_place_of_the_one_before() -> None:
    pool = make_pool()
    pool.open(b"a", [], 6)
    compute(pool, b"a", 1, [BLOCK])
    for boundary in (2, 3, 4):
        pool.fill_record(b"a", boundary * BLOCK)
        pool.seal(b"a", key(boundary - 1))
        pool.settle_records(b"a", boundary * BLOCK, lambda boundary: boundary > BLOCK)
    pool.close(b"a")
    keys = [key(index) for index in range(4)]
    assert [pool.open(bytes([n]), keys[:n], 6) for n in (1, 3)] == [1, 1]
    for n in (1, 3):
        pool.close(bytes([n]))
    assert pool.open(b"whole", keys, 6) == 4


def test_no_slot_no_owner() -> None:
    pool = make_pool(num_slots=1)
    assert pool.open(b"a", [], 1) == 0
    assert pool.open(b"b", [], 1) is None
    assert pool.fork(b"a", b"c", 2) is None
    pool.close(b"a")
    assert pool.open(b"b", [], 1) == 0


def test_the_least_recently_used_record_is_given_up() -> None:
    pool = make_pool(num_records=2, num_slots=4)
    for chain, owner in enumerate((b"a", b"b", b"c")):
        pool.open(owner, [], 2)
        if owner == b"c":
            assert pool.open(b"use", [key(0)], 2) == 1
            assert pool.taken_up(b"use").record is not None
            pool.close(b"use")
        compute(pool, owner, 1, [BLOCK], chain=chain * 10)
    found = [pool.open(bytes([chain]), [key(chain * 10)], 1, use=WindowUse.NONE) for chain in range(3)]
    assert found == [1, 1, 1]
    for owner in (b"a", b"b", b"c", *(bytes([chain]) for chain in range(3))):
        pool.close(owner)
    assert [pool.open(bytes([chain]), [key(chain * 10)], 2) for chain in range(3)] == [1, 0, 1]


def test_a_record_goes_with_its_block() -> None:
    pool = make_pool(num_blocks=3)
    pool.open(b"a", [], 2)
    compute(pool, b"a", 2, [BLOCK, 2 * BLOCK])
    pool.close(b"a")
    assert pool.windows is not None
    assert pool.windows.num_kept == 2
    assert pool.open(b"b", [], 3) == 0
    assert pool.windows.num_kept == 0
    pool.check()


@pytest.mark.parametrize(
    ("policy", "span", "expected"),
    [
        (RecordPolicy(), (0, 20), [12, 16, 20]),
        (RecordPolicy(), (0, 8), []),
        (RecordPolicy(), (8, 16), [12, 16]),
        (RecordPolicy(), (12, 21), [16, 20]),
        (RecordPolicy("full"), (0, 20), [4, 8, 12, 16, 20]),
        (RecordPolicy("periodic", 8), (3, 20), [8, 16]),
        (RecordPolicy("zero"), (0, 20), []),
    ],
)
def test_where_records_are_wanted(policy: RecordPolicy, span: tuple[int, int], expected: list[int]) -> None:
    """Of a prompt of 14 tokens."""
    assert policy.wanted(*span, BLOCK, 14, 0) == expected


def test_a_prompt_of_whole_blocks_can_be_repeated_and_continued() -> None:
    assert RecordPolicy().wanted(0, 16, BLOCK, 16, 0) == [12, 16]


def test_where_a_prompt_parts_from_what_is_cached_there_is_a_record() -> None:
    assert RecordPolicy().wanted(0, 30, BLOCK, 30, 8) == [8, 28]


class PoolWithWindows(RuleBasedStateMachine):
    """Owners come, compute, fork and go; every slot and record stays in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(num_slots=3, num_records=2, num_blocks=9)
        self.computed: dict[bytes, int] = {}
        self.names = 0

    @rule(chain=st.integers(0, 1), num_keys=st.integers(0, 3), computes=st.booleans())
    def open(self, chain: int, num_keys: int, computes: bool) -> None:
        owner = b"o%d" % self.names
        self.names += 1
        keys = [key(chain * 10 + index) for index in range(num_keys)]
        hit = self.pool.open(
            owner, keys, num_keys + 1, use=WindowUse.COMPUTED if computes else WindowUse.NONE
        )
        if hit is None:
            return
        if computes:
            assert (self.pool.taken_up(owner).record is not None) == bool(hit)
            self.computed[owner] = chain
        else:
            self.pool.close(owner)

    @precondition(lambda self: self.computed)
    @rule(data=st.data(), kept=st.booleans(), supersedes=st.booleans())
    def step(self, data: st.DataObject, kept: bool, supersedes: bool) -> None:
        owner = data.draw(st.sampled_from(sorted(self.computed)))
        index = len(self.pool.keys(owner))
        if not self.pool.grow(owner, index + 1):
            return
        self.pool.fill_record(owner, (index + 1) * BLOCK)
        if kept:
            self.pool.seal(owner, key(self.computed[owner] * 10 + index))
        self.pool.settle_records(owner, (index + kept) * BLOCK, lambda _: supersedes)

    @precondition(lambda self: self.computed)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.computed)))
        owner = b"f%d" % self.names
        self.names += 1
        if self.pool.fork(source, owner, len(self.pool.keys(source)) * BLOCK) is not None:
            self.computed[owner] = self.computed[source]

    @precondition(lambda self: self.computed)
    @rule(data=st.data(), forget=st.booleans(), in_mid_step=st.booleans())
    def close(self, data: st.DataObject, forget: bool, in_mid_step: bool) -> None:
        owner = data.draw(st.sampled_from(sorted(self.computed)))
        if in_mid_step:
            self.pool.fill_record(owner, BLOCK)
        self.pool.close(owner, forget=forget)
        del self.computed[owner]

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()

    def teardown(self) -> None:
        for owner in self.computed:
            self.pool.close(owner)
        assert self.pool.windows is not None
        assert self.pool.windows.num_free_slots == 3


PoolWithWindows.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolWithWindows = PoolWithWindows.TestCase
