"""What codecs do to numbers in host memory, as compiled loops.

Rows are those of a field, [layers · entries, columns]. Arguments that several have:

    bits       floats [rows, columns], see `float_bits`
    shape      (layers, entries, line_entries, 1 where the first entry counts as if it were the second, else 0)
    low, step  float32 [lines, spans], in the order of layers and entries; per_step is 1 / step
    ends       int64 [spans]: the column behind each
    pairs      codes of 4 bits, uint8 [⌈rows / 2⌉, columns]: row 2i in the low half, row 2i + 1 in the high

A line is `line_entries` entries of a layer, a span some neighbouring columns: their numbers share low and step.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from kvtransfer.codecs.nibbles import ESCAPE
from kvtransfer.compiled import Array, compiled

FAR = 1 << 24
"""The place of what is no number, or further away than can be counted."""

_Shape = tuple[int, int, int, int]

_ESCAPE = np.uint8(ESCAPE)
_0, _HALF, _15 = np.float32(0), np.float32(0.5), np.float32(15)
_INT_MAX = np.int32(0x7FFFFFFF)
_ESCAPES = np.uint64(0x0F0F0F0F0F0F0F0F)
_BELOW_TOP = np.uint64(0x7F7F7F7F7F7F7F7F)
_TOP = np.uint64(0x8080808080808080)
_BYTE_NUMBERS = np.uint64(0x0001020304050607)
_U1, _U7, _U8, _U56 = np.uint64(1), np.uint64(7), np.uint64(8), np.uint64(56)


def float_bits(numbers: torch.Tensor) -> Array:
    """float32 as uint32, bfloat16 (which numpy lacks) as uint16, in place in host memory: how loops take floats."""
    return numbers.view(torch.uint16 if numbers.dtype == torch.bfloat16 else torch.uint32).numpy()


@compiled
def place_nearest(bits: Array, shape: _Shape, low: Array, per_step: Array, ends: Array, pairs: Array) -> None:
    """Writes the nearest of the 16 codes."""
    num_columns = bits.shape[1]
    numbers, lows, inverses = _lines(num_columns)
    codes = np.empty(num_columns, np.uint8)
    line = row = 0
    for _ in range(shape[0]):
        for first in range(0, shape[1], shape[2]):
            _spread(low, line, ends, lows)
            _spread(per_step, line, ends, inverses)
            for entry in range(first, min(first + shape[2], shape[1])):
                _load_floats(bits, row + (entry < shape[3]), numbers)
                for i in range(num_columns):
                    place = (numbers[i] - lows[i]) * inverses[i] + _HALF
                    place = place if place > _0 else _0
                    codes[i] = np.int32(place if place < _15 else _15)
                _pack_row(codes, row, pairs)
                row += 1
            line += 1


@compiled
def place_or_escape(
    bits: Array, shape: _Shape, low: Array, per_step: Array, ends: Array, pairs: Array, escaped: Array
) -> int:
    """Writes codes 0 … 14, and ESCAPE for what lies elsewhere, whose place goes to `escaped`, int32. How many did;
    -1 where there was no room for more."""
    num_columns = bits.shape[1]
    numbers, lows, inverses = _lines(num_columns)
    codes, positions = _codes(num_columns), np.empty(num_columns + 8, np.uint32)
    line = row = found = 0
    for _ in range(shape[0]):
        for first in range(0, shape[1], shape[2]):
            _spread(low, line, ends, lows)
            _spread(per_step, line, ends, inverses)
            for entry in range(first, min(first + shape[2], shape[1])):
                _load_floats(bits, row + (entry < shape[3]), numbers)
                for i in range(num_columns):
                    place = (numbers[i] - lows[i]) * inverses[i] + _HALF
                    place = place if place >= _0 else _15  # not a number is not, too
                    codes[i] = np.int32(place if place < _15 else _15)
                here = _find_escapes(codes, positions)
                if found + here > len(escaped):
                    return -1
                for j in range(here):
                    i = positions[j]
                    place = np.floor((numbers[i] - lows[i]) * inverses[i] + _HALF)
                    escaped[found + j] = np.int32(place) if abs(place) < FAR else FAR
                found += here
                _pack_row(codes, row, pairs)
                row += 1
            line += 1
    return found


@compiled
def restore(
    pairs: Array, shape: _Shape, low: Array, step: Array, ends: Array, escaped: Array, bits: Array
) -> None:
    """Writes the numbers of codes. `escaped`: the places of all ESCAPEs, int32; none where 15 is a code as others
    are."""
    num_columns = bits.shape[1]
    numbers, lows, steps = _lines(num_columns)
    codes, positions = _codes(num_columns), np.empty(num_columns + 8, np.uint32)
    words = numbers.view(np.uint32)
    line = row = used = 0
    for _ in range(shape[0]):
        for first in range(0, shape[1], shape[2]):
            _spread(low, line, ends, lows)
            _spread(step, line, ends, steps)
            for _ in range(first, min(first + shape[2], shape[1])):
                _unpack_row(pairs, row, codes)
                for i in range(num_columns):
                    numbers[i] = lows[i] + np.float32(codes[i]) * steps[i]
                _store_floats(numbers, bits, row)
                if len(escaped):
                    here = _find_escapes(codes, positions)
                    for j in range(here):
                        i = positions[j]
                        numbers[0] = lows[i] + np.float32(escaped[used + j]) * steps[i]
                        bits[row, i] = words[0] if bits.itemsize == 4 else _upper_half(words[0])
                    used += here
                row += 1
            line += 1


@compiled
def norms(bits: Array, width: int, result: Array) -> None:
    """Writes Euclidean norms, float32 [rows, columns / width], of every `width` columns."""
    numbers = np.empty(bits.shape[1], np.float32)
    for row in range(len(bits)):
        _load_floats(bits, row, numbers)
        for span in range(result.shape[1]):
            result[row, span] = np.sqrt(_sum_of_squares(numbers, span * width, (span + 1) * width))


@partial(compiled, any_order=True)
def _sum_of_squares(numbers: Array, start: int, end: int) -> np.float32:
    total = np.float32(0)
    for i in range(np.uint64(start), np.uint64(end)):
        total += numbers[i] * numbers[i]
    return total


@compiled
def extremes(bits: Array, shape: _Shape, ends: Array, least: Array, largest: Array) -> None:
    """Writes the least and the largest number of every line and span, float32; NaN and infinities count as such."""
    num_columns = bits.shape[1]
    numbers = np.empty(num_columns, np.float32)
    lows, highs = np.empty(num_columns, np.int32), np.empty(num_columns, np.int32)
    words, least_words, largest_words = numbers.view(np.int32), least.view(np.int32), largest.view(np.int32)
    line = row = 0
    for _ in range(shape[0]):
        for first in range(0, shape[1], shape[2]):
            lows[:], highs[:] = _INT_MAX, -_INT_MAX
            for entry in range(first, min(first + shape[2], shape[1])):
                _load_floats(bits, row + (entry < shape[3]), numbers)
                for i in range(num_columns):
                    word = _in_order(words[i])
                    lows[i], highs[i] = min(lows[i], word), max(highs[i], word)
                row += 1
            start = 0
            for span in range(len(ends)):
                least_words[line, span] = _in_order(_least(lows, start, ends[span]))
                largest_words[line, span] = _in_order(_largest(highs, start, ends[span]))
                start = ends[span]
            line += 1


@compiled
def _in_order(word: np.int32) -> np.int32:
    """The bits of a float32 to an integer in the same order as the floats, and back. Integers are compared several at
    a time, floats not, because of NaN."""
    return word ^ ((word >> np.int32(31)) & _INT_MAX)


@compiled
def _least(words: Array, start: int, end: int) -> np.int32:
    least: np.int32 = words[start]
    for i in range(np.uint64(start), np.uint64(end)):
        least = min(least, words[i])
    return least


@compiled
def _largest(words: Array, start: int, end: int) -> np.int32:
    largest: np.int32 = words[start]
    for i in range(np.uint64(start), np.uint64(end)):
        largest = max(largest, words[i])
    return largest


@compiled
def take_apart(bits: Array, exponents: Array, top: Array, low: Array) -> None:
    """Writes exponents, uint8 [rows, columns]; top, like it: the sign above the highest 7 bits of the mantissa; low,
    uint16 like it: of float32 the other 16."""
    for row in range(len(bits)):
        for i in range(bits.shape[1]):
            half = bits[row, i] if bits.itemsize == 2 else bits[row, i] >> np.uint32(16)
            exponents[row, i] = half >> np.uint16(7)
            top[row, i] = (half & np.uint16(0x7F)) | ((half >> np.uint16(8)) & np.uint16(0x80))
        if bits.itemsize == 4:
            for i in range(bits.shape[1]):
                low[row, i] = bits[row, i]


@compiled
def put_together(exponents: Array, top: Array, low: Array, bits: Array) -> None:
    """The opposite: writes `bits`."""
    for row in range(len(bits)):
        if bits.itemsize == 2:
            for i in range(bits.shape[1]):
                bits[row, i] = _upper(exponents[row, i], top[row, i])
        else:
            for i in range(bits.shape[1]):
                bits[row, i] = (
                    np.uint32(_upper(exponents[row, i], top[row, i])) << np.uint32(16) | low[row, i]
                )


@compiled
def _upper(exponent: np.uint8, top: np.uint8) -> np.uint16:
    """The upper 16 bits of a float."""
    sign, mantissa = np.uint16(top & np.uint8(0x80)) << np.uint16(8), np.uint16(top & np.uint8(0x7F))
    return np.uint16(sign | np.uint16(exponent) << np.uint16(7) | mantissa)


@compiled
def largest_exponents(exponents: Array, num_entries: int, bases: Array) -> None:
    """Writes the largest exponent of every layer and column: uint8 [layers, columns]."""
    for row in range(len(exponents)):
        layer = row // num_entries
        if row % num_entries == 0:
            bases[layer] = 0
        for i in range(exponents.shape[1]):
            bases[layer, i] = max(bases[layer, i], exponents[row, i])


@compiled
def code_exponents(exponents: Array, num_entries: int, bases: Array, pairs: Array, escaped: Array) -> int:
    """Writes base - exponent, or ESCAPE where that is larger; the exponent itself then goes to `escaped`, uint8. How
    many did; -1 where there was no room for more."""
    num_columns = exponents.shape[1]
    codes, positions = _codes(num_columns), np.empty(num_columns + 8, np.uint32)
    found = 0
    for row in range(len(exponents)):
        layer = row // num_entries
        for i in range(num_columns):
            codes[i] = min(np.uint8(bases[layer, i] - exponents[row, i]), _ESCAPE)
        here = _find_escapes(codes, positions)
        if found + here > len(escaped):
            return -1
        for j in range(here):
            escaped[found + j] = exponents[row, positions[j]]
        found += here
        _pack_row(codes, row, pairs)
    return found


@compiled
def restore_exponents(pairs: Array, num_entries: int, bases: Array, escaped: Array, exponents: Array) -> None:
    """The opposite: writes `exponents`. `escaped` has as many as there are escapes."""
    num_columns = exponents.shape[1]
    codes, positions = _codes(num_columns), np.empty(num_columns + 8, np.uint32)
    used = 0
    for row in range(len(exponents)):
        layer = row // num_entries
        _unpack_row(pairs, row, codes)
        for i in range(num_columns):
            exponents[row, i] = bases[layer, i] - codes[i]
        here = _find_escapes(codes, positions)
        for j in range(here):
            exponents[row, positions[j]] = escaped[used + j]
        used += here


@compiled
def count_escapes(pairs: Array, num_rows: int) -> int:
    """How many of the codes of `num_rows` rows are ESCAPE."""
    found = 0
    for index in range(len(pairs)):
        both = 2 * index + 1 < num_rows
        for pair in pairs[index]:
            found += (pair & _ESCAPE) == _ESCAPE
            found += both and (pair >> 4) == _ESCAPE
    return found


@compiled
def _load_floats(bits: Array, row: int, numbers: Array) -> None:
    """float32 `numbers` of a row of `float_bits`."""
    words = numbers.view(np.uint32)
    if bits.itemsize == 4:
        for i in range(len(words)):
            words[i] = bits[row, i]
    else:
        for i in range(len(words)):
            words[i] = np.uint32(bits[row, i]) << np.uint32(16)


@compiled
def _store_floats(numbers: Array, bits: Array, row: int) -> None:
    """The opposite; to bfloat16 rounded to the nearest, half to even. `numbers` are finite."""
    words = numbers.view(np.uint32)
    if bits.itemsize == 4:
        for i in range(len(words)):
            bits[row, i] = words[i]
    else:
        for i in range(len(words)):
            bits[row, i] = _upper_half(words[i])


@compiled
def _upper_half(word: np.uint32) -> np.uint32:
    """Of a float32 as a bfloat16."""
    return (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@compiled
def _pack_row(codes: Array, row: int, pairs: Array) -> None:
    """Row `row` of codes below 16 into pairs; even rows first."""
    if row & 1:
        for i in range(pairs.shape[1]):
            pairs[row >> 1, i] |= codes[i] << np.uint8(4)
    else:
        for i in range(pairs.shape[1]):
            pairs[row >> 1, i] = codes[i]


@compiled
def _unpack_row(pairs: Array, row: int, codes: Array) -> None:
    """The opposite."""
    if row & 1:
        for i in range(pairs.shape[1]):
            codes[i] = pairs[row >> 1, i] >> np.uint8(4)
    else:
        for i in range(pairs.shape[1]):
            codes[i] = pairs[row >> 1, i] & _ESCAPE


@compiled
def _find_escapes(codes: Array, positions: Array) -> int:
    """Where codes below 16, a multiple of 8 of them, are ESCAPE; how many. `positions` has room for one more than
    there are codes.

    One in forty is: eight codes are looked at in one word, and its first escape is written down whether there is one
    or not, so that only a second one is a branch that the processor does not foresee.
    """
    words = codes.view(np.uint64)
    found = 0
    for index in range(np.uint64(len(words))):
        # The top bit of every byte that is ESCAPE; none of them is above 15, so no sum reaches the next byte.
        marks = ~((words[index] ^ _ESCAPES) + _BELOW_TOP) & _TOP
        first = marks & (~marks + _U1)
        positions[found] = _U8 * index + ((first >> _U7) * _BYTE_NUMBERS >> _U56)
        found += marks != 0
        marks ^= first
        while marks:
            first = marks & (~marks + _U1)
            positions[found] = _U8 * index + ((first >> _U7) * _BYTE_NUMBERS >> _U56)
            found += 1
            marks ^= first
    return found


@compiled
def _lines(num_columns: int) -> tuple[Array, Array, Array]:
    """Room for three rows of float32."""
    lines = np.empty((3, num_columns), np.float32)
    return lines[0], lines[1], lines[2]


@compiled
def _codes(num_columns: int) -> Array:
    """Room for a row's codes, filled up to whole words."""
    return np.zeros((num_columns + 7) // 8 * 8, np.uint8)


@compiled
def _spread(shared: Array, line: int, ends: Array, numbers: Array) -> None:
    """A line's value of each span to all of its columns."""
    start = np.uint64(0)
    for span in range(len(ends)):
        end = np.uint64(ends[span])
        for i in range(start, end):
            numbers[i] = shared[line, span]
        start = end
