"""The host tier, and what a store without a disk finds, wants and lets go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtransfer.frames import LeaseRef
from kvtransfer.layouts import CacheLayout, Field, Paged, Plane, Window
from kvtransfer.lease_types import RequestId
from kvtransfer.sources import FetchRequest, SourceRefused
from kvtransfer.tiers.host import HostTier, host_bytes
from kvtransfer.tiers.index import NoRoom
from kvtransfer.tiers.receiving import Offer
from kvtransfer.tiers.records import Shape
from kvtransfer.tiers.store import NodeStore
from kvtransfer.tiers.store_types import NotWanted, StoreOptions
from tests.tier_blocks import ALICE, BOB, SECRET, SHAPE, Clock, block, key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

pytestmark = pytest.mark.unit

SIZE = host_bytes(block(0))
LAYOUT = CacheLayout(
    tuple(Plane(name, 2, Paged(1), 1, (Field(name, 4, "float32"),)) for name in "kv"), block_tokens=16
)


@pytest.fixture
def store() -> Iterator[NodeStore]:
    store = NodeStore(StoreOptions(host_bytes=4 * SIZE, landing_bytes=200_000), SECRET, Clock())
    yield store
    store.close(1)


def fetch(
    numbers: Iterable[int], fidelity: int = 0, shape: Shape = SHAPE, codec: str = "raw"
) -> FetchRequest:
    keys = tuple(map(key, numbers))
    codecs = ((codec, 1),)
    lease = LeaseRef(bytes(16), 1, 0, 0)
    return FetchRequest(lease, keys, 0, shape.block_tokens, shape.layout, shape.dtypes, fidelity, codecs)


def test_the_limit_counts_what_is_around_the_payloads() -> None:
    tier = HostTier(2 * SIZE)
    assert block(0).payload_bytes < SIZE
    for number in range(3):
        assert tier.put(block(number)) is None
    assert [record.id.key for record in tier.records()] == [key(1), key(2)]
    assert (tier.index.used_bytes, tier.num_evicted) == (2 * SIZE, 1)
    assert tier.put(block(9, 50_000)) is NoRoom.TOO_LARGE
    assert tier.num_refused == 1


def test_of_one_prefix_the_end_goes_first(store: NodeStore) -> None:
    store.publish([block(number) for number in range(4)])
    store.publish([block(9)])
    assert store.lookup([key(number) for number in range(4)], 0, SHAPE).num_blocks == 3


def test_what_is_being_fetched_stays(store: NodeStore) -> None:
    store.publish([block(0), block(1)])
    run = store.open(fetch([0, 1]))
    store.publish([block(number) for number in range(10, 16)])
    assert [bytes(piece.payload) for piece in run.pieces()] == [
        bytes(part.payload) for number in (0, 1) for part in block(number).parts
    ]
    assert store.lookup([key(0), key(1)], 0, SHAPE).num_blocks == 2
    run.close()
    run.close()
    store.publish([block(number) for number in range(20, 24)])
    assert store.lookup([key(0)], 0, SHAPE).num_blocks == 0
    assert store.num_fetches == 0


def test_a_piece_can_be_had_again_by_its_number(store: NodeStore) -> None:
    store.publish([block(0), block(1)])
    run = store.open(fetch([0, 1]))
    pieces = list(run.pieces())
    assert [run.piece(number) for number in (3, 0, 2, 1)] == [pieces[number] for number in (3, 0, 2, 1)]
    assert [piece.piece.entries for piece in pieces] == [range(16)] * 2 + [range(16, 32)] * 2
    run.close()


def test_a_run_ends_at_a_block_that_the_asker_cannot_read(store: NodeStore) -> None:
    store.publish([block(0), block(1, fidelity=1)])
    store.publish([block(2, codec="int8")])
    assert store.open(fetch([0, 1, 2])).num_blocks == 1
    assert store.open(fetch([0, 1, 2], fidelity=1)).num_blocks == 2
    with pytest.raises(SourceRefused, match="NO_BLOCKS"):
        store.open(fetch([2]))
    with pytest.raises(SourceRefused, match="NO_BLOCKS"):
        store.open(fetch([0], shape=SHAPE._replace(block_tokens=32)))
    assert store.lookup([key(0), key(1)], 2, SHAPE).fidelity == 1


def test_a_writer_gets_as_many_blocks_as_may_land(store: NodeStore) -> None:
    offer = Offer(ALICE, tuple(map(key, range(500))), 3, 16, LAYOUT, 0)
    verdict = store.consider(offer)
    reserved = LAYOUT.num_bytes(16) * 17 // 16
    assert verdict.blocks == range(3, 3 + (200_000 - (64 << 10)) // reserved)
    with store.lock:
        store.areas.open(b"lease", RequestId("t", "r"), offer, verdict.blocks)
    assert store.areas.reserved_bytes <= 200_000
    rest = store.consider(Offer(BOB, tuple(map(key, range(600, 700))), 0, 16, LAYOUT, 0))
    assert rest.refused is NotWanted.BUSY
    store.areas.close([b"lease", b"lease"])
    assert store.areas.reserved_bytes == 0


def test_blocks_that_no_tier_could_keep_are_not_wanted(store: NodeStore) -> None:
    large = CacheLayout((Plane("k", 64, Paged(1), 8, (Field("k", 128, "float32"),)),), 16)
    assert store.consider(Offer(ALICE, (key(1),), 0, 16, large, 0)).refused is NotWanted.NO_ROOM
    window = CacheLayout((Plane("w", 1, Window(8, 1), 1, (Field("w", 4, "float32"),)),), 16)
    assert store.consider(Offer(ALICE, (key(1),), 0, 16, window, 0)).refused is NotWanted.UNSUPPORTED
    coarse = CacheLayout((Plane("k", 1, Paged(32), 1, (Field("k", 4, "float32"),)),), 32)
    assert store.consider(Offer(ALICE, (key(1),), 0, 16, coarse, 0)).refused is NotWanted.UNSUPPORTED
