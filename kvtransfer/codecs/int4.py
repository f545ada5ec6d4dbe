"""Codec `int4`: 4-bit integers between the least and the largest number of a group of at most 64.

x ≈ low + step · q with low = min and step = (max − min) / 15 of the group, both rounded to bfloat16, and
q = round((x − low) / step) in 0 … 15, which is the code. Keys per channel, values per entry, as in KIVI (Liu et al.,
2024). An outlier stretches its own group only, and the first entry of a sequence travels as it is (see `sink`).
Bytes: see `grouped`, two scales (low, step), 4 bits.
"""

from __future__ import annotations

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldwiseCodec
from kvtransfer.codecs.grouped import GroupedCoder, compact, reciprocal
from kvtransfer.codecs.split import SplitCoder

_STEPS = 15


class Int4Quantizer:
    """Quantizer of what is above."""

    bits = 4
    num_scales = 2
    keeps_sink = True

    def quantize(self, numbers: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        least, largest = numbers.amin(2, keepdim=True), numbers.amax(2, keepdim=True)
        low, step = least.to(torch.bfloat16), compact((largest - least) / _STEPS)
        steps = numbers.sub_(low.to(torch.float32)).mul_(reciprocal(step)).round_().clamp_(0, _STEPS)
        return [low, step], steps.to(torch.int8).view(torch.uint8)

    def restore(self, codes: torch.Tensor, scales: list[torch.Tensor]) -> torch.Tensor:
        low, step = scales
        return codes.to(torch.float32).mul_(step).add_(low)


class Int4Codec(FieldwiseCodec):
    """3.9 × on bf16, with errors of 5 to 10 percent."""

    def __init__(self) -> None:
        super().__init__("int4", Fidelity.COMPACT, GroupedCoder(Int4Quantizer()), SplitCoder())
