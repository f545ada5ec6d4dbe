"""Functions of 16 numbers at once, of what engine/kernels/lanes.py has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core.extending import intrinsic

from engine.kernels.lanes import FLOATS, INTS, LANES, address, call, constant, floats, load_from, whole
from engine.kernels.processor import HAS_WIDE_VECTORS

_INVERSE_GUESS = 0x7EF311C7  # off by an eighth at most
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


@intrinsic
def hadamard(typing: Any, a: Any) -> Any:
    """The 16 numbers times Hadamard's matrix of order 16, by butterflies."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        value = args[0]
        for apart in (1, 2, 4, 8):
            partners = ir.Constant(INTS, [lane ^ apart for lane in range(LANES)])
            signs = ir.Constant(FLOATS, [-1.0 if lane & apart else 1.0 for lane in range(LANES)])
            other = builder.shuffle_vector(value, value, partners)
            value = call(builder, "llvm.fma.v16f32", FLOATS, [value, signs, other])
        return value

    return floats(floats), generate


@intrinsic
def transpose(typing: Any, source: Any, first: Any, step: Any, target: Any, to: Any) -> Any:
    """16 rows of 16 int32, `step` elements apart from `first` of `source` on, into columns: 256 elements from `to`."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        rows, index = [], args[1]
        for _ in range(LANES):
            rows.append(load_from(builder, address(context, builder, sig.args[0], args[0], index, INTS)))
            index = builder.add(index, args[2])
        for apart in (1, 2, 4, 8):
            low = [lane if not lane & apart else lane - apart + LANES for lane in range(LANES)]
            high = [lane + apart if not lane & apart else lane + LANES for lane in range(LANES)]
            for i in range(LANES):
                if not i & apart:
                    a, b = rows[i], rows[i + apart]
                    rows[i] = builder.shuffle_vector(a, b, ir.Constant(INTS, low))
                    rows[i + apart] = builder.shuffle_vector(a, b, ir.Constant(INTS, high))
        for i, row in enumerate(rows):
            at = builder.add(args[4], ir.Constant(args[4].type, i * LANES))
            builder.store(row, address(context, builder, sig.args[3], args[3], at, INTS)).align = 1
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), generate


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
    return call(builder, "llvm.fma.v16f32", FLOATS, [x, y, z])


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
        mask, rounding = ir.Constant(ir.IntType(16), 0xFFFF), ir.Constant(ir.IntType(32), 4)
        return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, [x, power, x, mask, rounding])
    shift = builder.shl(builder.fptosi(power, INTS), whole(23))
    scaled = builder.bitcast(builder.add(builder.bitcast(x, INTS), shift), FLOATS)
    is_zero = builder.fcmp_ordered("<", power, constant(-125.0))
    finite = builder.select(is_zero, constant(0.0), scaled)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, finite)


@intrinsic
def inverse(typing: Any, a: Any) -> Any:
    """1 / each lane of numbers from 1 to 1e37, to a relative error of 1e-7: a third of what a division takes.

    Newton's iteration from what negating the exponent gives.
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        guess = builder.sub(whole(_INVERSE_GUESS), builder.bitcast(args[0], INTS))
        y = builder.bitcast(guess, FLOATS)
        for _ in range(3):
            off = _madd(builder, builder.fneg(args[0]), y, constant(1.0))
            y = _madd(builder, y, off, y)
        return y

    return floats(floats), generate
