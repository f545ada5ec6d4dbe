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
from dataclasses import dataclass

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldBox, FieldwiseCodec
from kvtransfer.codecs.nibbles import ESCAPE, checked_positions, escape_positions, pack_pairs, read_pairs
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
_FLOAT16_RANGE = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)
_U32 = struct.Struct("<I")


class EcsqCoder:
    """NumberCoder of what is above."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        values = put_sink(values, box, out)
        codes = torch.empty((box.rows, box.columns), dtype=torch.uint8, device=values.device)
        grid = (_count_by_channel if box.per_channel else _count_by_token)(values, box, codes)
        if grid is None:
            return False
        escapes = escape_positions(codes)
        if len(escapes) > box.numel * _MAX_ESCAPES:
            return False
        escaped = grid.at(escapes, box).count(values.view(-1)[escapes].to(torch.float32))
        if bool((escaped.abs() > _MOST_STEPS).any()):
            return False
        side = [grid.k] if grid.offset is None else [grid.k, grid.offset.to(torch.int16)]
        out.put(side, [True] * len(side))
        out.value(_U32, len(escapes))
        out.put([pack_pairs(codes), escaped.to(torch.int16)], [True, True])
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        sink = read_sink(streams, box)
        grid = _read_grid(streams, box)
        num_escapes = streams.value(_U32)
        if num_escapes > box.numel:
            raise ValueError(f"{num_escapes} escapes among {box.numel} numbers")
        codes = read_pairs(streams, box.rows, box.columns)
        escaped = streams.stream(2 * num_escapes).view(torch.int16).float()
        values = torch.empty(box.shape, dtype=box.dtype)
        for part in parts(box, codes.device):
            target = values[part.layers, part.entries]
            counts = codes[part.rows].to(torch.float32).view(target.shape)
            target.copy_(_within(grid.part(part).restore(counts, _ZERO), box.dtype))
        escapes = checked_positions(codes, num_escapes)
        restored = grid.at(escapes, box).restore(escaped, 0)
        values.view(-1)[escapes] = _within(restored, box.dtype).to(box.dtype)
        return restore_sink(values, sink)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Step sizes, and where "channel" planes have them offsets, for numbers of the shape that they broadcast to:
    k uint8, step and offset float32, [layers, 1, heads, width], or k and step [layers, entries, heads, 1]."""

    k: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor | None

    def part(self, part: Part) -> _Grid:
        """The grid of a part."""
        if self.offset is not None:
            return _Grid(self.k[part.layers], self.step[part.layers], self.offset[part.layers])
        return _Grid(self.k[part.layers, part.entries], self.step[part.layers, part.entries], None)

    def at(self, positions: torch.Tensor, box: FieldBox) -> _Grid:
        """The grid of single numbers, at `positions` in the flattened field."""
        if self.offset is None:
            rows = positions // box.width
            return _Grid(self.k.reshape(-1)[rows], self.step.reshape(-1)[rows], None)
        channels = positions // (box.entries * box.columns) * box.columns + positions % box.columns
        k, step, offset = (each.reshape(-1)[channels] for each in (self.k, self.step, self.offset))
        return _Grid(k, step, offset)

    def count(self, numbers: torch.Tensor) -> torch.Tensor:
        """How many steps beyond the offset, in place of `numbers`, float32."""
        counts = numbers.mul_(self.step.reciprocal())
        return (counts if self.offset is None else counts.sub_(self.offset)).round_()

    def restore(self, counts: torch.Tensor, zero: int) -> torch.Tensor:
        """The numbers, in place of `counts`, float32, which say `zero` for none."""
        if self.offset is not None:
            return counts.add_(self.offset - zero).mul_(self.step)
        return (counts.sub_(zero) if zero else counts).mul_(self.step)


