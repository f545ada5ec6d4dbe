"""How a plane's entries are written down: numbers of one dtype side by side, or a record of several.

A record has its fields one after the other, as bytes. What DeepSeek-V4 keeps so: 448 numbers in FP8 with a power of two
for each 64, 64 rotated ones in bfloat16; an indexer's key in FP4 with a power of two for each 32 (arXiv:2606.19348,
section 2.3.4). V3.2 scales by float32. All of it is exact arithmetic and rounding to nearest, number by number, so that
a record is a function of its entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from engine.storage import DTYPES, is_record, plane_dtype
from kvtransfer.layouts import Field, Plane

_FP8_MOST, _FP4_MOST = 448.0, 6.0
_LEAST_SCALE = 2.0**-126
_FP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_JUST_BELOW = 1 - 2.0**-24
# Between neighbours; a tie goes to the even code, which is the upper one for every other of them.
_FP4_BOUNDS = tuple(
    (low + high) / 2 * (_JUST_BELOW if code % 2 else 1.0)
    for code, (low, high) in enumerate(pairwise(_FP4_NUMBERS))
)


class EntryFormat(Protocol):
    """Numbers float32 [..., width] to what is stored, and back."""

    def pack(self, numbers: torch.Tensor) -> torch.Tensor: ...

    def unpack(self, stored: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Plain:
    """One dtype."""

    dtype: torch.dtype

    def pack(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(self.dtype)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.float()


@dataclass(frozen=True, slots=True)
class Record:
    """Several fields, as uint8 [..., bytes]. Numbers in few bits are followed by, or end with, a field "scale"."""

    fields: tuple[Field, ...]

    def pack(self, numbers: torch.Tensor) -> torch.Tensor:
        parts: dict[str, torch.Tensor] = {}
        start = 0
        for field in self.fields:
            if field.name == "scale":
                continue
            width = _width(field)
            own = numbers[..., start : start + width]
            start += width
            if field.dtype in DTYPES:
                parts[field.name] = own.to(DTYPES[field.dtype])
            else:
                parts[field.name], parts["scale"] = _reduced(own, field, self._scales)
        raw = [parts[field.name].contiguous().view(torch.uint8) for field in self.fields]
        return torch.cat(raw, dim=-1)

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        raw = dict(
            zip(
                (field.name for field in self.fields),
                stored.split([field.num_bytes for field in self.fields], dim=-1),
                strict=True,
            )
        )
        scales = _scale_numbers(raw["scale"], self._scales)
        parts = []
        for field in self.fields:
            if field.name == "scale":
                continue
            if field.dtype in DTYPES:
                parts.append(_numbers(raw[field.name], DTYPES[field.dtype]))
            else:
                parts.append(_restored(raw[field.name], field, scales))
        return torch.cat(parts, dim=-1)

    @property
    def _scales(self) -> Field:
        return next(field for field in self.fields if field.name == "scale")


def format_of(plane: Plane) -> EntryFormat:
    """How a plane of the engine is stored."""
    return Record(plane.fields) if is_record(plane) else Plain(plane_dtype(plane))


def _width(field: Field) -> int:
    """Numbers in a field: two to a byte where it is of bytes."""
    return 2 * field.width if field.dtype == "uint8" else field.width


def _reduced(numbers: torch.Tensor, field: Field, scales: Field) -> tuple[torch.Tensor, torch.Tensor]:
    """In few bits, and the scales as they are stored."""
    groups = numbers.unflatten(-1, (scales.width, -1))
    most = _FP4_MOST if field.dtype == "uint8" else _FP8_MOST
    least = (groups.abs().amax(-1, keepdim=True) / most).clamp_(min=_LEAST_SCALE)
    if scales.dtype == "float32":
        scale, kept = least, least.squeeze(-1)
    else:
        mantissa, exponent = torch.frexp(least)
        exponent = exponent + 127 - (mantissa == 0.5).int()  # the least power of two that is not below
        scale, kept = (exponent << 23).view(torch.float32), exponent.squeeze(-1).to(torch.uint8)
    scaled = (groups / scale).flatten(-2)
    if field.dtype != "uint8":
        return scaled.to(torch.float8_e4m3fn), kept
    bounds = torch.tensor(_FP4_BOUNDS, device=numbers.device)
    codes = torch.bucketize(scaled.abs(), bounds) + 8 * (scaled < 0)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), kept


def _numbers(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes, wherever in a record they begin, as float32."""
    return raw.clone(memory_format=torch.contiguous_format).view(dtype).float()


def _scale_numbers(raw: torch.Tensor, scales: Field) -> torch.Tensor:
    if scales.dtype == "float32":
        return _numbers(raw, torch.float32)
    return (raw.int() << 23).view(torch.float32)


def _restored(raw: torch.Tensor, field: Field, scales: torch.Tensor) -> torch.Tensor:
    if field.dtype == "uint8":
        table = torch.tensor([*_FP4_NUMBERS, *(-number for number in _FP4_NUMBERS)], device=raw.device)
        codes = raw.int()
        numbers = torch.stack((table[codes & 15], table[codes >> 4]), dim=-1).flatten(-2)
    else:
        numbers = _numbers(raw, torch.float8_e4m3fn)
    return (numbers.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)
