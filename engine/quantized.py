"""Weights as DeepSeek publishes them: FP8 in blocks of 128 × 128, and MXFP4, each with scales in a tensor beside it.

MXFP4 (OCP Microscaling Formats, version 1.0): two e2m1 numbers to a byte, the first in the low half, 32 along a row
share a power of two.
"""

from __future__ import annotations

import torch

FP8_BLOCK = 128
FP4_BLOCK = 32

_FP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

STORED_FP8, STORED_FP4 = "F8_E4M3", "I8"
"""What safetensors calls the dtypes of such weights."""
STORED_SCALES = ("F8_E8M0", "F32")


def stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """How a matrix of that shape lies in a file."""
    return (*shape[:-1], shape[-1] // 2) if dtype == STORED_FP4 else shape


def scales_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Of the scales of a matrix of that shape."""
    if dtype == STORED_FP4:
        return (*shape[:-1], -(-shape[-1] // FP4_BLOCK))
    return tuple(-(-length // FP8_BLOCK) for length in shape)


def dequantized(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [out, in] with scales per 128 × 128, or int8 [out, in / 2] with scales per row and 32 → float32
    [out, in]."""
    scales = scales.float()
    if weight.dtype == torch.int8:
        return _unpacked(weight) * scales.repeat_interleave(FP4_BLOCK, dim=1)
    rows, columns = weight.shape
    by_row = scales.repeat_interleave(FP8_BLOCK, dim=0)[:rows]
    return weight.float() * by_row.repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    numbers = torch.tensor([*_FP4_NUMBERS, *(-number for number in _FP4_NUMBERS)])
    codes = packed.view(torch.uint8).long()
    return torch.stack((numbers[codes & 15], numbers[codes >> 4]), dim=-1).flatten(-2)
