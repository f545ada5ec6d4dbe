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

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldBox, FieldwiseCodec
from kvtransfer.codecs.nibbles import ESCAPE, Escaped, escape_positions, pack_pairs, read_pairs
from kvtransfer.codecs.parts import Part, parts
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
_MAX_ESCAPES = 1 / 16  # of all numbers; beyond, the numbers are not what this codec is for
_LEAST_NORM = 2.0**-60
_FLOAT16_RANGE = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)
_U32 = struct.Struct("<I")


class EcsqCoder:
    """NumberCoder of what is above."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        values = put_sink(values, box, out)
        grid = _channel_grid(values, box) if box.per_channel else _TokenGrid(values, box)
        if grid is None:
            return False
        codes = torch.empty((box.rows, box.columns), dtype=torch.uint8, device=values.device)
        escaped = []
        for part in parts(box, values.device):
            places = grid.place(values[part.layers, part.entries].to(torch.float32, copy=True), part)
            # Not a number becomes 0 or -128 as an integer; 0, 16 and -128 all become ESCAPE.
            small = places.clamp(0, ESCAPE + 1).to(torch.int8).view(torch.uint8).view(-1, box.columns)
            torch.bitwise_and(small.sub_(1), ESCAPE, out=codes[part.rows])
            escaped.append(places.view(-1)[escape_positions(codes[part.rows])])
        counts = torch.cat(escaped).floor_().sub_(_ZERO + 1)
        few = len(counts) <= box.numel * _MAX_ESCAPES
        if not few or not grid.in_range() or not bool((counts.abs() <= _MOST_STEPS).all()):
            return False  # the last is false for NaN, too
        side = grid.streams()
        out.put(side, [True] * len(side))
        out.value(_U32, len(counts))
        out.put([pack_pairs(codes), counts.to(torch.int16)], [True, True])
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        sink = read_sink(streams, box)
        step, offset = _read_grid(streams, box)
        num_escapes = streams.value(_U32)
        if num_escapes > box.numel:
            raise ValueError(f"{num_escapes} escapes among {box.numel} numbers")
        codes = read_pairs(streams, box.rows, box.columns)
        escaped = Escaped(streams.stream(2 * num_escapes).view(torch.int16).float().add_(_ZERO))
        values = torch.empty(box.shape, dtype=box.dtype)
        for part in parts(box, codes.device):
            counts = codes[part.rows].to(torch.float32)
            escaped.fill(counts, codes[part.rows])
            target = values[part.layers, part.entries]
            numbers = counts.view(target.shape)
            if offset is None:
                numbers = numbers.sub_(_ZERO).mul_(step[part.layers, part.entries])
            else:
                steps = step[part.layers]
                numbers = torch.addcmul((offset[part.layers] - _ZERO) * steps, numbers, steps)
            target.copy_(_within(numbers, box.dtype))
        escaped.end()
        return restore_sink(values, sink)


class _ChannelGrid:
    """Steps and offsets of every layer and channel."""

    def __init__(self, k: torch.Tensor, offset: torch.Tensor) -> None:
        """Both [layers, 1, heads, width]: uint8, and whole numbers in float32."""
        self._k = k
        self._offset = offset
        self._per_step = _step(k).reciprocal_()
        self._shift = _ZERO + 1.5 - offset

    def place(self, numbers: torch.Tensor, part: Part) -> torch.Tensor:
        """Steps beyond the offset, plus 8.5: floored they are codes plus 1. `numbers` [layers, entries, heads,
        width] of a part, float32, may be overwritten."""
        return torch.addcmul(self._shift[part.layers], numbers, self._per_step[part.layers])

    def in_range(self) -> bool:
        """Whether steps and offsets can be written down."""
        return bool((self._offset.abs() <= _MOST_STEPS).all())

    def streams(self) -> list[torch.Tensor]:
        """What is sent of it."""
        return [self._k, self._offset.to(torch.int16)]


class _TokenGrid:
    """Steps of every entry and head, found as its part is placed."""

    def __init__(self, values: torch.Tensor, box: FieldBox) -> None:
        # k = 128 + 4 · log2(0.5 · rms^1.25 · m^-0.25), as a factor of log2 of the norm and a summand.
        norm: torch.Tensor = torch.linalg.vector_norm(_sample(values, box), dim=-1, keepdim=True)
        typical = norm.clamp_(min=_LEAST_NORM).log2_().mean(1, keepdim=True)
        constant = math.log2(_TOKEN_STEP) - math.log2(box.width) / 2
        self._summand = typical.mul_(1 - _TOKEN_POWER).add_(constant).mul_(_K_PER_OCTAVE).add_(_K_ZERO)
        self._k = torch.empty((*box.shape[:3], 1), dtype=torch.float32, device=values.device)

    def place(self, numbers: torch.Tensor, part: Part) -> torch.Tensor:
        """As _ChannelGrid does, without an offset."""
        norm: torch.Tensor = torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
        k = norm.log2_().mul_(_TOKEN_POWER * _K_PER_OCTAVE).add_(self._summand[part.layers])
        self._k[part.layers, part.entries] = k.round_().clamp_(min=0)
        return numbers.mul_(_step(self._k[part.layers, part.entries]).reciprocal_()).add_(_ZERO + 1.5)

    def in_range(self) -> bool:
        """Whether the steps can be written down; false for NaN, too."""
        return bool(self._k.amax() <= _K_MAX)

    def streams(self) -> list[torch.Tensor]:
        """What is sent of it."""
        return [self._k.to(torch.uint8)]


def _channel_grid(values: torch.Tensor, box: FieldBox) -> _ChannelGrid | None:
    """None where numbers are not finite or too large; other entries than the sample show in their codes."""
    sample = _sample(values, box)
    mean = sample.mean(1, keepdim=True)
    deviation = sample.sub_(mean).square_().mean(1, keepdim=True).sqrt_()
    # Never so small that the offset overflows, or that a channel which hardly moves takes all the bits.
    deviation = torch.maximum(deviation, mean.abs() / 1024)
    of_head = deviation.square().mean(-1, keepdim=True).sqrt_()
    step = (torch.maximum(deviation, of_head / 64) * of_head).sqrt_().mul_(_CHANNEL_STEP)
    k = step.log2_().mul_(_K_PER_OCTAVE).round_().add_(_K_ZERO).clamp_(min=0)
    if not bool(k.amax() <= _K_MAX):  # false for NaN, too
        return None
    return _ChannelGrid(k.to(torch.uint8), (mean / _step(k)).round_())


def _read_grid(streams: StreamReader, box: FieldBox) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Steps and offsets, float32, in shapes that broadcast to the field's."""
    if not box.per_channel:
        return _step(streams.stream(box.rows * box.heads).view(*box.shape[:3], 1)), None
    shape = (box.layers, 1, box.heads, box.width)
    step = _step(streams.stream(box.layers * box.columns).view(shape))
    return step, streams.stream(2 * box.layers * box.columns).view(torch.int16).view(shape).float()


def _sample(values: torch.Tensor, box: FieldBox) -> torch.Tensor:
    return values[:, :: max(1, box.entries // _SAMPLED_ENTRIES)].to(torch.float32, copy=True)


def _within(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In place. Only float16 ends below what steps can reach."""
    return numbers.clamp_(*_FLOAT16_RANGE) if dtype == torch.float16 else numbers


def _step(k: torch.Tensor) -> torch.Tensor:
    return ((k.to(torch.float32) - _K_ZERO) / _K_PER_OCTAVE).exp2_()


class EcsqCodec(FieldwiseCodec):
    """4.7 × on bf16, with errors of 5 to 15 percent, put where they do little to the output."""

    def __init__(self) -> None:
        super().__init__("ecsq", Fidelity.COMPACT, EcsqCoder(), SplitCoder())
