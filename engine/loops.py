"""Row by row work of the engine on the CPU, as compiled loops: a row is a function of itself alone, whatever the
others."""

from __future__ import annotations

import numpy as np

from kvtransfer.compiled import Array, compiled

_LARGEST = np.float32(127)
_SMALLEST_SCALE = np.float32(1e-30)  # a row of zeros has no scale of its own
_ZERO_AND_HALF = np.float32(128.5)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@compiled
def rotate_rows(rows: Array, size: int) -> None:
    """Every row of float32 [n, width] times √size · (H ⊗ 1), H the Hadamard matrix of order `size`, in place.

    `size`: a power of two that divides the width; the numbers that are mixed are width / size apart, so that sums and
    differences are of neighbours.
    """
    for row in range(len(rows)):
        _rotate(rows, row, size)


@compiled
def quantize_rows(rows: Array, size: int, codes: Array, scales: Array) -> None:
    """Writes codes, uint8 [n, width], and scales, float32 [n], so that rows, rotated, ≈ (codes - 128) · scale.
    rows: float32 [n, width], not changed. A row that is not finite has a scale that is not."""
    width = rows.shape[1]
    rotated = np.empty((1, width), np.float32)
    words = rotated.view(np.int32)
    peak = np.empty(1, np.int32)
    for row in range(len(rows)):
        for i in range(width):
            rotated[0, i] = rows[row, i]
        _rotate(rotated, 0, size)
        largest = np.int32(0)
        for i in range(width):  # as integers: they are compared several at a time, floats are not
            largest = max(largest, words[0, i] & _MAGNITUDE)
        peak[0] = largest
        scale = peak.view(np.float32)[0] / _LARGEST
        scales[row] = scale
        inverse = np.float32(1) / max(scale, _SMALLEST_SCALE)
        for i in range(width):
            codes[row, i] = np.int32(rotated[0, i] * inverse + _ZERO_AND_HALF)


@compiled
def _rotate(rows: Array, row: int, size: int) -> None:
    """By butterflies, the fast Walsh-Hadamard transform."""
    width = rows.shape[1]
    run = width // size
    while run < width:
        for start in range(0, width, 2 * run):
            for i in range(
                np.uint64(start), np.uint64(start + run)
            ):  # unsigned: no index counts from the end
                one, other = rows[row, i], rows[row, i + np.uint64(run)]
                rows[row, i] = one + other
                rows[row, i + np.uint64(run)] = one - other
        run *= 2


@compiled
def balance(matrices: Array, iterations: int, eps: float) -> None:
    """Every matrix of float32 [n, size, size] with sums of about 1 in its rows and columns, in place: rows to a sum of
    1 plus `eps` each number, then columns and rows in turn, `iterations` times columns (Sinkhorn and Knopp, 1967)."""
    nothing, small = np.float32(0), np.float32(eps)
    for n in range(len(matrices)):
        matrix = matrices[n]
        _balance_rows(matrix, nothing)
        matrix += small
        _balance_rows(matrix.T, small)
        for _ in range(iterations - 1):
            _balance_rows(matrix, small)
            _balance_rows(matrix.T, small)


@compiled
def _balance_rows(matrix: Array, more: np.float32) -> None:
    """Every row over its sum, to which `more` is added."""
    for i in range(len(matrix)):
        total = more
        for j in range(matrix.shape[1]):
            total += matrix[i, j]
        for j in range(matrix.shape[1]):
            matrix[i, j] /= total
