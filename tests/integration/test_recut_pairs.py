"""Ends that cut, block and store their caches differently exchange pieces, every end with every other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import pytest
import torch

from engine.cache import DTYPES, PagedCache
from engine.pool import BlockPool
from kvtransfer.layouts import CacheLayout, Field, Paged, Piece, Plane, pieces_for
from kvtransfer.recut import Cut, ShardedStore
from tests.integration.kvtransfer_harness import PagedStore, Receiver, Sender

pytestmark = pytest.mark.integration

LAYERS, HEADS, WIDTH, NUM_TOKENS = 4, 4, 8, 100
OWNER = b"owner"
CUTS = {
    "whole": [Cut(range(LAYERS), range(HEADS))],
    "2 heads": [Cut(range(LAYERS), range(head, head + 2)) for head in (0, 2)],
    "4 heads": [Cut(range(LAYERS), range(head, head + 1)) for head in range(HEADS)],
    "layers": [
        Cut(layers, range(head, head + 2)) for layers in (range(1), range(1, LAYERS)) for head in (0, 2)
    ],
}


def layout_of(block_tokens: int, dtype: str, layers: int = LAYERS, heads: int = HEADS) -> CacheLayout:
    """Keys and values cut by heads, and a plane of one head that every rank has."""

    def plane(name: str, num_heads: int) -> Plane:
        return Plane(name, layers, Paged(1), num_heads, (Field(name, WIDTH, dtype),))

    return CacheLayout((plane("k", heads), plane("v", heads), plane("latent", 1)), block_tokens)


class End(NamedTuple):
    """How one side keeps its cache."""

    cut: str
    block_tokens: int
    dtype: str


ENDS = [End(*facts) for facts in itertools.product(CUTS, (16, 32, 64), ("float32", "bfloat16"))]


class Ranks:
    """A whole engine's cache: real pools and paged caches, one a rank, under one store."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.layout = layout_of(end.block_tokens, end.dtype)
        num_blocks = 3 + -(-NUM_TOKENS // end.block_tokens)
        self.pools = [BlockPool(num_blocks, end.block_tokens) for _ in CUTS[end.cut]]
        self.caches = [
            PagedCache(
                layout_of(end.block_tokens, end.dtype, len(cut.layers), len(cut.heads)),
                num_blocks,
                torch.device("cpu"),
                pool.blocks,
            )
            for cut, pool in zip(CUTS[end.cut], self.pools, strict=True)
        ]
        self.store = ShardedStore(self.layout, list(zip(CUTS[end.cut], self.caches, strict=True)))

    def allocate(self, owner: bytes, num_tokens: int) -> None:
        for number, pool in enumerate(self.pools):
            pool.open(b"another's", [], 1 + number % 2)  # so that ranks differ in their block tables
            assert pool.open(owner, [], pool.blocks_for(num_tokens)) == 0
            pool.close(b"another's")

    def free(self, owner: bytes) -> None:
        for pool in self.pools:
            pool.close(owner)

    def forget(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for cache in self.caches for tensor in cache.planes.values()]

    def write(self, owner: bytes, numbers: dict[str, torch.Tensor]) -> None:
        """Put numbers [layers, tokens, heads, width] into the tensors themselves, each rank's part."""
        for cut, pool, cache in zip(CUTS[self.end.cut], self.pools, self.caches, strict=True):
            slots = self._slots(pool, owner)
            for name, whole in numbers.items():
                heads = range(1) if whole.shape[2] == 1 else cut.heads
                part = whole[cut.layers.start : cut.layers.stop, :, heads.start : heads.stop]
                cache.planes[name].index_copy_(2, slots, part.transpose(1, 2).contiguous())

    def image(self, owner: bytes, numbers: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """All tensors as they are with these numbers in the owner's blocks and nothing anywhere else."""
        self.forget()
        self.write(owner, numbers)
        images = [tensor.clone() for tensor in self.tensors()]
        self.forget()
        return images

    def shows(self, image: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, self.tensors(), image))

    def _slots(self, pool: BlockPool, owner: bytes) -> torch.Tensor:
        size, positions = pool.block_tokens, torch.arange(NUM_TOKENS)
        return torch.tensor(pool.blocks(owner))[positions // size] * size + positions % size


def numbers(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        plane.name: torch.randn((LAYERS, NUM_TOKENS, plane.heads, WIDTH), generator=generator)
        for plane in layout_of(64, "float32").planes
    }


WHOLE = numbers()


@pytest.fixture(scope="module")
def senders() -> dict[End, Ranks]:
    made = {}
    for end in ENDS:
        made[end] = Ranks(end)
        made[end].allocate(OWNER, NUM_TOKENS)
        made[end].write(OWNER, stored(end.dtype, end.dtype))
    return made


@pytest.fixture(scope="module")
def sent(senders: dict[End, Ranks]) -> dict[tuple[End, str], list[torch.Tensor]]:
    """What every end gathers, in every dtype to travel in."""
    return {
        (end, dtype): [
            sender.store.gather(OWNER, piece, travels.plane(piece.plane)) for piece in pieces(travels)
        ]
        for end, sender in senders.items()
        for dtype in ("float32", "bfloat16")
        for travels in [layout_of(64, dtype)]
    }


def stored(sender: str, receiver: str) -> dict[str, torch.Tensor]:
    """What torch makes of the numbers: rounded once where they were ever bfloat16, widened exactly."""
    return {name: each.to(DTYPES[sender]).to(DTYPES[receiver]) for name, each in WHOLE.items()}


def pieces(layout: CacheLayout) -> list[Piece]:
    """Of some layers each, in ranges of tokens that begin and end within blocks of any size."""
    ranges = (range(37), range(37, NUM_TOKENS))
    return [piece for tokens in ranges for piece in pieces_for(layout, tokens, target_bytes=10_000)]


@pytest.mark.parametrize("receiving", ENDS, ids=lambda end: f"{end.cut}-{end.block_tokens}-{end.dtype}")
def test_every_end_gives_to_every_other(
    sent: dict[tuple[End, str], list[torch.Tensor]], receiving: End
) -> None:
    receiver = Ranks(receiving)
    receiver.allocate(OWNER, NUM_TOKENS)
    images = {
        dtype: receiver.image(OWNER, stored(dtype, receiving.dtype)) for dtype in ("float32", "bfloat16")
    }
    for sending in ENDS:
        for dtype in {sending.dtype, receiving.dtype}:  # converted by the one side or by the other
            receiver.forget()
            travels = layout_of(64, dtype)
            for piece, data in zip(pieces(travels), sent[sending, dtype], strict=True):
                receiver.store.scatter(OWNER, piece, travels.plane(piece.plane), data)
            assert receiver.shows(images[sending.dtype]), (sending, dtype)


PUSHES: Sequence[tuple[End, End]] = [
    (End("whole", 64, "float32"), End("4 heads", 16, "float32")),
    (End("4 heads", 16, "bfloat16"), End("layers", 64, "bfloat16")),
    (End("2 heads", 32, "float32"), End("layers", 64, "bfloat16")),
    (End("layers", 64, "bfloat16"), End("2 heads", 16, "float32")),
]


class PushedStore:
    """A store with the harness's way to open owners in it."""

    def __init__(self, ranks: Ranks) -> None:
        self.gather, self.scatter, self.fence = ranks.store.gather, ranks.store.scatter, ranks.store.fence
        self.allocate, self.free = ranks.allocate, ranks.free


@pytest.mark.parametrize(("sending", "receiving"), PUSHES, ids=lambda end: f"{end.cut}-{end.dtype}")
def test_a_push_between_unequal_ends(senders: dict[End, Ranks], sending: End, receiving: End) -> None:
    ranks = Ranks(receiving)
    receiver = Receiver(ranks.layout, store=cast("PagedStore", PushedStore(ranks)))
    sender = Sender(receiver, NUM_TOKENS, senders[sending].layout)
    sender.store = cast("PagedStore", senders[sending].store)
    sender.OWNER = OWNER  # type: ignore[misc]
    try:
        grant = receiver.grant(NUM_TOKENS, fidelity=1)
        image = ranks.image(grant.lease_id, stored(sending.dtype, receiving.dtype))
        session = sender.session(grant)
        for ready in (37, 64, NUM_TOKENS):
            session.advance(ready)
        assert session.commit(sender.handoff(NUM_TOKENS), 20.0).is_committed
        assert receiver.fidelities == [0 if sending.dtype == receiving.dtype else 1]
        assert ranks.shows(image)
    finally:
        sender.close()
        receiver.close()


@pytest.mark.parametrize("name", CUTS)
def test_bytes_go_straight_to_where_they_are_wanted(senders: dict[End, Ranks], name: str) -> None:
    end = End(name, 32, "float32")
    store = senders[end].store
    for wire in ("float32", "bfloat16"):
        travels = layout_of(64, wire)
        for piece in pieces(travels):
            plane = travels.plane(piece.plane)
            plain = store.gather(OWNER, piece, plane)
            message = torch.zeros(7 + len(plain), dtype=torch.uint8)  # behind a header of any length
            tail = message[7:]
            assert store.gather(OWNER, piece, plane, tail) is tail
            assert torch.equal(tail, plain)


@pytest.mark.parametrize("name", CUTS)
def test_what_a_store_cannot_do_it_says(senders: dict[End, Ranks], name: str) -> None:
    ranks = Ranks(End(name, 32, "float32"))
    ranks.allocate(OWNER, 64)
    plane = ranks.layout.planes[0]
    piece = Piece("k", range(LAYERS), range(HEADS), range(60, 64))
    data = torch.ones(plane.num_bytes(piece), dtype=torch.uint8)
    beyond = Piece("k", range(LAYERS), range(HEADS), range(60, 65))
    longer = torch.ones(plane.num_bytes(beyond), dtype=torch.uint8)
    layered = Piece("k", range(LAYERS + 1), range(HEADS), range(1))
    ints = Plane("k", LAYERS, Paged(1), HEADS, (Field("k", WIDTH, "int8"),))
    for store in (ranks.store, ranks.caches[0]) if name == "whole" else (ranks.store,):
        store.scatter(OWNER, piece, plane, data)
        with pytest.raises(KeyError):
            store.gather(b"unknown", piece, plane)
        with pytest.raises(KeyError):
            store.scatter(b"unknown", piece, plane, data)
        with pytest.raises(ValueError, match=r"entries up to 65, but owner .* has 2 blocks of 32"):
            store.gather(OWNER, beyond, plane)
        with pytest.raises(ValueError, match=r"entries up to 65"):
            store.scatter(OWNER, beyond, plane, longer)
        with pytest.raises(ValueError, match="layers end at 5"):
            store.gather(OWNER, layered, plane)
        with pytest.raises(ValueError, match="does not fit"):
            store.gather(OWNER, piece, plane, data[:-1])
        with pytest.raises(ValueError, match="bytes for a piece of"):
            store.scatter(OWNER, piece, plane, longer)
        with pytest.raises(ValueError, match="float32 here, cannot be int8"):
            store.gather(OWNER, piece, ints)
        assert torch.equal(store.gather(OWNER, piece, plane), data)
