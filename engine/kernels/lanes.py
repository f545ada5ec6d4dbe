"""Vectors of 16 numbers in compiled loops: what a loop says is what the processor does, lane by lane.

LLVM finds vectors in plain loops by itself, but not in every loop, half as wide as the processor's, and never a
product of bytes. These are numba values of their own: `load` them from one-dimensional contiguous arrays, compute
with + - * and the functions here, `store` them. Every operation rounds each lane once, in an order that does not
depend on anything, so that a kernel's result is a function of its arguments (design §3.7). Where the processor has
shorter vectors, LLVM splits them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import llvmlite.ir as ir
import numpy as np
from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_builtin, register_model
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature

from kvtransfer.compiled import compiled

kernel = partial(compiled, counts_references=False)
"""What decorates the loops of this folder."""

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
_I32 = ir.IntType(32)
_INVERSE_GUESS = 0x7EF311C7  # off by an eighth at most
TINY_IS_ZERO = np.int32(0x9FC0)
_LOG2_E = 1.44269504088896341
_LN_2 = math.log(2)
_ROUNDS = 1.5 * 2**23  # added and taken away, it leaves a whole number
_EXP_FROM, _EXP_TO = -104.0, 80.0
# Least largest relative error over ±ln(2)/2 with 1 for 0.
_EXP_SERIES = (
    0.008290272206068039,
    0.04189816117286682,
    0.1666763871908188,
    0.4999914765357971,
    0.9999997019767761,
    1,
)
_SHORT_EXP_SERIES = (0.04151368513703346, 0.16787591576576233, 0.5000302195549011, 0.9999668002128601, 1)

HAS_WIDE_VECTORS = bool(binding.get_host_cpu_features().get("avx512f"))
HAS_BYTE_PRODUCTS = bool(binding.get_host_cpu_features().get("avx512vnni"))
"""Whether `add_products_of_bytes` may be used."""


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
        super().__init__(manager, fe_type, _FLOATS)


@register_model(Ints)
class _IntsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _INTS)


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
    return ir.Constant(_FLOATS, [float(np.float32(value))] * LANES)


def call(builder: ir.IRBuilder, name: str, returns: Any, args: Any) -> Any:
    """A call of an LLVM intrinsic."""
    kind = ir.FunctionType(returns, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def address(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any, to: Any) -> Any:
    """Pointer to element `index` of a one-dimensional contiguous array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _load(builder: ir.IRBuilder, pointer: Any) -> Any:
    value = builder.load(pointer)
    value.align = 1
    return value


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """16 numbers from element `index` on: of float32 and of uint16, taken as bfloat16, Floats; of int32 Ints."""
    kind = {types.float32: floats, types.uint16: floats, types.int32: ints}[array.dtype]

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        memory = {types.float32: _FLOATS, types.uint16: _SHORTS, types.int32: _INTS}[array.dtype]
        value = _load(builder, address(context, builder, sig.args[0], args[0], args[1], memory))
        if array.dtype == types.uint16:
            wide = builder.shl(builder.zext(value, _INTS), ir.Constant(_INTS, [16] * LANES))
            return builder.bitcast(wide, _FLOATS)
        return value

    return kind(array, types.intp), generate


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
        vector = ir.Constant(_FLOATS if number == types.float32 else _INTS, ir.Undefined)
        first = builder.insert_element(vector, args[0], ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, vector, ir.Constant(_INTS, [0] * LANES))

    return kind(number), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.fma.v16f32", _FLOATS, args)

    return floats(floats, floats, floats), generate


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger one of each lane; of Floats, b where a is NaN."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return _larger(builder, *args)

    return a(a, b), generate


def _larger(builder: ir.IRBuilder, x: Any, y: Any) -> Any:
    is_larger = builder.fcmp_ordered(">", x, y) if x.type == _FLOATS else builder.icmp_signed(">", x, y)
    return builder.select(is_larger, x, y)


