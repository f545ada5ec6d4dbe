"""Codec `ecsq`: entropy-coded scalar quantization. Steps of one size, as many as a number takes, and Huffman codes.

A 4-bit code of fixed range (`int4`) makes the steps as wide as its group's largest number demands. With an entropy
coder behind it the range is free: the step follows from how much the numbers vary, rare numbers take long codes,
and no group of 64 pays for scales. That is the classical result on quantization at high rate (Gish and Pierce,
1968). docs/codecs.md has what it gives here.

    x ≈ step · (q + offset)

"channel" planes (keys): one step and one offset for a channel of a layer over the piece's entries, step = 0.3 ·
√(σ · σ_head) from the channel's deviation and the head's (root mean square of its channels'), offset =
round(mean / step).
"token" planes (values): one step for an entry and head, 0.5 · rms^1.25 · m^−0.25, m the geometric mean of the rms of
the same head's entries; no offset. Entries of small values are those that attract attention, so their steps
are smaller still than their size alone would have them. Deviations and m come from about 64 entries of the piece,
evenly chosen. Steps are powers of two to a quarter: 2^((k − 128) / 4), k a byte; numbers below 2^-33 are zeros. What
would leave the range of float16 becomes its largest number.

Mode OWN of `fieldwise`, body of version 1, n = heads · width:
    stream  the first entry's bytes (see `sink`)
    stream  k, u8: [layers, n] for "channel", [layers, entries, heads] for "token"
    "channel" only: stream  offset, i16 [layers, n]
    u32     number of escapes
    stream  q + 7 where that is in 0 … 14, else ESCAPE, as pairs [⌈layers · entries / 2⌉, n] (see `nibbles`)
    stream  q of the escapes, i16
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldBox, FieldwiseCodec
from kvtransfer.codecs.grid import Grid, Sharing, norms
from kvtransfer.codecs.nibbles import read_packed
from kvtransfer.codecs.sink import put_sink, read_sink, restore_sink
from kvtransfer.codecs.split import SplitCoder
from kvtransfer.codecs.streams import StreamReader, StreamWriter

_CHANNEL_STEP = 0.3  # of the deviation
_TOKEN_STEP = 0.5  # of the root mean square
_TOKEN_POWER = 1.25
_SAMPLED_ENTRIES = 64
_ZERO = 7
_MOST_STEPS = 30_000  # q and offset travel as int16
_K_ZERO, _K_PER_OCTAVE, _K_MAX = 128, 4, 255
_ESCAPES_PER_NUMBER = 1 / 16  # beyond, the numbers are not what this codec is for
_LEAST_NORM = 2.0**-60
_U32 = struct.Struct("<I")


class _Steps(NamedTuple):
    """What is sent of a grid. k: uint8 [lines, spans]; offset: int16 like it, or None."""

    sharing: Sharing
    k: torch.Tensor
    offset: torch.Tensor | None

    def grid(self) -> Grid:
        step = _step(self.k)
        offset = -_ZERO if self.offset is None else self.offset.float() - _ZERO
        return Grid(self.sharing, offset * step, step)


class EcsqCoder:
    """NumberCoder of what is above."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        put_sink(values, box, out)
        steps = _channel_steps(values, box) if box.per_channel else _token_steps(values, box)
        placed = steps and steps.grid().or_escapes(values, most=int(box.numel * _ESCAPES_PER_NUMBER))
        if not steps or not placed:
            return False
        pairs, escaped = placed
        escaped = escaped - _ZERO
        if not bool((escaped.abs() <= _MOST_STEPS).all()):
            return False
        side = [steps.k] if steps.offset is None else [steps.k, steps.offset]
        out.put(side, [True] * len(side))
        out.value(_U32, len(escaped))
        out.put([pairs, escaped.to(torch.int16)], [True, True])
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        sink = read_sink(streams, box)
        sharing = _sharing(box)
        k = streams.stream(sharing.lines * sharing.spans).view(sharing.lines, sharing.spans)
        offset = streams.stream(2 * k.numel()).view(torch.int16).view(k.shape) if box.per_channel else None
        num_escapes = streams.value(_U32)
        if num_escapes > box.numel:
            raise ValueError(f"{num_escapes} escapes among {box.numel} numbers")
        pairs = read_packed(streams, box.rows, box.columns)
        escaped = streams.stream(2 * num_escapes).view(torch.int16).to(torch.int32) + _ZERO
        return restore_sink(_Steps(sharing, k, offset).grid().restore(pairs, escaped), sink)


def _sharing(box: FieldBox) -> Sharing:
    return Sharing(box, box.entries, 1) if box.per_channel else Sharing(box, 1, box.width)


def _channel_steps(values: torch.Tensor, box: FieldBox) -> _Steps | None:
    """None where numbers are not finite or too large; other entries than the sample show in their codes."""
    sample = _sampled(values, box).to(torch.float32, copy=True)
    mean = sample.mean(1, keepdim=True)
    deviation = sample.sub_(mean).square_().mean(1, keepdim=True).sqrt_()
    # Never so small that the offset overflows, or that a channel which hardly moves takes all the bits.
    deviation = torch.maximum(deviation, mean.abs() / 1024)
    of_head = deviation.square().mean(-1, keepdim=True).sqrt_()
    step = (torch.maximum(deviation, of_head / 64) * of_head).sqrt_().mul_(_CHANNEL_STEP)
    k = step.log2_().mul_(_K_PER_OCTAVE).round_().add_(_K_ZERO).clamp_(min=0)
    if not bool(k.amax() <= _K_MAX):  # false for NaN, too
        return None
    offset = (mean / _step(k)).round_()
    if not bool((offset.abs() <= _MOST_STEPS).all()):
        return None
    shape = (box.layers, box.columns)
    return _Steps(_sharing(box), k.to(torch.uint8).view(shape), offset.to(torch.int16).view(shape))


def _token_steps(values: torch.Tensor, box: FieldBox) -> _Steps | None:
    """As above."""
    # k = 128 + 4 · log2(0.5 · rms^1.25 · m^-0.25), as a factor of log2 of the norm and a summand.
    norm = norms(values, box)
    typical = _sampled(norm, box).clamp(min=_LEAST_NORM).log2_().mean(1, keepdim=True)
    constant = math.log2(_TOKEN_STEP) - math.log2(box.width) / 2
    summand = typical.mul_(1 - _TOKEN_POWER).add_(constant).mul_(_K_PER_OCTAVE).add_(_K_ZERO)
    k = norm.log2_().mul_(_TOKEN_POWER * _K_PER_OCTAVE).add_(summand).round_().clamp_(min=0)
    if not bool(k.amax() <= _K_MAX):
        return None
    return _Steps(_sharing(box), k.to(torch.uint8).view(box.rows, box.heads), None)


def _sampled(values: torch.Tensor, box: FieldBox) -> torch.Tensor:
    """[layers, some entries, …] of [layers, entries, …], without a sink."""
    return values[:, int(box.has_sink) :: max(1, box.entries // _SAMPLED_ENTRIES)]


def _step(k: torch.Tensor) -> torch.Tensor:
    return ((k.to(torch.float32) - _K_ZERO) / _K_PER_OCTAVE).exp2_()


class EcsqCodec(FieldwiseCodec):
    """4.7 × on bf16, with errors of 5 to 15 percent, put where they do little to the output."""

    def __init__(self) -> None:
        super().__init__("ecsq", Fidelity.COMPACT, EcsqCoder(), SplitCoder())
