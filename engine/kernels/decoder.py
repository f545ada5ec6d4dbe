"""The layers of a dense decoder as one compiled function, which all threads of a team run together.

Of many rows each thread has some of its own, from the beginning of a layer to its end, so that what a row becomes
stays near the core that works on it; threads wait for each other once a layer, until all keys and values are in the
cache. Few rows they share: of a product each takes some outputs, and all wait for each other after every phase.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.attention import AttentionScratch, attend
from engine.kernels.lanes import kernel, load, store
from engine.kernels.processor import TINY_IS_ZERO, set_rounding
from engine.kernels.products import BLOCK, Packed, Sums, code_at, multiply, takes_bytes, takes_floats
from engine.kernels.rows import normalize, quantize, turn
from engine.kernels.team import barrier, in_team, team_size, thread_index
from engine.kernels.tiles import configure, release
from kvtransfer.compiled import Array

UNIT = 5  # int32 of a unit of attention


class Shape(NamedTuple):
    """The model's, and how its products are computed: a kind of engine.kernels.products; attention in tiles or not; its
    cache in float32 or not."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    size: int
    kind: int
    in_tiles: bool
    wide_cache: bool
    has_head_norms: bool
    eps: float


class Norms(NamedTuple):
    """float32: [layers · hidden] twice, [hidden], [layers · head size] twice."""

    attention: Array
    mlp: Array
    last: Array
    queries: Array
    keys: Array


class Products(NamedTuple):
    """Of the layers. In `gate_up` 16 gates and the 16 that they are for take turns."""

    qkv: Packed
    o: Packed
    gate_up: Packed
    down: Packed


class Model(NamedTuple):
    """What stays as it is. cos, signed_sin: float32 [max_context · head size]."""

    shape: Shape
    norms: Norms
    products: Products
    head: Packed
    cos: Array
    signed_sin: Array


class Rows(NamedTuple):
    """What is kept of the step's rows: `x` float32 [rows, hidden] is the residual stream, `wide` float32 [rows,
    stride] what a product gives, `queries` bfloat16 or, without tiles, `wide_queries` float32, `codes` (as bytes, as 16
    bits and as float32, `room` bytes a row) and `scales` the input of a product."""

    stride: int
    room: int
    x: Array
    wide: Array
    queries: Array
    wide_queries: Array
    codes: Array
    codes_16: Array
    codes_32: Array
    scales: Array


class Step(NamedTuple):
    """`positions`, `slots` int64 of each row. A unit of attention, none across a multiple of BLOCK rows, is five int32:
    first row, number of tokens, first position, where in `table` the blocks of its sequence begin, and head. keys,
    values: the cache's memory as uint16, flat, [layers, heads, num_slots, head size]."""

    num_rows: int
    positions: Array
    slots: Array
    units: Array
    table: Array
    num_slots: int
    keys: Array
    values: Array


class Memory(NamedTuple):
    """What `Mine` holds, of every thread: [threads, …]. tiles: FULL_TILES."""

    row: Array
    other_row: Array
    sums: Sums
    attention: AttentionScratch
    tiles: Array


class Mine(NamedTuple):
    """One thread's: which one of how many, whether they share rows, and memory of its own."""

    index: int
    num_threads: int
    shares: bool
    row: Array
    other_row: Array
    sums: Sums
    attention: AttentionScratch


@kernel
def run_layers(
    first: int, end: int, model: Model, rows: Rows, step: Step, memory: Memory, num_threads: int
) -> None:
    """Layers [first, end). `rows.x`: what the embedding or the layer before gave, and what these do."""
    in_team(_layers, (first, end, model, rows, step, memory), num_threads)


@kernel
def _layers(first: int, end: int, model: Model, rows: Rows, step: Step, memory: Memory) -> None:
    before = set_rounding(TINY_IS_ZERO)
    if model.shape.in_tiles:
        configure(memory.tiles)
    mine = _mine(memory, step.num_rows)
    for layer in range(first, end):
        _attention(layer, model, rows, step, mine)
        _mlp(layer, model, rows, step, mine)
    if model.shape.in_tiles:
        release()
    set_rounding(before)


@kernel
def run_head(
    model: Model, rows: Rows, memory: Memory, drawing: Array, logits: Array, num_threads: int
) -> None:
    """After the last layer: logits float32 [number of rows in `drawing`, outputs of the head]."""
    in_team(_head, (model, rows, memory, drawing, logits), num_threads)


