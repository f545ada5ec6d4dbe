"""Products of a few rows with 32 columns in lanes, for processors without matrix tiles: every sum stays in a register
from its first product to its last.

Each step takes one number of every row, 16 times over, and two vectors with that step's number of every column. With 8
rows and 32 columns 18 reads serve 16 products, so that products set the pace and not reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from engine.kernels.lanes import (
    FLOATS,
    INTS,
    address,
    byte_products,
    call,
    halves,
    kernel,
    load_from,
    spread,
)
from kvtransfer.compiled import Array

COLUMNS = 2  # vectors of 16
_I32, _F32 = ir.IntType(32), ir.FloatType()
_UNROLLED = 16  # steps, of bytes four inputs each: a cache line


class _Block:
    """Sums of `num_rows` rows and two vectors of columns, through a loop."""

    def __init__(self, builder: ir.IRBuilder, num_rows: int, kind: ir.Type) -> None:
        self.builder = builder
        self.num_rows = num_rows
        self.sums = [[cgutils.alloca_once(builder, kind) for _ in range(COLUMNS)] for _ in range(num_rows)]

    def each(self, action: Callable[[int, int, Any], None]) -> None:
        """action(row, column, where the sum is)"""
        for row, columns in enumerate(self.sums):
            for column, slot in enumerate(columns):
                action(row, column, slot)

    def add(self, row: int, column: int, product: Callable[[Any], Any]) -> None:
        """sum = product(sum)"""
        slot = self.sums[row][column]
        self.builder.store(product(self.builder.load(slot)), slot)


def _plus(builder: ir.IRBuilder, index: Any, offset: Any) -> Any:
    offset = ir.Constant(index.type, offset) if isinstance(offset, int) else offset
    return builder.add(index, offset)


def _add_bytes(builder: ir.IRBuilder, fours: Any, weights: Any, total: Any) -> Any:
    return byte_products(builder, total, fours, weights)


def _add_product(builder: ir.IRBuilder, x: Any, y: Any, total: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", FLOATS, [x, y, total])


@intrinsic(prefer_literal=True)
def add_bytes(
    typing: Any,
    num_rows: Any,
    fours: Any,
    first: Any,
    weights: Any,
    at: Any,
    other: Any,
    num_lines: Any,
    sums: Any,
    to: Any,
) -> Any:
    """sums[to + 32 · row …] += row · weights, of rows of uint8 and weights of int8.

    fours: int32, four inputs in each; a row goes on 256 elements after every 16, from line to line, and the next row
    begins 16 further (engine/kernels/products.py). weights: of 16 columns from byte `at`, of the others from `other`.
    """
    if not isinstance(num_rows, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _, fours_, first_, weights_, at_, other_, lines, sums_, to_ = args
        block = _Block(builder, num_rows.literal_value, INTS)

        def pointer(which: int, array: Any, index: Any, kind: Any) -> Any:
            return address(context, builder, sig.args[which], array, index, kind)

        def place(row: int, column: int) -> Any:
            return pointer(7, sums_, _plus(builder, to_, 32 * row + 16 * column), INTS)

        block.each(lambda row, column, slot: builder.store(load_from(builder, place(row, column)), slot))
        with cgutils.for_range(builder, lines) as loop:
            x = _plus(builder, first_, builder.mul(loop.index, ir.Constant(loop.index.type, 256)))
            line = builder.mul(loop.index, ir.Constant(loop.index.type, 64 * _UNROLLED))
            for four in range(_UNROLLED):
                columns = [
                    load_from(
                        builder,
                        pointer(3, weights_, _plus(builder, _plus(builder, base, line), 64 * four), INTS),
                    )
                    for base in (at_, other_)
                ]
                for row in range(block.num_rows):
                    number = builder.load(pointer(1, fours_, _plus(builder, x, 16 * row + four), _I32))
                    repeated = spread(builder, INTS, number)
                    for column, vector in enumerate(columns):
                        block.add(row, column, partial(_add_bytes, builder, repeated, vector))

        def put(row: int, column: int, slot: Any) -> None:
            builder.store(builder.load(slot), place(row, column)).align = 1

        block.each(put)
        return context.get_dummy_value()

    intp = types.intp
    return (
        types.void(num_rows, fours, intp, weights, intp, intp, intp, sums, intp),
        generate,
    )


@intrinsic(prefer_literal=True)
def add_outer(
    typing: Any,
    num_rows: Any,
    numbers: Any,
    first: Any,
    step: Any,
    columns: Any,
    at: Any,
    other: Any,
    num_steps: Any,
    out: Any,
    to: Any,
    stride: Any,
) -> Any:
    """out[to + stride · row …] += row · columns, each product added to the sum before it, in order.

    numbers: float32, rows from `first` on, `step` from row to row. columns: of 16 columns from `at`, of the others from
    `other`, 16 elements a step; of float32 a step is one number of each column, of int32 two bfloat16 that follow each
    other.
    """
    if not isinstance(num_rows, types.IntegerLiteral):
        return None
    of_pairs = columns.dtype == types.int32

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _, numbers_, first_, step_, columns_, at_, other_, steps, out_, to_, stride_ = args
        block = _Block(builder, num_rows.literal_value, FLOATS)

        def pointer(which: int, array: Any, index: Any, kind: Any) -> Any:
            return address(context, builder, sig.args[which], array, index, kind)

        def place(row: int, column: int) -> Any:
            begins = _plus(builder, to_, builder.mul(stride_, ir.Constant(stride_.type, row)))
            return pointer(8, out_, _plus(builder, begins, 16 * column), FLOATS)

        def factors(base: Any) -> tuple[Any, ...]:
            kind = INTS if of_pairs else FLOATS
            vector = load_from(builder, pointer(4, columns_, base, kind))
            return halves(builder, vector) if of_pairs else (vector,)

        rows = [
            _plus(builder, first_, builder.mul(step_, ir.Constant(step_.type, r)))
            for r in range(block.num_rows)
        ]
        block.each(lambda row, column, slot: builder.store(load_from(builder, place(row, column)), slot))
        with cgutils.for_range(builder, steps) as loop:
            here = builder.mul(loop.index, ir.Constant(loop.index.type, 16))
            both = [factors(_plus(builder, base, here)) for base in (at_, other_)]
            x = builder.mul(loop.index, ir.Constant(loop.index.type, len(both[0])))
            for row in range(block.num_rows):
                for part in range(len(both[0])):
                    index = _plus(builder, _plus(builder, rows[row], x), part)
                    repeated = spread(builder, FLOATS, builder.load(pointer(1, numbers_, index, _F32)))
                    for column in range(COLUMNS):
                        block.add(row, column, partial(_add_product, builder, repeated, both[column][part]))

        def put(row: int, column: int, slot: Any) -> None:
            builder.store(builder.load(slot), place(row, column)).align = 1

        block.each(put)
        return context.get_dummy_value()

    intp = types.intp
    return (
        types.void(num_rows, numbers, intp, intp, columns, intp, intp, intp, out, intp, intp),
        generate,
    )


@kernel
def add_rows(
    count: int,
    numbers: Array,
    first: int,
    step: int,
    columns: Array,
    at: int,
    other: int,
    num_steps: int,
    out: Array,
    to: int,
    stride: int,
) -> None:
    """`add_outer` of `count` rows, 1 to 8; it may read and write what lies where the rows up to the eighth would."""
    if count > 4:
        add_outer(8, numbers, first, step, columns, at, other, num_steps, out, to, stride)
    elif count > 1:
        add_outer(4, numbers, first, step, columns, at, other, num_steps, out, to, stride)
    else:
        add_outer(1, numbers, first, step, columns, at, other, num_steps, out, to, stride)
