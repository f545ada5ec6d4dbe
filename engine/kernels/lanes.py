"""Vectors of 16 numbers in compiled loops: what a loop says is what the processor does, lane by lane.

LLVM finds vectors in plain loops by itself, but not in every loop, half as wide as the processor's, and never a
product of bytes. These are numba values of their own: `load` them from one-dimensional contiguous arrays, compute
with + - * and the functions here, `store` them. Every operation rounds each lane once, in an order that does not
depend on anything, so that a kernel's result is a function of its arguments (design §3.7). Where the processor has
shorter vectors, LLVM splits them.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_builtin, register_model
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature

from kvtransfer.compiled import compiled

kernel = partial(compiled, counts_references=False)
"""What decorates the loops of this folder."""

LANES = 16
FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
_I32 = ir.IntType(32)


class Floats(types.Type):
    """16 float32."""

    def __init__(self) -> None:
        super().__init__("Floats")


class Ints(types.Type):
    """16 int32."""

    def __init__(self) -> None:
        super().__init__("Ints")


floats, ints = Floats(), Ints()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, FLOATS)


@register_model(Ints)
class _IntsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, INTS)


def _arithmetic(op: Any, name: str) -> None:
    class Cases(ConcreteTemplate):
        cases = tuple(
            signature(kind, kind, kind) for kind in ((floats,) if name == "div" else (floats, ints))
        )

    infer_global(op)(Cases)

    @lower_builtin(op, floats, floats)
    def lower_floats(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return getattr(builder, f"f{name}")(*args)

    @lower_builtin(op, ints, ints)
    def lower_ints(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return getattr(builder, name)(*args)


for _op, _name in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.truediv, "div"),
):
    _arithmetic(_op, _name)


def constant(value: float) -> ir.Constant:
    """A vector of one float32."""
    return ir.Constant(FLOATS, [float(np.float32(value))] * LANES)


def whole(value: int) -> ir.Constant:
    """A vector of one int32."""
    return ir.Constant(INTS, [value] * LANES)


def call(builder: ir.IRBuilder, name: str, returns: Any, args: Any) -> Any:
    """A call of an LLVM intrinsic."""
    kind = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def address(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any, to: Any) -> Any:
    """Pointer to element `index` of a one-dimensional contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def load_from(builder: ir.IRBuilder, pointer: Any) -> Any:
    """What is at a pointer of any alignment."""
    value = builder.load(pointer)
    value.align = 1
    return value


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """16 numbers from element `index` on: of float32 and of uint16, taken as bfloat16, Floats; of int32 Ints."""
    kind = {types.float32: floats, types.uint16: floats, types.int32: ints}[array.dtype]

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        memory = {types.float32: FLOATS, types.uint16: _SHORTS, types.int32: INTS}[array.dtype]
        value = load_from(builder, address(context, builder, sig.args[0], args[0], args[1], memory))
        if array.dtype == types.uint16:
            return _widened(builder, builder.zext(value, INTS))
        return value

    return kind(array, types.intp), generate


def _widened(builder: ir.IRBuilder, bits: Any) -> Any:
    """bfloat16 in the lower half of each lane as float32."""
    return builder.bitcast(builder.shl(bits, whole(16)), FLOATS)


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write 16 numbers from element `index` on; Floats into uint16 are rounded to bfloat16."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        written = args[2]
        if array.dtype == types.uint16:
            written = _to_bfloat16(builder, written)
        elif array.dtype == types.uint8:
            written = builder.trunc(written, ir.VectorType(ir.IntType(8), LANES))
        pointer = address(context, builder, sig.args[0], args[0], args[1], written.type)
        builder.store(written, pointer).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


class _BFloat(ir.HalfType):
    """What llvmlite has no type for."""

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()  # else it would be HalfType's


def _to_bfloat16(builder: ir.IRBuilder, value: Any) -> Any:
    return builder.fptrunc(value, ir.VectorType(_BFloat(), LANES))


