"""ggml's quantized blocks decoded one element at a time, as the structures in ggml-common.h describe them.

An independent and slow statement of the formats, to compare fast decoders with.
"""

import struct
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

Row = list[float]


def decode_row(row: bytes, kind: Kind) -> Row:
    """The elements of one stored row."""
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = (row[start : start + block_bytes] for start in range(0, len(row), block_bytes))
    return [element for block in blocks for element in DECODERS[kind](block)]


def random_rows(kind: Kind, *, num_rows: int, num_elements: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random stored rows, uint8[num_rows, bytes], with scales that are ordinary numbers."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (num_rows * num_elements // block_elements, block_bytes), np.uint8)
    for offset in _SCALE_OFFSETS[kind]:
        scales = rng.uniform(-2, 2, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_rows, -1)


def _half(block: bytes, offset: int) -> float:
    return float(struct.unpack_from("<e", block, offset)[0])


def _nibbles(packed: bytes) -> list[int]:
    """32 values in 16 bytes: all the low halves, then all the high ones."""
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def _q4_0(block: bytes) -> Row:
    return [_half(block, 0) * (value - 8) for value in _nibbles(block[2:18])]


def _q4_1(block: bytes) -> Row:
    return [_half(block, 0) * value + _half(block, 2) for value in _nibbles(block[4:20])]


def _fifth_bits(block: bytes, offset: int) -> list[int]:
    (bits,) = struct.unpack_from("<I", block, offset)
    return [(bits >> index & 1) << 4 for index in range(32)]


def _q5_0(block: bytes) -> Row:
    values = zip(_nibbles(block[6:22]), _fifth_bits(block, 2), strict=True)
    return [_half(block, 0) * ((low | high) - 16) for low, high in values]


def _q5_1(block: bytes) -> Row:
    values = zip(_nibbles(block[8:24]), _fifth_bits(block, 4), strict=True)
    return [_half(block, 0) * (low | high) + _half(block, 2) for low, high in values]


def _q8_0(block: bytes) -> Row:
    return [_half(block, 0) * value for value in struct.unpack_from("<32b", block, 2)]


def _scale_and_minimum(scales: bytes, index: int) -> tuple[int, int]:
    """`get_scale_min_k4`: eight pairs of 6-bit numbers in twelve bytes."""
    if index < 4:
        return scales[index] & 63, scales[index + 4] & 63
    low, high = scales[index + 4], (scales[index - 4] >> 6, scales[index] >> 6)
    return (low & 15) | high[0] << 4, (low >> 4) | high[1] << 4


def _q4_k(block: bytes) -> Row:
    scale, minimum, row = _half(block, 0), _half(block, 2), []
    for index in range(8):
        factor, offset = _scale_and_minimum(block[4:16], index)
        packed = block[16 + index // 2 * 32 : 48 + index // 2 * 32]
        row += [scale * factor * (byte >> 4 * (index % 2) & 15) - minimum * offset for byte in packed]
    return row


def _q5_k(block: bytes) -> Row:
    scale, minimum, row = _half(block, 0), _half(block, 2), []
    for index in range(8):
        factor, offset = _scale_and_minimum(block[4:16], index)
        packed = block[48 + index // 2 * 32 : 80 + index // 2 * 32]
        for byte, bits in zip(packed, block[16:48], strict=True):
            value = (byte >> 4 * (index % 2) & 15) | (bits >> index & 1) << 4
            row.append(scale * factor * value - minimum * offset)
    return row


def _q6_k(block: bytes) -> Row:
    row, scale = [0.0] * 256, _half(block, 208)
    factors = struct.unpack_from("<16b", block, 192)
    for position in range(256):
        half, within = divmod(position, 128)
        quarter, lane = divmod(within, 32)
        low = block[half * 64 + quarter % 2 * 32 + lane] >> 4 * (quarter // 2) & 15
        high = block[128 + half * 32 + lane] >> 2 * quarter & 3
        row[position] = scale * factors[position // 16] * ((low | high << 4) - 32)
    return row


DECODERS: dict[Kind, Callable[[bytes], Row]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
_SCALE_OFFSETS = dict.fromkeys(DECODERS, (0,)) | {
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
