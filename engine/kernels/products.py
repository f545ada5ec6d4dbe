"""Products with weights that are packed once: integers of 8 bits, bfloat16 or float32.

Packed: of every 16 outputs a group, in it the weights of 4 bytes of input after the other, 16 times 4 bytes a row of
64. That is what a matrix tile takes, and what a vector takes. Sums of integers are exact, so it does not matter how
they come about. Those of bfloat16 in tiles are the tiles', 32 inputs at a time in ascending order; in lanes each
product is added to the sum before it, in ascending order: whatever the number of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.functions import exp, inverse
from engine.kernels.lanes import kernel, load, splat, store, to_floats
from engine.kernels.outer import add_bytes, add_rows
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
# Kinds of products. Inputs of the first are bfloat16, of the last two float32, of the others bytes.
BFLOAT16_IN_TILES, BYTES_IN_TILES, BYTES_IN_LANES, BFLOAT16_IN_LANES, FLOATS_IN_LANES = range(5)
LINE = 64  # bytes of a cache line
NEAR_LINES = 16  # of the weights of a block, which then stay in a core's first cache for all its rows
FEW_ROWS = 4  # up to which a tile would be mostly empty


class Packed(NamedTuple):
    """Weights of one product of every layer. `codes` uint8, flat; [layers · outputs] each `scales` float32, `bias`
    float32, empty where there is none, and `starts` int32, what sums begin with: -128 times the sum of an output's
    weights, where these are not bytes the bits of its bias. `width`: bytes of an output's weights; `ends`: what becomes
    of a product, one of REPLACE, ADD and GATE."""

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
    fours = np.ascontiguousarray(rows).view(np.uint32)
    by_group = fours.reshape(len(fours) // GROUP, GROUP, -1)
    return np.ascontiguousarray(by_group.transpose(0, 2, 1)).reshape(-1).view(np.uint8)


@kernel
def code_at(row: int, room: int) -> int:
    """Where in `codes`, with room for so many bytes a row, a row's first byte is. They lie in tiles of 16 rows and 64
    bytes: a row goes on 1024 bytes after every 64."""
    return row // 16 * 16 * room + row % 16 * 64


@kernel
def takes_bytes(kind: int) -> bool:
    """Whether a product's inputs are quantized."""
    return kind in (BYTES_IN_TILES, BYTES_IN_LANES)


@kernel
def takes_floats(kind: int) -> bool:
    """Whether a product's inputs are float32."""
    return kind in (BFLOAT16_IN_LANES, FLOATS_IN_LANES)


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
    codes: uint8, rows with `room` bytes for each (`code_at`, of float32 one after the other), their number rounded up
    to BLOCK. out: `stride` numbers from row to row.
    """
    # Tiles sum one block while vectors finish the one before, and the weights of the next are on their way. Where each
    # block has one turn, weights are all that is waited for, and the processor reads them ahead by itself.
    num_turns = -(-(num_rows - blocks[2] * BLOCK) // (blocks[3] * BLOCK))
    block_bytes = BLOCK * packed.width
    share = -(-block_bytes // (num_turns * LINE)) * LINE if num_turns > 1 else 0
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
                sums,
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
    sums: Sums,
    to: int,
) -> None:
    if takes_floats(kind):
        _sum_floats_in_lanes(kind == FLOATS_IN_LANES, codes, room, row, count, packed, at, here, sums, to)
    elif kind == BFLOAT16_IN_TILES or (kind == BYTES_IN_TILES and count > FEW_ROWS):
        _sum_in_tiles(kind == BYTES_IN_TILES, codes, room, row, count > 16, packed, at, here, sums.whole, to)
    else:
        _sum_bytes_in_lanes(codes, room, row, count, packed, at, here, sums.whole, to)


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
        if takes_bytes(kind):
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
def _begin_sums(packed: Packed, here: int, count: int, sums: Array, to: int) -> None:
    """Of `count` rows, rounded up to 8."""
    start, other_start = load(packed.starts, here), load(packed.starts, here + 16)
    for i in range(-(-count // 8) * 8):
        store(sums, to + i * BLOCK, start)
        store(sums, to + i * BLOCK + 16, other_start)


@kernel
def _sum_bytes_in_lanes(
    codes: Array, room: int, row: int, count: int, packed: Packed, at: int, here: int, sums: Array, to: int
) -> None:
    _begin_sums(packed, here, count, sums, to)
    fours, weights, num_lines = codes.view(np.int32), packed.codes, packed.width // LINE
    for line in range(0, num_lines, NEAR_LINES):
        lines, first, i = min(NEAR_LINES, num_lines - line), at + line * 16 * LINE, 0
        last = first + 16 * packed.width
        while i < count:
            x, target = code_at(row + i, room) // 4 + line * 256, to + i * BLOCK
            if count - i >= 8:
                add_bytes(8, fours, x, weights, first, last, lines, sums, target)
                i += 8
            elif count - i >= 4:
                add_bytes(4, fours, x, weights, first, last, lines, sums, target)
                i += 4
            else:
                add_bytes(1, fours, x, weights, first, last, lines, sums, target)
                i += 1


@kernel
def _sum_floats_in_lanes(
    wide: bool,
    codes: Array,
    room: int,
    row: int,
    count: int,
    packed: Packed,
    at: int,
    here: int,
    sums: Sums,
    to: int,
) -> None:
    """wide: whether weights are float32, too."""
    _begin_sums(packed, here, count, sums.whole, to)
    numbers = codes.view(np.float32)
    for line in range(0, packed.width, NEAR_LINES * LINE):
        num_bytes = min(NEAR_LINES * LINE, packed.width - line)
        first, steps = at // 4 + line * 4, num_bytes // 4
        last, inputs_at = first + 4 * packed.width, line // 4 if wide else line // 2
        for i in range(0, count, 8):
            few, x, target = min(8, count - i), (row + i) * room // 4 + inputs_at, to + i * BLOCK
            if wide:
                floats = packed.codes.view(np.float32)
                add_rows(few, numbers, x, room // 4, floats, first, last, steps, sums.floats, target, BLOCK)
            else:
                pairs = packed.codes.view(np.int32)
                add_rows(few, numbers, x, room // 4, pairs, first, last, steps, sums.floats, target, BLOCK)
