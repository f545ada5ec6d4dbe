"""An engine's cache as a store: runs of slots, however blocks lie, and the ways of an accelerator, tried on the CPU."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache import PagedCache, gather_box, scatter_box
from engine.models.layouts import gqa_layout
from engine.storage import DTYPES
from kvtransfer.layouts import Piece, Plane

pytestmark = pytest.mark.integration

LAYERS, HEADS, WIDTH, BLOCK_TOKENS, NUM_BLOCKS = 3, 2, 8, 4, 12
LAYOUT = gqa_layout(LAYERS, HEADS, WIDTH, "float32", BLOCK_TOKENS)
OWNER = b"anybody"


def cache_of(blocks: list[int], seed: int) -> PagedCache:
    """With noise in every slot."""
    cache = PagedCache(LAYOUT, NUM_BLOCKS, torch.device("cpu"), lambda owner: blocks)
    for tensor in cache.planes.values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    return cache


class Case(NamedTuple):
    """A piece, where its blocks lie, and what it travels as."""

    blocks: list[int]
    piece: Piece
    wire: Plane
    dtype: torch.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def box(limit: int) -> range:
        start = draw(st.integers(0, limit - 1))
        return range(start, draw(st.integers(start + 1, limit)))

    seed = draw(st.integers(0, 99))
    blocks = random.Random(seed).sample(range(NUM_BLOCKS), 7)
    if seed % 2:
        blocks.sort()  # more of them lie side by side
    tokens = box(len(blocks) * BLOCK_TOKENS)
    piece = Piece(draw(st.sampled_from(["k", "v"])), box(LAYERS), box(HEADS), tokens)
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return Case(blocks, piece, LAYOUT.plane(piece.plane).with_dtypes((dtype,)), DTYPES[dtype], seed)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_a_piece_is_the_numbers_at_its_entries_wherever_their_blocks_lie(case: Case) -> None:
    blocks, piece, wire, dtype, seed = case
    cache, other = cache_of(blocks, seed), cache_of(blocks, seed + 1)
    untouched = other.planes[piece.plane].clone()
    raw = cache.gather(OWNER, piece, wire)
    other.scatter(OWNER, piece, wire, raw)
    numbers = raw.view(dtype).float().tolist()
    places = itertools.product(piece.layers, piece.entries, piece.heads)
    for index, (layer, entry, head) in enumerate(places):
        slot = blocks[entry // BLOCK_TOKENS] * BLOCK_TOKENS + entry % BLOCK_TOKENS
        stored = cache.planes[piece.plane][layer, head, slot].to(dtype).float()
        assert numbers[index * WIDTH : (index + 1) * WIDTH] == stored.tolist()
        untouched[layer, head, slot] = stored
    assert torch.equal(other.planes[piece.plane], untouched)


@settings(max_examples=50, deadline=None)
@given(case=cases())
def test_an_accelerators_way_gives_and_takes_the_same_bytes(case: Case) -> None:
    blocks, piece, wire, dtype, seed = case
    cache, here, there = cache_of(blocks, seed), cache_of(blocks, seed + 1), cache_of(blocks, seed + 1)
    slots = [blocks[entry // BLOCK_TOKENS] * BLOCK_TOKENS + entry % BLOCK_TOKENS for entry in piece.entries]
    runs = [(slice(index, index + 1), slice(slot, slot + 1)) for index, slot in enumerate(slots)]
    raw = gather_box(cache.planes[piece.plane], piece, runs, dtype)
    assert torch.equal(raw, cache.gather(OWNER, piece, wire))
    scatter_box(here.planes[piece.plane], piece, runs, raw.view(dtype))
    there.scatter(OWNER, piece, wire, raw)
    assert torch.equal(here.planes[piece.plane], there.planes[piece.plane])
