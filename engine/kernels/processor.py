"""What the processor has, and what a kernel asks of it besides numbers."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from llvmlite import binding
from numba import types
from numba.core.extending import intrinsic

from engine.kernels.lanes import address, call

_FEATURES = binding.get_host_cpu_features()
HAS_WIDE_VECTORS = bool(_FEATURES.get("avx512f"))
HAS_BYTE_PRODUCTS = bool(_FEATURES.get("avx512vnni"))
"""Whether `lanes.byte_products` may be used."""
SUMS_BYTES_EXACTLY = HAS_BYTE_PRODUCTS or bool(_FEATURES.get("avxvnni"))
"""Whether products of bytes are summed in 32 bits. Without these instructions pairs of them saturate at 16."""

TINY_IS_ZERO = np.int32(0x9FC0)
_I32 = ir.IntType(32)


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
