"""Attention of some positions against one head of a paged cache, by tiles: in bfloat16 through the processor's matrix
tiles, in bfloat16 or float32 through its vectors.

A unit is up to BLOCK positions of a sequence with the queries of one group. Keys come in blocks of 64 at
absolute positions, each row of queries keeps its maximum, its sum and its output (online softmax: Milakov and
Gimelshein, arXiv:1805.02867; Flash attention, Dao et al., arXiv:2205.14135) and takes the blocks in ascending order. A
row never sees another: a tile's rows are independent, and a block that is masked as a whole adds exactly nothing. So a
position alone, in a chunk or in a batch gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.functions import exp, exp_of_negative, transpose
from engine.kernels.lanes import (
    kernel,
    lanes_from,
    larger,
    largest,
    load,
    pairs,
    splat,
    store,
    total,
    where_at_most,
)
from engine.kernels.outer import add_rows
from engine.kernels.tiles import add_product_of_bfloat16, clear, fetch, put
from kvtransfer.compiled import Array

KEYS = 64  # of a block
MASKED = np.float32(-1e30)  # finite: a row that a block masks as a whole then weighs exactly 0 instead of NaN


class AttentionScratch(NamedTuple):
    """One thread's. With R rows, BLOCK · group rounded up to 16, and head size D: queries uint16 [R · D], without
    tiles wide_queries float32 [R · D]; keys, values uint16 [2 · KEYS · D], packed; scores float32 [R · KEYS]; weights
    uint16 [R · KEYS]; output float32 [R · D], sums float32 [R · 16], peaks float32 [R]."""

    queries: Array
    wide_queries: Array
    keys: Array
    values: Array
    scores: Array
    weights: Array
    output: Array
    sums: Array
    peaks: Array


@kernel
def attend(
    queries: Array,
    wide_queries: Array,
    first_row: int,
    num_tokens: int,
    num_heads: int,
    first_head: int,
    group: int,
    size: int,
    keys: Array,
    values: Array,
    plane_at: int,
    table: Array,
    table_at: int,
    start: int,
    out: Array,
    stride: int,
    scratch: AttentionScratch,
    in_tiles: bool,
    wide: bool,
) -> None:
    """Rows [first_row, first_row + num_tokens) of queries, [rows, num_heads, size], at positions from `start` on, of
    the heads from `first_head` on, against the blocks of `table`; writes `out`, float32, the heads side by side and
    `stride` numbers from row to row.

    queries: bfloat16, without tiles wide_queries, float32. keys, values: the memory as uint16, of bfloat16 or, where
    `wide`, of float32; a block's begins at number plane_at + its number · KEYS · size.
    """
    num_rows = -(-num_tokens * group // 16) * 16
    for token in range(num_tokens):
        source = ((first_row + token) * num_heads + first_head) * size
        target = token * group * size
        for i in range(0, group * size, 16):
            if in_tiles:
                store(scratch.queries, target + i, load(queries, source + i))
            else:
                store(scratch.wide_queries, target + i, load(wide_queries, source + i))
    zero = splat(np.float32(0))
    for i in range(0, num_rows * size, 16):
        store(scratch.output, i, zero)
    for i in range(0, num_rows * 16, 16):
        store(scratch.sums, i, zero)
    for i in range(0, num_rows, 16):
        store(scratch.peaks, i, splat(MASKED))
    for block in range((start + num_tokens - 1) // KEYS + 1):
        at = plane_at + np.int64(table[table_at + block]) * KEYS * size
        if wide:
            _pack_wide_keys(keys, at, size, scratch.keys)
            _pack_wide_values(values, at, size, scratch.values)
        else:
            _pack_keys(keys, at, size, scratch.keys)
            _pack_values(values, at, size, scratch.values)
        ahead = block * KEYS - start  # the first token of the unit that sees the block's first key
        first = max(0, ahead * group) // 32 * 32
        if in_tiles:
            _add_block_in_tiles(scratch, first, num_rows, num_tokens * group, group, size, -ahead)
        else:
            _add_block_in_lanes(scratch, first, num_tokens * group, group, size, -ahead, wide)
    for row in range(num_tokens * group):
        token = row // group
        target = (first_row + token) * stride + (first_head + row - token * group) * size
        inverse = splat(np.float32(1) / total(load(scratch.sums, row * 16)))
        for i in range(0, size, 16):
            store(out, target + i, load(scratch.output, row * size + i) * inverse)


@kernel
def _pack_keys(keys: Array, at: int, size: int, packed: Array) -> None:
    """[KEYS, size] into tiles of 16 keys and 32 numbers each, of pairs of numbers one row: what a product with the
    queries takes."""
    words, target, to = keys.view(np.int32), packed.view(np.int32), 0
    for key in range(0, KEYS, 16):
        for i in range(0, size, 32):
            transpose(words, (at + key * size + i) // 2, size // 2, target, to)
            to += 256


@kernel
def _pack_values(values: Array, at: int, size: int, packed: Array) -> None:
    """[KEYS, size] into tiles of 32 keys and 16 numbers each, of pairs of keys one row."""
    target, to = packed.view(np.int32), 0
    for half in range(0, KEYS, 32):
        for i in range(0, size, 16):
            for key in range(half, half + 32, 2):
                here = at + key * size + i
                store(target, to, pairs(values, here, here + size))
                to += 16


@kernel
def _pack_wide_keys(keys: Array, at: int, size: int, packed: Array) -> None:
    """[KEYS, size] float32: of 16 keys one number after the other."""
    words, target, to = keys.view(np.int32), packed.view(np.int32), 0
    for key in range(0, KEYS, 16):
        for i in range(0, size, 16):
            transpose(words, at + key * size + i, size, target, to)
            to += 256


@kernel
def _pack_wide_values(values: Array, at: int, size: int, packed: Array) -> None:
    """[KEYS, size] float32: of 16 numbers one key after the other."""
    source, target, to = values.view(np.float32), packed.view(np.float32), 0
    for i in range(0, size, 16):
        for key in range(KEYS):
            store(target, to, load(source, at + key * size + i))
            to += 16


@kernel
def _add_block_in_tiles(
    scratch: AttentionScratch, first: int, num_rows: int, num_used: int, group: int, size: int, behind: int
) -> None:
    """The block in scratch to the rows from `first` on. What a tile wrote can't be read at once, nor the other way
    round: tiles work on the rows before and after."""
    _score(scratch.queries, first, num_rows, size, scratch.keys, scratch.scores)
    for row in range(first, num_rows, 32):
        if row + 32 < num_rows:
            _score(scratch.queries, row + 32, num_rows, size, scratch.keys, scratch.scores)
        if row > first:
            _add_values(scratch, row - 32, num_rows, size)
        _weigh(scratch, row, min(32, num_used - row), group, size, behind, True, False)
    _add_values(scratch, (num_rows - 1) // 32 * 32, num_rows, size)


@kernel
def _add_block_in_lanes(
    scratch: AttentionScratch, first: int, num_used: int, group: int, size: int, behind: int, wide: bool
) -> None:
    """The same on a processor without tiles; weights stay float32, in the place of the scores."""
    for row in range(first, num_used, 8):
        count = min(8, num_used - row)
        _score_in_lanes(scratch, row, count, size, wide)
        _weigh(scratch, row, count, group, size, behind, False, wide)
        _add_values_in_lanes(scratch, row, count, size, wide)


@kernel
def _score(queries: Array, row: int, num_rows: int, size: int, keys: Array, scores: Array) -> None:
    """Of 32 rows, or of the last 16."""
    at, tile = row * KEYS, size * 16  # elements from 16 keys to the next
    for key in range(0, KEYS, 32):
        here = key // 16 * tile
        clear(0)
        clear(1)
        if row + 16 < num_rows:
            clear(2)
            clear(3)
            for i in range(0, size, 32):
                fetch(4, queries, row * size + i, size * 2)
                fetch(5, queries, (row + 16) * size + i, size * 2)
                fetch(6, keys, here + i * 16, 64)
                fetch(7, keys, here + tile + i * 16, 64)
                add_product_of_bfloat16(0, 4, 6)
                add_product_of_bfloat16(1, 4, 7)
                add_product_of_bfloat16(2, 5, 6)
                add_product_of_bfloat16(3, 5, 7)
            put(2, scores, at + 16 * KEYS + key, 4 * KEYS)
            put(3, scores, at + 16 * KEYS + key + 16, 4 * KEYS)
        else:
            for i in range(0, size, 32):
                fetch(4, queries, row * size + i, size * 2)
                fetch(6, keys, here + i * 16, 64)
                fetch(7, keys, here + tile + i * 16, 64)
                add_product_of_bfloat16(0, 4, 6)
                add_product_of_bfloat16(1, 4, 7)
        put(0, scores, at + key, 4 * KEYS)
        put(1, scores, at + key + 16, 4 * KEYS)


@kernel
def _weigh(
    scratch: AttentionScratch,
    row: int,
    count: int,
    group: int,
    size: int,
    behind: int,
    in_tiles: bool,
    wide: bool,
) -> None:
    """Scores of `count` rows into weights; brings what their outputs hold under the new maximum. behind: how far the
    unit's first token is behind the block's first key."""
    masked = splat(MASKED)
    masks = behind + row // group < KEYS - 1
    for i in range(count):
        at = (row + i) * KEYS
        a, b = load(scratch.scores, at), load(scratch.scores, at + 16)
        c, d = load(scratch.scores, at + 32), load(scratch.scores, at + 48)
        if masks:
            # Up to the last key of the block that the row sees.
            limit = splat(np.int32(behind + (row + i) // group))
            a = where_at_most(lanes_from(np.int32(0)), limit, a, masked)
            b = where_at_most(lanes_from(np.int32(16)), limit, b, masked)
            c = where_at_most(lanes_from(np.int32(32)), limit, c, masked)
            d = where_at_most(lanes_from(np.int32(48)), limit, d, masked)
        old = scratch.peaks[row + i]
        peak = max(largest(larger(larger(a, b), larger(c, d))), old)
        top = splat(peak)
        if wide:
            a, b, c, d = exp(a - top), exp(b - top), exp(c - top), exp(d - top)
        else:
            a, b, c, d = (
                exp_of_negative(a - top),
                exp_of_negative(b - top),
                exp_of_negative(c - top),
                exp_of_negative(d - top),
            )
        sums = (a + b) + (c + d)
        if peak == old:
            sums = load(scratch.sums, (row + i) * 16) + sums
        else:
            scratch.peaks[row + i] = peak
            factor = exp(splat(old - peak)) if wide else exp_of_negative(splat(old - peak))
            sums = load(scratch.sums, (row + i) * 16) * factor + sums
            for k in range((row + i) * size, (row + i + 1) * size, 16):
                store(scratch.output, k, load(scratch.output, k) * factor)
        store(scratch.sums, (row + i) * 16, sums)
        if in_tiles:
            _store_four(scratch.weights, at, 16, a, b, c, d)
        else:
            _store_four(scratch.scores, at, 16, a, b, c, d)


@kernel
def _add_values(scratch: AttentionScratch, row: int, num_rows: int, size: int) -> None:
    """To the outputs of 32 rows, or of the last 16."""
    for first in range(0, size, 32):
        at = row * size + first
        fetch(0, scratch.output, at, size * 4)
        fetch(1, scratch.output, at + 16, size * 4)
        if row + 16 < num_rows:
            other = at + 16 * size
            fetch(2, scratch.output, other, size * 4)
            fetch(3, scratch.output, other + 16, size * 4)
            for key in range(0, KEYS, 32):
                tile = key * size + first * 32
                fetch(4, scratch.weights, row * KEYS + key, KEYS * 2)
                fetch(5, scratch.weights, (row + 16) * KEYS + key, KEYS * 2)
                fetch(6, scratch.values, tile, 64)
                fetch(7, scratch.values, tile + 512, 64)
                add_product_of_bfloat16(0, 4, 6)
                add_product_of_bfloat16(1, 4, 7)
                add_product_of_bfloat16(2, 5, 6)
                add_product_of_bfloat16(3, 5, 7)
            put(2, scratch.output, other, size * 4)
            put(3, scratch.output, other + 16, size * 4)
        else:
            for key in range(0, KEYS, 32):
                tile = key * size + first * 32
                fetch(4, scratch.weights, row * KEYS + key, KEYS * 2)
                fetch(6, scratch.values, tile, 64)
                fetch(7, scratch.values, tile + 512, 64)
                add_product_of_bfloat16(0, 4, 6)
                add_product_of_bfloat16(1, 4, 7)
        put(0, scratch.output, at, size * 4)
        put(1, scratch.output, at + 16, size * 4)


@kernel
def _score_in_lanes(scratch: AttentionScratch, row: int, count: int, size: int, wide: bool) -> None:
    """Of up to 8 rows."""
    zero, queries, scores, x = splat(np.float32(0)), scratch.wide_queries, scratch.scores, row * size
    for i in range(row * KEYS, (row + 8) * KEYS, 16):
        store(scores, i, zero)
    for key in range(0, KEYS, 32):
        at, other, to = key * size, (key + 16) * size, row * KEYS + key
        if wide:
            floats = scratch.keys.view(np.float32)
            add_rows(count, queries, x, size, floats, at, other, size, scores, to, KEYS)
        else:
            twos = scratch.keys.view(np.int32)
            add_rows(count, queries, x, size, twos, at // 2, other // 2, size // 2, scores, to, KEYS)


@kernel
def _add_values_in_lanes(scratch: AttentionScratch, row: int, count: int, size: int, wide: bool) -> None:
    """To the outputs of up to 8 rows."""
    weights, output = scratch.scores, scratch.output
    for first in range(0, size, 32):
        to = row * size + first
        for key in range(0, KEYS, 32):
            x = row * KEYS + key
            if wide:
                floats, at = scratch.values.view(np.float32), first * KEYS + key * 16
                add_rows(count, weights, x, KEYS, floats, at, at + 16 * KEYS, 32, output, to, size)
            else:
                # Tiles of 32 keys, in them tiles of 16 numbers, in them a row for each pair of keys.
                twos, at = scratch.values.view(np.int32), key * size // 2 + first * 16
                add_rows(count, weights, x, KEYS, twos, at, at + 256, 16, output, to, size)


@kernel
def _store_four(target: Array, at: int, stride: int, a: Array, b: Array, c: Array, d: Array) -> None:
    store(target, at, a)
    store(target, at + stride, b)
    store(target, at + 2 * stride, c)
    store(target, at + 3 * stride, d)
