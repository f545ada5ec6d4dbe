"""Codec `int4`: 4-bit integers between the least and the largest number of a group of at most 64.

x ≈ low + scale · q, q in 0 … 15. Keys per channel, values per entry, as in KIVI (Liu et al., 2024). An outlier
stretches its own group only, and the first entry of a sequence travels as it is (see `sink`).

Mode OWN of `fieldwise`, body of version 2:
    where the sequence begins here: stream  the first entry's bytes
    stream  one record for each group, in the order [layer, g, channel] for "channel", [layer, entry, head, g] for
            others: size / 2 bytes of codes, two to a byte, the first in the low half; scale, f16; low, f16
Groups as in `grouped`, but of an even size. The record is that of FBGEMM's row-wise quantized embeddings (Guan et
al., 2019), whose fused kernels torch brings along: a number takes a third of the time that single operations take.

The quick one of its class: nothing is entropy-coded. zstd made the codes a tenth smaller and took as long as all the
rest, which was version 1; `ecsq` is the way to fewer bytes.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldwiseCodec
from kvtransfer.codecs.grouped import Grouping
from kvtransfer.codecs.parts import parts
from kvtransfer.codecs.sink import put_sink, read_sink, restore_sink
from kvtransfer.codecs.split import SplitCoder

if TYPE_CHECKING:
    from kvtransfer.codecs.fieldwise import FieldBox
    from kvtransfer.codecs.streams import StreamReader, StreamWriter

_STEPS = 15
_SCALES_BYTES = 4
_SMALLEST = 2.0**-19  # of scales: float16 has five bits of it left
_LARGEST = 2.0**15  # of numbers: rounding up could make them infinite


class Int4Coder:
    """NumberCoder of what is above."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        grouping = Grouping(box, multiple=2)
        values = put_sink(values, box, out)
        packed, sums = [], []
        early = box.dtype if box.per_channel else torch.float32  # half as many bytes to turn round
        for part in parts(box, values.device, grouping.size if box.per_channel else 1):
            numbers = grouping.cut(values[part.layers, part.entries], early)
            rows = swapped(numbers).view(-1, grouping.size).float()
            sums.append(rows.sum())  # the kernel would not notice NaN
            packed.append(pack_rows(rows))
        records = packed[0] if len(packed) == 1 else torch.cat(packed)
        scales = records[:, -_SCALES_BYTES:].clone().reshape(-1).view(torch.float16).view(-1, 2).float()
        if not isfinite(float(sum(sums))) or not _holds(scales):
            return False
        out.put([records], [False])
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        grouping = Grouping(box, multiple=2)
        sink = read_sink(streams, box)
        num_layers, num_middle, num_inner = grouping.scales_shape
        record_bytes = grouping.size // 2 + _SCALES_BYTES
        rows = streams.stream(num_layers * num_middle * num_inner * record_bytes).view(-1, record_bytes)
        values, start = torch.empty(box.shape, dtype=box.dtype), 0
        for part in parts(box, values.device, grouping.size if box.per_channel else 1):
            target = values[part.layers, part.entries]
            num_outer, num_groups, inner = grouping.shape_of(target)
            stop = start + num_outer * num_groups * inner
            numbers = unpack_rows(rows[start:stop]).to(box.dtype)
            by_group = numbers.view(num_outer, num_groups, inner, grouping.size)
            target.copy_(grouping.trim(swapped(by_group), part))
            start = stop
        return restore_sink(values, sink)


def swapped(numbers: torch.Tensor) -> torch.Tensor:
    """With the last two axes exchanged, contiguous."""
    if 1 in numbers.shape[2:]:
        return numbers.reshape(*numbers.shape[:2], numbers.shape[3], numbers.shape[2])
    if numbers.device.type != "cpu":
        return numbers.transpose(2, 3).contiguous()
    # numpy takes half of the time that torch takes.
    as_ints = numbers.view(torch.int16 if numbers.element_size() == 2 else torch.int32).numpy()
    return torch.from_numpy(np.ascontiguousarray(as_ints.swapaxes(2, 3))).view(numbers.dtype)


def pack_rows(rows: torch.Tensor) -> torch.Tensor:
    """float32 [n, size], finite → records, uint8 [n, size / 2 + 4]."""
    if rows.device.type == "cpu":
        packed: torch.Tensor = torch.ops.quantized.embedding_bag_4bit_prepack(rows)
        return packed
    return pack_rows_anywhere(rows)


def pack_rows_anywhere(rows: torch.Tensor) -> torch.Tensor:
    """The same by operations that every device has."""
    low = rows.amin(1, keepdim=True).to(torch.float16)
    scale = ((rows.amax(1, keepdim=True) - low.float()) / _STEPS).to(torch.float16)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = ((rows - low.float()) / scale.float()).round_().clamp_(0, _STEPS).to(torch.uint8)
    pairs = torch.add(codes[:, 0::2], codes[:, 1::2], alpha=16)
    return torch.cat([pairs, scale.view(torch.uint8), low.view(torch.uint8)], dim=1)


def unpack_rows(records: torch.Tensor) -> torch.Tensor:
    """Numbers, float32 [n, size], of records in host memory."""
    numbers: torch.Tensor = torch.ops.quantized.embedding_bag_4bit_unpack(records)
    return numbers


def _holds(scales: torch.Tensor) -> bool:
    """Whether float16 could hold scale and low of every group, [n, 2], and every number between. Equal numbers have
    scale 1, and so do those that differ by less than 2^-21: as good as equal."""
    reach = scales[:, 1].abs() + _STEPS * scales[:, 0]
    return bool((scales[:, 0] >= _SMALLEST).all() & (reach < _LARGEST).all())  # false for NaN, too


class Int4Codec(FieldwiseCodec):
    """3.5 × on bf16, with errors of 5 to 10 percent."""

    def __init__(self) -> None:
        super().__init__("int4", Fidelity.COMPACT, Int4Coder(), SplitCoder(), version=2)