@intrinsic
def magnitude_bits(typing: Any, a: Any) -> Any:
    """|a| as its bits, which order as the numbers do, and NaN above all."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], _INTS), ir.Constant(_INTS, [0x7FFFFFFF] * LANES))

    return ints(floats), generate


@intrinsic
def number_of(typing: Any, bits: Any) -> Any:
    """The float32 that has these bits."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bfloat16(typing: Any, bits: Any) -> Any:
    """The float32 that is the bfloat16 with these bits."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def hadamard(typing: Any, a: Any) -> Any:
    """The 16 numbers times Hadamard's matrix of order 16, by butterflies."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        value = args[0]
        for apart in (1, 2, 4, 8):
            partners = ir.Constant(_INTS, [lane ^ apart for lane in range(LANES)])
            signs = ir.Constant(_FLOATS, [-1.0 if lane & apart else 1.0 for lane in range(LANES)])
            other = builder.shuffle_vector(value, value, partners)
            value = call(builder, "llvm.fma.v16f32", _FLOATS, [value, signs, other])
        return value

    return floats(floats), generate


@intrinsic
def add_products_of_bytes(typing: Any, total: Any, fours: Any, array: Any, index: Any) -> Any:
    """total + in each lane the four uint8 of `fours` times the four int8 at `index` + 4 · lane of an array of bytes."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        weights = _load(builder, address(context, builder, sig.args[2], args[2], args[3], _INTS))
        if not HAS_BYTE_PRODUCTS:
            return builder.add(args[0], weights)  # never run
        # Since LLVM 22 the operands are bytes.
        as_bytes = [builder.bitcast(value, _BYTES) for value in (args[1], weights)]
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, [args[0], *as_bytes])

    return ints(ints, ints, array, types.intp), generate


@intrinsic
def transpose(typing: Any, source: Any, first: Any, step: Any, target: Any, to: Any) -> Any:
    """16 rows of 16 int32, `step` elements apart from `first` of `source` on, into columns: 256 elements from `to`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        rows, index = [], args[1]
        for _ in range(LANES):
            rows.append(_load(builder, address(context, builder, sig.args[0], args[0], index, _INTS)))
            index = builder.add(index, args[2])
        for apart in (1, 2, 4, 8):
            low = [lane if not lane & apart else lane - apart + LANES for lane in range(LANES)]
            high = [lane + apart if not lane & apart else lane + LANES for lane in range(LANES)]
            for i in range(LANES):
                if not i & apart:
                    a, b = rows[i], rows[i + apart]
                    rows[i] = builder.shuffle_vector(a, b, ir.Constant(_INTS, low))
                    rows[i + apart] = builder.shuffle_vector(a, b, ir.Constant(_INTS, high))
        for i, row in enumerate(rows):
            at = builder.add(args[4], ir.Constant(args[4].type, i * LANES))
            builder.store(row, address(context, builder, sig.args[3], args[3], at, _INTS)).align = 1
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), generate


@intrinsic
def to_floats(typing: Any, a: Any) -> Any:
    """Ints as Floats, rounded to even."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _FLOATS)

    return floats(ints), generate


@intrinsic
def to_ints(typing: Any, a: Any) -> Any:
    """Floats as Ints, cut towards 0; any number for one that does not fit."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.fptosi(args[0], _INTS)

    return ints(floats), generate


def _halves(builder: ir.IRBuilder, value: Any, step: Any) -> Any:
    """Lane 0 of a tree over the lanes."""
    width = LANES // 2
    while width:
        order = ir.Constant(_INTS, [(lane + width) % LANES for lane in range(LANES)])
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
def exp(typing: Any, a: Any) -> Any:
    """e to the power of each lane: exactly 1 of 0, exactly 0 up to -104, from 80 on that of 80, NaN of NaN.

    A power of two times a polynomial of the rest, whose relative error is 1e-7; rounding the rest adds 2e-8 for every
    power of two.
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        top = constant(_EXP_TO)
        x = builder.select(builder.fcmp_ordered("<", top, args[0]), top, args[0])  # args[0] where it is NaN
        return _exp(builder, x, _EXP_SERIES)

    return floats(floats), generate


@intrinsic
def exp_of_negative(typing: Any, a: Any) -> Any:
    """As `exp`, of numbers up to 0, with a relative error of 3e-6: less than rounding to bfloat16 by far."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return _exp(builder, args[0], _SHORT_EXP_SERIES)

    return floats(floats), generate