@kernel
def _head(model: Model, rows: Rows, memory: Memory, drawing: Array, logits: Array) -> None:
    before = set_rounding(TINY_IS_ZERO)
    if model.shape.in_tiles:
        configure(memory.tiles)
    shape, mine = model.shape, _mine(memory, 1)
    for index in range(mine.index, len(drawing), mine.num_threads):
        at = drawing[index] * shape.hidden
        normalize(rows.x, at, shape.hidden, model.norms.last, 0, shape.eps, mine.row)
        _put_input(mine.row, 0, shape.hidden, index, shape, rows, mine)
    barrier()
    _multiply(model.head, np.int64(0), shape, rows, len(drawing), logits, model.head.num_outputs, mine)
    if model.shape.in_tiles:
        release()
    set_rounding(before)


@kernel
def _mine(memory: Memory, num_rows: int) -> Mine:
    me, num_threads, all_of = thread_index(), team_size(), memory.attention
    attention = AttentionScratch(
        all_of.queries[me],
        all_of.wide_queries[me],
        all_of.keys[me],
        all_of.values[me],
        all_of.scores[me],
        all_of.weights[me],
        all_of.output[me],
        all_of.sums[me],
        all_of.peaks[me],
    )
    sums = Sums(memory.sums.whole[me], memory.sums.floats[me])
    shares = num_rows < 2 * BLOCK * num_threads
    return Mine(me, num_threads, shares, memory.row[me], memory.other_row[me], sums, attention)


@kernel
def _wait(mine: Mine) -> None:
    """Where rows are shared, for the others."""
    if mine.shares:
        barrier()


@kernel
def _attention(layer: int, model: Model, rows: Rows, step: Step, mine: Mine) -> None:
    shape, products = model.shape, model.products
    _enter(model.norms.attention, layer, shape, rows, step, mine)
    _multiply(products.qkv, layer, shape, rows, step.num_rows, rows.wide, rows.stride, mine)
    _place_heads(layer, model, rows, step, mine)
    barrier()
    _attend(layer, shape, rows, step, mine)
    _encode(shape.num_heads * shape.size, shape, rows, step, mine)
    _multiply(products.o, layer, shape, rows, step.num_rows, rows.x, shape.hidden, mine)


@kernel
def _mlp(layer: int, model: Model, rows: Rows, step: Step, mine: Mine) -> None:
    shape, products = model.shape, model.products
    _enter(model.norms.mlp, layer, shape, rows, step, mine)
    _multiply(products.gate_up, layer, shape, rows, step.num_rows, rows.wide, rows.stride, mine)
    _encode(shape.inner, shape, rows, step, mine)
    _multiply(products.down, layer, shape, rows, step.num_rows, rows.x, shape.hidden, mine)


@kernel
def _multiply(
    packed: Packed,
    layer: int,
    shape: Shape,
    rows: Rows,
    num_rows: int,
    out: Array,
    stride: int,
    mine: Mine,
) -> None:
    num_blocks = packed.num_outputs // BLOCK
    if mine.shares:
        first = mine.index * num_blocks // mine.num_threads
        end = (mine.index + 1) * num_blocks // mine.num_threads
        blocks = (first, end, 0, 1)
    else:
        blocks = (0, num_blocks, mine.index, mine.num_threads)
    multiply(
        packed,
        layer,
        shape.kind,
        rows.codes,
        rows.room,
        rows.scales,
        num_rows,
        blocks,
        out,
        stride,
        mine.sums,
    )
    _wait(mine)


@kernel
def _is_mine(number: int, row: int, mine: Mine) -> bool:
    """Whether work on `row` is this thread's: where rows are shared by the work's number, else by blocks of rows."""
    owner = number if mine.shares else row // BLOCK
    return bool(owner % mine.num_threads == mine.index)


@kernel
def _enter(weight: Array, layer: int, shape: Shape, rows: Rows, step: Step, mine: Mine) -> None:
    """The norm of x as the next product's input."""
    hidden = shape.hidden
    for row in range(step.num_rows):
        if _is_mine(row, row, mine):
            normalize(rows.x, row * hidden, hidden, weight, layer * hidden, shape.eps, mine.row)
            _put_input(mine.row, 0, hidden, row, shape, rows, mine)
    _wait(mine)