@intrinsic
def splat(typing: Any, number: Any) -> Any:
    """16 times the same float32 or int32."""
    kind = {types.float32: floats, types.int32: ints}[number]

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return spread(builder, FLOATS if kind is floats else INTS, args[0])

    return kind(number), generate


def spread(builder: ir.IRBuilder, vector: Any, number: Any) -> Any:
    """16 times the same number."""
    nothing = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, nothing, whole(0))


def halves(builder: ir.IRBuilder, bits: Any) -> tuple[Any, Any]:
    """The lower and the upper 16 bits of each lane, taken as bfloat16."""
    return _widened(builder, bits), builder.bitcast(builder.and_(bits, whole(-65536)), FLOATS)


def byte_products(builder: ir.IRBuilder, total: Any, fours: Any, weights: Any) -> Any:
    """total + in each lane the four uint8 of `fours` times the four int8 of `weights`, all of them INTS."""
    # Since LLVM 22 the operands are bytes.
    as_bytes = [builder.bitcast(value, _BYTES) for value in (fours, weights)]
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, [total, *as_bytes])


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.fma.v16f32", FLOATS, args)

    return floats(floats, floats, floats), generate


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger one of each lane; of Floats, b where a is NaN."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return _larger(builder, *args)

    return a(a, b), generate


def _larger(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    is_larger = builder.fcmp_ordered(">", x, y) if x.type == FLOATS else builder.icmp_signed(">", x, y)
    return builder.select(is_larger, x, y)


@intrinsic
def magnitude_bits(typing: Any, a: Any) -> Any:
    """|a| as its bits, which order as the numbers do, and NaN above all."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], INTS), whole(0x7FFFFFFF))

    return ints(floats), generate


@intrinsic
def number_of(typing: Any, bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def to_floats(typing: Any, a: Any) -> Any:
    """Ints as Floats, rounded to even."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], FLOATS)

    return floats(ints), generate


@intrinsic
def to_ints(typing: Any, a: Any) -> Any:
    """Floats as Ints, cut towards 0; any number for one that does not fit."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], INTS)

    return ints(floats), generate


def _halves(builder: ir.IRBuilder, value: Any, step: Any) -> Any:
    """Lane 0 of a tree over the lanes."""
    width = LANES // 2
    while width:
        order = ir.Constant(INTS, [(lane + width) % LANES for lane in range(LANES)])
        value = step(value, builder.shuffle_vector(value, value, order))
        width //= 2
    return builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic
def total(typing: Any, a: Any) -> Any:
    """Sum of the lanes: of those 8 apart, then 4, 2 and 1."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return _halves(builder, args[0], builder.fadd)

    return types.float32(floats), generate


@intrinsic
def largest(typing: Any, a: Any) -> Any:
    """The largest lane."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return _halves(builder, args[0], partial(_larger, builder))

    return (types.float32 if a is floats else types.int32)(a), generate


@intrinsic
def pairs(typing: Any, array: Any, index: Any, other: Any) -> Any:
    """16 numbers of 16 bits from `index` on, each with the one from `other` on above it, as Ints."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        low, high = (
            builder.zext(
                load_from(builder, address(context, builder, sig.args[0], args[0], i, _SHORTS)), INTS
            )
            for i in args[1:]
        )
        return builder.or_(low, builder.shl(high, whole(16)))

    return ints(array, types.intp, types.intp), generate


@intrinsic
def lanes_from(typing: Any, first: Any) -> Any:
    """first, first + 1, …"""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.add(spread(builder, INTS, args[0]), ir.Constant(INTS, list(range(LANES))))

    return ints(types.int32), generate


@intrinsic
def where_at_most(typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x in the lanes where a ≤ b, y in the others. a, b: Ints; x, y: Floats."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed("<=", args[0], args[1]), args[2], args[3])

    return floats(ints, ints, floats, floats), generate
