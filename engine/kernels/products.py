"""Products with weights that are packed once: integers of 8 bits, or bfloat16.

Packed: of every 16 outputs a group, in it the weights of 4 bytes of input after the other, 16 times 4 bytes a row of
64. That is what a matrix tile takes, and what a vector of products of bytes takes. Sums of integers are exact, so it
does not matter how they come about; those of bfloat16 are the tiles', 32 inputs at a time in ascending order, whatever
the number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.functions import exp, inverse
from engine.kernels.lanes import kernel, load, splat, store, to_floats
from engine.kernels.outer import sum_bytes
from engine.kernels.processor import expect
from engine.kernels.tiles import (
    add_product_of_bfloat16,
    add_product_of_bytes,
    fetch,
    put,
)
from kvtransfer.compiled import Array

GROUP = 16  # outputs
BLOCK = 32  # rows and outputs that are computed together
REPLACE, ADD, GATE = 0, 1, 2  # what becomes of a product
BFLOAT16, BYTES_IN_TILES, BYTES_IN_LANES = 0, 1, 2  # kinds of products; the first are in tiles, too
LINE = 64  # bytes of a cache line
FEW_ROWS = 4  # up to which a tile would be mostly empty


class Packed(NamedTuple):
    """Weights of one product of every layer. `codes` uint8, flat; [layers · outputs] each `scales` float32, `bias`
    float32, empty where there is none, and `starts` int32, what sums begin with: -128 times the sum of an output's
    weights, of bfloat16 the bits of its bias. `width`: bytes of an input row; `ends`: what becomes of a product, one of
    REPLACE, ADD and GATE."""

    codes: Array
    scales: Array
    starts: Array
    bias: Array
    width: int
    num_outputs: int
    ends: int


class Sums(NamedTuple):
    """A thread's room for two blocks: 2 · BLOCK · BLOCK int32, and the same memory as float32."""

    whole: Array
    floats: Array