@kernel
def _encode(width: int, shape: Shape, rows: Rows, step: Step, mine: Mine) -> None:
    """Rows of `wide`, `width` numbers each, as the next product's input."""
    for row in range(step.num_rows):
        if _is_mine(row, row, mine):
            _put_input(rows.wide, row * rows.stride, width, row, shape, rows, mine)
    _wait(mine)


@kernel
def _put_input(source: Array, at: int, width: int, row: int, shape: Shape, rows: Rows, mine: Mine) -> None:
    if takes_floats(shape.kind):
        to = row * rows.room // 4
        for i in range(0, width, 16):
            store(rows.codes_32, to + i, load(source, at + i))
        return
    if takes_bytes(shape.kind):
        to = code_at(row, rows.room)
        rows.scales[row] = quantize(source, at, width, mine.other_row, rows.codes, to)
        return
    to = code_at(row, rows.room) // 2
    for i in range(0, width, 32):
        store(rows.codes_16, to + i * 16, load(source, at + i))
        store(rows.codes_16, to + i * 16 + 16, load(source, at + i + 16))


@kernel
def _place_heads(layer: int, model: Model, rows: Rows, step: Step, mine: Mine) -> None:
    """Queries, turned and scaled, into `queries`; keys, turned, and values into the cache."""
    for row in range(step.num_rows):
        if _is_mine(row, row, mine):
            _place_row(layer, model, rows, step, mine, row)


@kernel
def _place_row(layer: int, model: Model, rows: Rows, step: Step, mine: Mine, row: int) -> None:
    shape, norms = model.shape, model.norms
    size, num_heads, num_kv_heads = shape.size, shape.num_heads, shape.num_kv_heads
    factor = np.float32(size) ** np.float32(-0.5)
    source, angle = row * rows.stride, step.positions[row] * size
    for head in range(num_heads + num_kv_heads):
        heads, at = rows.wide, source + head * size
        if shape.has_head_norms:
            weight = norms.queries if head < num_heads else norms.keys
            normalize(heads, at, size, weight, layer * size, shape.eps, mine.row)
            heads, at = mine.row, 0
        if head < num_heads:
            to = (row * num_heads + head) * size
            if shape.in_tiles:
                turn(heads, at, size, model.cos, model.signed_sin, angle, factor, rows.queries, to)
            else:
                turn(heads, at, size, model.cos, model.signed_sin, angle, factor, rows.wide_queries, to)
        else:
            to, one = _slot(layer, head - num_heads, shape, step, step.slots[row]), np.float32(1)
            if shape.wide_cache:
                keys = step.keys.view(np.float32)
                turn(heads, at, size, model.cos, model.signed_sin, angle, one, keys, to)
            else:
                turn(heads, at, size, model.cos, model.signed_sin, angle, one, step.keys, to)
    for head in range(num_kv_heads):
        at = source + (num_heads + num_kv_heads + head) * size
        to = _slot(layer, head, shape, step, step.slots[row])
        for i in range(0, size, 16):
            if shape.wide_cache:
                store(step.values.view(np.float32), to + i, load(rows.wide, at + i))
            else:
                store(step.values, to + i, load(rows.wide, at + i))


@kernel
def _slot(layer: int, head: int, shape: Shape, step: Step, slot: int) -> int:
    return ((layer * shape.num_kv_heads + head) * step.num_slots + slot) * shape.size


@kernel
def _attend(layer: int, shape: Shape, rows: Rows, step: Step, mine: Mine) -> None:
    """Attention of the step's units; `wide` becomes the heads, side by side."""
    group = shape.num_heads // shape.num_kv_heads
    for unit in range(len(step.units) // UNIT):
        at = unit * UNIT
        if not _is_mine(unit, step.units[at], mine):
            continue
        head = step.units[at + 4]
        attend(
            rows.queries,
            rows.wide_queries,
            step.units[at],
            step.units[at + 1],
            shape.num_heads,
            head * group,
            group,
            shape.size,
            step.keys,
            step.values,
            _slot(layer, head, shape, step, 0),
            step.table,
            step.units[at + 3],
            step.units[at + 2],
            rows.wide,
            rows.stride,
            mine.attention,
            shape.in_tiles,
            shape.wide_cache,
        )
    _wait(mine)
