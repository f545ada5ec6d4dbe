"""The first entry of a sequence, kept apart by codecs that lose much.

The first token draws a large part of all attention (the attention sink; Xiao et al., 2023), its keys are outliers
and its values tiny. An error in it is an error in every answer: kept exact, it halves the KL divergence that 4-bit
keys cause (KVQuant, Hooper et al. 2024, keeps it too). It is 1 entry in 1,000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvtransfer.codecs.fieldwise import FieldBox
    from kvtransfer.codecs.streams import StreamReader, StreamWriter


def put_sink(values: torch.Tensor, box: FieldBox, out: StreamWriter) -> None:
    """Writes the first entry, if it is the sequence's, as a stream of its own."""
    if box.has_sink:
        out.put([values[:, 0]], [False])


def read_sink(streams: StreamReader, box: FieldBox) -> torch.Tensor | None:
    """What `put_sink` wrote: [layers, heads, width], or None where this piece has none."""
    if not box.has_sink:
        return None
    num_numbers = box.layers * box.columns
    data = streams.stream(num_numbers * box.dtype.itemsize)
    return data.clone().view(box.dtype).view(box.layers, box.heads, box.width)


def restore_sink(values: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Puts it back into decoded `values` [layers, entries, heads, width], in place."""
    if sink is not None:
        values[:, 0] = sink
    return values
