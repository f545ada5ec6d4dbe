"""Row by row: norm, rotation, quantization, rotary embedding. A row is a function of itself alone.

Arrays are one-dimensional; `at` is where in one a row begins. Widths are multiples of 64.
"""

from __future__ import annotations

import numpy as np

from engine.kernels.functions import hadamard
from engine.kernels.lanes import (
    fma,
    kernel,
    larger,
    largest,
    load,
    magnitude_bits,
    number_of,
    splat,
    store,
    to_ints,
    total,
)
from kvtransfer.compiled import Array

MIXED = 64  # numbers that a rotation mixes with each other
_LARGEST = np.float32(127)
_SMALLEST_SCALE = np.float32(1e-30)  # a row of zeros has no scale of its own
_ZERO_AND_HALF = np.float32(128.5)


@kernel
def normalize(
    source: Array, at: int, width: int, weight: Array, weight_at: int, eps: float, target: Array
) -> None:
    """Row / root of its mean square · weight, to the beginning of `target`."""
    square = splat(np.float32(0))
    for i in range(0, width, 16):
        x = load(source, at + i)
        square = fma(x, x, square)
    mean = total(square) / np.float32(width)
    factor = splat(np.float32(1) / np.sqrt(mean + np.float32(eps)))
    for i in range(0, width, 16):
        store(target, i, load(source, at + i) * factor * load(weight, weight_at + i))


@kernel
def rotate(source: Array, at: int, width: int, target: Array, to: int) -> np.float32:
    """Row times 8 · (1 ⊗ H), H the Hadamard rotation of 64 numbers, to `target`. Returns its largest magnitude, NaN
    where it holds one."""
    peak = magnitude_bits(splat(np.float32(0)))
    for i in range(0, width, 64):
        a, b = hadamard(load(source, at + i)), hadamard(load(source, at + i + 16))
        c, d = hadamard(load(source, at + i + 32)), hadamard(load(source, at + i + 48))
        a, b, c, d = a + b, a - b, c + d, c - d
        a, b, c, d = a + c, b + d, a - c, b - d
        store(target, to + i, a)
        store(target, to + i + 16, b)
        store(target, to + i + 32, c)
        store(target, to + i + 48, d)
        peak = larger(magnitude_bits(a), peak)
        peak = larger(magnitude_bits(b), peak)
        peak = larger(magnitude_bits(c), peak)
        peak = larger(magnitude_bits(d), peak)
    return number_of(largest(peak))


@kernel
def quantize(source: Array, at: int, width: int, scratch: Array, codes: Array, to: int) -> np.float32:
    """Writes uint8 codes such that the row, rotated, ≈ (codes - 128) · the scale that is returned. The scale of a row
    that is not finite is not. Codes go on 1024 bytes after every 64 (engine/kernels/products.py)."""
    scale = rotate(source, at, width, scratch, 0) / _LARGEST
    inverse = splat(np.float32(1) / max(scale, _SMALLEST_SCALE))
    half = splat(_ZERO_AND_HALF)
    for i in range(0, width, 64):
        for k in range(i, i + 64, 16):
            store(codes, to + i * 15 + k, to_ints(load(scratch, k) * inverse + half))
    return scale


@kernel
def turn(
    source: Array,
    at: int,
    width: int,
    cos: Array,
    signed_sin: Array,
    angle_at: int,
    factor: float,
    target: Array,
    to: int,
) -> None:
    """A head's rotary embedding, times `factor`: dimension i with i + width / 2 (engine/rope.py)."""
    half = width // 2
    scale = splat(np.float32(factor))
    for i in range(0, half, 16):
        low, high = load(source, at + i), load(source, at + half + i)
        one = low * load(cos, angle_at + i) + high * load(signed_sin, angle_at + i)
        other = high * load(cos, angle_at + half + i) + low * load(signed_sin, angle_at + half + i)
        store(target, to + i, one * scale)
        store(target, to + half + i, other * scale)
