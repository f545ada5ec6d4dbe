"""The threads that kernels share: those that torch computes with, so that neither ever waits for the other's.

torch's are GNU OpenMP's; a kernel runs in all of them through the entry of that library which compilers call for
`#pragma omp parallel`. Where torch was built without it, the team has one thread.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.ir as ir
import torch
from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from engine.kernels.lanes import call


def _open_mp() -> ctypes.CDLL | None:
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        return ctypes.CDLL("libgomp.so.1")  # the one that torch has loaded: it is found by its name
    except OSError:
        return None


_OPEN_MP = _open_mp()
_POINTER = ir.IntType(8).as_pointer()
_FUNCTIONS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
if _OPEN_MP is not None:
    for _function in _FUNCTIONS:
        binding.add_symbol(_function, ctypes.cast(getattr(_OPEN_MP, _function), ctypes.c_void_p).value)


@intrinsic
def in_team(typing: Any, function: Any, arguments: Any, num_threads: Any) -> Any:
    """Call a compiled function that returns nothing with a tuple of arguments in that many threads at once, and go on
    when all are through. What it raises is lost."""
    inner = typing.resolve_function_type(function, tuple(arguments), {})

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        compiled = function.dispatcher.overloads[inner.args]
        context.active_code_library.add_linking_library(compiled.library)
        callee = context.declare_function(builder.module, compiled.fndesc)
        name = builder.module.get_unique_name(f"in_team_{compiled.fndesc.mangled_name}")
        entry = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
        entry.linkage = "internal"
        inside = ir.IRBuilder(entry.append_basic_block())
        packed = inside.load(inside.bitcast(entry.args[0], args[1].type.as_pointer()))
        values = [inside.extract_value(packed, i) for i in range(len(inner.args))]
        context.call_conv.call_function(inside, callee, inner.return_type, inner.args, values)
        inside.ret_void()
        data = builder.bitcast(cgutils.alloca_once_value(builder, args[1]), _POINTER)
        if _OPEN_MP is None:
            builder.call(entry, [data])
        else:
            threads = builder.trunc(args[2], ir.IntType(32))
            flags = ir.Constant(ir.IntType(32), 0)
            call(builder, "GOMP_parallel", ir.VoidType(), [entry, data, threads, flags])
        return context.get_dummy_value()

    return types.void(function, arguments, types.int64), generate


@intrinsic
def barrier(typing: Any) -> Any:
    """Go on when every thread of the team is here."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if _OPEN_MP is not None:
            call(builder, "GOMP_barrier", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


def _answer(function: str, alone: int) -> Any:
    """What a function of the library says, as int64; `alone` where there is none."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if _OPEN_MP is None:
            return ir.Constant(ir.IntType(64), alone)
        return builder.sext(call(builder, function, ir.IntType(32), []), ir.IntType(64))

    return types.int64(), generate


@intrinsic
def thread_index(typing: Any) -> Any:
    """0 … threads of the team - 1."""
    return _answer("omp_get_thread_num", alone=0)


@intrinsic
def team_size(typing: Any) -> Any:
    """Threads of the team."""
    return _answer("omp_get_num_threads", alone=1)
