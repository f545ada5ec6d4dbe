"""The layers of a dense decoder as one compiled function, which all threads of a team run together.

Of many rows each thread has some of its own, from the beginning of a layer to its end, so that what a row becomes
stays near the core that works on it; threads wait for each other once a layer, until all keys and values are in the
cache. Few rows they share: of a product each takes some outputs, and all wait for each other after every phase.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.kernels.attention import AttentionScratch, attend
from engine.kernels.lanes import TINY_IS_ZERO, kernel, load, set_rounding, store
from engine.kernels.products import BFLOAT16, BLOCK, Packed, Sums, code_at, multiply
from engine.kernels.rows import normalize, quantize, turn
from engine.kernels.team import barrier, in_team, team_size, thread_index
from engine.kernels.tiles import configure, release
from kvtransfer.compiled import Array

UNIT = 5  # int32 of a unit of attention


class Shape(NamedTuple):
    """The model's, and how its products are computed: a kind of engine.kernels.products, attention in tiles or not."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    size: int
    num_slots: int
    kind: int
    in_tiles: bool
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
    stride] what a product gives, `queries` bfloat16, `codes` (as bytes and as 16 bits, `room` bytes a row) and
    `scales` the input of a product."""

    stride: int
    room: int
    x: Array
    wide: Array
    queries: Array
    codes: Array
    codes_16: Array
    scales: Array


class Step(NamedTuple):
    """`positions`, `slots` int64 of each row. A unit of attention, none across a multiple of BLOCK rows, is five int32:
    first row, number of tokens, first position, where in `table` the blocks of its sequence begin, and head. keys,
    values: uint16, flat, [layers, heads, slots, head size]."""

    num_rows: int
    positions: Array
    slots: Array
    units: Array
    table: Array
    keys: Array
    values: Array


class Memory(NamedTuple):
    """[threads, …] of what `Mine` and AttentionScratch hold; FULL_TILES."""

    row: Array
    other_row: Array
    sums: Array
    sums_f: Array
    queries: Array
    keys: Array
    values: Array
    scores: Array
    weights: Array
    output: Array
    totals: Array
    peaks: Array
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
    me, num_threads = thread_index(), team_size()
    attention = AttentionScratch(
        memory.queries[me],
        memory.keys[me],
        memory.values[me],
        memory.scores[me],
        memory.weights[me],
        memory.output[me],
        memory.totals[me],
        memory.peaks[me],
    )
    sums = Sums(memory.sums[me], memory.sums_f[me])
    return Mine(
        me,
        num_threads,
        num_rows < 2 * BLOCK * num_threads,
        memory.row[me],
        memory.other_row[me],
        sums,
        attention,
    )


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
def _first_row(turn: int, mine: Mine) -> int:
    """Of this thread's rows, every so many of them: one by one where rows are shared, else whole blocks."""
    return (turn * mine.num_threads + mine.index) * (1 if mine.shares else BLOCK)


@kernel
def _end_row(turn: int, num_rows: int, mine: Mine) -> int:
    return min(_first_row(turn, mine) + (1 if mine.shares else BLOCK), num_rows)


@kernel
def _enter(weight: Array, layer: int, shape: Shape, rows: Rows, step: Step, mine: Mine) -> None:
    """The norm of x as the next product's input."""
    hidden, turn_ = shape.hidden, 0
    while _first_row(turn_, mine) < step.num_rows:
        for row in range(_first_row(turn_, mine), _end_row(turn_, step.num_rows, mine)):
            normalize(rows.x, row * hidden, hidden, weight, layer * hidden, shape.eps, mine.row)
            _put_input(mine.row, 0, hidden, row, shape, rows, mine)
        turn_ += 1
    _wait(mine)


@kernel
def _encode(width: int, shape: Shape, rows: Rows, step: Step, mine: Mine) -> None:
    """Rows of `wide`, `width` numbers each, as the next product's input."""
    turn_ = 0
    while _first_row(turn_, mine) < step.num_rows:
        for row in range(_first_row(turn_, mine), _end_row(turn_, step.num_rows, mine)):
            _put_input(rows.wide, row * rows.stride, width, row, shape, rows, mine)
        turn_ += 1
    _wait(mine)


@kernel
def _put_input(source: Array, at: int, width: int, row: int, shape: Shape, rows: Rows, mine: Mine) -> None:
    if shape.kind != BFLOAT16:
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
    turn_ = 0
    while _first_row(turn_, mine) < step.num_rows:
        for row in range(_first_row(turn_, mine), _end_row(turn_, step.num_rows, mine)):
            _place_row(layer, model, rows, step, mine, row)
        turn_ += 1


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
            turn(heads, at, size, model.cos, model.signed_sin, angle, factor, rows.queries, to)
        else:
            to = _slot(layer, head - num_heads, shape, step.slots[row])
            turn(heads, at, size, model.cos, model.signed_sin, angle, np.float32(1), step.keys, to)
    for head in range(num_kv_heads):
        at = source + (num_heads + num_kv_heads + head) * size
        to = _slot(layer, head, shape, step.slots[row])
        for i in range(0, size, 16):
            store(step.values, to + i, load(rows.wide, at + i))


@kernel
def _slot(layer: int, head: int, shape: Shape, slot: int) -> int:
    return ((layer * shape.num_kv_heads + head) * shape.num_slots + slot) * shape.size


@kernel
def _attend(layer: int, shape: Shape, rows: Rows, step: Step, mine: Mine) -> None:
    """Attention of the step's units; `wide` becomes the heads, side by side."""
    group = shape.num_heads // shape.num_kv_heads
    for unit in range(len(step.units) // UNIT):
        at = unit * UNIT
        owner = unit if mine.shares else step.units[at] // BLOCK
        if owner % mine.num_threads != mine.index:
            continue
        head = step.units[at + 4]
        attend(
            rows.queries,
            step.units[at],
            step.units[at + 1],
            shape.num_heads,
            head * group,
            group,
            shape.size,
            step.keys,
            step.values,
            _slot(layer, head, shape, 0),
            step.table,
            step.units[at + 3],
            step.units[at + 2],
            rows.wide,
            rows.stride,
            mine.attention,
            shape.in_tiles,
        )
    _wait(mine)
