"""Codec `int4`: 4-bit integers between the least and the largest number of a group of at most 64.

x ≈ low + scale · q, q in 0 … 15. Keys per channel, values per entry, as in KIVI (Liu et al., 2024). An outlier
stretches its own group only, and the first entry of a sequence travels as it is (see `sink`).

Mode OWN of `fieldwise`, body of version 3:
    where the sequence begins here: stream  the first entry's bytes
    stream  scale, f16 [layers, g, heads · width] for "channel", [layers, entries, heads, g] for others
    stream  low, f16, the same shape
    stream  q as pairs [⌈layers · entries / 2⌉, heads · width] (see `nibbles`), stored
Groups as in `grouped`.

The quick one of its class: no code is entropy-coded. zstd makes them a tenth smaller and takes longer than all the
rest; `ecsq` is the way to fewer bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldwiseCodec
from kvtransfer.codecs.grid import Grid, Sharing, extremes
from kvtransfer.codecs.grouped import Grouping
from kvtransfer.codecs.nibbles import read_packed
from kvtransfer.codecs.sink import put_sink, read_sink, restore_sink
from kvtransfer.codecs.split import SplitCoder

if TYPE_CHECKING:
    from kvtransfer.codecs.fieldwise import FieldBox
    from kvtransfer.codecs.streams import StreamReader, StreamWriter

_STEPS = 15
_SMALLEST = 2.0**-19  # of scales: float16 has five bits of it left
_LARGEST = 2.0**15  # of numbers: rounding up could make them infinite


class Int4Coder:
    """NumberCoder of what is above."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        put_sink(values, box, out)
        sharing = _sharing(box)
        least, largest = extremes(values, sharing)
        low = least.to(torch.float16)
        scale = torch.where(least == largest, 1.0, (largest - low.float()) / _STEPS).to(torch.float16)
        if not _holds(low.float(), scale.float()):
            return False
        codes = Grid(sharing, low.float(), scale.float()).nearest(values)
        out.put([scale, low, codes], [True, True, False])
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        sink = read_sink(streams, box)
        sharing = _sharing(box)
        scale, low = (
            streams.stream(2 * sharing.lines * sharing.spans)
            .view(torch.float16)
            .view(sharing.lines, -1)
            .float()
            for _ in range(2)
        )
        codes = read_packed(streams, box.rows, box.columns)
        return restore_sink(Grid(sharing, low, scale).restore(codes), sink)


def _sharing(box: FieldBox) -> Sharing:
    size = Grouping(box).size
    return Sharing(box, size, 1) if box.per_channel else Sharing(box, 1, size)


def _holds(low: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether float16 could hold low and scale of every group, and every number between."""
    return bool(
        (scale >= _SMALLEST).all() & (low.abs() + _STEPS * scale < _LARGEST).all()
    )  # false for NaN, too


class Int4Codec(FieldwiseCodec):
    """3.5 × on bf16, with errors of 5 to 10 percent."""

    def __init__(self) -> None:
        super().__init__("int4", Fidelity.COMPACT, Int4Coder(), SplitCoder(), version=3)
