"""Windows in memory: the last rows of every running sequence, and records of what was live at boundaries.

Whose slot is whose is the pool's business (engine/windows.py). A slot is a ring of as many rows as a window has and
some more, so that guesses that are not kept overwrite nothing that lives on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.batch import Span
from engine.cache_size import far_boundary, ring_rows, slot_bytes, window_planes
from engine.storage import plane_dtype, plane_width
from engine.window_step import WindowStep, window_step
from kvtransfer.layouts import CacheLayout, Plane


class WindowCache:
    """`slots[name]` [layers, 1, num_slots · ring, width] and `records[name]` [layers, 1, num_records · live rows,
    width] of every window plane of a layout; nothing for a layout without. `spare_rows`: most guesses of a step."""

    def __init__(
        self, layout: CacheLayout, num_slots: int, num_records: int, spare_rows: int, device: torch.device
    ) -> None:
        self._planes = window_planes(layout)
        self._device = device
        self.slot_bytes = slot_bytes(layout, spare_rows)
        self._boundary = far_boundary(layout)
        self._rings = {plane.name: ring_rows(plane, spare_rows) for plane in self._planes}
        self._live = {plane.name: len(plane.live(self._boundary)) for plane in self._planes}
        self.slots = {
            plane.name: self._room(plane, num_slots * self._rings[plane.name]) for plane in self._planes
        }
        self.records = {
            plane.name: self._room(plane, num_records * self._live[plane.name]) for plane in self._planes
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots and records."""
        tensors = (*self.slots.values(), *self.records.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def step(self, name: str, spans: Sequence[Span]) -> WindowStep:
        """What a step of `spans` reads and writes of a plane."""
        plane = next(plane for plane in self._planes if plane.name == name)
        return window_step(plane, self._rings[name], self._live[name], spans, self._device)

    def runs(self, name: str, slot: int, positions: range) -> list[tuple[slice, slice]]:
        """Some positions, counted from the first, and the consecutive rows of a slot that they lie in. Raises
        ValueError for more than a ring has."""
        ring = self._rings[name]
        if len(positions) > ring or positions.start < 0:
            raise ValueError(f"rows {positions.start} to {positions.stop} of a window of {ring}")
        runs, start = [], positions.start
        while start < positions.stop:
            stop = min(positions.stop, (start // ring + 1) * ring)
            first = slot * ring + start % ring
            part = slice(start - positions.start, stop - positions.start)
            runs.append((part, slice(first, first + stop - start)))
            start = stop
        return runs

    def restore(self, record: int, slot: int, num_tokens: int) -> None:
        """Fill a slot with what was live at `num_tokens`, from its record."""
        for plane in self._planes:
            live, ring = self._live[plane.name], self._rings[plane.name]
            positions = torch.tensor(plane.live(num_tokens), dtype=torch.int64, device=self._device)
            source, target = record * live + positions % max(live, 1), slot * ring + positions % ring
            self.slots[plane.name].index_copy_(2, target, self.records[plane.name].index_select(2, source))

    def copy(self, source: int, target: int) -> None:
        """One slot's rows into another."""
        self.put(target, self.take(source))

    def take(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of a slot's rows: by plane [layers, 1, ring, width]."""
        return {name: self._ring(name, slot).clone() for name in self.slots}

    def put(self, slot: int, taken: dict[str, torch.Tensor]) -> None:
        """Write what `take` gave."""
        for name, rows in taken.items():
            self._ring(name, slot).copy_(rows)

    def _ring(self, name: str, slot: int) -> torch.Tensor:
        rows = self._rings[name]
        return self.slots[name][:, :, slot * rows : (slot + 1) * rows]

    def _room(self, plane: Plane, num_rows: int) -> torch.Tensor:
        shape = (plane.layers, plane.heads, num_rows, plane_width(plane))
        return torch.zeros(shape, dtype=plane_dtype(plane), device=self._device)
