"""Codecs that treat every field of a plane by itself: how a payload is cut into fields, for all of them.

A payload is one section per field of the plane, in the plane's order:
    u8   mode
    u32  number of bytes that follow, little endian
    …    the body
Modes:
    0  the field's bytes as they are, [layer, entry, head, field]
    1  one stream (see `streams`) of those bytes
    2  numbers as `split` codes them, without loss
    3  numbers as the codec that the frame names codes them
A field that holds no numbers to convert (fp8 and int8 records with scales of their own, say) has mode 0 or 1
under every codec. Mode 2 is also how a lossy codec passes on what it cannot hold: NaN, infinities, numbers
near the end of the dtype's range. Where nothing makes a field smaller its mode is 0, so a payload never exceeds
the raw bytes by more than 5 per field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvtransfer.codecs.memory import readable
from kvtransfer.codecs.streams import StreamReader, StreamWriter
from kvtransfer.layouts import CONVERTIBLE, Paged

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvtransfer.codecs.base import Fidelity
    from kvtransfer.layouts import Piece, Plane

VERBATIM, CODED_BYTES, SPLIT, OWN = 0, 1, 2, 3

_SECTION = struct.Struct("<BI")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class FieldBox:
    """One field of a piece whose numbers are floats: [layers, entries, heads, width] of `dtype`."""

    layers: int
    entries: int
    heads: int
    width: int
    dtype: torch.dtype
    per_channel: bool  # what shares a scale: a channel over entries, or one entry's numbers of one head
    has_sink: bool  # the first entry is the first of the sequence, and not alone

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.layers, self.entries, self.heads, self.width

    @property
    def rows(self) -> int:
        """Layers · entries: the rows of codes, of `columns` each."""
        return self.layers * self.entries

    @property
    def columns(self) -> int:
        return self.heads * self.width

    @property
    def numel(self) -> int:
        return self.rows * self.columns


class NumberCoder(Protocol):
    """One way to write the floats of a field."""

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        """`values`: [layers, entries, heads, width] of box.dtype, contiguous, on any device, not to be changed.
        False, whatever was written, where they cannot be held."""

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        """The same shape and dtype on the CPU. Raises ValueError."""


class FieldwiseCodec:
    """A codec made of one NumberCoder, and the lossless one for what that cannot hold."""

    def __init__(
        self,
        name: str,
        fidelity: Fidelity,
        own: NumberCoder | None,
        lossless: NumberCoder,
        version: int = 1,
    ) -> None:
        self.name = name
        self.version = version
        self.fidelity = fidelity
        self._coders = {SPLIT: lossless} if own is None else {OWN: own, SPLIT: lossless}

    def encode(self, raw: torch.Tensor, plane: Plane, piece: Piece) -> Buffer:
        """See Codec."""
        parts: list[Buffer] = []
        for index, data in enumerate(_columns(raw, plane)):
            mode, body = self._body(data, _box(plane, piece, index))
            parts.append(_SECTION.pack(mode, sum(len(memoryview(part)) for part in body)))
            parts += body
        return b"".join(parts)

    def decode(self, payload: Buffer, plane: Plane, piece: Piece) -> torch.Tensor:
        """See Codec."""
        reader = StreamReader(payload)
        num_records = plane.num_bytes(piece) // plane.record_bytes
        fields = []
        for index, field in enumerate(plane.fields):
            data = self._field(reader, num_records * field.num_bytes, _box(plane, piece, index))
            fields.append(data.view(num_records, field.num_bytes))
        reader.end()
        return (fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)).view(-1)

    def _body(self, data: torch.Tensor, box: FieldBox | None) -> tuple[int, list[Buffer]]:
        """The first way that holds the numbers and makes them smaller."""
        if box is None:
            out = StreamWriter()
            out.put([data], [True])
            if out.num_bytes < data.numel():
                return CODED_BYTES, out.parts
        else:
            values = _as_numbers(data, box.dtype).view(box.shape)
            for mode, coder in self._coders.items():
                out = StreamWriter()
                if coder.encode(values, box, out) and out.num_bytes < data.numel():
                    return mode, out.parts
        return VERBATIM, [data.cpu().numpy().data]

    def _field(self, reader: StreamReader, num_bytes: int, box: FieldBox | None) -> torch.Tensor:
        mode, length = _SECTION.unpack(reader.take(_SECTION.size))
        body = reader.take(length)
        if mode == VERBATIM:
            if length != num_bytes:
                raise ValueError(f"a field of {length} bytes where {num_bytes} belong")
            return readable(body)
        streams = StreamReader(body)
        if mode == CODED_BYTES and box is None:
            data = streams.stream(num_bytes)
        elif mode in self._coders and box is not None:
            data = self._coders[mode].decode(streams, box).view(-1).view(torch.uint8)
        else:
            raise ValueError(f"mode {mode} is none of {self.name} {self.version} for this field")
        streams.end()
        return data


def _as_numbers(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In place, wherever in a buffer the bytes begin."""
    return (torch.from_numpy(data.numpy()) if data.device.type == "cpu" else data).view(dtype)


def _columns(raw: torch.Tensor, plane: Plane) -> list[torch.Tensor]:
    """Each field's bytes, contiguous uint8."""
    if len(plane.fields) == 1:
        return [raw]
    records = raw.view(-1, plane.record_bytes)
    parts = torch.split(records, [field.num_bytes for field in plane.fields], dim=1)
    return [part.contiguous().view(-1) for part in parts]


def _box(plane: Plane, piece: Piece, index: int) -> FieldBox | None:
    field = plane.fields[index]
    if field.dtype not in CONVERTIBLE:
        return None
    return FieldBox(
        layers=len(piece.layers),
        entries=len(piece.entries),
        heads=len(piece.heads),
        width=field.width,
        dtype=_DTYPES[field.dtype],
        per_channel=plane.scale_along == "channel",
        has_sink=isinstance(plane.kind, Paged) and piece.entries.start == 0 and len(piece.entries) > 1,
    )