def pack(rows: np.ndarray) -> np.ndarray:
    """Weights [outputs, inputs], outputs a multiple of BLOCK, of whatever type, as flat bytes."""
    raw = np.ascontiguousarray(rows).view(np.uint8)
    by_group = raw.reshape(len(raw) // GROUP, GROUP, -1, 4)
    return np.ascontiguousarray(by_group.transpose(0, 2, 1, 3)).reshape(-1)


@kernel
def code_at(row: int, room: int) -> int:
    """Where in `codes`, with room for so many bytes a row, a row's first byte is. They lie in tiles of 16 rows and 64
    bytes: a row goes on 1024 bytes after every 64."""
    return row // 16 * 16 * room + row % 16 * 64


@kernel
def multiply(
    packed: Packed,
    layer: int,
    kind: int,
    codes: Array,
    room: int,
    scales: Array,
    num_rows: int,
    blocks: tuple[int, int, int, int],
    out: Array,
    stride: int,
    sums: Sums,
) -> None:
    """out = input · weightsᵀ + bias for some blocks of BLOCK outputs and BLOCK rows: of outputs those from blocks[0]
    to blocks[1], of rows blocks[2] and every blocks[3]th after it.

    ADD: out += that. GATE: of every block of 32 outputs the first half are gates: out = silu(gate) · up, half as wide.
    codes: uint8, rows of `packed.width` bytes with `room` for each (`code_at`), their number rounded up to BLOCK. out:
    `stride` numbers from row to row.
    """
    # Tiles sum one block while vectors finish the one before, and the weights of the next are on their way.
    num_turns = -(-(num_rows - blocks[2] * BLOCK) // (blocks[3] * BLOCK))
    block_bytes = BLOCK * packed.width
    share = -(-block_bytes // (max(num_turns, 1) * LINE)) * LINE
    last_block, last_row, half = np.int64(-1), np.int64(0), np.int64(0)
    for block in range(blocks[0], blocks[1]):
        at = layer * packed.num_outputs * packed.width + block * block_bytes
        coming = at + block_bytes
        for row in range(blocks[2] * BLOCK, num_rows, blocks[3] * BLOCK):
            for line in range(coming, coming + share, LINE):
                expect(packed.codes, line)
            coming += share
            _sum(
                packed,
                at,
                layer * packed.num_outputs + block * BLOCK,
                kind,
                codes,
                room,
                row,
                min(BLOCK, num_rows - row),
                sums.whole,
                half,
            )
            half = BLOCK * BLOCK - half
            if last_block >= 0:
                count = min(BLOCK, num_rows - last_row)
                _finish(
                    packed,
                    layer,
                    last_block,
                    kind,
                    scales,
                    last_row,
                    count,
                    out,
                    stride,
                    sums,
                    half,
                )
            last_block, last_row = block, row
    if last_block >= 0:
        count = min(BLOCK, num_rows - last_row)
        _finish(
            packed,
            layer,
            last_block,
            kind,
            scales,
            last_row,
            count,
            out,
            stride,
            sums,
            BLOCK * BLOCK - half,
        )


@kernel
def _sum(
    packed: Packed,
    at: int,
    here: int,
    kind: int,
    codes: Array,
    room: int,
    row: int,
    count: int,
    sums: Array,
    to: int,
) -> None:
    if kind == BFLOAT16 or (kind == BYTES_IN_TILES and count > FEW_ROWS):
        _sum_in_tiles(kind != BFLOAT16, codes, room, row, count > 16, packed, at, here, sums, to)
    else:
        _sum_bytes_in_lanes(codes, room, row, count, packed, at, here, sums, to)


@kernel
def _finish(
    packed: Packed,
    layer: int,
    block: int,
    kind: int,
    scales: Array,
    row: int,
    count: int,
    out: Array,
    stride: int,
    sums: Sums,
    sums_at: int,
) -> None:
    here = layer * packed.num_outputs + block * BLOCK
    scale, other_scale = load(packed.scales, here), load(packed.scales, here + 16)
    for i in range(count):
        at = sums_at + i * BLOCK
        if kind != BFLOAT16:
            of_row = splat(scales[row + i])
            a = to_floats(load(sums.whole, at)) * scale * of_row
            b = to_floats(load(sums.whole, at + 16)) * other_scale * of_row
            if len(packed.bias) > 0:
                a, b = a + load(packed.bias, here), b + load(packed.bias, here + 16)
        else:
            a, b = load(sums.floats, at), load(sums.floats, at + 16)
        if packed.ends == GATE:
            one, zero = splat(np.float32(1)), splat(np.float32(0))
            store(out, (row + i) * stride + block * 16, a * b * inverse(one + exp(zero - a)))
            continue
        to = (row + i) * stride + block * BLOCK
        if packed.ends == ADD:
            a, b = load(out, to) + a, load(out, to + 16) + b
        store(out, to, a)
        store(out, to + 16, b)


@kernel
def _sum_in_tiles(
    of_bytes: bool,
    codes: Array,
    room: int,
    row: int,
    both: bool,
    packed: Packed,
    at: int,
    here: int,
    sums: Array,
    to: int,
) -> None:
    """Of 32 rows, or of 16."""
    weights, low, high, other = packed.codes, row * room, (row + 16) * room, at + 16 * packed.width
    fetch(0, packed.starts, here, 0)  # the same row 16 times
    fetch(1, packed.starts, here + 16, 0)
    fetch(2, packed.starts, here, 0)
    fetch(3, packed.starts, here + 16, 0)
    for k in range(0, packed.width * 16, 1024):
        fetch(4, codes, low + k, 64)
        fetch(6, weights, at + k, 64)
        fetch(7, weights, other + k, 64)
        if both:
            fetch(5, codes, high + k, 64)
        _add_products(of_bytes, both)
    put(0, sums, to, 128)
    put(1, sums, to + 16, 128)
    if both:
        put(2, sums, to + 512, 128)
        put(3, sums, to + 528, 128)


@kernel
def _add_products(of_bytes: bool, both: bool) -> None:
    if of_bytes:
        add_product_of_bytes(0, 4, 6)
        add_product_of_bytes(1, 4, 7)
        if both:
            add_product_of_bytes(2, 5, 6)
            add_product_of_bytes(3, 5, 7)
    else:
        add_product_of_bfloat16(0, 4, 6)
        add_product_of_bfloat16(1, 4, 7)
        if both:
            add_product_of_bfloat16(2, 5, 6)
            add_product_of_bfloat16(3, 5, 7)


@kernel
def _sum_bytes_in_lanes(
    codes: Array, room: int, row: int, count: int, packed: Packed, at: int, here: int, sums: Array, to: int
) -> None:
    fours, other, lines = codes.view(np.int32), at + 16 * packed.width, packed.width // LINE
    weights, starts, i = packed.codes, packed.starts, 0
    while i + 8 <= count:
        first = code_at(row + i, room) // 4
        sum_bytes(8, fours, first, weights, at, other, lines, starts, here, sums, to + i * BLOCK)
        i += 8
    while i + 4 <= count:
        first = code_at(row + i, room) // 4
        sum_bytes(4, fours, first, weights, at, other, lines, starts, here, sums, to + i * BLOCK)
        i += 4
    while i < count:
        first = code_at(row + i, room) // 4
        sum_bytes(1, fours, first, weights, at, other, lines, starts, here, sums, to + i * BLOCK)
        i += 1