def _madd(builder: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", _FLOATS, [x, y, z])


def _exp(builder: ir.IRBuilder, x: Any, terms: Sequence[float]) -> Any:
    bottom, magic = constant(_EXP_FROM), constant(_ROUNDS)
    x = builder.select(builder.fcmp_ordered(">", bottom, x), bottom, x)
    power = builder.fsub(_madd(builder, x, constant(_LOG2_E), magic), magic)
    rest = _madd(builder, power, constant(-_LN_2), x)
    series = constant(terms[0])
    for term in terms[1:]:
        series = _madd(builder, series, rest, constant(term))
    return _times_power_of_two(builder, series, power)


def _times_power_of_two(builder: ir.IRBuilder, x: Any, power: Any) -> Any:
    if HAS_WIDE_VECTORS:
        mask, rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(_I32, 4)
        return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, [x, power, x, mask, rounding])
    shift = builder.shl(builder.fptosi(power, _INTS), ir.Constant(_INTS, [23] * LANES))
    scaled = builder.bitcast(builder.add(builder.bitcast(x, _INTS), shift), _FLOATS)
    is_zero = builder.fcmp_ordered("<", power, constant(-125.0))
    finite = builder.select(is_zero, constant(0.0), scaled)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, finite)


@intrinsic
def inverse(typing: Any, a: Any) -> Any:
    """1 / each lane of numbers from 1 to 1e37, to a relative error of 1e-7: a third of what a division takes.

    Newton's iteration from what negating the exponent gives.
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        guess = builder.sub(ir.Constant(_INTS, [_INVERSE_GUESS] * LANES), builder.bitcast(args[0], _INTS))
        y = builder.bitcast(guess, _FLOATS)
        for _ in range(3):
            off = _madd(builder, builder.fneg(args[0]), y, constant(1.0))
            y = _madd(builder, y, off, y)
        return y

    return floats(floats), generate


@intrinsic
def pairs(typing: Any, array: Any, index: Any, other: Any) -> Any:
    """16 numbers of 16 bits from `index` on, each with the one from `other` on above it, as Ints."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        low, high = (
            builder.zext(_load(builder, address(context, builder, sig.args[0], args[0], i, _SHORTS)), _INTS)
            for i in args[1:]
        )
        return builder.or_(low, builder.shl(high, ir.Constant(_INTS, [16] * LANES)))

    return ints(array, types.intp, types.intp), generate


@intrinsic
def low_half(typing: Any, a: Any) -> Any:
    """The lower 16 bits of each lane, taken as bfloat16."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(args[0], ir.Constant(_INTS, [16] * LANES)), _FLOATS)

    return floats(ints), generate


@intrinsic
def high_half(typing: Any, a: Any) -> Any:
    """The upper 16 bits of each lane, taken as bfloat16."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(args[0], ir.Constant(_INTS, [-65536] * LANES)), _FLOATS)

    return floats(ints), generate


@intrinsic
def lanes_from(typing: Any, first: Any) -> Any:
    """first, first + 1, …"""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector = ir.Constant(_INTS, ir.Undefined)
        one = builder.insert_element(vector, args[0], ir.Constant(_I32, 0))
        same = builder.shuffle_vector(one, vector, ir.Constant(_INTS, [0] * LANES))
        return builder.add(same, ir.Constant(_INTS, list(range(LANES))))

    return ints(types.int32), generate


@intrinsic
def where_at_most(typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """x in the lanes where a ≤ b, y in the others. a, b: Ints; x, y: Floats."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed("<=", args[0], args[1]), args[2], args[3])

    return floats(ints, ints, floats, floats), generate


@intrinsic
def expect(typing: Any, array: Any, index: Any) -> Any:
    """Begin to bring the cache line of an element nearer, which need not exist."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = address(context, builder, sig.args[0], args[0], args[1], ir.IntType(8))
        options = [ir.Constant(_I32, number) for number in (0, 2, 1)]  # to read, into the second cache, data
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *options])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def set_rounding(typing: Any, control: Any) -> Any:
    """Take a word for the register that says how this thread rounds (x86: MXCSR); returns the one before, to be set
    again. `TINY_IS_ZERO`: as always, but numbers below float32's normal range, which take a hundred times as long as
    others, are 0."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if not HAS_WIDE_VECTORS:
            return args[0]
        slot = builder.alloca(_I32)
        pointer = builder.bitcast(slot, ir.IntType(8).as_pointer())
        call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [pointer])
        before = builder.load(slot)
        builder.store(args[0], slot)
        call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [pointer])
        return before

    return types.int32(types.int32), generate
