"""Numbers cut into groups of at most 64 that share a scale, and codes of 8 bits for them.

Keys have outliers in fixed channels and values in single tokens (KIVI, Liu et al. 2024; KVQuant, Hooper et al.
2024), so a plane with scale_along "channel" has groups of consecutive entries of one channel of a layer, any other
plane groups of consecutive channels of one entry and head. L numbers along that axis are cut into g = ⌈L / 64⌉
groups of ⌈L / g⌉; the last one may be shorter.

Mode OWN of `fieldwise` for `int8` and `fp8`, body of version 1, n = heads · width:
    stream  scales, bf16 [layers, g, n] for "channel", [layers, entries, heads, g] for others
    stream  high halves of the codes as pairs [⌈layers · entries / 2⌉, n] (see `nibbles`)
    stream  low halves, pairs of the same shape; stored, since they do not compress
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvtransfer.codecs.nibbles import pack_pairs, read_pairs
from kvtransfer.codecs.parts import parts

if TYPE_CHECKING:
    from kvtransfer.codecs.fieldwise import FieldBox
    from kvtransfer.codecs.parts import Part
    from kvtransfer.codecs.streams import StreamReader, StreamWriter

GROUP = 64

_SMALLEST_SCALE = 2.0**-100  # a group below is zeros: the reciprocal would overflow
_LARGEST = {torch.float32: 2.0**120, torch.bfloat16: 2.0**120, torch.float16: 2.0**14}
"""Numbers from here on are left to the lossless way: rounding up could make them infinite."""


class Quantizer(Protocol):
    """What differs between the codecs. Numbers are float32 [outer, groups, size, inner], scales
    [outer, groups, 1, inner]."""

    @property
    def decodes_from(self) -> torch.dtype:
        """What codes are to `restore`."""

    def quantize(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """bfloat16 scales, and codes as uint8 like `numbers`, which may be overwritten."""

    def restore(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Numbers from codes, which may be overwritten, and float32 scales."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """How the numbers of a field are grouped. `multiple`: of which the size of a group is one."""

    box: FieldBox
    multiple: int = 1

    @property
    def length(self) -> int:
        return self.box.entries if self.box.per_channel else self.box.width

    @property
    def groups(self) -> int:
        return -(-self.length // GROUP)

    @property
    def size(self) -> int:
        return -(-self.length // (self.groups * self.multiple)) * self.multiple

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """[layers, groups, columns] or [rows, heads, groups]."""
        box = self.box
        if box.per_channel:
            return box.layers, self.groups, box.columns
        return box.rows, box.heads, self.groups

    def part_of_scales(self, part: Part) -> tuple[slice, slice]:
        """Where a part's scales are in a tensor of `scales_shape`."""
        if not self.box.per_channel:
            return part.rows, slice(None)
        return part.layers, slice(part.entries.start // self.size, -(-part.entries.stop // self.size))

    def cut(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Numbers [layers, entries, heads, width] of a part → [outer, groups, size, inner] of `dtype`, in memory of
        their own; the last number fills up the last group."""
        outer, groups, inner = self.shape_of(part)
        flat = part.reshape(outer, -1, inner)
        length, padded = flat.shape[1], groups * self.size
        if padded == length:
            whole = flat.to(dtype, copy=True)
        else:
            whole = flat.new_empty((outer, padded, inner), dtype=dtype)
            whole[:, :length] = flat
            whole[:, length:] = flat[:, -1:]
        return whole.view(outer, groups, self.size, inner)

    def shape_of(self, part: torch.Tensor) -> tuple[int, int, int]:
        """(outer, groups, inner) of what `cut` makes of a part."""
        num_layers, num_entries, num_heads, width = part.shape
        if self.box.per_channel:
            return num_layers, -(-num_entries // self.size), num_heads * width
        return num_layers * num_entries * num_heads, -(-width // self.size), 1

    def trim(self, grouped: torch.Tensor, part: Part) -> torch.Tensor:
        """[outer, groups, size, inner] of a part → [layers, entries, heads, width]."""
        box, num_layers = self.box, part.layers.stop - part.layers.start
        num_entries = part.entries.stop - part.entries.start
        flat = grouped.flatten(1, 2)[:, : num_entries if box.per_channel else box.width]
        return flat.reshape(num_layers, num_entries, box.heads, box.width)


class GroupedCoder:
    """NumberCoder made of a Quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer

    def encode(self, values: torch.Tensor, box: FieldBox, out: StreamWriter) -> bool:
        grouping = Grouping(box)
        codes = torch.empty(box.shape, dtype=torch.uint8, device=values.device)
        scales = torch.empty(grouping.scales_shape, dtype=torch.bfloat16, device=values.device)
        for part in parts(box, values.device, grouping.size if box.per_channel else 1):
            numbers = grouping.cut(values[part.layers, part.entries], torch.float32)
            found, steps = self._quantizer.quantize(numbers)
            codes[part.layers, part.entries] = grouping.trim(steps, part)
            target = scales[grouping.part_of_scales(part)]
            target.copy_(found.view(target.shape))
        if not bool(scales.abs().amax().float() * 256 < _LARGEST[box.dtype]):  # false for NaN, too
            return False
        rows = codes.view(box.rows, box.columns)
        out.put([scales, pack_pairs(rows >> 4), pack_pairs(rows & 15)], [True, True, False])
        return True

    def decode(self, streams: StreamReader, box: FieldBox) -> torch.Tensor:
        grouping, dtype = Grouping(box), self._quantizer.decodes_from
        num_scales = grouping.scales_shape[0] * grouping.scales_shape[1] * grouping.scales_shape[2]
        scales = streams.stream(2 * num_scales).view(torch.bfloat16).view(grouping.scales_shape)
        high, low = (read_pairs(streams, box.rows, box.columns) for _ in range(2))
        codes = torch.add(low, high, alpha=16).view(box.shape)
        values = torch.empty(box.shape, dtype=box.dtype)
        for part in parts(box, codes.device, grouping.size if box.per_channel else 1):
            grouped = grouping.cut(codes[part.layers, part.entries], dtype)
            shape = (grouped.shape[0], grouped.shape[1], 1, grouped.shape[3])
            scale = scales[grouping.part_of_scales(part)].float().reshape(shape)
            values[part.layers, part.entries] = grouping.trim(self._quantizer.restore(grouped, scale), part)
        return values


def compact(scale: torch.Tensor) -> torch.Tensor:
    """A scale as it travels: bfloat16, 0 where the group is as good as zeros."""
    return torch.where(scale < _SMALLEST_SCALE, 0.0, scale).to(torch.bfloat16)


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """Float32; 0 for a scale of 0."""
    wide = scale.to(torch.float32)
    return torch.where(wide == 0, 0.0, wide.reciprocal())
