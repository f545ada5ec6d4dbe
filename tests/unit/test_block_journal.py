"""What a worker tells of its cached blocks gives whoever reads all of it the set that is cached."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pool import BlockPool
from headrace.v1 import worker_pb2
from kvtransfer.key_digest import key_digest, split_keys
from worker.block_journal import BlockJournal, BlockStream

pytestmark = pytest.mark.unit


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 2


def journal_of(*numbers: int, **bounds: int) -> BlockJournal:
    journal = BlockJournal(**bounds)
    for number in numbers:
        journal.named(key(number), 0)
    return journal


class Reader:
    """Believes every message, and checks its number and figures."""

    def __init__(self, stream: BlockStream) -> None:
        self.stream = stream
        self.keys: set[bytes] = set()
        self.messages: list[worker_pb2.BlockEvents] = []

    def read(self) -> worker_pb2.BlockEvents:
        message = worker_pb2.BlockEvents.FromString(self.stream.next_message().SerializeToString())
        if message.is_snapshot and not (self.messages and self.messages[-1].continues):
            self.keys.clear()
        self.messages.append(message)
        assert message.number == len(self.messages)
        for change in message.changes:
            for each in split_keys(change.keys):
                assert (each in self.keys) is not change.added
                (self.keys.add if change.added else self.keys.remove)(each)
        assert (message.num_blocks, message.digest) == (len(self.keys), key_digest(self.keys))
        return message

    def read_all(self) -> set[bytes]:
        self.read()
        while self.stream.has_more:
            self.read()
        return self.keys


def test_a_stream_begins_with_all_and_goes_on_with_what_changes() -> None:
    journal = journal_of(1, 2, 3)
    reader = Reader(journal.open())
    assert reader.read().is_snapshot
    journal.named(key(4), 0)
    journal.forgotten(key(1), 0)
    message = reader.read()
    assert not message.is_snapshot
    assert [(change.added, change.keys) for change in message.changes] == [(False, key(1)), (True, key(4))]
    assert reader.keys == {key(2), key(3), key(4)}


def test_without_changes_the_figures_are_told_again() -> None:
    journal = journal_of(1)
    reader = Reader(journal.open())
    reader.read()
    message = reader.read()
    assert (message.number, message.num_blocks, message.digest, len(message.changes)) == (2, 1, 1, 0)


def test_an_empty_worker_says_so() -> None:
    message = Reader(BlockJournal().open()).read()
    assert message.is_snapshot and not message.continues and message.num_blocks == 0


def test_a_block_that_came_and_went_is_not_told_nor_one_that_went_and_came() -> None:
    journal = journal_of(1)
    reader = Reader(journal.open())
    reader.read()
    journal.named(key(2), 0)
    journal.forgotten(key(2), 0)
    journal.forgotten(key(1), 0)
    journal.named(key(1), 0)
    assert not reader.read().changes


def test_blocks_that_are_not_exact_are_not_told() -> None:
    journal = BlockJournal()
    journal.named(key(1), 1)
    journal.named(key(1), 0)
    journal.forgotten(key(1), 1)
    assert Reader(journal.open()).read_all() == {key(1)}


def test_a_large_snapshot_comes_in_pages_and_what_changes_meanwhile_comes_after_it() -> None:
    journal = journal_of(*range(10), max_keys_per_message=4)
    reader = Reader(journal.open())
    assert reader.read().continues
    journal.forgotten(key(0), 0)
    journal.named(key(10), 0)
    assert reader.read().continues
    assert not reader.read().continues
    assert reader.stream.has_more
    reader.read()
    assert reader.keys == {key(number) for number in range(1, 11)}
    assert not reader.stream.has_more


def test_many_changes_come_in_several_messages_with_figures_of_their_own() -> None:
    journal = journal_of(max_keys_per_message=4)
    reader = Reader(journal.open())
    reader.read()
    for number in range(10):
        journal.named(key(number), 0)
    assert reader.read_all() == {key(number) for number in range(10)}
    assert [message.num_blocks for message in reader.messages] == [0, 4, 8, 10]


def test_a_stream_that_is_not_read_begins_anew_and_keeps_little() -> None:
    journal = journal_of(max_collected=3)
    reader = Reader(journal.open())
    reader.read()
    for number in range(1000):
        journal.named(key(number), 0)
    assert len(reader.stream._collected) <= 3
    assert reader.read().is_snapshot
    assert len(reader.keys) == 1000


def test_a_snapshot_that_is_asked_for_during_another_follows_it() -> None:
    journal = journal_of(*range(6), max_keys_per_message=4)
    reader = Reader(journal.open())
    reader.read()
    reader.stream.restart()
    journal.named(key(9), 0)
    second, third = reader.read(), reader.read()
    assert not second.continues
    assert third.is_snapshot and third.continues
    assert reader.read_all() == {key(number) for number in (*range(6), 9)}


def test_streams_do_not_disturb_each_other_and_closed_ones_collect_nothing() -> None:
    journal = journal_of(1)
    first, second = Reader(journal.open()), Reader(journal.open())
    first.read()
    second.read()
    journal.close(second.stream)
    journal.close(second.stream)
    journal.named(key(2), 0)
    assert first.read_all() == {key(1), key(2)}
    assert not second.stream.has_more


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.5, 1.0]))
def test_a_journal_knows_exactly_the_exact_blocks_of_its_pool(seed: int, share: float) -> None:
    rng = random.Random(seed)
    pool = BlockPool(8, 4, tenant_share=share)
    journal = BlockJournal(max_keys_per_message=3, max_collected=5)
    pool.on_named, pool.on_forgotten = journal.named, journal.forgotten
    reader = Reader(journal.open())
    everything = [key(number) for number in range(12)]
    owners: list[bytes] = []
    for number in range(60):
        match rng.randrange(6):
            case 0:
                owner = number.to_bytes(2, "big")
                names = rng.sample(everything, 2)
                if pool.open(owner, names, rng.randrange(1, 5), tenant=rng.choice("ab"), bound=1) is not None:
                    owners.append(owner)
            case 1 | 2 if owners:
                owner = rng.choice(owners)
                if len(pool.keys(owner)) < len(pool.blocks(owner)):
                    pool.seal(owner, rng.choice([k for k in everything if k not in pool.keys(owner)]))
            case 3 if owners:
                pool.worsen(rng.choice(owners), rng.randrange(2))
            case 4 if owners:
                owner = owners.pop(rng.randrange(len(owners)))
                pool.close(owner, forget=rng.random() < 0.3)
            case 5 if rng.random() < 0.5:
                reader.read()
    cached = {each for each in everything if pool.lookup([each])}
    assert journal.num_blocks == len(cached)
    assert reader.read_all() == cached
