"""Which rows of a window a step reads and writes, as index arrays, once for all layers.

A sequence's rows lie in its slot, a ring: the row of position p at p modulo the ring's length, which leaves room for
guesses that are not kept. A record is a ring of just the rows that live at a boundary. A step works on `rows`: those
that were live before it, span by span, followed by the step's own, one for each of its tokens; `locate` says where in
them a position is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.batch import Span
from kvtransfer.layouts import Plane, Window


@dataclass(frozen=True, slots=True)
class RowMoves:
    """`rows[source]` → the plane's rows `target`; int64 of one length."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class WindowStep:
    """`previous` int64 [P]: the live rows before the step, in the plane's slots. `kept`: into the slots; `recorded`:
    into records."""

    previous: torch.Tensor
    kept: RowMoves
    recorded: RowMoves
    _spans: tuple[Span, ...]
    _first_live: tuple[int, ...]
    _first_previous: tuple[int, ...]

    def locate(self, index: int, positions: np.ndarray) -> np.ndarray:
        """Where in `rows` the rows of span `index` at `positions` are, which live or are the step's."""
        span = self._spans[index]
        before = self._first_previous[index] + positions - self._first_live[index]
        own = len(self.previous) + span.first_row + positions - span.start
        return np.where(positions < span.start, before, own)

    def rows(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """stored [slots · ring, width] of a layer, new [T, width] of its dtype → [P + T, width]."""
        return torch.cat((stored.index_select(0, self.previous), new))

    def keep(self, rows: torch.Tensor, stored: torch.Tensor, records: torch.Tensor) -> None:
        """Write what lives on, from `rows`, into a layer's slots and records [records · live rows, width]."""
        stored.index_copy_(0, self.kept.target, rows.index_select(0, self.kept.source))
        if len(self.recorded.target):
            records.index_copy_(0, self.recorded.target, rows.index_select(0, self.recorded.source))


def window_step(
    plane: Plane, ring_rows: int, record_rows: int, spans: Sequence[Span], device: torch.device
) -> WindowStep:
    """For a step of `spans`. `record_rows`: live rows at a boundary, of which a record has room for."""
    assert isinstance(plane.kind, Window)
    previous: list[np.ndarray] = []
    first_live, first_previous, num_previous = [], [], 0
    for span in spans:
        live = plane.live(span.start)
        positions = np.arange(max(live.start, span.window_start), live.stop)
        previous.append(span.slot * ring_rows + positions % ring_rows)
        first_live.append(max(live.start, span.window_start))
        first_previous.append(num_previous)
        num_previous += len(positions)

    def tensor(parts: list[np.ndarray]) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.zeros(0)
        return torch.from_numpy(joined.astype(np.int64)).to(device)

    none = RowMoves(tensor([]), tensor([]))
    step = WindowStep(tensor(previous), none, none, tuple(spans), tuple(first_live), tuple(first_previous))
    kept: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    recorded: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for index, span in enumerate(spans):
        end = span.start + span.num_tokens
        last = np.arange(max(span.start, end - ring_rows), end)
        kept[0].append(step.locate(index, last))
        kept[1].append(span.slot * ring_rows + last % ring_rows)
        for boundary, record in span.records:
            at_boundary = np.asarray(plane.live(boundary))
            recorded[0].append(step.locate(index, at_boundary))
            recorded[1].append(record * record_rows + at_boundary % max(record_rows, 1))
    return WindowStep(
        step.previous,
        RowMoves(tensor(kept[0]), tensor(kept[1])),
        RowMoves(tensor(recorded[0]), tensor(recorded[1])),
        step._spans,
        step._first_live,
        step._first_previous,
    )