def _count_by_channel(values: torch.Tensor, box: FieldBox, codes: torch.Tensor) -> _Grid | None:
    """Fills `codes`. None where numbers are not finite, or too large."""
    sample = _sample(values, box)
    mean = sample.mean(1, keepdim=True)
    deviation = (sample - mean).square_().mean(1, keepdim=True).sqrt_()
    # Never so small that the offset overflows, or that a channel which hardly moves takes all the bits.
    deviation = torch.maximum(deviation, mean.abs() / 1024)
    of_head = deviation.square().mean(-1, keepdim=True).sqrt_()
    k = _nearest_k((torch.maximum(deviation, of_head / 64) * of_head).sqrt_().mul_(_CHANNEL_STEP))
    if k is None:
        return None
    step = _step(k)
    grid = _Grid(k, step, (mean / step).round_())
    if bool(mean.div_(step).abs_().amax() > _MOST_STEPS):
        return None
    total = torch.zeros((), device=values.device)
    for part in parts(box, values.device):
        counts = grid.part(part).count(values[part.layers, part.entries].to(torch.float32, copy=True))
        total += counts.sum()  # only a sample of the entries has been looked at so far
        _put_codes(counts, codes[part.rows])
    return grid if math.isfinite(float(total)) else None


def _count_by_token(values: torch.Tensor, box: FieldBox, codes: torch.Tensor) -> _Grid | None:
    """Fills `codes`. None where numbers are not finite, or too large."""
    typical = _log_rms(_sample(values, box)).mean(1, keepdim=True).mul_(1 - _TOKEN_POWER)
    typical += math.log2(_TOKEN_STEP)
    k = torch.empty((*box.shape[:3], 1), dtype=torch.uint8, device=values.device)
    step = torch.empty(k.shape, dtype=torch.float32, device=values.device)
    for part in parts(box, values.device):
        numbers = values[part.layers, part.entries].to(torch.float32, copy=True)
        size = _log_rms(numbers).mul_(_TOKEN_POWER).add_(typical[part.layers])
        found = _nearest_k(size.exp2_())
        if found is None:
            return None
        k[part.layers, part.entries] = found
        step[part.layers, part.entries] = _step(found)
        counts = _Grid(found, step[part.layers, part.entries], None).count(numbers)
        _put_codes(counts, codes[part.rows])
    return _Grid(k, step, None)


def _put_codes(counts: torch.Tensor, codes: torch.Tensor) -> None:
    """Codes of `counts`, which are overwritten."""
    small = counts.clamp_(-1 - _ZERO, ESCAPE - _ZERO).to(torch.int8).view(torch.uint8).view(codes.shape)
    # What was clamped from below becomes 255 and then, like what was clamped from above, ESCAPE.
    torch.bitwise_and(small.add_(_ZERO), ESCAPE, out=codes)


def _read_grid(streams: StreamReader, box: FieldBox) -> _Grid:
    if not box.per_channel:
        k = streams.stream(box.rows * box.heads).view(*box.shape[:3], 1)
        return _Grid(k, _step(k), None)
    shape = (box.layers, 1, box.heads, box.width)
    k = streams.stream(box.layers * box.columns).view(shape)
    offset = streams.stream(2 * box.layers * box.columns).view(torch.int16).view(shape)
    return _Grid(k, _step(k), offset.to(torch.float32))


def _sample(values: torch.Tensor, box: FieldBox) -> torch.Tensor:
    return values[:, :: max(1, box.entries // _SAMPLED_ENTRIES)].to(torch.float32)


def _log_rms(numbers: torch.Tensor) -> torch.Tensor:
    """log2 of the root mean square along the last axis, which stays with length 1."""
    norm: torch.Tensor = torch.linalg.vector_norm(numbers, dim=-1, keepdim=True)
    return norm.div_(numbers.shape[-1] ** 0.5).clamp_(min=2.0**-60).log2_()


def _nearest_k(step: torch.Tensor) -> torch.Tensor | None:
    """uint8; the least where a step is below it, None where one is beyond the largest or not finite."""
    k = step.log2_().mul_(_K_PER_OCTAVE).round_().add_(_K_ZERO)
    return k.clamp_(min=0).to(torch.uint8) if bool(k.amax() <= _K_MAX) else None


def _within(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In place. Only float16 ends below what steps can reach."""
    return numbers.clamp_(*_FLOAT16_RANGE) if dtype == torch.float16 else numbers


def _step(k: torch.Tensor) -> torch.Tensor:
    return k.to(torch.float32).sub_(_K_ZERO).div_(_K_PER_OCTAVE).exp2_()


class EcsqCodec(FieldwiseCodec):
    """4.7 × on bf16, with errors of 5 to 15 percent, put where they do little to the output."""

    def __init__(self) -> None:
        super().__init__("ecsq", Fidelity.COMPACT, EcsqCoder(), SplitCoder())
