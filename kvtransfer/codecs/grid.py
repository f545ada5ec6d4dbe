"""Numbers as places on a grid of evenly spaced steps, with codes of 4 bits; what `ecsq` and `int4` have in common.

    x ≈ low + step · code

Codes are pairs along the entries (see `nibbles`): uint8 [⌈layers · entries / 2⌉, heads · width]. In host memory loops
of `loops` do the work; on an accelerator tensor operations, whose codes may differ by one where a number lies
halfway between two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvtransfer.codecs import loops
from kvtransfer.codecs.loops import count_escapes, float_bits
from kvtransfer.codecs.nibbles import ESCAPE, escape_positions, pack_pairs

if TYPE_CHECKING:
    from kvtransfer.codecs.fieldwise import FieldBox
    from kvtransfer.compiled import Array

FAR = loops.FAR
_FLOAT16_RANGE = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which numbers of a field share a step: those of `line_entries` entries of one layer and `span_columns` channels
    of one head; less at the end of a layer or head."""

    box: FieldBox
    line_entries: int
    span_columns: int

    @property
    def lines(self) -> int:
        return self.box.layers * -(-self.box.entries // self.line_entries)

    @property
    def spans(self) -> int:
        return self.box.heads * -(-self.box.width // self.span_columns)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As the loops take it. A sink is coded as if it were the entry behind it, so that it enters into no scale."""
        return self.box.layers, self.box.entries, self.line_entries, int(self.box.has_sink)

    def ends(self) -> Array:
        """The column behind each span."""
        in_head = np.minimum(
            np.arange(1, self.spans // self.box.heads + 1) * self.span_columns, self.box.width
        )
        return (np.arange(self.box.heads)[:, None] * self.box.width + in_head).reshape(-1)

    def spread(self, shared: torch.Tensor) -> torch.Tensor:
        """[lines, spans] → one for each number, [layers · entries, columns]."""
        box, widths = self.box, np.diff(self.ends(), prepend=0)
        columns = shared.repeat_interleave(torch.from_numpy(widths).to(shared.device), dim=1)
        rows = columns.view(box.layers, -1, box.columns).repeat_interleave(self.line_entries, dim=1)
        return rows[:, : box.entries].reshape(box.rows, box.columns)


@dataclass(frozen=True, slots=True)
class Grid:
    """low and step: float32 [lines, spans] of `sharing`, on the numbers' device."""

    sharing: Sharing
    low: torch.Tensor
    step: torch.Tensor

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """The nearest of 16 codes each."""
        if values.device.type != "cpu":
            return nearest_anywhere(self, values)
        pairs = _empty_pairs(self.sharing.box)
        loops.place_nearest(*self._placing(values), pairs)
        return torch.from_numpy(pairs)

    def or_escapes(self, values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes 0 … 14, or ESCAPE; the places of those, int32, FAR where they cannot be counted. None where they are
        more than `most`."""
        if values.device.type != "cpu":
            return or_escapes_anywhere(self, values, most)
        pairs, room = _empty_pairs(self.sharing.box), np.empty(most, np.int32)
        found = loops.place_or_escape(*self._placing(values), pairs, room)
        return None if found < 0 else (torch.from_numpy(pairs), torch.from_numpy(room[:found]))

    def restore(self, pairs: torch.Tensor, escaped: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers of codes in host memory: [layers, entries, heads, width] of the field's dtype. `escaped`: int32, the
        places of all escapes; without, 15 is a code as others are. Raises ValueError where it has too few or too many.
        """
        box = self.sharing.box
        places = np.empty(0, np.int32)
        if escaped is not None:
            places, expected = escaped.numpy(), count_escapes(pairs.numpy(), box.rows)
            if len(places) != expected:
                raise ValueError(f"{len(places)} numbers for {expected} escapes")
        values = torch.empty(box.shape, dtype=torch.float32 if box.dtype == torch.float16 else box.dtype)
        loops.restore(
            pairs.numpy(),
            self.sharing.shape,
            self.low.numpy(),
            self.step.numpy(),
            self.sharing.ends(),
            places,
            _rows(values, box),
        )
        # Only float16 ends below what steps can reach.
        return values.clamp_(*_FLOAT16_RANGE).to(box.dtype) if box.dtype == torch.float16 else values

    def _placing(self, values: torch.Tensor) -> tuple[Array, tuple[int, int, int, int], Array, Array, Array]:
        """What both loops begin with."""
        sharing, per_step = self.sharing, self.step.reciprocal()
        return _rows(values, sharing.box), sharing.shape, self.low.numpy(), per_step.numpy(), sharing.ends()


def nearest_anywhere(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """Grid.nearest on any device."""
    return pack_pairs(_places(grid, values).clamp_(0, 15).to(torch.uint8))


def or_escapes_anywhere(
    grid: Grid, values: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Grid.or_escapes on any device."""
    places = _places(grid, values)
    codes = torch.where((places >= 0) & (places < ESCAPE), places, ESCAPE).to(torch.uint8)
    escaped = places.view(-1)[escape_positions(codes)]
    escaped = torch.where(escaped.abs() < FAR, escaped, FAR).to(torch.int32)
    return None if len(escaped) > most else (pack_pairs(codes), escaped)


def _places(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """Whole numbers in float32, [layers · entries, columns]."""
    sharing = grid.sharing
    numbers = _without_sink(values, sharing.box).view(sharing.box.rows, -1) - sharing.spread(grid.low)
    return numbers.mul_(sharing.spread(grid.step.reciprocal())).add_(0.5).floor_()


def norms(values: torch.Tensor, box: FieldBox) -> torch.Tensor:
    """Euclidean norms of every entry and head: float32 [layers, entries, heads]. A sink has that of the next entry."""
    if values.device.type == "cpu":
        norm = torch.empty(box.shape[:3])
        loops.norms(_rows(values, box), box.width, norm.view(box.rows, -1).numpy())
    else:
        norm = torch.linalg.vector_norm(values.float(), dim=-1)
    if box.has_sink:
        norm[:, 0] = norm[:, 1]
    return norm


def extremes(values: torch.Tensor, sharing: Sharing) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest of each that share a step, float32 [lines, spans]; not finite where numbers are not."""
    if values.device.type != "cpu":
        return extremes_anywhere(values, sharing)
    least, largest = (np.empty((sharing.lines, sharing.spans), np.float32) for _ in range(2))
    loops.extremes(_rows(values, sharing.box), sharing.shape, sharing.ends(), least, largest)
    return torch.from_numpy(least), torch.from_numpy(largest)


def extremes_anywhere(values: torch.Tensor, sharing: Sharing) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any device."""
    numbers, num_shared = _without_sink(values, sharing.box).view(-1), sharing.lines * sharing.spans
    numbered = torch.arange(num_shared, device=values.device).view(sharing.lines, sharing.spans)
    which = sharing.spread(numbered).view(-1)
    least, largest = (
        numbers.new_empty(num_shared)
        .scatter_reduce_(0, which, numbers, how, include_self=False)
        .view(sharing.lines, sharing.spans)
        for how in ("amin", "amax")
    )
    return least, largest


def _without_sink(values: torch.Tensor, box: FieldBox) -> torch.Tensor:
    """float32, in memory of its own."""
    numbers = values.to(torch.float32, copy=True)
    if box.has_sink:
        numbers[:, 0] = numbers[:, 1]
    return numbers


def _empty_pairs(box: FieldBox) -> Array:
    return np.empty((-(-box.rows // 2), box.columns), np.uint8)


def _rows(values: torch.Tensor, box: FieldBox) -> Array:
    numbers = values.float() if values.dtype == torch.float16 else values
    return float_bits(numbers.view(box.rows, box.columns))
