"""Codec `int8`: 8-bit integers with one scale per group of at most 64 numbers.

x ≈ scale · q with scale = max |x| / 127 of the group, rounded to bfloat16, and q = round(x / scale) in −127 … 127.
The code is q + 128. Its high half compresses (3.1 of 4 bits on real text). Bytes: see `grouped`, one scale, 8 bits.
"""

from __future__ import annotations

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldwiseCodec
from kvtransfer.codecs.grouped import GroupedCoder, compact, reciprocal
from kvtransfer.codecs.split import SplitCoder

_STEPS = 127
_ZERO = 128


class Int8Quantizer:
    """Quantizer of what is above."""

    decodes_from = torch.float32

    def quantize(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = compact(numbers.abs().amax(2, keepdim=True) / _STEPS)
        # A scale that was rounded down by 1/512 leaves 127.25 steps: not yet 128.
        steps = numbers.mul_(reciprocal(scale)).round_().to(torch.int8)
        return scale, steps.view(torch.uint8).add_(_ZERO)

    def restore(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return codes.sub_(_ZERO).mul_(scale)


class Int8Codec(FieldwiseCodec):
    """2.1 × on bf16, with errors of half a percent."""

    def __init__(self) -> None:
        super().__init__("int8", Fidelity.NEAR, GroupedCoder(Int8Quantizer()), SplitCoder())
