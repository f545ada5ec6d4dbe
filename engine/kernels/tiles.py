"""The processor's matrix tiles (Intel AMX) in compiled loops: eight registers of 16 rows of 64 bytes.

Tiles are named by number, 0 to 7. `configure` first, in every thread; `release` at the end. On a processor without
them every operation compiles to a trap, so that a kernel that is told which it may use can be one function.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
import torch
from llvmlite import binding
from numba import types
from numba.core.extending import intrinsic

from engine.kernels.lanes import address

TILE_ROWS = 16
TILE_BYTES = 64  # of a row
_I8, _I64 = ir.IntType(8), ir.IntType(64)


def _supported() -> bool:
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-int8", "amx-bf16", "avx512bw")):
        return False
    return bool(torch.cpu._init_amx())  # the kernel wants to be asked once a process


HAS_TILES = _supported()


def _full_tiles() -> np.ndarray:
    """Palette 1, eight tiles of 16 rows of 64 bytes."""
    layout = np.zeros(64, np.uint8)
    layout[0] = 1
    layout[16:32].view(np.uint16)[:] = TILE_BYTES
    layout[48:56] = TILE_ROWS
    return layout


FULL_TILES = _full_tiles()


def _emit(builder: ir.IRBuilder, name: str, args: Any) -> None:
    if not HAS_TILES:
        name, args = "llvm.trap", []
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, args)


def _numbers(*tiles: Any) -> list[ir.Constant]:
    return [ir.Constant(_I8, tile.literal_value) for tile in tiles]


def _literals(*tiles: Any) -> bool:
    return all(isinstance(tile, types.IntegerLiteral) for tile in tiles)


@intrinsic
def configure(typing: Any, layout: Any) -> Any:
    """Take `FULL_TILES` for this thread."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        zero = ir.Constant(_I64, 0)
        _emit(builder, "llvm.x86.ldtilecfg", [address(context, builder, sig.args[0], args[0], zero, _I8)])
        return context.get_dummy_value()

    return types.void(layout), generate


@intrinsic
def release(typing: Any) -> Any:
    """Give the tiles back."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tilerelease", [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def clear(typing: Any, tile: Any) -> Any:
    """Zero a tile."""
    if not _literals(tile):
        return None

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _emit(builder, "llvm.x86.tilezero", _numbers(tile))
        return context.get_dummy_value()

    return types.void(tile), generate


def _transfer(name: str, tile: Any, array: Any) -> Any:
    if not _literals(tile):
        return None

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = address(context, builder, sig.args[1], args[1], args[2], _I8)
        _emit(builder, name, [*_numbers(tile), pointer, args[3]])
        return context.get_dummy_value()

    return types.void(tile, array, types.intp, types.intp), generate


@intrinsic(prefer_literal=True)
def fetch(typing: Any, tile: Any, array: Any, index: Any, stride: Any) -> Any:
    """Read a tile from element `index` of a one-dimensional array; `stride`: bytes from row to row."""
    return _transfer("llvm.x86.tileloadd64", tile, array)


@intrinsic(prefer_literal=True)
def put(typing: Any, tile: Any, array: Any, index: Any, stride: Any) -> Any:
    """Write a tile, as `fetch` reads one."""
    return _transfer("llvm.x86.tilestored64", tile, array)


def _product(name: str, c: Any, a: Any, b: Any) -> Any:
    if not _literals(c, a, b):
        return None

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        _emit(builder, name, _numbers(c, a, b))
        return context.get_dummy_value()

    return types.void(c, a, b), generate


@intrinsic(prefer_literal=True)
def add_product_of_bytes(typing: Any, c: Any, a: Any, b: Any) -> Any:
    """c += a · b; c int32 [16, 16], a uint8 [16, 64], b int8 [64, 16], four of its rows in one of the tile."""
    return _product("llvm.x86.tdpbusd", c, a, b)


@intrinsic(prefer_literal=True)
def add_product_of_bfloat16(typing: Any, c: Any, a: Any, b: Any) -> Any:
    """c += a · b; c float32 [16, 16], a bfloat16 [16, 32], b bfloat16 [32, 16], two of its rows in one of the tile."""
    return _product("llvm.x86.tdpbf16ps", c, a, b)
