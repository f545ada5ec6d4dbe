"""Many tokens into one entry (arXiv:2606.19348, sections 2.3.1 and 2.3.2).

Each token gives a value and a gate; an entry is the sum of its tokens' values, weighted channel by channel by the
softmax of their gates. An entry of CSA takes the second half of its own tokens' channels and the first half of those
of the entry before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention import MASKED, exp_
from engine.entry_format import EntryFormat
from engine.layers import RMSNorm
from engine.linear import Product
from engine.models.deepseek.rotation import Angles
from engine.models.deepseek.step import CompletedEntries
from engine.whole_vectors import in_whole_vectors, sum_in_order
from engine.window_step import WindowStep


@dataclass(frozen=True, slots=True)
class TailMemory:
    """A layer's uncompressed rows, in slots and in records: [·, 2 · channels] float32, kv and gate."""

    slots: torch.Tensor
    records: torch.Tensor


class Compressor:
    """`project`: hidden → kv and gate, [T, 2 · channels]; `bias` [tokens, channels] is added to the gates of an
    entry's own tokens, by their place in it."""

    def __init__(self, project: Product, bias: torch.Tensor, norm: RMSNorm) -> None:
        self._project = project
        self._bias = bias
        self._norm = norm

    def __call__(
        self,
        x: torch.Tensor,
        window: WindowStep,
        completed: CompletedEntries | None,
        angles: Angles | None,
        tail: TailMemory,
        entries: torch.Tensor,
        entry_format: EntryFormat,
    ) -> None:
        """Write the entries that x [T, hidden] completes into `entries` [slots, width], turned by their positions'
        `angles`, in their format, and what is left into `tail`."""
        rows = window.rows(tail.slots, self._project(x))
        window.keep(rows, tail.slots, tail.records)
        if completed is None:
            return
        assert angles is not None
        compressed = self._norm(self._sum(rows[completed.rows], completed.missing))
        turned = angles.turn_pairs(compressed.unsqueeze(1)).squeeze(1)
        entries.index_copy_(0, completed.slots, entry_format.pack(turned))

    def _sum(self, tokens: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
        """tokens [E, tokens, 2 · channels] → [E, width]."""
        values, gates = tokens.chunk(2, dim=-1)
        own = len(self._bias)
        overlap = values.shape[1] - own
        if overlap:
            gates = gates + torch.cat((self._bias[own - overlap :], self._bias))
            values, gates = _halves(values, overlap), _halves(gates, overlap)
        else:
            gates = gates + self._bias
        gates = gates.masked_fill(missing.unsqueeze(-1), MASKED)
        weights = in_whole_vectors(exp_, (gates - gates.amax(dim=1, keepdim=True)).contiguous())
        return sum_in_order(weights * values, 1) / sum_in_order(weights, 1)


def _halves(rows: torch.Tensor, overlap: int) -> torch.Tensor:
    """The first half of the channels of the tokens before, the second of an entry's own."""
    width = rows.shape[-1] // 2
    return torch.cat((rows[:, :overlap, :width], rows[:, overlap:, width:]), dim=1)
