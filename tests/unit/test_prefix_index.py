"""The prefix index says of every worker exactly how many leading blocks of a prompt it holds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvtransfer.key_digest import key_digest, split_keys
from router.core.prefix_index import IndexFull, PrefixIndex

pytestmark = pytest.mark.unit


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 2


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def test_workers_are_grouped_by_how_far_they_hold_a_prompt() -> None:
    index = PrefixIndex()
    index.add(0, keys(1, 2, 3))
    index.add(5, keys(1, 2, 3, 9))
    index.add(7, keys(1))
    index.add(8, keys(2, 3))  # without the first block, the others are of no use
    assert index.match(keys(1, 2, 3, 4)) == [(1 << 0 | 1 << 5, 3), (1 << 7, 1)]
    assert index.match(keys(4, 1, 2)) == []
    assert index.match([]) == []


def test_a_hole_ends_what_a_worker_holds() -> None:
    index = PrefixIndex()
    index.add(3, keys(1, 2, 3))
    index.remove(3, keys(2))
    assert index.match(keys(1, 2, 3)) == [(8, 1)]


def test_another_index_may_fill_the_holes() -> None:
    index, beside = PrefixIndex(), PrefixIndex()
    index.add(0, keys(1, 3))
    beside.add(0, keys(2))
    beside.add(1, keys(1))
    assert index.match(keys(1, 2, 3, 4), beside) == [(1, 3), (2, 1)]


def test_a_cleared_slot_is_as_new() -> None:
    index = PrefixIndex()
    index.add(2, keys(1, 2))
    index.add(3, keys(2))
    index.clear(2)
    assert (index.num_entries, index.num_blocks(2), index.digest(2)) == (1, 0, 0)
    index.add(2, keys(2))
    assert index.match(keys(2)) == [(4 | 8, 1)]
    assert index.match(keys(1)) == []


def test_what_does_not_fit_changes_nothing() -> None:
    index = PrefixIndex(max_entries=3)
    index.add(0, keys(1, 2))
    with pytest.raises(IndexFull, match="2 of 3"):
        index.add(1, keys(1, 2))
    assert (index.num_blocks(1), index.digest(1), index.match(keys(1))) == (0, 0, [(1, 1)])
    index.add(0, keys(1, 2, 3))  # two of them are there already
    index.remove(0, keys(3))
    index.add(1, keys(9))
    assert index.num_entries == 3


@pytest.mark.parametrize(("slot", "wrong"), [(-1, keys(1)), (0, [b"short"])])
def test_what_is_no_slot_or_no_key_is_refused(slot: int, wrong: Sequence[bytes]) -> None:
    index = PrefixIndex()
    with pytest.raises(ValueError):
        index.add(slot, wrong)
    assert index.num_entries == 0


def test_an_index_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        PrefixIndex(0)


@given(st.sets(st.binary(min_size=16, max_size=16), max_size=20), st.data())
def test_a_digest_says_nothing_of_order_and_is_kept_up_by_adding_and_taking_away(
    some: set[bytes], data: st.DataObject
) -> None:
    naive = 0
    for each in some:
        naive ^= int.from_bytes(each[:8], "little")
    assert key_digest(some) == naive
    gone = data.draw(st.sets(st.sampled_from(sorted(some)))) if some else set()
    assert key_digest(some) ^ key_digest(gone) == key_digest(some - gone)
    assert split_keys(b"".join(sorted(some))) == sorted(some)


def test_half_a_key_is_refused() -> None:
    for take in (split_keys, lambda joined: key_digest([joined])):
        with pytest.raises(ValueError, match="whole number of keys"):
            take(bytes(24))


SLOTS = st.sampled_from([0, 1, 2, 31, 64, 999])
KEYS = st.lists(st.integers(0, 15).map(key), max_size=8)


class IndexMachine(RuleBasedStateMachine):
    """Any changes, beside one plain set for each worker."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(max_entries=40)
        self.sets: dict[int, set[bytes]] = {}

    @rule(slot=SLOTS, some=KEYS)
    def add(self, slot: int, some: list[bytes]) -> None:
        wanted = self.sets.get(slot, set()) | set(some)
        others = sum(len(held) for other, held in self.sets.items() if other != slot)
        try:
            self.index.add(slot, some)
        except IndexFull:
            assert others + len(wanted) > 40
        else:
            assert others + len(wanted) <= 40
            self.sets[slot] = wanted

    @rule(slot=SLOTS, some=KEYS)
    def remove(self, slot: int, some: list[bytes]) -> None:
        self.index.remove(slot, some)
        self.sets.get(slot, set()).difference_update(some)

    @rule(slot=SLOTS, some=KEYS)
    def keep_only(self, slot: int, some: list[bytes]) -> None:
        self.index.keep_only(slot, set(some))
        self.sets.get(slot, set()).intersection_update(some)

    @rule(slot=SLOTS)
    def clear(self, slot: int) -> None:
        self.index.clear(slot)
        self.sets.pop(slot, None)

    @rule(prompt=KEYS)
    def match(self, prompt: list[bytes]) -> None:
        lengths: dict[int, int] = {}
        for slot, held in self.sets.items():
            count = next((n for n, each in enumerate(prompt) if each not in held), len(prompt))
            if count:
                lengths[count] = lengths.get(count, 0) | 1 << slot
        expected = [(mask, count) for count, mask in sorted(lengths.items(), reverse=True)]
        assert self.index.match(prompt) == expected

    @invariant()
    def agrees(self) -> None:
        assert self.index.num_entries == sum(len(held) for held in self.sets.values())
        for slot, held in self.sets.items():
            assert self.index.keys_of(slot) == held
            assert self.index.num_blocks(slot) == len(held)
            assert self.index.digest(slot) == key_digest(held)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
