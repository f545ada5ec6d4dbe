"""Codec `split`: lossless. Exponents, which vary little, are entropy-coded; sign and mantissa, which do not
compress (7.97 of 8 bits on bf16 keys and values of real text), are stored.

Floats of bf16 and f32, mode SPLIT of `fieldwise`, body of version 1:
    u8   base: 0 one base per layer, 1 one base per layer and channel, 2 exponents as they are
    u32  number of escapes
    base 0, 1:
        stream  bases, u8 [layers] or [layers, heads · width]: the largest exponent
        stream  codes: base − exponent, ESCAPE where that is ESCAPE or more, as pairs [⌈layers · entries / 2⌉,
                heads · width] (see `nibbles`)
        stream  the exponents of the escapes, u8
    base 2:
        stream  exponents, u8 [layers · entries, heads · width]
    stream  u8 [layers · entries, heads · width]: the highest 7 bits of the mantissa, above them the sign
    f32 only: stream  u16, the same shape: the lowest 16 bits
f16 (its exponent of 5 bits does not end at a byte):
    stream  high bytes, u8;  stream  low bytes, u8

A base per channel serves keys, whose channels differ in size (0.16 bits per number); values gain nothing.
"""

from __future__ import annotations

import struct

import torch

from kvtransfer.codecs.base import Fidelity
from kvtransfer.codecs.fieldwise import FieldBox, FieldwiseCodec
from kvtransfer.codecs.nibbles import ESCAPE, Escaped, escape_positions, pack_pairs, read_pairs
from kvtransfer.codecs.parts import parts
from kvtransfer.codecs.streams import StreamReader, StreamWriter

PER_LAYER, PER_CHANNEL, NO_BASE = 0, 1, 2

_MIN_ENTRIES_PER_CHANNEL_BASE = 128  # below, the bases cost more than they save
_MAX_ESCAPES = 1 / 16  # of all numbers: above, exponents are coded as they are
_U8, _U32 = struct.Struct("<B"), struct.Struct("<I")


class SplitCoder:
    """NumberCoder of what is above. Any bit pattern comes back as it was."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        if box.dtype == torch.float16:
            halves = values.view(torch.int16)
            out.put([(halves >> 8).to(torch.uint8), halves.to(torch.uint8)], [True, False])
            return True
        bits = values.view(torch.int32 if box.dtype == torch.float32 else torch.int16)
        exponents, stored = _take_apart(bits.view(box.rows, box.columns), box)
        self._put_exponents(exponents, box, out)
        out.put(stored, [False] * len(stored))
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        if box.dtype == torch.float16:
            high, low = (streams.stream(box.numel) for _ in range(2))
            halves = high.to(torch.int16).bitwise_left_shift_(8).bitwise_or_(low)
            return halves.view(torch.float16).view(box.shape)
        exponents = self._read_exponents(streams, box).view(box.rows, box.columns)
        top = streams.stream(box.numel).view(exponents.shape)
        if box.dtype == torch.bfloat16:
            return _put_together(exponents, top, box).view(torch.bfloat16).view(box.shape)
        words = torch.empty((box.numel, 2), dtype=torch.int16)
        words[:, 0] = streams.stream(2 * box.numel).view(torch.int16)
        words[:, 1] = _put_together(exponents, top, box).view(-1)
        return words.view(torch.float32).view(box.shape)

    def _put_exponents(self, exponents: torch.Tensor, box: FieldBox, out: StreamWriter) -> None:
        """`exponents`: uint8 [rows, columns]."""
        per_channel = box.per_channel and box.entries >= _MIN_ENTRIES_PER_CHANNEL_BASE
        by_layer = exponents.view(box.layers, box.entries, box.columns)
        bases = _largest(by_layer)
        if not per_channel:
            bases = bases.amax(2, keepdim=True)
        codes = (bases - by_layer).clamp_(max=ESCAPE).view(box.rows, box.columns)
        escapes = escape_positions(codes)
        if len(escapes) > box.numel * _MAX_ESCAPES:
            out.value(_U8, NO_BASE)
            out.value(_U32, 0)
            out.put([exponents], [True])
            return
        out.value(_U8, PER_CHANNEL if per_channel else PER_LAYER)
        out.value(_U32, len(escapes))
        out.put([bases, pack_pairs(codes), exponents.view(-1)[escapes]], [True, True, True])

    def _read_exponents(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        """uint8, box.numel of them."""
        base, num_escapes = streams.value(_U8), streams.value(_U32)
        if base == NO_BASE:
            return streams.stream(box.numel)
        if base not in (PER_LAYER, PER_CHANNEL) or num_escapes > box.numel:
            raise ValueError(f"exponents with base {base} and {num_escapes} escapes are none of split")
        num_columns = box.columns if base == PER_CHANNEL else 1
        bases = streams.stream(box.layers * num_columns).view(box.layers, 1, num_columns)
        codes = read_pairs(streams, box.rows, box.columns)
        exponents = bases - codes.view(box.layers, box.entries, box.columns)
        escaped = Escaped(streams.stream(num_escapes))
        escaped.fill(exponents, codes)
        escaped.end()
        return exponents


def _largest(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 [layers, entries, columns] → [layers, 1, columns]."""
    # torch reduces int16 ten times as fast as uint8, and 32 rows at a time leave little to reduce.
    num_entries = exponents.shape[1]
    if num_entries % 32 == 0:
        halves = exponents.view(exponents.shape[0], 32, num_entries // 32, -1)
        while halves.shape[1] > 1:
            half = halves.shape[1] // 2
            halves = torch.maximum(halves[:, :half], halves[:, half:])
        exponents = halves.squeeze(1)
    return exponents.to(torch.int16).amax(1, keepdim=True).to(torch.uint8)


def _take_apart(bits: torch.Tensor, box: FieldBox) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """int16 or int32 [rows, columns] → exponents, uint8, and the planes that are stored."""
    exponents, top = (torch.empty(bits.shape, dtype=torch.uint8, device=bits.device) for _ in range(2))
    for part in parts(box, bits.device):
        halves = bits[part.rows]
        if halves.dtype == torch.int32:
            halves = (halves >> 16).to(torch.int16)
        high = halves >> 7
        exponents[part.rows] = high
        top[part.rows] = (halves & 0x7F).bitwise_or_(high.bitwise_right_shift_(1).bitwise_and_(0x80))
    if bits.dtype == torch.int32:
        return exponents, [top, bits.to(torch.int16)]
    return exponents, [top]


def _put_together(exponents: torch.Tensor, top: torch.Tensor, box: FieldBox) -> torch.Tensor:
    """The upper 16 bits of every float, int16 [rows, columns]."""
    halves = torch.empty(exponents.shape, dtype=torch.int16)
    for part in parts(box, exponents.device):
        # As a signed byte, sign and mantissa widen to the sign's bit nine times and the mantissa. Where it is set the
        # exponent must find ones to flip: it is inverted first.
        signed = top[part.rows].view(torch.int8)
        exponent = exponents[part.rows].bitwise_xor((signed >> 7).view(torch.uint8))
        torch.bitwise_xor(exponent.to(torch.int16).bitwise_left_shift_(7), signed, out=halves[part.rows])
    return halves


class SplitCodec(FieldwiseCodec):
    """Lossless; 1.5 × on bf16, 1.2 × on f32."""

    def __init__(self) -> None:
        super().__init__("split", Fidelity.EXACT, None, SplitCoder())
